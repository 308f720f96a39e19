"""Replacement policies behind a small interface, to compare with the engine's slot table.

A policy orders the keys that are resident; it knows nothing of bytes, slots, files or threads. Its owner tells it every change:

    touch(key)          a resident key was used        insert(key)   a key became resident
    victim(evictable)   the key to evict, or None      remove(key)   a key left for another reason (failed read, moved away)

`victim` is handed a predicate that excludes keys of the running call and reads under way; the key that it returns is no longer
resident for the policy. All operations take constant time, except that `victim` steps over excluded keys (at most one layer's
experts), LFU's halving is amortised, and Belady's heap costs a logarithm.

Published traces (ds4, colibri, OLMoE, V4.1): recency beats static lists, LFU, 2Q and LRU-2 gain nothing at 30-50 % resident,
S3-FIFO sometimes. The engine goes by frequencies at several paces (`localrun.offload.cache.demand`).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from localrun.offload.cache.profile import Key

Evictable = Callable[[Key], bool]
"""False for keys that must stay: needed by the running call, or still being read."""


class Policy(Protocol):
    """Order of the resident keys. Not thread-safe: one caller."""

    def touch(self, key: Key) -> None:
        """A resident key was used; unknown keys are an error of the caller (KeyError)."""

    def insert(self, key: Key, *, cold: bool = False) -> None:
        """A key that was not resident became so.

        Args:
            cold: it was needed once and is no likelier than others to be needed again (see `slots.TAIL_TOKENS`). Policies that tell
                newcomers from regulars by themselves take no notice.
        """

    def remove(self, key: Key) -> None:
        """A resident key is gone without having been a victim; nothing is remembered of it."""

    def victim(self, evictable: Evictable) -> Key | None:
        """Removes and returns the key that should go first among the evictable ones; None if there is none."""

    def __len__(self) -> int:
        """Resident keys."""


class Lru:
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()  # coldest first

    def touch(self, key: Key) -> None:
        """See `Policy`."""
        self._order.move_to_end(key)

    def insert(self, key: Key, *, cold: bool = False) -> None:
        """See `Policy`."""
        self._order[key] = None
        if cold:
            self._order.move_to_end(key, last=False)

    def remove(self, key: Key) -> None:
        """See `Policy`."""
        del self._order[key]

    def victim(self, evictable: Evictable) -> Key | None:
        """See `Policy`."""
        return _pop_first(self._order, evictable)

    def __len__(self) -> int:
        return len(self._order)


class PinnedLru:
    """LRU for most, and a set of keys that go only when nothing else can.

    Exempting them outright could leave a long prompt without room; as a last resort they are evicted like the rest.

    Args:
        pinned: the likeliest keys, from a profile; small against the capacity, or everything else suffers.
    """

    def __init__(self, pinned: Iterable[Key] = ()) -> None:
        self._pinned = frozenset(pinned)
        self._kept: OrderedDict[Key, None] = OrderedDict()
        self._rest: OrderedDict[Key, None] = OrderedDict()

    @property
    def pinned(self) -> Collection[Key]:
        """Keys that are kept as long as possible, resident or not."""
        return self._pinned

    def pin(self, keys: Iterable[Key]) -> None:
        """Exchanges the pinned set; what is resident keeps its place in the order."""
        self._pinned = frozenset(keys)
        resident = [*self._rest, *self._kept]
        self._kept, self._rest = OrderedDict(), OrderedDict()
        for key in resident:
            self.insert(key)

    def _queue(self, key: Key) -> OrderedDict[Key, None]:
        return self._kept if key in self._pinned else self._rest

    def touch(self, key: Key) -> None:
        """See `Policy`."""
        self._queue(key).move_to_end(key)

    def insert(self, key: Key, *, cold: bool = False) -> None:
        """See `Policy`."""
        queue = self._queue(key)
        queue[key] = None
        if cold:
            queue.move_to_end(key, last=False)

    def remove(self, key: Key) -> None:
        """See `Policy`."""
        del self._queue(key)[key]

    def victim(self, evictable: Evictable) -> Key | None:
        """See `Policy`."""
        return _pop_first(self._rest, evictable) or _pop_first(self._kept, evictable)

    def __len__(self) -> int:
        return len(self._kept) + len(self._rest)


class Lfu:
    """Least frequently used first, equals by recency. Counts outlive residency and are halved now and then.

    Counts of all keys ever seen are kept (there are at most some ten thousand experts), so that an expert that comes back is
    known. Counts end at `CAP`: a few buckets instead of a heap.

    Args:
        halve_after: uses per resident key between two halvings; smaller forgets faster.
    """

    CAP = 63

    def __init__(self, halve_after: int = 16) -> None:
        self._halve_after = halve_after
        self._counts: defaultdict[Key, int] = defaultdict(int)
        self._buckets: list[OrderedDict[Key, None]] = [OrderedDict() for _ in range(self.CAP + 1)]
        self._n_resident = 0
        self._n_uses = 0

    def touch(self, key: Key) -> None:
        """See `Policy`."""
        count = self._counts[key]
        del self._buckets[count][key]
        self._place(key, count)

    def insert(self, key: Key, *, cold: bool = False) -> None:
        """See `Policy`."""
        self._n_resident += 1
        self._place(key, self._counts[key])

    def _place(self, key: Key, count: int) -> None:
        count = min(count + 1, self.CAP)
        self._counts[key] = count
        self._buckets[count][key] = None
        self._n_uses += 1
        if self._n_uses >= self._halve_after * max(64, self._n_resident):
            self._halve()

    def _halve(self) -> None:
        self._n_uses = 0
        for key in self._counts:
            self._counts[key] >>= 1
        old, self._buckets = self._buckets, [OrderedDict() for _ in range(self.CAP + 1)]
        for count, bucket in enumerate(old):
            self._buckets[count >> 1].update(bucket)

    def remove(self, key: Key) -> None:
        """See `Policy`."""
        del self._buckets[self._counts[key]][key]
        self._n_resident -= 1

    def victim(self, evictable: Evictable) -> Key | None:
        """See `Policy`."""
        for bucket in self._buckets:
            key = _pop_first(bucket, evictable)
            if key is not None:
                self._n_resident -= 1
                return key
        return None

    def __len__(self) -> int:
        return self._n_resident


class S3Fifo:
    """S3-FIFO (Yang et al., SOSP 2023): a small queue for newcomers, a main queue, and a memory of who was sent away.

    A newcomer that is not used again leaves from the small queue; one that was, or that comes back soon, gets into the main
    queue, where use buys further rounds. Departure from the paper: shares are of the keys that are resident, because the
    capacity is bytes, which the policy does not know.

    Args:
        small_share: of the residents that may be in the small queue before it gives up victims.
    """

    MAX_USES = 3

    def __init__(self, small_share: float = 0.1) -> None:
        self._small_share = small_share
        self._small: OrderedDict[Key, None] = OrderedDict()
        self._main: OrderedDict[Key, None] = OrderedDict()
        self._ghost: OrderedDict[Key, None] = OrderedDict()
        self._uses: dict[Key, int] = {}

    def touch(self, key: Key) -> None:
        """See `Policy`."""
        self._uses[key] = min(self._uses[key] + 1, self.MAX_USES)

    def insert(self, key: Key, *, cold: bool = False) -> None:
        """See `Policy`."""
        self._uses[key] = 0
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = None
        else:
            self._small[key] = None

    def remove(self, key: Key) -> None:
        """See `Policy`."""
        del self._uses[key]
        self._small.pop(key, None)
        self._main.pop(key, None)

    def victim(self, evictable: Evictable) -> Key | None:
        """See `Policy`."""
        small_first = len(self._small) > self._small_share * len(self)
        for take in (self._from_small, self._from_main) if small_first else (self._from_main, self._from_small):
            key = take(evictable)
            if key is not None:
                del self._uses[key]
                return key
        return None

    def _from_small(self, evictable: Evictable) -> Key | None:
        for key in _keys_now(self._small):
            if self._uses[key] > 1:
                self._uses[key] = 0
                del self._small[key]
                self._main[key] = None
            elif evictable(key):
                del self._small[key]
                self._remember(key)
                return key
        return None

    def _from_main(self, evictable: Evictable) -> Key | None:
        for _ in range(self.MAX_USES + 1):  # every round takes one use from every key: the last one finds a victim
            for key in _keys_now(self._main):
                if not evictable(key):
                    continue
                if self._uses[key] == 0:
                    del self._main[key]
                    return key
                self._uses[key] -= 1
                self._main.move_to_end(key)
        return None

    def _remember(self, key: Key) -> None:
        self._ghost[key] = None
        while len(self._ghost) > max(1, len(self._main)):
            self._ghost.popitem(last=False)

    def __len__(self) -> int:
        return len(self._uses)


class Belady:
    """The bound: evicts the key whose next use is farthest away. Needs the future, so for the simulator only.

    Args:
        future: every request of the trace in order, as (time, key); times rise, one per layer call. Each `touch` or `insert`
            consumes its key's next request, in whatever order the keys of one call come.
    """

    NEVER = 1 << 62

    def __init__(self, future: Iterable[tuple[int, Key]]) -> None:
        self._uses: defaultdict[Key, deque[int]] = defaultdict(deque)
        for time, key in future:
            self._uses[key].append(time)
        self._next: dict[Key, int] = {}
        self._heap: list[tuple[int, Key]] = []  # (-next use, key); entries that disagree with _next are stale

    def touch(self, key: Key) -> None:
        """See `Policy`."""
        uses = self._uses[key]
        if uses:
            uses.popleft()
        self._next[key] = uses[0] if uses else self.NEVER
        heapq.heappush(self._heap, (-self._next[key], key))

    def insert(self, key: Key, *, cold: bool = False) -> None:
        """See `Policy`."""
        self.touch(key)

    def remove(self, key: Key) -> None:
        """See `Policy`."""
        del self._next[key]

    def victim(self, evictable: Evictable) -> Key | None:
        """See `Policy`."""
        kept = []
        found = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            if self._next.get(entry[1]) != -entry[0]:
                continue
            if evictable(entry[1]):
                found = entry[1]
                del self._next[found]
            else:
                kept.append(entry)
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return found

    def __len__(self) -> int:
        return len(self._next)


POLICIES: dict[str, Callable[[], Policy]] = {"lru": Lru, "lfu": Lfu, "s3fifo": S3Fifo, "lru+pin": PinnedLru}
"""Policies that work without knowing the future, by the name that options and reports use."""


def _pop_first(order: OrderedDict[Key, None], evictable: Evictable) -> Key | None:
    for key in order:
        if evictable(key):
            del order[key]  # the iteration ends here
            return key
    return None


def _keys_now(queue: OrderedDict[Key, None]) -> Iterator[Key]:
    """The keys that are in the queue now, each once, while the caller changes the queue."""
    for _ in range(len(queue)):
        key = next(iter(queue), None)
        if key is None:
            return
        yield key
        if next(iter(queue), None) == key:  # left in place: step over it
            queue.move_to_end(key)
