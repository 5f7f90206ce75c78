"""Which experts stay in memory: policies that name the one to give way, and a count of what each would have missed.

A policy is told of every use, and asked for a victim when there is no room. Keys are anything hashable; the store's are
(layer, expert). Nothing here knows of tensors, files or threads.

    lru      the one not used for the longest time
    lfu      the one used least often, where a use counts less the older it is (ageing)
    s3-fifo  three queues: what was used but once leaves before what was used again, so that a scan, such as a long
             prompt, does not empty the cache

`belady` knows the future: no policy misses less.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from typing import Protocol

from handful.errors import ConfigError

__all__ = ["LFU", "LRU", "POLICIES", "S3FIFO", "Policy", "belady", "check_policy", "simulate"]

Key = Hashable
# Of 1 to 256, what misses least on the routings that docs/memory.md tells of, though 4 and 16 are next to as good.
HALF_LIFE = 8
NOTHING: frozenset[Key] = frozenset()


class Policy(Protocol):
    """What a cache asks. Every key is added once before it is used, and is gone when `evict` or `remove` named it."""

    def use(self, key: Key) -> None:
        """A key that is held is needed."""

    def add(self, key: Key) -> None:
        """A key that was not held is needed, and is held from now on."""

    def evict(self, pinned: Container[Key] = NOTHING) -> Key | None:
        """Let go of a key that is not pinned; None if all are."""

    def remove(self, key: Key) -> None:
        """A key is held no more, for reasons of the cache's own."""


class LRU:
    """The least recently used gives way."""

    def __init__(self, capacity: int) -> None:
        self._held: OrderedDict[Key, None] = OrderedDict()  # the oldest use first

    def use(self, key: Key) -> None:
        self._held.move_to_end(key)

    def add(self, key: Key) -> None:
        self._held[key] = None

    def evict(self, pinned: Container[Key] = NOTHING) -> Key | None:
        victim = next((key for key in self._held if key not in pinned), None)
        if victim is not None:
            del self._held[victim]
        return victim

    def remove(self, key: Key) -> None:
        del self._held[key]


class LFU:
    """The least frequently used gives way, of equals the one whose last use is the oldest.

    A use counts half as much after HALF_LIFE times the capacity of further uses: what was popular with another text
    must not stay for ever. The count of what was let go is kept, so that what comes back is not taken for new.
    """

    def __init__(self, capacity: int) -> None:
        self._growth = 2.0 ** (1.0 / (HALF_LIFE * max(1, capacity)))
        self._one = 1.0  # what a use counts now: it grows, instead of all others falling
        self._score: dict[Key, float] = {}  # of every key ever seen
        self._turn = 0
        self._held: dict[Key, int] = {}  # key -> the turn of its last use
        # (score, turn, key), one for each key that is held. It may be older than the key's last use: both only grow,
        # so that the least entry, once it is brought up to date and still the least, is the one to go.
        self._heap: list[tuple[float, int, Key]] = []
        self._queued: set[Key] = set()  # those that have an entry; of `remove`d ones it is still there

    def use(self, key: Key) -> None:
        self._one *= self._growth
        self._score[key] = self._score.get(key, 0.0) + self._one
        self._turn += 1
        self._held[key] = self._turn
        if self._one > 1e100:
            self._score = {other: score / self._one for other, score in self._score.items()}
            self._one = 1.0
            self._heap = [(self._score[other], turn, other) for other, turn in self._held.items()]
            heapq.heapify(self._heap)
            self._queued = set(self._held)

    def add(self, key: Key) -> None:
        self.use(key)
        if key not in self._queued:
            self._queued.add(key)
            heapq.heappush(self._heap, (self._score[key], self._turn, key))

    def evict(self, pinned: Container[Key] = NOTHING) -> Key | None:
        aside = []
        victim = None
        while self._heap and victim is None:
            entry = heapq.heappop(self._heap)
            key = entry[2]
            turn = self._held.get(key)
            if turn is None:
                self._queued.discard(key)
            elif turn != entry[1]:
                heapq.heappush(self._heap, (self._score[key], turn, key))
            elif key in pinned:
                aside.append(entry)
            else:
                victim = key
                del self._held[key]
                self._queued.discard(key)
        for entry in aside:
            heapq.heappush(self._heap, entry)
        return victim

    def remove(self, key: Key) -> None:
        del self._held[key]


class S3FIFO:
    """Three first-in-first-out queues (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

    What is new waits in a small queue, a tenth of the capacity. At its end, what was used again moves on to the main
    queue and the rest goes; its name is kept in a ghost queue, as long as the main one, and what comes back while its
    name is there goes straight to the main queue. There, a use (counted up to three) buys another round.
    """

    def __init__(self, capacity: int) -> None:
        self._small_size = max(1, capacity // 10)
        self._ghosts = max(1, capacity - self._small_size)
        self._small: OrderedDict[Key, int] = OrderedDict()  # key -> uses since it came, at most 3
        self._main: OrderedDict[Key, int] = OrderedDict()
        self._ghost: OrderedDict[Key, None] = OrderedDict()

    def use(self, key: Key) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(3, queue[key] + 1)

    def add(self, key: Key) -> None:
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def evict(self, pinned: Container[Key] = NOTHING) -> Key | None:
        first = (self._from_small, self._from_main)
        if len(self._small) < self._small_size:
            first = first[::-1]
        for queue in first:
            victim = queue(pinned)
            if victim is not None:
                return victim
        return None

    def _from_small(self, pinned: Container[Key]) -> Key | None:
        for key in list(self._small):
            if key in pinned:
                continue
            if self._small.pop(key) > 0:
                self._main[key] = 0
                continue
            self._ghost[key] = None
            if len(self._ghost) > self._ghosts:
                self._ghost.popitem(last=False)
            return key
        return None

    def _from_main(self, pinned: Container[Key]) -> Key | None:
        # Each round takes a use from everyone, and there are at most three.
        for _ in range(4):
            for key in list(self._main):
                if key in pinned:
                    continue
                uses = self._main.pop(key)
                if uses == 0:
                    return key
                self._main[key] = uses - 1
        return None

    def remove(self, key: Key) -> None:
        del (self._small if key in self._small else self._main)[key]


POLICIES: dict[str, Callable[[int], Policy]] = {"lru": LRU, "lfu": LFU, "s3-fifo": S3FIFO}


def check_policy(name: str) -> None:
    """ConfigError unless there is a policy of that name."""
    if name not in POLICIES:
        raise ConfigError(f"policy = {name!r}: one of {', '.join(POLICIES)}")


def simulate(policy: str, calls: Iterable[Sequence[Key]], capacity: int) -> list[list[bool]]:
    """Whether each key of each call is a hit, in a cache of `capacity` keys.

    A call is the keys that are needed together, each once: where they fit, none of them gives way to another.
    ConfigError for another policy.
    """
    check_policy(policy)
    state = POLICIES[policy](capacity)
    held: set[Key] = set()
    found = []
    for keys in calls:
        wanted = set(keys) if len(keys) <= capacity else NOTHING
        known = [key for key in keys if key in held]
        for key in known:
            state.use(key)
        new = [key for key in keys if key not in held]
        found.append([key in held for key in keys])
        for key in new:
            if len(held) >= capacity:
                victim = state.evict(wanted)
                assert victim is not None, "a call that fits leaves one that is not its own"
                held.remove(victim)
            held.add(key)
            state.add(key)
    return found


def belady(calls: Sequence[Sequence[Key]], capacity: int) -> list[list[bool]]:
    """`simulate`, by one who knows all that will be needed: what is needed latest gives way (Belady 1966). A bound on
    the hits, not a policy."""
    flat = [key for keys in calls for key in keys]
    again = [len(flat)] * len(flat)  # when each is needed next; beyond the end: never
    last: dict[Key, int] = {}
    for i in range(len(flat) - 1, -1, -1):
        again[i] = last.get(flat[i], len(flat))
        last[flat[i]] = i
    held: set[Key] = set()
    # (-when it is needed next, its last use). An entry whose key was needed since then names a time that has passed, so
    # it lies below those of all keys that are held: the first entry is never out of date.
    heap: list[tuple[int, int]] = []
    found = []
    i = 0
    for keys in calls:
        hits = []
        for key in keys:
            hits.append(key in held)
            # What just came is not kept either, if it is needed later than all others.
            held.add(key)
            heapq.heappush(heap, (-again[i], i))
            i += 1
            if len(held) > capacity:
                held.remove(flat[heapq.heappop(heap)[1]])
        found.append(hits)
    return found
