"""Traces replayed through replacement policies and through the engine's own slot table.

Figures are of distinct experts per layer call, as the engine's own telemetry counts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES
from localrun.offload.cache.profile import Key, RoutingProfile
from localrun.offload.cache.slots import TAIL_TOKENS, SlotTable
from localrun.offload.cache.trace import TraceHeader
from tools.simulator.policies import Lru, Policy
from tools.simulator.trace_file import TracedCall


@dataclass(frozen=True, slots=True)
class Outcome:
    """Counts of one replay after the warm-up."""

    hits: int
    misses: int
    n_tokens: int

    @property
    def hit_rate(self) -> float:
        """Share of distinct experts per call that were resident."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def misses_per_token(self) -> float:
        """Experts read per token."""
        return self.misses / max(1, self.n_tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """One call as the cache sees it.

    Attributes:
        keys: its distinct experts, ascending.
        n_tokens: how many tokens it moves the model on.
        tail: those of its experts that its last tokens use; None: all.
        counts: how many of its tokens use each expert.
    """

    keys: tuple[Key, ...]
    n_tokens: int
    tail: frozenset[Key] | None = None
    counts: Mapping[Key, int] = field(default_factory=dict)


def steps_of(calls: Iterable[TracedCall]) -> list[Step]:
    """Prepares calls for any number of replays; a call's tokens count with the first layer that the trace names."""
    steps = []
    first_layer = None
    known: dict[Key, Key] = {}  # one tuple per expert instead of one per use
    for call in calls:
        first_layer = call.layer if first_layer is None else first_layer

        def keys_of(ids: npt.NDArray[np.int32], layer: int = call.layer) -> Iterator[Key]:
            return (known.setdefault((layer, e), (layer, e)) for e in np.unique(ids).tolist())

        tail = frozenset(keys_of(call.ids[-TAIL_TOKENS:])) if len(call.ids) > TAIL_TOKENS else None
        keys = tuple(keys_of(call.ids))
        counts = dict(zip(keys, np.unique(call.ids, return_counts=True)[1].tolist(), strict=True))
        steps.append(Step(keys, len(call.ids) if call.layer == first_layer else 0, tail, counts))
    return steps


def replay(steps: Sequence[Step], policy: Policy, n_slots: int, *, warm_up: int = 0, tail: bool = False) -> Outcome:
    """Plays a trace against a cache of `n_slots` equal experts, with the pool's rules.

    A call's experts are protected while it runs. Where they don't all fit, those computed first make room for the rest.

    Args:
        warm_up: steps that are played and not counted.
        tail: of a batch only the last tokens' experts count as used.
    """
    resident: set[Key] = set()
    hits = misses = n_tokens = 0
    for index, step in enumerate(steps):
        protected = set(step.keys)
        missing = []
        for key in step.keys:
            if key not in resident:
                missing.append(key)
            elif not tail or step.tail is None or key in step.tail:
                policy.touch(key)
        if index >= warm_up:
            hits += len(step.keys) - len(missing)
            misses += len(missing)
            n_tokens += step.n_tokens
        for key in missing:
            while len(resident) >= n_slots:
                gone = policy.victim(lambda other, protected=protected: other not in protected)  # type: ignore[misc]
                if gone is None:
                    protected = {key}
                else:
                    resident.discard(gone)
            policy.insert(key, cold=tail and step.tail is not None and key not in step.tail)
            resident.add(key)
    return Outcome(hits, misses, n_tokens)


def replay_engine(steps: Sequence[Step], header: TraceHeader, n_slots: int, *, warm_up: int = 0) -> Outcome:
    """As `replay`, through the engine's own code (`localrun.offload.cache.slots`), whose invariants are checked at the end."""
    hits = misses = n_tokens = 0
    for index, (step, missing) in enumerate(zip(steps, engine_misses(steps, header, n_slots), strict=True)):
        if index >= warm_up:
            hits += len(step.keys) - len(missing)
            misses += len(missing)
            n_tokens += step.n_tokens
    return Outcome(hits, misses, n_tokens)


def engine_misses(steps: Iterable[Step], header: TraceHeader, n_slots: int) -> Iterator[list[Key]]:
    """What each step had to read, with the engine's slot table of `n_slots` equal experts."""
    n_layers, n_experts = max(header.layers) + 1, max(n for n, _ in header.layers.values())
    table = SlotTable(n_slots * PAGE_BYTES, n_layers, n_experts)
    for step in steps:
        if step.n_tokens:
            table.begin_batch(step.n_tokens)
        for key in step.keys:
            table.uses[key] += step.counts[key]
        found = [table.peek(*key) for key in step.keys]
        pinned = [slot for slot in found if slot is not None]
        for slot in pinned:
            table.pin(slot)
            if step.tail is None or (slot.layer, slot.expert) in step.tail:
                table.touch(slot)
        missing = [key for key, slot in zip(step.keys, found, strict=True) if slot is None]
        for key in missing:
            new = table.reserve(*key, PAGE_BYTES)
            if new is None:  # what was computed makes room
                while pinned:
                    table.unpin(pinned.pop())
                new = table.reserve(*key, PAGE_BYTES)
            assert new is not None
            table.ready(new)
            if step.tail is not None and key not in step.tail:
                table.chill(new)
            table.pin(new)
            pinned.append(new)
        for slot in pinned:
            table.unpin(slot)
        yield missing
    table.check()
    table.close()


def replay_per_layer(steps: Sequence[Step], n_slots: int, *, warm_up: int = 0) -> Outcome:
    """As `replay`, the slots divided evenly among the layers, each with its own LRU."""
    of_layer: dict[int, list[Step]] = {}
    warm: dict[int, int] = {}
    for index, step in enumerate(steps):
        layer = step.keys[0][0]
        of_layer.setdefault(layer, []).append(step)
        warm[layer] = warm.get(layer, 0) + (index < warm_up)
    each = n_slots // len(of_layer)
    parts = [replay(part, Lru(), each, warm_up=warm[layer]) for layer, part in of_layer.items()]
    return Outcome(sum(p.hits for p in parts), sum(p.misses for p in parts), sum(p.n_tokens for p in parts))


def learn(calls: Iterable[TracedCall], header: TraceHeader) -> RoutingProfile:
    """The profile that the engine would have after these calls."""
    profile = RoutingProfile(header.identity, {layer: shape[0] for layer, shape in header.layers.items()})
    for call in calls:
        experts, counts = np.unique(call.ids, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(counts)])
        profile.record(call.layer, experts.astype(np.int32), starts.astype(np.int32), len(call.ids))
    return profile
