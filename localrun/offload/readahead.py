"""Reading experts before they are asked for: what is certain, and what is likely while nothing else happens.

* Hash-routed layers choose experts by token id alone (`ffn_gate_tid2eid`), so the experts of tokens that are about to run are
  known exactly: `prepare` starts their reads before `llama_decode` is called.
* After a model is opened, a thread reads the experts that earlier runs used most, hottest first, into free memory, and keeps
  away while an answer is being computed.

Guesses never displace an expert that was used; only certain reads may.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from localrun.offload.pool import ExpertPool
from localrun.quant.model.source import ModelSource

log = logging.getLogger(__name__)

QUIET_S = 0.1
"""The warming thread waits so long after an answer: one token is often followed by the next."""

_POLL_S = 0.01


class ReadAhead:
    """Read-ahead for one model. `prepare` is for the decoding thread; `close` ends the warming thread before the pool is closed.

    Args:
        source: for the hash layers' tables.
        pool: whose experts.
        depth: most reads ahead that are under way at once.
    """

    def __init__(self, source: ModelSource, pool: ExpertPool, *, depth: int) -> None:
        self._pool = pool
        self._depth = depth
        self._tables = _hash_tables(source)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def hash_layers(self) -> tuple[int, ...]:
        """Layers whose experts follow from the token id."""
        return tuple(self._tables)

    def prepare(self, tokens: Sequence[int]) -> int:
        """Starts reading what the hash layers will ask for when these tokens run next. Returns the number of reads started."""
        if not self._tables or len(tokens) == 0:
            return 0
        ids = np.asarray(tokens, np.int64)
        started = 0
        for layer, table in self._tables.items():
            experts = np.unique(table[ids[(ids >= 0) & (ids < len(table))]])
            started += self._pool.read_ahead(layer, [int(e) for e in experts], evict=True, limit=self._depth)
        return started

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
        for layer, expert in ranking:
            while not self._closing.is_set():
                quiet = not self._pool.busy and time.monotonic() - self._pool.last_call > QUIET_S
                if quiet and self._pool.settle() < self._depth:
                    break
                self._closing.wait(_POLL_S)
            if self._closing.is_set():
                return
            elsewhere = self._pool.gpu is not None and self._pool.gpu.has_place(layer, expert)
            missing = not elsewhere and self._pool.table.peek(layer, expert) is None
            if missing and not self._pool.has_room(layer, expert):
                break
            if missing:
                self._pool.read_ahead(layer, [expert], evict=False, limit=self._depth)
        while self._pool.settle() and not self._closing.is_set():
            self._closing.wait(_POLL_S)


def _hash_tables(source: ModelSource) -> dict[int, npt.NDArray[np.int32]]:
    """(n_vocab, K) expert ids by layer, from blk.N.ffn_gate_tid2eid.weight (ggml shape K, n_vocab)."""
    tables = {}
    for layer in source.moe_layers:
        info = source.tensors.get(f"blk.{layer}.ffn_gate_tid2eid.weight")
        if info is not None:
            tables[layer] = source.read_tensor(info.name).view(np.int32).reshape(info.shape[1], info.shape[0])
    return tables
