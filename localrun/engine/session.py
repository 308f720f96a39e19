"""One timeline of tokens: the KV cache's contents, the logits after them, and answers generated from there.

llama.cpp can't truncate a deepseek4 sequence at an arbitrary position, so a session can only grow, be cleared, or be restored
from a saved state (`snapshots.py`). The session only knows ids: `tokenizer.py` and `engine/chat/format.py` handle text, roles
and messages.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from localrun.engine import states
from localrun.engine.facts import FinishReason, Timings
from localrun.engine.llama import DECODE_ABORTED, DECODE_NO_SLOT, Context
from localrun.engine.options import SamplingOptions
from localrun.engine.sampling import Sampler
from localrun.engine.snapshots import SnapshotStore, State
from localrun.engine.steering import Steering, log_probabilities, most_likely
from localrun.errors import (
    ContextFullError,
    DecodeError,
    FormatError,
    LocalrunError,
    StoppedError,
    UsageError,
)

if TYPE_CHECKING:
    from localrun.engine.engine import Engine

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (tokens in the context, tokens wanted): once the reused tokens are known, and after each batch."""

STOP_PATIENCE_S = 0.3
"""A stop lets a running step of one token end by itself for so long: that keeps the KV cache, an aborted step loses it."""

SNAPSHOT_DISTANCE = 512
"""Tokens between two saved states inside one prompt: what going back costs at most, against a state's size."""

SNAPSHOT_SHARE = 8
"""Or an eighth of the tokens before, if that is more: each state holds all of them, and the states of one prompt of any length
together take no more than about eight times the last one."""

SAVE_EVERY_S = 60.0
SAVED_BYTES = 64 << 20
"""Longer prompts are saved along the way, so that cancelling and asking again does not start over: so often, or less often by as
many times as a state is larger than this (in f16, 9,000 tokens of Flash)."""

_PARTWAY = 2
"""States along the way that are kept: the last one may not be written yet."""


class Session:
    """The tokens that a context holds, and everything that adds to them.

    Owns a llama.cpp context; made by `Engine.session`, freed by `close` or with the engine (then every use raises LocalrunError).
    Not thread-safe, except `stop`. Lock: `_stop_lock`, held briefly, never during a step; no other lock is taken inside it.

    After a failed or stopped batch the context's contents are undefined in llama.cpp, so the session is cleared and usable
    again. Callers that pass whole prompts to `prefill` don't notice.
    """

    def __init__(self, engine: Engine, context: Context, snapshots: SnapshotStore | None = None) -> None:
        """
        Args:
            snapshots: where states are saved and found; None: the session can only grow or start over.
        """
        self._engine = engine
        self._snapshots = snapshots
        self._context = context
        self._tokens: list[int] = []
        self._has_logits = False
        self._stop_lock = threading.Lock()  # guards the next three
        self._stopping = False
        self._in_step = False  # one token is being decoded
        self._stop_timer: threading.Timer | None = None

    @property
    def follows_company(self) -> bool:
        """See `Context.follows_company`; `generate` enables it for answers that need not be reproducible."""
        return self._context.follows_company

    @follows_company.setter
    def follows_company(self, follows: bool) -> None:
        self._context.follows_company = follows

    @property
    def tokens(self) -> Sequence[int]:
        """Ids in the context, oldest first."""
        return tuple(self._tokens)

    @property
    def position(self) -> int:
        """Number of tokens in the context."""
        return len(self._tokens)

    @property
    def n_ctx(self) -> int:
        """Most tokens that the context holds."""
        return self._context.n_ctx

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Logits (n_vocab,) after the last token that was fed; a copy."""
        if not self._has_logits:
            raise LocalrunError("no logits: feed a token first")
        return self._context.logits(-1).copy()

    # --- feeding

    def feed(self, tokens: Sequence[int], *, progress: Progress | None = None) -> None:
        """Appends tokens in batches; `logits` are those after the last one.

        Raises:
            ContextFullError: they don't fit; nothing changed.
            UsageError: an id is not in the vocabulary; nothing changed.
            StoppedError, DecodeError: the session is empty now.
        """
        total = self.position + len(tokens)
        for batch in self._batches(tokens):
            self._decode(batch, all_logits=False)
            if progress is not None:
                progress(self.position, total)

    def feed_all_logits(self, tokens: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        """Appends tokens and yields the logits of every one, (n, n_vocab) a batch; needs `all_logits`. Raises as `feed`."""
        for batch in self._batches(tokens):
            self._decode(batch, all_logits=True)
            yield np.stack([self._context.logits(row) for row in range(len(batch))])

    def prefill(
        self, prompt: Sequence[int], *, boundaries: Sequence[int] = (), progress: Progress | None = None
    ) -> int:
        """Makes the context hold exactly `prompt`, with logits after it, with the least work.

        It continues from the current contents if the prompt starts with them, else from the longest saved state that is a
        prefix, else from scratch.

        Args:
            boundaries: ascending positions in the prompt where messages end. States are saved at the first and the last, and at
                those in between at least `SNAPSHOT_DISTANCE` apart; elsewhere only after `SAVE_EVERY_S`, until the next of these.
            progress: called first with the reused tokens, then after each batch.

        Returns:
            Number of reused tokens.
        Raises:
            As `feed`; UsageError for an empty prompt.
        """
        if not prompt:
            raise UsageError("the prompt is empty")
        prompt = list(prompt)
        self._check(prompt, room=self.n_ctx)
        held = self._go_back_to(prompt)
        total, at = len(prompt), held
        if progress is not None:
            progress(held, total)
        if held == total:
            return held
        saved_at, partway = time.perf_counter(), deque[int]()
        for end in [*self._snapshot_places(boundaries, held, total), total]:
            for batch in self._batches(prompt[at:end]):
                self._decode(batch, all_logits=False)
                if progress is not None:
                    progress(self.position, total)
                if self.position < end and self._is_time_to_save(time.perf_counter() - saved_at):
                    if self.save():
                        partway.append(self.position)
                        self._drop_partway(prompt, partway, _PARTWAY)
                    saved_at = time.perf_counter()  # what failed is not tried again after every batch
            at = end
            if end < total and self.save():
                self._drop_partway(prompt, partway, 0)
                saved_at = time.perf_counter()
        return held

    def _is_time_to_save(self, seconds: float) -> bool:
        """Along the way, so long after the last state."""
        if self._snapshots is None or seconds < SAVE_EVERY_S:
            return False
        return seconds >= SAVE_EVERY_S * states.size_bytes(self._context, self.position) / SAVED_BYTES

    def _drop_partway(self, prompt: Sequence[int], places: deque[int], n_kept: int) -> None:
        """Forgets states that later ones have made useless: they would push out other conversations'."""
        assert self._snapshots is not None
        while len(places) > n_kept:
            self._snapshots.drop(places.popleft(), prompt)

    def _go_back_to(self, prompt: list[int]) -> int:
        """Leaves the longest useful beginning of `prompt` in the context; its length."""
        held = len(self._tokens)
        if held and prompt[:held] == self._tokens and (held < len(prompt) or self._has_logits):
            return held
        saved = self._snapshots.longest_prefix(prompt) if self._snapshots is not None else None
        if saved is not None:
            n_tokens, state = saved
            try:
                self.restore(state)
                # The store found it by its file's name; what it continues is in the file.
                if self._tokens != prompt[:n_tokens]:
                    raise FormatError("the session snapshot is another conversation's")
                return n_tokens
            except LocalrunError as error:
                log.warning("ignoring a saved state: %s", error)
                assert self._snapshots is not None
                self._snapshots.drop(n_tokens, prompt)
        self.reset()
        return 0

    def _snapshot_places(self, boundaries: Sequence[int], held: int, total: int) -> list[int]:
        if self._snapshots is None:
            return []
        ahead = [place for place in boundaries if held < place < total]
        places: list[int] = []
        for i, place in enumerate(ahead):
            distance = place - (places[-1] if places else held)
            far = distance >= max(SNAPSHOT_DISTANCE, place // SNAPSHOT_SHARE)
            if far or i == len(ahead) - 1 or place == boundaries[0]:
                places.append(place)
        return places

    def save(self) -> bool:
        """Saves the current state, if there is a store and it is not already saved; True if it did."""
        store, tokens = self._snapshots, self._tokens
        if store is None or not tokens or store.has(tokens):
            return False
        try:
            n_bytes = states.size_bytes(self._context, self.position)
            if store.holds_in_memory(n_bytes):
                return store.put(tokens, self.snapshot())
            return store.put_file(tokens, n_bytes, self.write)
        except (LocalrunError, MemoryError) as error:  # it only saves time later: the answer must not end because of it
            log.warning("could not save the conversation's state: %s", error or "out of memory")
            return False

    def _batches(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        self._check(tokens, room=self.n_ctx - self.position)
        for start in range(0, len(tokens), self._context.n_batch):
            yield tokens[start : start + self._context.n_batch]

    def _check(self, tokens: Sequence[int], *, room: int) -> None:
        if len(tokens) > room:
            raise ContextFullError(
                f"{len(tokens)} tokens don't fit: {room} of {self.n_ctx} are left in the context",
                hint="shorten the conversation or raise --context",
            )
        n_vocab = self._context.n_vocab
        for token in tokens:
            if not 0 <= token < n_vocab:
                raise UsageError(f"token id {token} is not in the model's vocabulary of {n_vocab}")

    def _decode(self, batch: Sequence[int], *, all_logits: bool) -> None:
        """One llama_decode; on failure the session is emptied and the cause raised."""
        self._context.require_open()  # before the experts are notified
        with self._stop_lock:
            if self._stopping:
                raise StoppedError("stopped")
            self._in_step = len(batch) == 1
        self._has_logits = False
        try:
            with self._engine.decoding(batch):
                code = self._context.decode(batch, self.position, all_logits=all_logits)
        finally:
            with self._stop_lock:
                self._in_step = False
        cause = self._engine.take_error()
        if code == 0 and cause is None:
            self._tokens.extend(batch)
            self._has_logits = True
            return
        self.reset()
        if self._stopping and (code == DECODE_ABORTED or isinstance(cause, StoppedError) or cause is None):
            raise StoppedError("stopped")
        if isinstance(cause, LocalrunError):
            raise cause
        if code == DECODE_NO_SLOT and cause is None:
            raise ContextFullError("llama.cpp has no room for the batch", hint="raise --context")
        raise DecodeError(f"the forward pass failed (llama_decode: {code})") from cause

    # --- answers

    def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions,
        *,
        boundaries: Sequence[int] = (),
        max_tokens: int | None = None,
        ignore_eos: bool = False,
        progress: Progress | None = None,
        steering: Steering | None = None,
        top_logprobs: int | None = None,
    ) -> Generation:
        """Prepares an answer to `prompt`; iterate over the result. See `Generation`.

        Args:
            steering: constraints on this answer's tokens.
            top_logprobs: record each token's log probability and those of this many others.
        """
        self.follows_company = sampling.seed is None and sampling.temperature > 0
        return Generation(
            self, list(prompt), sampling, max_tokens, ignore_eos, progress, boundaries, steering, top_logprobs
        )

    def _step(self, sampler: Sampler) -> int:
        return sampler.sample(self._context.handle)

    @property
    def _next_logits(self) -> npt.NDArray[np.float32]:
        """What the sampler will see; llama.cpp's memory."""
        return self._context.logits(-1)

    @property
    def n_vocab(self) -> int:
        """Checks that the ids are in the vocabulary."""
        return self._context.n_vocab

    def _is_end(self, token: int) -> bool:
        return self._engine.vocab.is_end(token)

    # --- stopping

    def stop(self) -> None:
        """Stops the running step; any thread. A batch of several tokens fails within a layer, a single-token step may finish
        first."""
        with self._stop_lock:
            self._stopping = True
            if not self._in_step:
                self._abort()
            elif self._stop_timer is None:
                self._stop_timer = threading.Timer(STOP_PATIENCE_S, self._patience_ends)
                self._stop_timer.daemon = True
                self._stop_timer.start()

    def clear_stop(self) -> None:
        """Clears `stop`, even if it has not taken effect; call before the next command."""
        with self._stop_lock:
            self._stopping = False
            self._forget_timer()
            self._context.stop.set(False)
            self._engine.clear_stop()

    def _patience_ends(self) -> None:
        with self._stop_lock:
            # A timer can't be cancelled once it runs: one of an earlier command finds itself replaced or forgotten.
            if threading.current_thread() is self._stop_timer:
                self._stop_timer = None
                self._abort()

    def _abort(self) -> None:
        """Under the lock."""
        self._context.stop.set(True)
        self._engine.request_stop()

    def _forget_timer(self) -> None:
        """Under the lock."""
        if self._stop_timer is not None:
            self._stop_timer.cancel()
            self._stop_timer = None

    # --- state

    def reset(self) -> None:
        """Empties the session."""
        self._tokens.clear()
        self._has_logits = False
        self._context.clear()

    def snapshot(self) -> bytearray:
        """Everything needed to continue from here: ids and KV state, with a checksum, but no logits.

        The only copy; the caller owns it.
        """
        return states.pack(self._context, self._engine.state_key, self._tokens)

    def write(self, path: Path) -> None:
        """The same to a file, one tensor in memory at a time. Raises StoreError."""
        states.write(self._context, path, self._engine.state_key, self._tokens)

    def restore(self, snapshot: State) -> None:
        """Restores the session to where `snapshot` was taken; feed at least one token before reading logits.

        Raises:
            ChecksumError: the bytes are damaged; nothing changed.
            FormatError: not a snapshot, or one of another model, KV type or context length; nothing changed.
            StoreError: a file can't be read; nothing changed.
            DecodeError: llama.cpp rejected the state; the session is empty now.
        """
        key, tokens = self._engine.state_key, None
        if isinstance(snapshot, Path) and states.is_packed(snapshot):
            snapshot = states.read_packed(snapshot)
        if isinstance(snapshot, Path):
            n_tokens = states.check(snapshot, key, self.n_ctx)
            self.reset()
            tokens = self._context.load_file(snapshot, n_tokens)
        else:
            ids, state = states.unpack(snapshot, key, self.n_ctx)
            self.reset()
            if not ids or self._context.load_state(state):
                tokens = ids
        if tokens is None:
            self.reset()
            raise DecodeError("llama.cpp rejected the session snapshot", hint="delete it")
        self._tokens = tokens

    def close(self) -> None:
        """Frees the context."""
        with self._stop_lock:
            self._forget_timer()
        self._context.close()
        self._engine.forget(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Generation:
    """One answer, token by token: an iterator of ids, without the end token.

    Attributes:
        reason: why it ended; None before.
        seed: the sampler's seed.
        timings: cost so far, final when the iterator is exhausted.
        logprobs: if requested, the model's (id, log probability) of the last token and then of the most likely ones, before
            sampling options and steering.
    """

    def __init__(
        self,
        session: Session,
        prompt: list[int],
        sampling: SamplingOptions,
        max_tokens: int | None,
        ignore_eos: bool,
        progress: Progress | None,
        boundaries: Sequence[int] = (),
        steering: Steering | None = None,
        top_logprobs: int | None = None,
    ) -> None:
        self._session, self._prompt, self._progress, self._boundaries = session, prompt, progress, boundaries
        self._max_tokens, self._ignore_eos = max_tokens, ignore_eos
        self._sampler = Sampler(sampling, session.n_vocab)
        self._steering, self._top_logprobs = steering, top_logprobs
        self.logprobs: tuple[tuple[int, float], ...] = ()
        self.seed = self._sampler.seed
        self.reason: FinishReason | None = None
        self.timings = Timings(prompt_tokens=len(prompt))

    def __iter__(self) -> Iterator[int]:
        with self._sampler:
            try:
                yield from self._run()
            except StoppedError:
                self.reason = "stopped"

    def _run(self) -> Iterator[int]:
        session, n_prompt = self._session, len(self._prompt)
        start: float | None = None  # of the prefill: finding and reading a saved state is not part of its rate

        def progress(done: int, total: int) -> None:
            nonlocal start
            if start is None:
                start = time.perf_counter()
            if self._progress is not None:
                self._progress(done, total)

        n_reused = session.prefill(self._prompt, boundaries=self._boundaries, progress=progress)
        decode_start = time.perf_counter()
        assert start is not None
        n_new, spent = 0, session._engine.spent()
        n_steps, stepped_s = 0, 0.0  # the steps alone: whoever takes the tokens may be slow
        while self.reason is None:
            token = self._draw()
            if not self._ignore_eos and session._is_end(token):
                self.reason = "eos"
            else:
                n_new += 1
                if n_new == self._max_tokens:
                    self.reason = "length"
                elif session.position == session.n_ctx:
                    self.reason = "context"
            self.timings = Timings(
                prompt_tokens=n_prompt,
                reused_tokens=n_reused,
                prompt_s=decode_start - start,
                new_tokens=n_new,
                decode_s=time.perf_counter() - decode_start,
                context_used=session.position,
            )
            if self.reason != "eos":
                yield token
            if self.reason is None:
                before = time.perf_counter()
                session.feed([token])
                n_steps, stepped_s = n_steps + 1, stepped_s + time.perf_counter() - before
        at = session.position - n_steps // 2
        session._engine.learn_tokens(spent, n_tokens=n_steps, seconds=stepped_s, position=at)
        session.save()

    def _draw(self) -> int:
        session = self._session
        known = log_probabilities(session._next_logits) if self._top_logprobs is not None else None
        if self._steering is not None:
            self._steering.allow(session._next_logits)
        token = session._step(self._sampler)
        if self._steering is not None:
            self._steering.accept(token)
        if known is not None:
            ids = [token, *most_likely(known, self._top_logprobs or 0)]
            self.logprobs = tuple((i, float(known[i])) for i in ids)
        return token
