"""The policies, on sequences short enough to follow by hand."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handful.errors import ConfigError
from handful.experts.cache import HALF_LIVES, LRU, POLICIES, WEIGHTS, Call, Key, NextUse, Policy, belady, simulate


def key(letter: str) -> Key:
    """a to z are the experts of layer 0, A to Z those of layer 1."""
    return (0, ord(letter) - ord("a")) if letter.islower() else (1, ord(letter) - ord("A"))


def letters(keys: Sequence[Key | None]) -> str:
    return "".join("-" if k is None else chr(ord("Aa"[k[0] == 0]) + k[1]) for k in keys)


def call(word: str, tokens: int = 1) -> Call:
    """What one call of a layer needs; a letter twice was chosen by two tokens."""
    counts = Counter(key(letter)[1] for letter in word)
    return Call(key(word[0])[0] if word else 0, tokens, counts)


def calls(words: Sequence[str]) -> list[Call]:
    return [call(word) for word in words]


def hits(policy: str, words: Sequence[str], capacity: int) -> str:
    """A word of h and m: what became of each key."""
    return word(simulate(policy, calls(words), capacity))


def best(words: Sequence[str], capacity: int) -> str:
    return word(belady(calls(words), capacity))


def word(found: list[list[bool]]) -> str:
    return "".join("h" if hit else "m" for call in found for hit in call)


def evicted(policy: Policy, count: int, pinned: str = "") -> str:
    return letters([policy.evict({key(letter) for letter in pinned}) for _ in range(count)])


def filled(policy: Policy, adds: str, uses: str = "") -> Policy:
    for letter in adds:
        policy.call(call(letter))
        policy.add(key(letter))
    for letter in uses:
        policy.call(call(letter))
        policy.use(key(letter))
    return policy


def test_lru_lets_the_oldest_use_go() -> None:
    assert evicted(filled(LRU(1, 3), "abc", "a"), 3) == "bca"
    assert hits("lru", "abcabc", 3) == "mmmhhh"
    assert hits("lru", "abcabc", 2) == "mmmmmm"  # a cycle longer than the cache: the worst it can meet
    assert hits("lru", "abacab", 2) == "mmhmhm"


def test_next_use_keeps_what_tokens_chose_often_and_what_the_last_one_chose() -> None:
    assert evicted(filled(NextUse(1, 3), "abc"), 3) == "abc"  # used once each: the last one's share is the largest
    # a has 0.75 · 0.16 of nine older tokens and 0.25 · 0.25 of the last one, c 0.75 · 0.04 and 0.25 · 0.5.
    assert evicted(filled(NextUse(1, 3), "abc", "aaaaaaaabc"), 3) == "bca"
    # What is used all the time survives a scan that would push it out of an LRU of as many.
    assert hits("next-use", "aaaaaaaaabcdea", 2) == "mhhhhhhhhmmmmh"
    assert hits("lru", "aaaaaaaaabcdea", 2) == "mhhhhhhhhmmmmm"


def test_next_use_remembers_what_it_let_go() -> None:
    policy = filled(NextUse(1, 4), "a", "aaaaa")
    policy.remove(key("a"))
    filled(policy, "bcda")
    # a's share of six tokens and the last one; d is newer than c, and c than b.
    assert evicted(policy, 4) == "bcda"


def test_next_use_forgets_in_time() -> None:
    def after(rounds: int) -> str:
        return evicted(filled(NextUse(1, 3), "abc", "a" * 40 + "b" * rounds + "cc"), 1, pinned="c")

    # Of a's forty tokens 0.56 are left at first, and 0.28 after 32 others, which have 0.48.
    assert after(1) == "b"
    assert after(9) == "b"
    assert after(32) == "a"


def test_next_use_counts_the_tokens_of_a_call() -> None:
    # A prompt of four tokens: three chose b, one chose a.
    policy = NextUse(1, 2)
    policy.call(call("abbb", tokens=4))
    for letter in "ab":
        policy.add(key(letter))
    assert evicted(policy, 1) == "a"


def test_next_use_lets_the_layer_go_that_has_just_been() -> None:
    # One expert of each of two layers, used by every token: the layer that has just run is needed a round later.
    assert evicted(filled(NextUse(2, 1), "aA", "aA" * 200), 2) == "Aa"
    assert evicted(filled(NextUse(2, 1), "aA", "aA" * 200 + "a"), 2) == "aA"


class PlainNextUse:
    """When each is expected to be needed, by the definition: shares are sums over all calls of its layer."""

    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.experts = layers, experts
        self.calls: list[Call] = []
        self.held: set[Key] = set()

    def call(self, call: Call) -> None:
        self.calls.append(call)

    def use(self, key: Key) -> None:
        pass

    def add(self, key: Key) -> None:
        self.held.add(key)

    def due(self, key: Key) -> float:
        layer, expert = key
        chance = 0.0
        for half_life, weight in zip(HALF_LIVES, WEIGHTS, strict=True):
            later = 0  # tokens of the layer since then
            for call in reversed([call for call in self.calls if call.layer == layer]):
                part = 0.5 ** (later / half_life) - 0.5 ** ((later + call.tokens) / half_life)
                chance += weight * part * call.counts.get(expert, 0) / call.tokens
                later += call.tokens
        rounds = self.calls[-1].layer if self.calls else -1
        return (layer - rounds - 1) % self.layers / self.layers + 1 / max(chance, 1e-9)

    def remove(self, key: Key) -> None:
        self.held.remove(key)


@given(
    st.lists(st.tuples(st.sampled_from("ccepr"), st.text("abcd", min_size=1, max_size=6), st.booleans()), max_size=30)
)
@settings(max_examples=300, deadline=None)
def test_next_use_is_what_it_says(steps: list[tuple[str, str, bool]]) -> None:
    policy, plain = NextUse(2, 4), PlainNextUse(2, 4)
    for what, letters_of, upper in steps:
        needed = call(letters_of.upper() if upper else letters_of, tokens=len(letters_of))
        first = needed.keys[0]
        if what == "c":
            for each in (policy, plain):
                each.call(needed)
            for each_key in needed.keys:
                known = each_key in plain.held
                for each in (policy, plain):
                    (each.use if known else each.add)(each_key)
        elif what == "r" and first in plain.held:
            policy.remove(first)
            plain.remove(first)
        elif what in "ep":
            pinned = set(needed.keys) if what == "p" else set()
            victim = policy.evict(pinned)
            assert (victim is None) == (not plain.held - pinned)
            if victim is not None:
                assert victim in plain.held - pinned
                latest = max(plain.due(other) for other in plain.held - pinned)
                assert plain.due(victim) == pytest.approx(latest, rel=1e-6)  # of equals, any
                plain.held.remove(victim)


def test_next_use_takes_no_longer_than_a_layer_may_wait() -> None:
    # OLMoE's shape: what a layer adds to a token of some 50 ms.
    policy = NextUse(16, 64)
    draw = random.Random(0)
    took = []
    for _ in range(50):
        for layer in range(16):
            needed = Call(layer, 1, dict.fromkeys(draw.sample(range(64), 8), 1))
            began = time.perf_counter()
            policy.call(needed)
            for one in needed.keys[:4]:
                policy.add(one)
                policy.evict(set(needed.keys))
            took.append(time.perf_counter() - began)
    assert sorted(took)[len(took) // 2] < 1e-3


def test_belady_lets_go_what_is_needed_latest() -> None:
    # c is needed later than both others, or never: it is not kept.
    assert best("abacab", 2) == "mmhmhh"
    assert best("abcab", 2) == "mmmhh"
    assert best("abcabc", 2) == "mmmhhm"
    assert best("abcabcabc", 2) == "mmmhhmhhm"


def plain_belady(words: Sequence[str], capacity: int) -> list[list[bool]]:
    """The definition: of all that is held, what is needed latest goes."""
    once = ["".join(dict.fromkeys(word)) for word in words]
    flat = "".join(once)
    held: set[str] = set()
    found: list[bool] = []
    for i, letter in enumerate(flat):
        found.append(letter in held)
        held.add(letter)
        if len(held) > capacity:
            held.remove(max(held, key=lambda other: flat.find(other, i + 1) % (len(flat) + 1)))  # -1 is after the end
    left = iter(found)
    return [[next(left) for _ in word] for word in once]


@given(words=st.lists(st.text("abcdefgh", max_size=5), max_size=25), capacity=st.integers(0, 9))
@settings(max_examples=300)
def test_belady_is_what_it_is_defined_as(words: list[str], capacity: int) -> None:
    assert belady(calls(words), capacity) == plain_belady(words, capacity)


def test_a_large_cache_takes_belady_no_longer_than_a_small_one() -> None:
    draw = random.Random(0)
    trace = [Call(0, 1, {draw.randrange(20_000): 1}) for _ in range(20_000)]

    def seconds(capacity: int) -> float:
        began = time.process_time()
        belady(trace, capacity)
        return time.process_time() - began

    # Where each miss looks at all that is held, it takes forty times as long.
    assert min(seconds(4000) for _ in range(3)) < 8 * min(seconds(8) for _ in range(3))


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_pinned_stays(name: str) -> None:
    policy = filled(POLICIES[name](1, 4), "abcd", "ccdd")
    assert set(evicted(policy, 2, pinned="ac")) == {"b", "d"}
    assert evicted(policy, 1, pinned="ac") == "-"
    assert set(evicted(policy, 2)) == {"a", "c"}
    assert evicted(policy, 1) == "-"


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_removed_is_gone(name: str) -> None:
    policy = filled(POLICIES[name](1, 4), "abc", "ab")
    policy.remove(key("b"))
    assert set(evicted(policy, 3)) == {"a", "c", "-"}


@pytest.mark.parametrize("name", POLICIES)
def test_a_call_that_fits_does_not_push_itself_out(name: str) -> None:
    # Three needed together in a cache of three: the two that are there must not give way to the third.
    assert hits(name, ["ab", "c", "abd", "abd"], 3) == "mmmhhmhhh"


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_holds_more_than_it_may_or_beats_the_best(name: str) -> None:
    draw = random.Random(0)
    trace = [Call(0, 1, dict.fromkeys(draw.sample(range(30), 4), 1)) for _ in range(400)]
    for capacity in (4, 9, 20):
        found = sum(hit for call in simulate(name, trace, capacity) for hit in call)
        bound = sum(hit for call in belady(trace, capacity) for hit in call)
        assert 0 < found <= bound
    assert sum(hit for call in simulate(name, trace, 30) for hit in call) == 1600 - 30


def test_a_long_scan_does_not_empty_the_cache() -> None:
    popular = ["abcd"] * 12
    scan = list("efghijklmnopqrst")
    after = simulate("next-use", calls([*popular, *scan, *popular]), 8)[-12]
    assert after == [True] * 4
    assert simulate("lru", calls([*popular, *scan, *popular]), 8)[-12] == [False] * 4


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy = 'fifo': one of lru, next-use"):
        simulate("fifo", [], 3)
