"""Measures a model's predictions: perplexity of a text, and distance from a reference's distributions.

A text is split into windows of equal length; each is predicted from a context with only the begin token, so every token of the
text is predicted exactly once. Results for different window lengths are not comparable.

Two models are run one after the other, because each may need all memory; the reference's logits are kept on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from localrun.disk_space import check_free
from localrun.engine.engine import Engine
from localrun.engine.session import Session
from localrun.errors import FormatError, UsageError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(slots=True)
class Scores:
    """Sums over predicted tokens.

    Attributes:
        nll: negative log-likelihood of the text, nats.
        reference_nll: the same of the reference.
        kls: KL(reference || model) of each token, nats.
        n_same: positions with the reference's most likely token.
    """

    n_tokens: int = 0
    n_windows: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kls: list[float] = field(default_factory=list)
    n_same: int = 0
    has_reference: bool = False

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.n_tokens)

    @property
    def comparison(self) -> Comparison | None:
        """Against the reference; None without one."""
        if not self.has_reference:
            return None
        kls = np.array(self.kls)
        return Comparison(
            reference_perplexity=math.exp(self.reference_nll / self.n_tokens),
            kl_mean=float(kls.mean()),
            kl_median=float(np.median(kls)),
            kl_p99=float(np.quantile(kls, 0.99)),
            kl_max=float(kls.max()),
            top1_agreement=self.n_same / self.n_tokens,
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a model's distributions are from a reference's: KL(reference || model) in nats over tokens."""

    reference_perplexity: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float


def evaluate_text(
    engine: Engine,
    text: str,
    *,
    window: int,
    max_tokens: int = 0,
    save_folder: Path | None = None,
    reference_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Runs `evaluate` on a text in its own session; `window` is limited to the context, `max_tokens` 0 means the whole text.

    Raises:
        UsageError: the text is empty, or the model has no begin token.
        DiskSpaceError: no room for the logits in `save_folder`.
        FormatError: as `evaluate`.
    """
    tokens = engine.tokenizer.encode(text)
    tokens = tokens[:max_tokens] if max_tokens else tokens
    begin = engine.vocab.begin
    if begin is None:
        raise UsageError("the model has no begin token")
    if save_folder is not None:
        _check_space(save_folder, len(tokens), engine.facts.n_vocab)
    with engine.session(all_logits=True) as session:
        return evaluate(
            session,
            tokens,
            begin,
            window=min(window, session.n_ctx),
            save_folder=save_folder,
            reference_folder=reference_folder,
            progress=progress,
        )


def _check_space(folder: Path, n_tokens: int, n_vocab: int) -> None:
    check_free(
        folder,
        4 * n_tokens * n_vocab,
        what=f"a reference of {n_tokens} tokens",
        otherwise="compare fewer tokens (`eval` has --max-tokens), or set another LOCALRUN_CACHE_DIR",
    )


def windows(tokens: Sequence[int], window: int) -> Iterator[Sequence[int]]:
    """Consecutive pieces of `window` tokens, the last one shorter."""
    for start in range(0, len(tokens), window):
        yield tokens[start : start + window]


def evaluate(
    session: Session,
    tokens: Sequence[int],
    begin: int,
    *,
    window: int,
    save_folder: Path | None = None,
    reference_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores `tokens`; the session is empty afterwards.

    Args:
        session: one with all logits.
        begin: id of the begin token.
        save_folder: receives one `window_N.npy` per window: logits, float32 (T, n_vocab), and their tokens.
        reference_folder: another model's `save_folder`, for the same tokens and window length.
        progress: called at the start and after each window with (tokens done, tokens in all).

    Raises:
        UsageError: no tokens, or a window that the context can't hold.
        FormatError: the reference saw other tokens, windows or another vocabulary.
    """
    if not tokens:
        raise UsageError("the text is empty")
    if not 1 <= window <= session.n_ctx:
        raise UsageError(f"a window of {window} tokens does not fit into the context of {session.n_ctx}")
    scores = Scores(has_reference=reference_folder is not None)
    if progress is not None:
        progress(0, len(tokens))
    for number, piece in enumerate(windows(tokens, window)):
        session.reset()
        targets = np.asarray(piece)
        reference = _read(reference_folder, number, targets) if reference_folder else None
        saved = _Saved(save_folder, number, targets) if save_folder else None
        at = 0
        # The last token is predicted and never fed. A batch's logits at a time: with 129,280 tokens of vocabulary a window's
        # would take gigabytes.
        for logits in session.feed_all_logits([begin, *piece[:-1]]):
            rows = slice(at, at + len(logits))
            if reference is not None and reference.shape != (len(piece), logits.shape[1]):
                raise FormatError(
                    f"the reference's logits are {reference.shape}, the model's {(len(piece), logits.shape[1])}: "
                    "not the same vocabulary"
                )
            add_rows(scores, logits, targets[rows], None if reference is None else reference[rows])
            if saved is not None:
                saved.write(rows, logits)
            at += len(logits)
        scores.n_windows += 1
        if progress is not None:
            progress(scores.n_tokens, len(tokens))
    session.reset()
    return scores


def add_rows(scores: Scores, logits: F32, targets: npt.NDArray[np.int64], reference: F32 | None) -> None:
    """Adds logits (T, V), the T tokens they should have predicted, the reference's logits (T, V)."""
    for row, target in enumerate(targets):  # row by row: a batch in float64 would take gigabytes
        q = log_softmax(logits[row])
        scores.nll -= float(q[target])
        if reference is not None:
            p = log_softmax(reference[row])
            scores.reference_nll -= float(p[target])
            scores.kls.append(float((np.exp(p) * (p - q)).sum()))
            scores.n_same += int(p.argmax() == q.argmax())
    scores.n_tokens += len(targets)


class _Saved:
    """One window's logits on the disk, for another model's run; written batch by batch."""

    def __init__(self, folder: Path, number: int, targets: npt.NDArray[np.int64]) -> None:
        self._path, self._n_rows = folder / f"window_{number}.npy", len(targets)
        self._rows: npt.NDArray[np.float32] | None = None
        np.save(folder / f"tokens_{number}.npy", targets)

    def write(self, rows: slice, logits: F32) -> None:
        if self._rows is None:
            shape = (self._n_rows, logits.shape[1])
            self._rows = np.lib.format.open_memmap(self._path, mode="w+", dtype=np.float32, shape=shape)
        self._rows[rows] = logits


def log_softmax(logits: F32) -> F64:
    """Log-probabilities (V,) in float64."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= math.log(np.exp(x).sum())
    return x


def _read(folder: Path, number: int, targets: npt.NDArray[np.int64]) -> F32:
    try:
        tokens = np.load(folder / f"tokens_{number}.npy", allow_pickle=False)
        logits: F32 = np.load(folder / f"window_{number}.npy", mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FormatError(f"{folder}: the reference has no window {number}: not the same text or tokenizer") from None
    if not np.array_equal(tokens, targets):
        raise FormatError(f"{folder}: the reference tokenized window {number} differently: not the same tokenizer")
    return logits
