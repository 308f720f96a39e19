"""Reads experts ahead of demand: certain ones, nearly certain ones, and likely ones when the drive is idle.

* Hash-routed layers choose experts by token id alone (`ffn_gate_tid2eid`), so the experts of tokens that are about to run are
  known exactly: `prepare` starts their reads before `llama_decode` is called.
* A long batch uses many experts of each layer. What the next layer's router picks for one of 64 of its tokens will almost
  certainly be needed: `follow` starts those reads behind this layer's own, so that the drive works while attention is computed.
* A token's next two layers are asked what they will likely need (`foresight.py`).
* After a model is opened, a thread reads the experts that earlier runs used most, hottest first, into free memory, and keeps
  away while an answer is being computed: `warm`.

Warming never displaces a used expert; only reads for imminent demand may.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from localrun.offload.cache.slots import Slot, SlotState
from localrun.offload.device.view import F32, I32
from localrun.offload.foresight import Foresight
from localrun.offload.residency import Residency
from localrun.offload.routers import Routers
from localrun.quant.model.source import ModelSource

log = logging.getLogger(__name__)

QUIET_S = 0.1
"""The warming thread waits so long after an answer: one token is often followed by the next."""

_POLL_S = 0.01

PROMPT_TOKENS = 64
"""Batches of so many tokens read ahead for the next layer; and so many tokens tell which experts a layer uses."""
ASKED_TOKENS = 64
"""Of a long batch, tokens for which the next layer's router is asked: a pick for one of them counts for several of the batch."""
CERTAIN = 0.9
"""Least probability with which an expert must be needed to be read ahead."""
PROMPT_SHARE = 1 / 3
"""Most of the slots that a long prompt's reads ahead may take. Simulated on prompts of 464 tokens with new topics: if they always
take so many, 4.6 % of a prompt's experts are there at 10 % resident and 19.8 % at 30 %; with a 25th of the slots, 7.4 and
26.6 %."""


class ReadAhead:
    """Read-ahead for one model.

    Owns the guesses (slots read for the next layer's call, until that call shows whether it needs them), which belong to the
    decoding thread, and the warming thread, which `close` ends before residency is closed. It has no lock: slots change under
    residency's, and the warming thread only reads two numbers that the decoding thread writes.

    Args:
        residency: whose experts.
        n_used: experts per token.
        depth: most reads ahead that `prepare` and `warm` have under way at once.
        hash_tables: (n_vocab, K) expert ids by layer whose experts follow from the token id.
        routers: rank the experts of other layers.

    Attributes:
        foresight: guesses for a single token's next layers.
    """

    def __init__(
        self,
        residency: Residency,
        n_used: int,
        *,
        depth: int,
        hash_tables: Mapping[int, npt.NDArray[np.int32]] | None = None,
        routers: Routers | None = None,
    ) -> None:
        self._residency = residency
        self._n_used = n_used
        self._depth = depth
        self._tables = hash_tables or {}
        self._routers = routers
        self.foresight = Foresight(residency, n_used, hash_tables=self._tables, routers=routers)
        self._guesses: set[Slot] = set()
        self._reach = depth
        self._decoding = False
        self._last_call_s = (
            0.0  # time.monotonic() of the last layer call that came to Python, or of the last decode's end
        )
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Around each `llama_decode`: warming keeps away from the drive meanwhile."""
        self._decoding = True
        try:
            yield
        finally:
            self.note_call()
            self._decoding = False

    def note_call(self) -> None:
        """A layer call was in Python: an answer is being computed."""
        self._last_call_s = time.monotonic()

    # -- what is certain -----------------------------------------------------------------------------------------------

    def prepare(self, tokens: Sequence[int]) -> int:
        """Starts reading what the hash layers will ask for when these tokens run next. Returns the number of reads started."""
        self.foresight.begin_batch(tokens[0] if len(tokens) == 1 else -1)
        if not self._tables or len(tokens) == 0:
            return 0
        ids = np.asarray(tokens, np.int64)
        started = 0
        for layer, table in self._tables.items():
            experts = np.unique(table[ids[(ids >= 0) & (ids < len(table))]])
            started += self.read(layer, [int(e) for e in experts], evict=True)
        return started

    def read(self, layer: int, experts: Iterable[int], *, evict: bool) -> int:
        """Starts reading experts that are not there, without waiting; any thread unless `evict`.

        Args:
            evict: may displace the coldest experts (for what is certain to be needed); else only free memory is used. Only on the
                decoding thread: compiled code reads residency without the lock.

        Returns:
            Number of reads started; 0 also when the memory or the depth is exhausted.
        """
        where = self._residency
        with where.lock:
            where.settle()
            started = 0
            for expert in experts:
                if where.n_ahead >= self._depth:
                    break
                # What is certain to be asked for is not displaced by its neighbours' reads.
                if evict:
                    where.table.announce(layer, expert)
                if where.is_here(layer, expert):
                    continue
                slot = where.reserve(layer, expert, evict=evict)
                if slot is None:
                    break
                where.read_ahead(slot)
                started += 1
            return started

    # -- what a long prompt will need next -----------------------------------------------------------------------------

    def follow(self, layer: int, n_tokens: int, share_used: float, x: F32 | None = None) -> None:
        """In a long batch's call of `layer`, once its own reads have begun: starts reading what the next one will almost certainly
        ask for. On the decoding thread, which holds residency's lock.

        As many slots serve this, layer after layer, as the drive fills before the next call (`reached`), at most `PROMPT_SHARE`:
        a slot that is filled again for each layer hides one read per layer, one that keeps its expert saves one read per
        batch, and answers after the prompt need it.

        Args:
            n_tokens: of the batch.
            share_used: of the layer's experts, by this batch: where it was nearly all, the next layer's will be.
            x: (T, D) inputs of this layer's experts.
        """
        where, following = self._residency, layer + 1
        if following not in where.layers or n_tokens < PROMPT_TOKENS:
            return
        # Where long prompts stream, what is missing passes through a GPU and displaces nothing.
        evict = where.gpu is None or where.gpu.rings is None
        wanted = self._certain(following, n_tokens, share_used, x)
        missing = [e for e in wanted if not where.is_here(following, e)]
        if not missing:
            return
        there = [slot for slot in where.table if slot.layer == following]
        for present in there:  # they will be asked for as certainly
            where.table.pin(present)
        try:
            for expert in missing[: min(self._reach, int(where.n_slots * PROMPT_SHARE))]:
                slot = where.reserve(following, expert, evict=evict, retake=False)
                if slot is None:
                    break
                where.read_ahead(slot)
                where.table.announce(following, expert)
                self._guesses.add(slot)
        finally:
            for present in there:
                where.table.unpin(present)

    def reached(self, layer: int) -> None:
        """Call at the start of a layer's call: learns how far ahead the drive gets. What is still being read then keeps it busy
        into the call; if all has arrived, it was idle."""
        here = [slot.state is SlotState.READY for slot in self._guesses if slot.layer == layer]
        if here and all(here):
            self._reach = max(self._reach, 2 * len(here))
        elif here:
            self._reach = sum(here) + self._depth

    def _certain(self, layer: int, n_tokens: int, share_used: float, x: F32 | None) -> list[int]:
        """Experts that a batch of so many tokens will almost certainly use: as its router says, those of most tokens first, or else
        in file order."""
        if x is not None and self._routers is not None and layer not in self._tables:
            some = x[np.linspace(0, len(x) - 1, ASKED_TOKENS).astype(int)]
            popular = self._routers.popular(layer, some, self._n_used)
            if popular is not None:
                return [int(e) for e in popular]
        uses = self._residency.table.uses[layer, : self._residency.layers[layer].n_experts]
        seen = int(uses.sum()) // self._n_used
        if share_used >= CERTAIN:
            return list(range(uses.size))
        if seen < PROMPT_TOKENS:
            return []
        return [int(e) for e in np.flatnonzero(1 - (1 - np.minimum(uses / seen, 1.0)) ** n_tokens >= CERTAIN)]

    def is_guess(self, slot: Slot) -> bool:
        """The slot was read for the running call, before it began."""
        return slot in self._guesses

    def judge(self, layer: int, used: I32) -> None:
        """Call at the end of a layer's call: wrong guesses that were not used since go before others as likely."""
        self.foresight.judge(layer, used)
        table = self._residency.table
        for slot in [slot for slot in self._guesses if slot.layer == layer]:
            self._guesses.discard(slot)
            # Another stamp than its arrival's: the compiled path has used it since.
            if slot.expert not in used and table.stamps[slot.layer, slot.expert] == slot.ready_stamp:
                table.chill(slot)

    # -- what is likely ------------------------------------------------------------------------------------------------

    def warm(self, ranking: Sequence[tuple[int, int]]) -> None:
        """Starts the warming thread: reads (layer, expert) in this order until free memory runs out."""
        if self._thread is not None or not ranking:
            return
        self._thread = threading.Thread(target=self._warm, args=(list(ranking),), name="localrun-warm", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops warming; reads under way are finished by the store."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _warm(self, ranking: list[tuple[int, int]]) -> None:
        where = self._residency
        for layer, expert in ranking:
            while not self._closing.is_set():
                quiet = not self._decoding and time.monotonic() - self._last_call_s > QUIET_S
                if quiet and where.settle() < self._depth:
                    break
                self._closing.wait(_POLL_S)
            if self._closing.is_set():
                return
            elsewhere = where.gpu is not None and where.gpu.has_slot(layer, expert)
            missing = not elsewhere and where.table.peek(layer, expert) is None
            if missing and not where.has_room(layer, expert):
                break
            if missing:
                self.read(layer, [expert], evict=False)
        while where.settle() and not self._closing.is_set():
            self._closing.wait(_POLL_S)


def hash_tables(source: ModelSource) -> dict[int, npt.NDArray[np.int32]]:
    """(n_vocab, K) expert ids by layer, from blk.N.ffn_gate_tid2eid.weight (ggml shape K, n_vocab)."""
    tables = {}
    for layer in source.moe_layers:
        info = source.tensors.get(f"blk.{layer}.ffn_gate_tid2eid.weight")
        if info is not None:
            tables[layer] = source.read_tensor(info.name).view(np.int32).reshape(info.shape[1], info.shape[0])
    return tables
