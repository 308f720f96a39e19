"""Bounded RAM for experts: an arena, a first-fit allocator, and eviction.

`Arena` hands out aligned ranges of one anonymous mapping whose size never changes; `SlotTable` maps (layer, expert) to ranges and
evicts, of those neither pinned nor being filled, the one that is least likely to be used soon (`demand.py`). Recency, use counts
and addresses are plain arrays, because compiled code (`device/compiled_pairs.py`) reads and updates them. Neither class knows about
files, formats or threads: callers hold residency's lock, and I/O threads only fill slots in state LOADING.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes as C
import itertools
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import BudgetError
from localrun.offload.cache.demand import Demand
from localrun.offload.cache.gate import Gate
from localrun.pages import HUGE_PAGE_BYTES, anonymous
from localrun.units import format_size

TAIL_TOKENS = 16
"""Of a long batch (a prompt), only what so many tokens at its end used is marked as recent; estimates count all of it
(`demand.py`). Recency decides between equal estimates: a prompt touches nearly every expert of every layer, and by the order of
calls alone the last layers' would be kept. [m] With nothing but recency it is worth 3 points of hit rate at 30 % resident
(docs/benchmarks.md, "Cache policies"); what it adds to the estimates has not been measured."""


_MADV_COLD: Final = 20
"""asm-generic/mman-common.h."""


class Arena:
    """One anonymous mapping of fixed size; first-fit allocation, adjacent free ranges are merged.

    The budget is strict: never maps more than `size_bytes`; pages become resident only when first written.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes // PAGE_BYTES * PAGE_BYTES
        if self.size_bytes <= 0:
            raise BudgetError(f"{format_size(size_bytes)} of expert memory is less than one page")
        try:
            self._map = anonymous(self.size_bytes)
        except OSError as error:
            raise BudgetError(
                f"can't allocate {format_size(self.size_bytes)} of memory for experts: {error.strerror}",
                hint="lower --ram",
            ) from error
        self._anchor: C.c_char | None = C.c_char.from_buffer(self._map)
        self.address = C.addressof(self._anchor)
        self._free: list[tuple[int, int]] = [(0, self.size_bytes)]  # (offset, size), by offset

    @property
    def free_bytes(self) -> int:
        """Bytes not allocated, possibly in several pieces."""
        return sum(size for _, size in self._free)

    @property
    def largest_hole(self) -> int:
        """Bytes of the largest free range."""
        return max((size for _, size in self._free), default=0)

    def allocate(self, size_bytes: int) -> int | None:
        """Address of a free range of at least that size, or None if no single hole is large enough."""
        need = align_up(size_bytes, PAGE_BYTES)
        for i, (offset, size) in enumerate(self._free):
            if size >= need:
                if size == need:
                    del self._free[i]
                else:
                    self._free[i] = (offset + need, size - need)
                return self.address + offset
        return None

    def drop(self, address: int, size_bytes: int) -> None:
        """Gives the pages of an allocated range back to the system; they read as zeros until they are written again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin = address - self.address
        end = begin + align_up(size_bytes, PAGE_BYTES)
        self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)
        # A huge page of which a part is in use stays whole until the kernel is short of memory: of scattered slots of 7 MiB a
        # quarter. Marking the other part as cold splits it now, in 0.3 ms, and changes nothing else without a swap file.
        first = -self.address % HUGE_PAGE_BYTES  # offset of the first whole huge page
        for low, high in (
            (first + (begin - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, begin),
            (end, first + -(-(end - first) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES),
        ):
            low, high = max(low, 0), min(high, self.size_bytes)
            if low < high:
                with contextlib.suppress(OSError):  # Linux before 5.4, or another system
                    self._map.madvise(_MADV_COLD, low, high - low)

    def release(self, address: int, size_bytes: int) -> None:
        """Gives a range back; `size_bytes` as given to `allocate`."""
        offset, size = address - self.address, align_up(size_bytes, PAGE_BYTES)
        i = bisect.bisect_left(self._free, (offset, 0))
        if i < len(self._free) and self._free[i][0] == offset + size:
            size += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == offset:
            offset, before = self._free.pop(i - 1)
            size += before
            i -= 1
        self._free.insert(i, (offset, size))

    def close(self) -> None:
        """Unmaps. No slot address may be used afterwards."""
        if self._anchor is not None:
            self._anchor = None
            self._map.close()


class SlotState(Enum):
    """LOADING: an I/O thread fills it; READY: kernels may read it."""

    LOADING = "loading"
    READY = "ready"


@dataclass(slots=True, eq=False)
class Slot:
    """One expert's place in RAM.

    Attributes:
        layer, expert: the expert it belongs to.
        address: first byte, page-aligned.
        size_bytes: packed size.
        variant: index into the layer's `MoeLayer.variants`.
        state: see `SlotState`.
        pins: number of running calls that need it; a pinned slot is never evicted.
        replaces: the slot that this one replaces once complete, see `SlotTable.begin_upgrade`.
        ready_stamp: its recency when it became READY, -1 before.
        ahead_bytes: read for it ahead of any use, see `SlotTable.note_ahead`.
        uses_before: of its expert when that read began.
    """

    layer: int
    expert: int
    address: int
    size_bytes: int
    variant: int = 0
    state: SlotState = SlotState.LOADING
    pins: int = 0
    replaces: Slot | None = None
    ready_stamp: int = -1
    ahead_bytes: int = 0
    uses_before: int = 0


VARIANT_MASK = PAGE_BYTES - 1
"""Of a word of `SlotTable.resident`: slots begin at pages, so the lower bits of an address are free for the variant."""

ABSENT = 1 << 62
"""Recency of an expert that is not in RAM or not yet READY: never the smallest."""
_PINNED = 1 << 61
"""Added to the order of slots that must stay."""
_KEPT = 1 << 60
"""Added to the order of experts to evict last."""
_DUE = 1 << 59
"""Added to the order of experts that the running batch will probably ask for."""
_CANDIDATES = 32
"""Coldest slots around which room is looked for when slots have several sizes."""


class SlotTable:
    """The experts in RAM.

    Attributes, all (n_layers, n_experts) and shared with compiled code:
        resident: address of the READY slot plus its variant (`VARIANT_MASK`), 0 if there is none. A single word, because
            compiled code reads it without a lock, and two stores may be reordered on processors other than x86.
        variants: variant of the READY slot.
        stamps: value of `tick` at the last use; `ABSENT` if not READY.
        uses: (token, expert) pairs served since the model was opened, for the routing profile.
        demand: estimates how soon experts will be used again.
        unused_bytes: read ahead and given up without having been used.
        loading: 1 while the only slot is LOADING.

    Args:
        budget_bytes: size of the arena.
        n_layers, n_experts: one more than the largest block number, and the largest number of experts of a layer.
    """

    def __init__(self, budget_bytes: int, n_layers: int, n_experts: int) -> None:
        self.arena = Arena(budget_bytes)
        self.gate = Gate()
        self.resident: npt.NDArray[np.uint64] = np.zeros((n_layers, n_experts), np.uint64)
        self.variants: npt.NDArray[np.int32] = np.zeros((n_layers, n_experts), np.int32)
        self.stamps: npt.NDArray[np.int64] = np.full((n_layers, n_experts), ABSENT, np.int64)
        self.uses: npt.NDArray[np.int64] = np.zeros((n_layers, n_experts), np.int64)
        self.loading: npt.NDArray[np.uint8] = np.zeros((n_layers, n_experts), np.uint8)
        self.tick: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        self.demand = Demand(self.uses)
        self._due: npt.NDArray[np.int64] = np.zeros((n_layers, n_experts), np.int64)
        self._protection: npt.NDArray[np.int64] = np.zeros((n_layers, n_experts), np.int64)
        self._kept: npt.NDArray[np.int64] = np.zeros((n_layers, n_experts), np.int64)
        self._slots: dict[tuple[int, int], Slot] = {}
        self._by_address: dict[int, Slot] = {}
        self._addresses: list[int] = []  # of all slots, ascending
        self._withheld: list[Slot] = []  # ranges without pages, in the two above as slots that can't go
        self.n_evictions = 0
        self.unused_bytes = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self._slots.values()))

    @property
    def used_bytes(self) -> int:
        """Bytes taken by slots, page rounding included."""
        return self.arena.size_bytes - self.arena.free_bytes - self.withheld_bytes

    @property
    def withheld_bytes(self) -> int:
        """Bytes that are not used, because other programs need the memory."""
        return sum(slot.size_bytes for slot in self._withheld)

    def find(self, layer: int, expert: int) -> Slot | None:
        """The expert's slot, marked as most recently used; it may still be LOADING."""
        slot = self._slots.get((layer, expert))
        if slot is not None:
            self.touch(slot)
        return slot

    def touch(self, slot: Slot) -> None:
        """Makes a READY slot the last to go of those that are as likely to be used."""
        if slot.state is SlotState.READY:
            self.tick += 1
            self.stamps[slot.layer, slot.expert] = self.tick[0]

    def chill(self, slot: Slot) -> None:
        """Makes a READY slot the first to go of those that are as likely to be used."""
        if slot.state is SlotState.READY and self._slots.get((slot.layer, slot.expert)) is slot:
            self.stamps[slot.layer, slot.expert] = 0
            self.demand.lower(slot.layer)

    def peek(self, layer: int, expert: int) -> Slot | None:
        """The expert's slot without touching the order."""
        return self._slots.get((layer, expert))

    def reserve(
        self,
        layer: int,
        expert: int,
        size_bytes: int,
        *,
        variant: int = 0,
        evict: bool = True,
        retake: bool = True,
    ) -> Slot | None:
        """Allocates a LOADING slot for an expert without one, evicting unpinned READY slots, the least likely to be used first.

        Args:
            evict: False: use only free memory (guesses must not displace used experts).
            retake: memory that was given back to the system may be taken again if there is no other.

        Returns:
            The slot, or None if everything else is pinned or loading.
        """
        address = self._allocate(layer, size_bytes, evict=evict, retake=retake)
        if address is None:
            return None
        slot = Slot(layer, expert, address, size_bytes, variant)
        self._slots[layer, expert] = slot
        self.loading[layer, expert] = 1
        self._place(slot)
        return slot

    def _allocate(self, layer: int, size_bytes: int, *, evict: bool, retake: bool = True) -> int | None:
        address = self.arena.allocate(size_bytes)
        if address is None and evict:
            if not self._make_room(layer, size_bytes) and retake and self._withheld:
                # Slots of several sizes: what is withheld may be in the way of the only hole there can be.
                self.use_again(self.withheld_bytes)
                if (address := self.arena.allocate(size_bytes)) is None:
                    self._make_room(layer, size_bytes)
            address = address or self.arena.allocate(size_bytes)
        return address

    def _place(self, slot: Slot) -> None:
        self._by_address[slot.address] = slot
        bisect.insort(self._addresses, slot.address)

    def begin_batch(self, n_tokens: int) -> None:
        """A batch of so many tokens begins."""
        self._due[:] = 0
        self.demand.advance(n_tokens)

    def note_ahead(self, slot: Slot, n_bytes: int) -> None:
        """The slot is about to be filled with so many bytes that no call waits for."""
        slot.ahead_bytes, slot.uses_before = n_bytes, int(self.uses[slot.layer, slot.expert])

    def announce(self, layer: int, expert: int) -> None:
        """The running batch will probably ask for this expert: others go first, until `end_announced` or the next batch."""
        self._due[layer, expert] = _DUE

    def end_announced(self, layer: int) -> None:
        """This layer's call is over."""
        self._due[layer] = 0
        self.demand.lower(layer)

    def begin_upgrade(self, old: Slot, size_bytes: int, variant: int) -> Slot | None:
        """Allocates a second, LOADING slot for an expert whose READY slot `old` serves until `end_upgrade`; evicts others for it.

        Returns:
            The slot, or None if there is no room.
        """
        self.pin(old)
        address = self._allocate(old.layer, size_bytes, evict=True)
        if address is None:
            self.unpin(old)
            return None
        slot = Slot(old.layer, old.expert, address, size_bytes, variant, replaces=old)
        self._place(slot)
        return slot

    def end_upgrade(self, slot: Slot, *, complete: bool) -> None:
        """Puts the new slot into the old one's place, recency kept; or drops it if its read failed. While nothing is decoded."""
        old = slot.replaces
        assert old is not None
        slot.replaces = None
        self.unpin(old)
        if not complete:
            self._free(slot)
            return
        stamp = self.stamps[slot.layer, slot.expert]
        self.discard(old)
        self._slots[slot.layer, slot.expert] = slot
        self.ready(slot)
        self.stamps[slot.layer, slot.expert] = stamp
        self.demand.lower(slot.layer)

    def ready(self, slot: Slot) -> None:
        """The slot's bytes are complete: LOADING -> READY, the most recently used one."""
        slot.state = SlotState.READY
        self.tick += 1
        slot.ready_stamp = int(self.tick[0])
        self.stamps[slot.layer, slot.expert] = slot.ready_stamp
        self.demand.lower(slot.layer)
        self.variants[slot.layer, slot.expert] = slot.variant
        self.resident[slot.layer, slot.expert] = _word(slot)  # last: compiled code may use it from now on
        self.loading[slot.layer, slot.expert] = 0

    def pin(self, slot: Slot) -> None:
        """Keeps the slot until as many `unpin`s."""
        slot.pins += 1
        self._protection[slot.layer, slot.expert] = _PINNED

    def unpin(self, slot: Slot) -> None:
        """Takes one `pin` back."""
        slot.pins -= 1
        if slot.pins == 0:
            self._protection[slot.layer, slot.expert] = 0
            self.demand.lower(slot.layer)

    def keep(self, experts: Iterable[tuple[int, int]]) -> None:
        """Evicts these (layer, expert) only when nothing else can go; replaces an earlier set."""
        self._kept[:] = 0
        self.demand.lower_all()
        for layer, expert in experts:
            self._kept[layer, expert] = _KEPT

    def withhold(self, n_bytes: int, keep_bytes: int) -> int:
        """Gives memory back to the system: evicts the coldest slots, and uses no free memory until `use_again`.

        What compiled code is using stays, so unlike other evictions it may run beside it.

        Args:
            n_bytes: to evict.
            keep_bytes: of slots that stay, whatever is asked for.

        Returns:
            Bytes evicted.
        """
        evicted, used = 0, self.used_bytes
        order = self._order(len(self.stamps)).ravel()
        coldest, n_experts = order.argsort() if n_bytes > 0 else (), self.stamps.shape[1]
        with self.gate.closed() as layer:
            for at in coldest:
                if evicted >= n_bytes or order[at] >= _PINNED:
                    break
                slot = self._slots[divmod(int(at), n_experts)]
                size_bytes = align_up(slot.size_bytes, PAGE_BYTES)
                if used - evicted - size_bytes < keep_bytes:
                    break
                if slot.layer != layer:
                    self.discard(slot)
                    self.n_evictions += 1
                    evicted += size_bytes
        while hole := self.arena.largest_hole:
            address = self.arena.allocate(hole)
            assert address is not None
            self._withhold(address, hole)
            self.arena.drop(address, hole)
        return evicted

    def use_again(self, n_bytes: int) -> None:
        """Lets slots use up to this many bytes of what was withheld."""
        n_bytes = n_bytes // PAGE_BYTES * PAGE_BYTES
        while n_bytes > 0 and self._withheld:
            slot = self._withheld.pop()
            released = min(n_bytes, slot.size_bytes)
            self._forget(slot)
            if slot.size_bytes > released:
                self._withhold(slot.address, slot.size_bytes - released)
            self.arena.release(slot.address + slot.size_bytes - released, released)
            n_bytes -= released

    def _withhold(self, address: int, size_bytes: int) -> None:
        slot = Slot(-1, -1, address, size_bytes)
        self._withheld.append(slot)
        self._place(slot)

    def discard(self, slot: Slot) -> None:
        """Frees a slot in any state; for failed reads and for experts that moved elsewhere."""
        at = (slot.layer, slot.expert)
        if slot.state is SlotState.READY and self.uses[at] == slot.uses_before:
            self.unused_bytes += slot.ahead_bytes
        self.resident[at], self.stamps[at], self._protection[at], self.loading[at] = 0, ABSENT, 0, 0
        del self._slots[at]
        self._free(slot)

    def _forget(self, slot: Slot) -> None:
        del self._by_address[slot.address]
        del self._addresses[bisect.bisect_left(self._addresses, slot.address)]

    def _free(self, slot: Slot) -> None:
        self._forget(slot)
        self.arena.release(slot.address, slot.size_bytes)

    def _order(self, layer: int) -> npt.NDArray[np.int64]:
        """(n_layers, n_experts) the smaller, the sooner to go while `layer` is computed; from `_PINNED` on not at all. Valid until
        the next call."""
        return self.demand.order(layer, *self._others())

    def _others(self) -> tuple[npt.NDArray[np.int64], ...]:
        return self.stamps, self._protection, self._kept, self._due

    def _make_room(self, layer: int, size_bytes: int) -> bool:
        """Evicts until a hole is large enough for an expert of `layer`; False if that is impossible.

        With equal slot sizes, evicts the coldest. With several sizes one slot may not be enough; then the cheapest run of
        neighbours around the coldest slots is evicted, where a run's cost is that of its likeliest slot.
        """
        need = align_up(size_bytes, PAGE_BYTES)
        coldest, least = self.demand.first(layer, *self._others())
        if least >= _PINNED:
            return False
        slot = self._slots[divmod(coldest, self.stamps.shape[1])]
        run: list[Slot] | None = [slot]
        at = bisect.bisect_left(self._addresses, slot.address)
        if self._end(at) - self._begin(at) < need:
            order = self._order(layer)
            n_candidates = min(_CANDIDATES, len(self._slots))
            candidates = np.argpartition(order, n_candidates - 1, axis=None)[:n_candidates]
            run = self._cheapest_run(candidates, need, order)
            if run is None:  # rarely: only slots further up have evictable neighbours
                run = self._cheapest_run(np.flatnonzero(order < _PINNED), need, order)
        if run is None:
            return False
        for slot in run:
            self.discard(slot)
            self.n_evictions += 1
        return True

    def _cheapest_run(
        self, candidates: npt.NDArray[np.intp], need: int, order: npt.NDArray[np.int64]
    ) -> list[Slot] | None:
        """The best of the runs around these slots (flat indices into `order`); None if none of them has one."""
        best: tuple[int, list[Slot]] | None = None
        for at in candidates:
            slot = self._slots.get(divmod(int(at), order.shape[1]))
            run = self._run_around(slot, need, order) if slot is not None else None
            if run is not None:
                cost = max(int(order[s.layer, s.expert]) for s in run)
                if best is None or cost < best[0]:
                    best = cost, run
        return best[1] if best is not None else None

    def _run_around(self, slot: Slot, need: int, order: npt.NDArray[np.int64]) -> list[Slot] | None:
        """`slot` and enough neighbours, colder ones first, to free `need` contiguous bytes; None if a pinned one is in the
        way."""
        low = high = bisect.bisect_left(self._addresses, slot.address)
        run = [slot]
        if order[slot.layer, slot.expert] >= _PINNED:
            return None
        while self._end(high) - self._begin(low) < need:
            below = self._worth(low - 1, order)
            above = self._worth(high + 1, order)
            if min(below, above) >= _PINNED:
                return None
            if below <= above:
                low -= 1
                run.append(self._by_address[self._addresses[low]])
            else:
                high += 1
                run.append(self._by_address[self._addresses[high]])
        return run

    def _worth(self, index: int, order: npt.NDArray[np.int64]) -> int:
        if not 0 <= index < len(self._addresses):
            return ABSENT
        slot = self._by_address[self._addresses[index]]
        return ABSENT if slot.layer < 0 else int(order[slot.layer, slot.expert])

    def _begin(self, index: int) -> int:
        """End of the slot before the one at `index`: free bytes between them are the hole's."""
        if index == 0:
            return self.arena.address
        before = self._by_address[self._addresses[index - 1]]
        return before.address + align_up(before.size_bytes, PAGE_BYTES)

    def _end(self, index: int) -> int:
        if index + 1 < len(self._addresses):
            return self._addresses[index + 1]
        return self.arena.address + self.arena.size_bytes

    def check(self) -> None:
        """Asserts that slots are in the arena and don't overlap, that used plus free is everything, and that the arrays agree."""
        ranges = sorted((s.address, s.address + align_up(s.size_bytes, PAGE_BYTES)) for s in self._by_address.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges)), "slots overlap"
        assert all(self.arena.address <= a and b <= self.arena.address + self.arena.size_bytes for a, b in ranges)
        assert sum(b - a for a, b in ranges) + self.arena.free_bytes == self.arena.size_bytes, "bytes lost"
        ready = {(s.layer, s.expert): _word(s) for s in self._slots.values() if s.state is SlotState.READY}
        assert ready == {
            (int(a), int(b)): int(self.resident[a, b]) for a, b in zip(*self.resident.nonzero(), strict=True)
        }
        loading = {(s.layer, s.expert) for s in self._slots.values() if s.state is SlotState.LOADING}
        assert loading == {(int(a), int(b)) for a, b in zip(*self.loading.nonzero(), strict=True)}
        assert self._addresses == sorted(self._by_address), "addresses out of step"
        assert all(self._by_address[s.address] is s for s in self._slots.values())
        assert all((self.stamps[at] < ABSENT) == (at in ready) for at in np.ndindex(self.stamps.shape))
        at, least = self.demand.first(self.demand.layer, *self._others())
        assert least == self._order(self.demand.layer).min() == self._order(self.demand.layer).flat[at], (
            "not the coldest"
        )

    def close(self) -> None:
        """Frees all memory."""
        self._slots.clear()
        self._by_address.clear()
        self._addresses.clear()
        self._withheld.clear()
        self.resident[:] = 0
        self.arena.close()


def _word(slot: Slot) -> int:
    assert slot.address & VARIANT_MASK == 0
    assert slot.variant <= VARIANT_MASK
    return slot.address + slot.variant
