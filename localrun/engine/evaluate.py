"""How good a model's predictions are: perplexity of a text, and distance from a reference's distributions.

A text is cut into windows of equal length; each is predicted from an empty context that holds the begin token only, so every
token of the text is predicted exactly once. Figures of different window lengths can't be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from localrun.engine.session import Session
from localrun.errors import FormatError, UsageError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(slots=True)
class Scores:
    """Sums over predicted tokens.

    Attributes:
        nll: negative log-likelihood of the text, nats.
        kl: KL(reference || model), nats.
        n_same: positions with the reference's most likely token.
    """

    n_tokens: int = 0
    n_windows: int = 0
    nll: float = 0.0
    kl: float = 0.0
    kl_max: float = 0.0
    n_same: int = 0
    has_reference: bool = False

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.n_tokens)


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
        save_folder: gets one `window_N.npy` per window: logits, float32 (T, n_vocab), and their tokens.
        reference_folder: what another model's run saved for the same tokens and window length.

    Raises:
        UsageError: no tokens, or a window that the context can't hold.
        FormatError: the reference saw other tokens, windows or another vocabulary.
    """
    if not tokens:
        raise UsageError("the text is empty")
    if not 1 <= window <= session.n_ctx:
        raise UsageError(f"a window of {window} tokens does not fit the context of {session.n_ctx}")
    scores = Scores(has_reference=reference_folder is not None)
    for number, piece in enumerate(windows(tokens, window)):
        session.reset()
        # The last token is predicted and never fed.
        logits = np.concatenate(list(session.feed_all_logits([begin, *piece[:-1]])))  # (T, V)
        targets = np.asarray(piece)
        add_window(scores, logits, targets, _read(reference_folder, number, targets) if reference_folder else None)
        if save_folder is not None:
            np.save(save_folder / f"window_{number}.npy", logits)
            np.save(save_folder / f"tokens_{number}.npy", targets)
        if progress is not None:
            progress(scores.n_tokens, len(tokens))
    session.reset()
    return scores


def add_window(scores: Scores, logits: F32, targets: npt.NDArray[np.int64], reference: F32 | None) -> None:
    """Adds one window: logits (T, V), the T tokens they should have predicted, the reference's logits (T, V)."""
    if reference is not None and reference.shape != logits.shape:
        raise FormatError(
            f"the reference's logits are {reference.shape}, the model's {logits.shape}: not the same vocabulary"
        )
    for row, target in enumerate(targets):  # row by row: a window in float64 would take gigabytes
        q = log_softmax(logits[row])
        scores.nll -= float(q[target])
        if reference is not None:
            p = log_softmax(reference[row])
            kl = float((np.exp(p) * (p - q)).sum())
            scores.kl += kl
            scores.kl_max = max(scores.kl_max, kl)
            scores.n_same += int(p.argmax() == q.argmax())
    scores.n_tokens += len(targets)
    scores.n_windows += 1


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
