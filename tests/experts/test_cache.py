"""The policies, on sequences short enough to follow by hand."""

from __future__ import annotations

import random
import time
from collections.abc import Container, Hashable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handful.errors import ConfigError
from handful.experts.cache import HALF_LIFE, LFU, LRU, POLICIES, S3FIFO, Policy, belady, simulate


def hits(policy: str, keys: str, capacity: int) -> str:
    """A word of h and m: what became of each key, needed one by one."""
    return word(simulate(policy, list(keys), capacity))


def best(keys: str, capacity: int) -> str:
    return word(belady(list(keys), capacity))


def word(found: list[list[bool]]) -> str:
    return "".join("h" if hit else "m" for call in found for hit in call)


def evicted(policy: Policy, count: int, pinned: Sequence[Hashable] = ()) -> list[Hashable]:
    return [policy.evict(set(pinned)) for _ in range(count)]


def filled(policy: Policy, adds: str, uses: str = "") -> Policy:
    for key in adds:
        policy.add(key)
    for key in uses:
        policy.use(key)
    return policy


def test_lru_lets_the_oldest_use_go() -> None:
    assert evicted(filled(LRU(3), "abc", "a"), 3) == ["b", "c", "a"]
    assert hits("lru", "abcabc", 3) == "mmmhhh"
    assert hits("lru", "abcabc", 2) == "mmmmmm"  # a cycle longer than the cache: the worst it can meet
    assert hits("lru", "abacab", 2) == "mmhmhm"


def test_lfu_lets_the_least_used_go_and_of_equals_the_oldest() -> None:
    assert evicted(filled(LFU(9), "abc", "aabb"), 3) == ["c", "a", "b"]
    assert evicted(filled(LFU(9), "abc", "cba"), 3) == ["c", "b", "a"]
    # What is used all the time survives a scan that would push it out of an LRU of as many.
    assert hits("lfu", "aaabcdea", 2) == "mhhmmmmh"
    assert hits("lru", "aaabcdea", 2) == "mhhmmmmm"


def test_lfu_remembers_what_it_let_go() -> None:
    policy = filled(LFU(9), "ab", "aaab")
    policy.remove("a")
    policy.add("c")
    policy.use("c")
    policy.use("c")
    policy.add("a")  # its fifth use; c's are three, b's two
    assert evicted(policy, 3) == ["b", "c", "a"]


def test_lfu_forgets_in_time() -> None:
    def after(rounds: int) -> Hashable:
        policy = filled(LFU(2), "ab", "a" * 8)
        for _ in range(rounds):
            policy.use("b")
        return policy.evict()

    assert after(3) == "b"
    assert after(9) == "a"
    # Eight old uses count less than five new ones once there were others, 8 times the capacity for each halving.
    policy = filled(LFU(2), "ax", "a" * 8 + "x" * 64)
    policy.remove("x")
    filled(policy, "b", "b" * 4)
    assert policy.evict() == "a"


def test_lfu_counts_on_after_very_many_uses() -> None:
    policy = filled(LFU(1), "abc")
    for _ in range(6000):  # a use would count 2^750 by then: beyond what is let grow
        policy.use("a")
    policy.use("b")
    assert evicted(policy, 3) == ["c", "b", "a"]


class PlainLFU:
    """The definition: of all that are held and not pinned, the one with the lowest score, of equals the oldest use."""

    def __init__(self, capacity: int) -> None:
        self.growth = 2.0 ** (1.0 / (HALF_LIFE * capacity))
        self.score: dict[Hashable, float] = {}
        self.uses: list[Hashable] = []
        self.held: set[Hashable] = set()

    def use(self, key: Hashable) -> None:
        self.uses.append(key)
        self.score[key] = self.score.get(key, 0.0) + self.growth ** len(self.uses)

    def add(self, key: Hashable) -> None:
        self.held.add(key)
        self.use(key)

    def evict(self, pinned: Container[Hashable] = frozenset()) -> Hashable | None:
        last = {key: i for i, key in enumerate(self.uses)}
        free = [key for key in self.held if key not in pinned]
        victim = min(free, key=lambda key: (round(self.score[key], 9), last[key]), default=None)
        self.held.discard(victim)
        return victim

    def remove(self, key: Hashable) -> None:
        self.held.remove(key)


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("uepr"), st.sampled_from("abcdef")), max_size=60))
@settings(max_examples=300, deadline=None)
def test_lfu_is_what_it_says(capacity: int, steps: list[tuple[str, str]]) -> None:
    policy, plain = LFU(capacity), PlainLFU(capacity)
    for what, key in steps:
        if what == "u":
            for each in (policy, plain):
                (each.use if key in plain.held else each.add)(key)
        elif what == "r" and key in plain.held:
            policy.remove(key)
            plain.remove(key)
        elif what in "ep":
            pinned = {key} if what == "p" else set()
            assert policy.evict(pinned) == plain.evict(pinned)
    assert evicted(policy, 7) == evicted(plain, 7)


def test_s3_fifo_keeps_what_was_used_again_from_a_scan() -> None:
    # Capacity 10: the small queue is 1. a and b were used again and move on; the scan goes first in, first out.
    policy = filled(S3FIFO(10), "abcde", "ab")
    assert evicted(policy, 3) == ["c", "d", "e"]
    filled(policy, "fg")
    assert evicted(policy, 1) == ["f"]
    assert evicted(policy, 3) == ["g", "a", "b"]


def test_s3_fifo_takes_back_what_its_ghost_queue_names() -> None:
    policy = filled(S3FIFO(10), "abc")
    assert evicted(policy, 1) == ["a"]
    filled(policy, "ad")  # a is known: it goes to the main queue, behind nobody
    assert evicted(policy, 3) == ["b", "c", "d"]
    assert evicted(policy, 1) == ["a"]


def test_s3_fifo_counts_at_most_three_uses() -> None:
    policy = filled(S3FIFO(10), "abc", "ab")
    assert evicted(policy, 1) == ["c"]  # a and b have moved on, and are counted anew
    filled(policy, "", "a" * 9 + "bbb")
    assert evicted(policy, 2) == ["a", "b"]


def test_belady_lets_go_what_is_needed_latest() -> None:
    # c is needed later than both others, or never: it is not kept.
    assert best("abacab", 2) == "mmhmhh"
    assert best("abcab", 2) == "mmmhh"
    assert best("abcabc", 2) == "mmmhhm"
    assert best("abcabcabc", 2) == "mmmhhmhhm"


def plain_belady(calls: Sequence[Sequence[str]], capacity: int) -> list[list[bool]]:
    """The definition: of all that is held, what is needed latest goes."""
    flat = "".join(key for keys in calls for key in keys)
    held: set[str] = set()
    found: list[bool] = []
    for i, key in enumerate(flat):
        found.append(key in held)
        held.add(key)
        if len(held) > capacity:
            held.remove(max(held, key=lambda other: flat.find(other, i + 1) % (len(flat) + 1)))  # -1 is after the end
    left = iter(found)
    return [[next(left) for _ in keys] for keys in calls]


@given(calls=st.lists(st.text("abcdefgh", max_size=5), max_size=25), capacity=st.integers(0, 9))
@settings(max_examples=300)
def test_belady_is_what_it_is_defined_as(calls: list[str], capacity: int) -> None:
    assert belady(calls, capacity) == plain_belady(calls, capacity)


def test_a_large_cache_takes_belady_no_longer_than_a_small_one() -> None:
    draw = random.Random(0)
    calls = [[draw.randrange(20_000)] for _ in range(20_000)]

    def seconds(capacity: int) -> float:
        began = time.process_time()
        belady(calls, capacity)
        return time.process_time() - began

    # Where each miss looks at all that is held, it takes forty times as long.
    assert min(seconds(4000) for _ in range(3)) < 8 * min(seconds(8) for _ in range(3))


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_pinned_stays(name: str) -> None:
    policy = filled(POLICIES[name](4), "abcd", "ccdd")
    assert set(evicted(policy, 2, pinned="ac")) == {"b", "d"}
    assert evicted(policy, 1, pinned="ac") == [None]
    assert set(evicted(policy, 2)) == {"a", "c"}
    assert evicted(policy, 1) == [None]


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_removed_is_gone(name: str) -> None:
    policy = filled(POLICIES[name](4), "abc", "ab")
    policy.remove("b")
    assert set(evicted(policy, 3)) == {"a", "c", None}


@pytest.mark.parametrize("name", POLICIES)
def test_a_call_that_fits_does_not_push_itself_out(name: str) -> None:
    # Three needed together in a cache of three: the two that are there must not give way to the third.
    assert word(simulate(name, ["ab", "c", "abd", "abd"], 3)) == "mmmhhmhhh"


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_holds_more_than_it_may_or_beats_the_best(name: str) -> None:
    draw = random.Random(0)
    calls = [draw.sample(range(30), 4) for _ in range(400)]
    for capacity in (4, 9, 20):
        found = sum(hit for call in simulate(name, calls, capacity) for hit in call)
        bound = sum(hit for call in belady(calls, capacity) for hit in call)
        assert 0 < found <= bound
    assert sum(hit for call in simulate(name, calls, 30) for hit in call) == 1600 - 30


@pytest.mark.parametrize("name", ["lfu", "s3-fifo"])
def test_a_long_scan_does_not_empty_the_cache(name: str) -> None:
    popular = [[0, 1, 2, 3]] * 12
    scan = [[i] for i in range(100, 160)]
    after = simulate(name, [*popular, *scan, *popular], 8)[-12]
    assert after == [True] * 4
    assert simulate("lru", [*popular, *scan, *popular], 8)[-12] == [False] * 4


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy = 'fifo': one of lru, lfu, s3-fifo"):
        simulate("fifo", [], 3)
