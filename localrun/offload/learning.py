"""Learns from a model's runs: the routing profile, which warms the next start and pins a small set in RAM.
A model's first start has the routing counts of its conversion's calibration, where the manifest holds them.

The compiled path counts uses per expert in the slot table's array; here the counts since the last look are handed to the profile.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from localrun.offload.cache.profile import RoutingProfile
from localrun.offload.cache.telemetry import Telemetry
from localrun.offload.residency import Residency
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.source import ModelSource

PINNED_SHARE = 0.05
"""Part of the slots kept for the profile's hottest experts; the rest is LRU. [m] tools/simulator compares shares."""

PROFILE_MIN_TOKENS = 2000
"""With fewer tokens too little is known about hot experts to pin any."""


class Learner:
    """Feeds and saves one model's routing profile. For the decoding thread; `close` once at the end.

    Args:
        residency: source of the use counts.
        telemetry: counts tokens.
        folder: for profiles, `<identity>.profile`; None: nothing is read or saved.
    """

    def __init__(self, source: ModelSource, residency: Residency, telemetry: Telemetry, folder: Path | None) -> None:
        self._residency, self._telemetry = residency, telemetry
        self._seen = residency.table.uses.copy()
        self._seen_tokens = 0
        self._path = folder / f"{source.identity}.profile" if folder is not None else None
        shapes = {layer: moe.n_experts for layer, moe in source.moe_layers.items()}
        if self._path is None:
            self.profile = RoutingProfile(source.identity, shapes)
        else:
            self.profile = RoutingProfile.load(source.identity, shapes, path=self._path)
            # Until there is experience, what the conversion's calibration text used is the best guess.
            if self.profile.is_empty and isinstance(source, GgufSource) and source.manifest is not None:
                counted = source.manifest.profile
                counts = counted.get("counts")
                if isinstance(counts, Mapping):
                    self.profile.seed(counts, counted.get("tokens"))

    @property
    def is_saved(self) -> bool:
        """These uses are a user's: later runs know them."""
        return self._path is not None

    def keep_hottest(self) -> int:
        """Protects the profile's hottest experts from eviction where others can go; how many."""
        if self.profile.clock < PROFILE_MIN_TOKENS:
            return 0
        slots = self._residency.n_slots
        gpu = self._residency.gpu
        ranking = (at for at in self.profile.ranking() if gpu is None or not gpu.has_slot(*at))
        hottest = list(itertools.islice(ranking, int(slots * PINNED_SHARE)))
        self._residency.table.keep(hottest)
        return len(hottest)

    def learn(self) -> None:
        """Hands the uses since the last call to the profile."""
        uses, n_tokens = self._residency.table.uses, self._telemetry.totals().tokens
        fresh = uses - self._seen
        self._seen += fresh
        n_layers = max(1, len(self._residency.layers))
        tokens, self._seen_tokens = (n_tokens - self._seen_tokens) // n_layers, n_tokens
        for layer in self._residency.layers:
            experts = fresh[layer].nonzero()[0].astype(np.int32)
            starts = np.concatenate([[0], np.cumsum(fresh[layer][experts])]).astype(np.int32)
            self.profile.record(layer, experts, starts, max(tokens, 0))

    def heat(self, layer: int) -> npt.NDArray[np.float64]:
        """(n_experts,) uses, older ones counting less, those that the profile has not seen yet included."""
        return np.asarray(self.profile.counts(layer) + self.fresh(layer), np.float64)

    def fresh(self, layer: int) -> npt.NDArray[np.int64]:
        """(n_experts,) uses that the profile has not seen yet; any thread."""
        n_experts = self._residency.layers[layer].n_experts
        fresh: npt.NDArray[np.int64] = self._residency.table.uses[layer, :n_experts] - self._seen[layer, :n_experts]
        return fresh

    def close(self) -> None:
        """Learns the rest and saves."""
        self.learn()
        if self._path is not None and not self.profile.is_empty:
            self.profile.save(self._path)
