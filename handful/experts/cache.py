"""Which experts stay in memory: policies that name the one to give way, and a count of what each would have missed.

A policy is told of every call and use, and asked for a victim when there is no room. Keys are (layer, expert). Nothing
here knows of tensors, files or threads.

    lru       the one not used for the longest time
    next-use  the one whose next use is expected latest, by how often tokens chose it and how far away its layer is

`belady` knows the future: no policy misses less.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from handful.errors import ConfigError

__all__ = ["LRU", "POLICIES", "Call", "Key", "NextUse", "Policy", "belady", "check_policy", "play", "simulate"]

Key = tuple[int, int]  # (layer, expert)
Floats = npt.NDArray[np.float64]
# Tokens after which a token counts half, and what the two shares weigh (docs/memory.md says on which texts they were
# chosen): half or twice of them hit as often within a point.
HALF_LIVES, WEIGHTS = (1.0, 32.0), np.array((0.25, 0.75))
NEVER = 1e-9  # a chance of none
NOTHING: frozenset[Key] = frozenset()


class Call(NamedTuple):
    """What one call of a layer needs: how many of its tokens chose each of the experts that any of them chose."""

    layer: int
    tokens: int
    counts: Mapping[int, int]

    @property
    def keys(self) -> list[Key]:
        """The experts, each once."""
        return [(self.layer, expert) for expert in self.counts]


class Policy(Protocol):
    """What a cache asks. Every key is added once before it is used, and is gone when `evict` or `remove` named it."""

    def call(self, call: Call) -> None:
        """What is needed next, in the `use` and `add` that follow."""

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

    def __init__(self, layers: int, experts: int) -> None:
        self._held: OrderedDict[Key, None] = OrderedDict()  # the oldest use first

    def call(self, call: Call) -> None:
        pass

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


class NextUse:
    """The one whose next use is expected latest gives way: what Belady would do, as far as it can be known.

    A layer comes again after as many others as lie between, and whether it then needs an expert is a chance p: the
    expected time is the way there and 1/p - 1 further rounds. p is the share of the layer's tokens that chose the
    expert, where a token counts half as much after each of HALF_LIVES further tokens: a mean of what is popular with
    the text and of what the last token chose. All tokens of a call count alike.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self._share = np.zeros((len(HALF_LIVES), layers, experts))
        self._held = np.zeros((layers, experts), dtype=bool)
        self._layers = np.arange(layers)
        self._layer = -1  # the last that was called
        self._due: Floats | None = None  # the rounds until each is needed, since then

    def call(self, call: Call) -> None:
        for share, half_life in zip(self._share[:, call.layer], HALF_LIVES, strict=True):
            kept = 0.5 ** (call.tokens / half_life)
            share *= kept
            share[list(call.counts)] += (1 - kept) / call.tokens * np.fromiter(call.counts.values(), float)
        self._layer, self._due = call.layer, None

    def use(self, key: Key) -> None:
        pass

    def add(self, key: Key) -> None:
        self._held[key] = True

    def evict(self, pinned: Container[Key] = NOTHING) -> Key | None:
        if self._due is None:
            self._due = self.due()
        due = np.where(self._held, self._due, -1.0)
        while True:
            layer, expert = divmod(int(due.argmax()), due.shape[1])
            key = (layer, expert)
            if due[key] < 0:
                return None
            if key not in pinned:
                self._held[key] = False
                return key
            due[key] = -1.0

    def remove(self, key: Key) -> None:
        self._held[key] = False

    def due(self) -> Floats:
        """The rounds until each expert is needed, as expected after the last call, (layers, experts)."""
        ahead = (self._layers - self._layer - 1) % len(self._layers) / len(self._layers)
        chance = np.tensordot(WEIGHTS, self._share, 1)
        return ahead[:, None] + 1 / np.maximum(chance, NEVER) - 1


POLICIES: dict[str, Callable[[int, int], Policy]] = {"lru": LRU, "next-use": NextUse}  # of (layers, experts)


def check_policy(name: str) -> None:
    """ConfigError unless there is a policy of that name."""
    if name not in POLICIES:
        raise ConfigError(f"policy = {name!r}: one of {', '.join(POLICIES)}")


def simulate(policy: str, calls: Sequence[Call], capacity: int) -> list[list[bool]]:
    """Whether each key of each call is a hit, in a cache of `capacity` keys.

    Where the keys of a call fit, none of them gives way to another. ConfigError for another policy.
    """
    check_policy(policy)
    layers = max((call.layer for call in calls), default=-1) + 1
    experts = max((max(call.counts, default=-1) for call in calls), default=-1) + 1
    return play(POLICIES[policy](layers, experts), calls, capacity)


def play(state: Policy, calls: Iterable[Call], capacity: int) -> list[list[bool]]:
    """`simulate`, with a policy that is there."""
    held: set[Key] = set()
    found = []
    for call in calls:
        keys = call.keys
        wanted = set(keys) if len(keys) <= capacity else NOTHING
        state.call(call)
        found.append([key in held for key in keys])
        new = [key for key in keys if key not in held]
        for key in keys:
            if key in held:
                state.use(key)
        for key in new:
            if len(held) >= capacity:
                victim = state.evict(wanted)
                assert victim is not None, "a call that fits leaves one that is not its own"
                held.remove(victim)
            held.add(key)
            state.add(key)
    return found


def belady(calls: Sequence[Call], capacity: int) -> list[list[bool]]:
    """`simulate`, by one who knows all that will be needed: what is needed latest gives way (Belady 1966). A bound on
    the hits, not a policy."""
    flat = [key for call in calls for key in call.keys]
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
    for call in calls:
        hits = []
        for key in call.keys:
            hits.append(key in held)
            # What just came is not kept either, if it is needed later than all others.
            held.add(key)
            heapq.heappush(heap, (-again[i], i))
            i += 1
            if len(held) > capacity:
                held.remove(flat[heapq.heappop(heap)[1]])
        found.append(hits)
    return found
