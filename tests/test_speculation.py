"""Drafts of coming tokens: they change no token, no bit and nothing that is told, and pass only where they pay."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from builders import VOCAB, dense, moe, tiny_data
from hypothesis import given, settings
from hypothesis import strategies as st

import handful.engine
from handful.config import MLAConfig, ModelConfig
from handful.data import Data
from handful.engine import Delta, Engine, Job, Request
from handful.errors import CheckpointError, ConfigError
from handful.experts.quantize_model import quantize_model
from handful.generate import generate, text_request
from handful.kernels import few_tokens
from handful.machine import native_error
from handful.memory import attach, pack
from handful.model import Decoder
from handful.positions import KVCache, KVCaches
from handful.routing import Routing
from handful.routing_options import RoutingOptions
from handful.sampling import Sampling
from handful.speculation import LONGEST, DraftCosts, PromptLookup, draft_limit, share_out

GREEDY = Sampling(temperature=0)
native = pytest.mark.skipif(native_error() is not None, reason="the bits are the kernels'")

SHAPES: dict[str, ModelConfig] = {
    "many experts": moe({"experts": 16, "top_k": 2}, width=64, context=256, layers=3, expert_width=32),
    "window, sinks, shared": moe(width=64, context=256, window=5, full_layers=(1,), sinks=True, shared_width=16),
    "dense": dense(width=64, context=256, ffn=96),
}  # fmt: skip
LATENT = dense(mla=MLAConfig(q_rank=None, kv_rank=6, nope_dim=4, rope_dim=4, v_dim=5), rope_adjacent=True, context=256)


def decoder(config: ModelConfig, kind: str = "float64") -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config).to(getattr(torch, "bfloat16" if kind.startswith("int") else kind)).eval()
    if kind.startswith("int"):
        quantize_model(model, bits=int(kind[3:]))
    return model


class Free(DraftCosts):
    """Every draft pays."""

    def longest(self, sequences: int) -> int:
        return self.most - sequences

    def steps(self, sequences: int, tokens: int) -> float:
        return 1.0

    def measured(self, sequences: int, tokens: int, made: int, seconds: float) -> None:
        pass


def drafting(model: Decoder, **options: Any) -> Engine:
    """An engine whose drafts all pass."""
    engine = Engine(model, speculate=True, **options)
    assert engine._costs is not None
    engine._costs = Free(model.config, engine._costs.most)
    return engine


def seen(engine: Engine, *requests: Request) -> list[list[Any]]:
    """All that an engine tells of each request, to the last bit."""
    jobs = [engine.submit(request) for request in requests]
    found: dict[Job, list[Any]] = {job: [] for job in jobs}
    while engine.busy:
        for delta in engine.step():
            found[delta.job].append(told(delta))
    assert [[one[0] for one in found[job] if one[0] is not None] for job in jobs] == [job.made for job in jobs]
    return list(found.values())


def told(delta: Delta) -> tuple[Any, ...]:
    routed = delta.routed
    layers = [] if routed is None else [layer.tolist() for layer in (*routed.experts_TK, *routed.weights_TK)]
    rows = [(row.logits_TE.tolist(), row.experts_TK.tolist()) for row in delta.routings]
    return delta.token, delta.text, delta.logprobs, delta.finish, delta.stop_token, layers, rows


def prophets(right: Sequence[int], most_made: int, draw: random.Random) -> type[PromptLookup]:
    """Lookups that know what comes, and are wrong now and then."""

    class Prophet(PromptLookup):
        def _find(self, most: int) -> tuple[list[int], int]:
            made = len(self._tokens) - self._prompt
            assert made + most < most_made  # the last token that is made passes no more
            coming = list(right[made:][: draw.randint(0, most)])
            coming += [draw.randrange(VOCAB) for _ in range(most - len(coming))]
            return coming[: draw.randint(0, most)], 2

    return Prophet


# ---------------------------------------------------------------------------------------------------------------------
# The same tokens.


@native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_few_tokens_have_the_bits_that_each_has_alone(kind: str, shape: str) -> None:
    config = SHAPES[shape]
    model, router = decoder(config, kind), config.router
    dtype = model.embed.weight.dtype
    few = few_tokens(dtype, *(() if router is None else (router.experts, router.top_k)))
    assert few is not None
    assert few >= 4
    prompt, tokens = torch.randint(VOCAB, (1, 70)), torch.randint(VOCAB, (1, few))
    with torch.inference_mode():
        caches = [KVCache(config, 1, 70 + few, dtype=dtype) for _ in range(2)]
        for cache in caches:
            model(prompt[:, :61], cache)  # so that positions come from two runs of `next_rope`
        alone = torch.cat([model(token, caches[0])[0] for token in tokens.split(1, dim=1)], dim=1)
        together, _ = model(tokens, KVCaches([caches[1]], [few], singly=True))
    assert together.equal(alone)
    assert [cache.length for cache in caches] == [61 + few] * 2
    for one, other in zip(caches[0].keys_values, caches[1].keys_values, strict=True):
        assert all(held.equal(same) for held, same in zip(one, other, strict=True))


@native
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**30), kind=st.sampled_from(["float32", "bfloat16", "int8", "int4"]))
def test_all_that_is_told_is_the_same_to_the_last_bit(seed: int, kind: str) -> None:
    """Tokens, log-probabilities, routings, ends; drafts are right up to any place, or wrong from the first."""
    draw = random.Random(seed)
    model = decoder(SHAPES[draw.choice(sorted(SHAPES))], kind)
    prompt = [draw.randrange(VOCAB) for _ in range(draw.choice([1, 3, 40]))]
    sampling = draw.choice([GREEDY, Sampling(temperature=1.2, top_p=0.9, seed=seed, repetition_penalty=1.3)])
    asked = Request(
        prompt=prompt,
        max_tokens=draw.choice([1, 2, 20, 80]),
        sampling=sampling,
        stop_tokens=draw.sample(range(VOCAB), draw.choice([0, 8])),
        logprobs=draw.choice([None, 0, 3]),
        routing=RoutingOptions(record=True) if model.moe_layers and draw.random() < 0.5 else None,
    )
    plain = Engine(model, speculate=False)
    (want,) = seen(plain, asked)
    right = [token for token, *_ in want if token is not None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handful.engine, "PromptLookup", prophets(right, min(asked.max_tokens, 256 - len(prompt)), draw))
        engine = drafting(model)
        assert engine._costs is not None
        assert engine._costs.most == draft_limit(model, exact=True)
        assert seen(engine, asked) == [want]
    stats = engine.stats()
    assert 0 <= stats.accepted_tokens <= stats.draft_tokens
    assert stats.made_tokens == plain.stats().made_tokens


@pytest.mark.parametrize("kind", ["float64", "bfloat16"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.3, seed=5, repetition_penalty=1.01)])
def test_a_text_that_repeats_itself_takes_fewer_steps(kind: str, sampling: Sampling) -> None:
    """Its own lookups: prompts of one phrase again and again, and answers that fall into a loop."""
    model = decoder(SHAPES["many experts"], kind)
    asked = [Request(prompt=[*phrase] * 6, max_tokens=100, sampling=sampling) for phrase in ([7, 8, 9, 10, 11], [3])]
    for request in asked:
        (want,) = seen(Engine(model, speculate=False), request)
        engine, passes = drafting(model), list[int]()
        engine.on_routing = lambda jobs, new, routings, passes=passes: passes.append(new[0])
        (found,) = seen(engine, request)
        stats = engine.stats()
        if kind == "float64" or native_error() is None:
            assert found == want
        assert sum(passes[1:]) == stats.made_tokens - 1
        assert stats.accepted_tokens == stats.made_tokens - len(passes)
        if sampling is GREEDY:
            assert len(passes) < 60


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), latent=st.booleans())
def test_sequences_that_join_and_leave_get_what_each_gets_alone(seed: int, latent: bool) -> None:
    """float64, so that no rounding decides between two tokens. What one begins with may be what another has made."""
    draw = random.Random(seed)
    model = decoder(LATENT if latent else SHAPES["window, sinks, shared"])
    phrase = [draw.randrange(VOCAB) for _ in range(6)]
    requests = [
        Request(
            prompt=[*phrase * draw.randint(1, 6), *(draw.randrange(VOCAB) for _ in range(draw.choice([0, 1, 9])))],
            max_tokens=draw.choice([1, 4, 30]),
            sampling=draw.choice([GREEDY, Sampling(temperature=1.0, top_k=5, seed=draw.randrange(9))]),
        )
        for _ in range(draw.randint(1, 6))
    ]
    alone = [seen(Engine(model, speculate=False), request)[0] for request in requests]
    longer = [Request(prompt=[*r.prompt, *(o[0] for o in one)], max_tokens=5, sampling=GREEDY)
              for r, one in zip(requests, alone, strict=True)]  # fmt: skip
    alone += [seen(Engine(model, speculate=False), request)[0] for request in longer]
    engine = drafting(model, max_sequences=draw.randint(1, 4), chunk=draw.choice([3, 50]))
    later, found = [*requests, *longer], dict[int, list[Any]]()
    while later or engine.busy:
        for _ in range(draw.choice([0, 1, 2])):
            if later:
                engine.submit(later.pop(0))
        for delta in engine.step():
            found.setdefault(delta.job.number, []).append(told(delta))
    assert [[one[:2] + one[3:5] for one in found[n + 1]] for n in range(len(alone))] == [
        [one[:2] + one[3:5] for one in own] for own in alone
    ]


def test_drafts_that_were_wrong_are_not_kept_for_other_prompts() -> None:
    """What is kept after a request is its own tokens' keys and values, whatever lay there in between."""
    model, draw = decoder(SHAPES["many experts"]), random.Random(1)
    first = Request(prompt=[draw.randrange(VOCAB) for _ in range(20)], max_tokens=40, sampling=GREEDY)
    plain = Engine(model, speculate=False)
    (want,) = seen(plain, first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handful.engine, "PromptLookup", prophets([token for token, *_ in want], 40, draw))
        engine = drafting(model)
        assert seen(engine, first) == [want]
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert plain._prefixes is not None
    assert engine._prefixes is not None
    (right,), (kept,) = plain._prefixes._prefixes, engine._prefixes._prefixes
    assert kept.tokens.tolist() == right.tokens.tolist()
    assert len(kept) == 20 + 39
    for one, other in zip(kept.held.keys_values, right.held.keys_values, strict=True):
        for held, same in zip(one, other, strict=True):
            torch.testing.assert_close(held, same)


@native
@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.parametrize("shape", ["many experts", "window, sinks, shared"])
def test_drafts_over_windows_that_slide_and_caches_of_bytes(
    shape: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers with a window hold some of the tokens alone, and let go of others between and within passes."""
    config = dataclasses.replace(SHAPES[shape], context=1300)
    model, draw = decoder(config, "bfloat16"), random.Random(2)
    request = Request(prompt=[draw.randrange(VOCAB) for _ in range(500)], max_tokens=700, sampling=GREEDY)
    (want,) = seen(Engine(model, speculate=False, kv_cache_dtype=cache), request)
    tokens = [token for token, *_ in want]
    monkeypatch.setattr(handful.engine, "PromptLookup", prophets(tokens, 700, draw))
    slid: list[bool] = []
    advance = KVCache.advance

    def watched(self: KVCache, new: int) -> None:
        advance(self, new)
        slid.append(self.first > 0)

    monkeypatch.setattr(KVCache, "advance", watched)
    engine = drafting(model, kv_cache_dtype=cache)
    forward, step = Mock(wraps=engine._forward), Mock(wraps=engine.step)
    monkeypatch.setattr(engine, "_forward", forward)
    monkeypatch.setattr(engine, "step", step)
    assert seen(engine, request) == [want]
    assert forward.call_count == step.call_count  # one that failed would be made again, without its drafts
    assert 0 < engine.stats().accepted_tokens < engine.stats().draft_tokens
    assert any(slid) == (config.window is not None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return tiny_data(tmp_path_factory.mktemp("speculation"))


def test_a_stop_text_within_a_draft_that_came_true(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(moe(context=64)).double().eval()
    model.tokenizer = data.tokenizer
    text = "".join(generate(model, "the router", max_tokens=30, sampling=GREEDY))
    (whole,) = Engine(model).run([text_request(model, "the router", max_tokens=30, sampling=GREEDY)])

    class All(PromptLookup):
        def _find(self, most: int) -> tuple[list[int], int]:
            return whole.made[len(self._tokens) - self._prompt :][:most], 2

    monkeypatch.setattr(handful.engine, "PromptLookup", All)
    for start, end in ((4, 9), (len(text) - 4, len(text))):
        asked = text_request(model, "the router", max_tokens=30, sampling=GREEDY, stop=[text[start:end]])
        engine = drafting(model)
        (found,) = seen(engine, asked)
        assert "".join(piece for _, piece, *_ in found) == text[: text.find(text[start:end])]
        assert [one[3] for one in found] == [None] * (len(found) - 1) + ["stop"]
        assert [found] == seen(Engine(model, speculate=False), asked)
        assert engine.stats().draft_tokens > 0


def test_what_is_told_of_a_pass_is_what_came_true() -> None:
    """The routings of the tokens that stayed, in order: those of the run without drafts."""

    def recorded(engine: Engine) -> tuple[list[int], torch.Tensor]:
        kept: list[torch.Tensor] = []

        def note(jobs: Sequence[Job], new: Sequence[int], routings: list[Routing]) -> None:
            assert len(routings) == 3
            assert all(routing.tokens == sum(new) for routing in routings)
            kept.append(routings[1].logits_TE)

        engine.on_routing = note
        (job,) = engine.run([Request(prompt=[4, 5, 6, 4, 5], max_tokens=60, sampling=GREEDY)])
        return job.made, torch.cat(kept)

    model = decoder(SHAPES["many experts"])
    engine = drafting(model)
    made, logits = recorded(engine)
    want, right = recorded(Engine(model, speculate=False))
    assert made == want
    assert engine.stats().accepted_tokens > 0
    torch.testing.assert_close(logits, right)


def test_a_draft_that_cannot_pass_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(SHAPES["dense"])
    asked = Request(prompt=[1, 2, 3], max_tokens=12, sampling=GREEDY)
    (want,) = Engine(model, speculate=False).run([asked])
    assert 250 not in want.made
    forward = model.embed.forward

    def refuse(tokens: torch.Tensor) -> torch.Tensor:
        if 250 in tokens.flatten().tolist():
            raise CheckpointError("experts.pack: cannot be read")
        return forward(tokens)

    class Bad(PromptLookup):
        def _find(self, most: int) -> tuple[list[int], int]:
            return [250][:most], 2

    monkeypatch.setattr(model.embed, "forward", refuse)
    monkeypatch.setattr(handful.engine, "PromptLookup", Bad)
    engine = drafting(model)
    (job,) = engine.run([asked])
    assert (job.made, job.finish) == (want.made, "length")


def test_a_request_that_changes_routing_has_no_drafts_beside_it() -> None:
    model = decoder(SHAPES["many experts"])
    engine = drafting(model)
    asked = [
        Request(prompt=[5] * 9, max_tokens=20, sampling=GREEDY, routing=routing)
        for routing in (None, RoutingOptions(top_k=1))
    ]
    engine.run(asked)
    assert engine.stats().draft_tokens == 0
    engine.run(asked[:1])
    assert engine.stats().draft_tokens > 0


# ---------------------------------------------------------------------------------------------------------------------
# Lookups.


def slow_find(tokens: Sequence[int], most: int) -> tuple[list[int], int]:
    """The latest of the longest matches, by trying all."""
    for length in range(LONGEST, 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                between = tokens[end:]
                return [between[i % len(between)] for i in range(most)], length
    return [], 0


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.integers(0, 3), max_size=20), st.integers(1, 9)
)
def test_the_latest_of_the_longest_matches(prompt: list[int], made: list[int], most: int) -> None:
    lookup = PromptLookup(prompt)
    for count in range(len(made) + 1):
        draft = lookup.draft(made[:count], most)
        assert (draft, lookup._alike) == slow_find([*prompt, *made[:count]], most)
        assert len(lookup.chances()) == len(draft)


def test_a_draft_is_judged_by_what_came() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 9, 1, 2])
    assert lookup.draft([], 3) == [3, 4, 9]
    assert lookup.chances() == [0.5, 0.25, 0.125]
    assert lookup.draft([3, 4, 5], 3) == []  # two came, the third did not
    assert [rate.value for rate in lookup.rates[2:6]] == [0.75, 0.75, 0.25, 0.5]
    assert lookup.draft([3, 4, 5, 1, 2], 2) == [3, 4]
    assert lookup.draft([3, 4, 5, 1, 2, 3], 0) == []  # it is not asked for one, and sees what came
    assert lookup.rates[2].value == pytest.approx(2.5 / 3)


# ---------------------------------------------------------------------------------------------------------------------
# Only where it pays. Time is what a function says it is.

OLMOE = moe({"experts": 64, "top_k": 8}, width=2048, expert_width=1024, layers=4, vocab=8192, heads=16)


def speed(text: Sequence[int], seconds: Callable[[int], float], config: ModelConfig = OLMOE, most: int = 16) -> float:
    """How many times as fast a text is made with drafts as without, where a step of n tokens takes seconds(n)."""
    lookup, costs, made, took = PromptLookup(text[:64]), DraftCosts(config, most), list[int](), 0.0
    coming = text[64:]
    while len(made) < len(coming):
        left = len(coming) - len(made)
        draft = lookup.draft(made, min(most - 1, left - 1))
        (count,) = share_out(costs, [lookup.chances()])
        right = 0
        while right < count and draft[right] == coming[len(made) + right]:
            right += 1
        now = seconds(1 + count)
        costs.measured(1, 1 + count, 1 + right, now)
        took += now
        made += coming[len(made) : len(made) + right + 1]
    return len(coming) * seconds(1) / took


def text_of(kind: str, length: int = 1500) -> list[int]:
    draw = random.Random(3)
    if kind == "random":
        return [draw.randrange(8192) for _ in range(length)]
    if kind == "of few words":  # pairs come again all the time, and say nothing
        return [draw.randrange(12) for _ in range(length)]
    copied = [draw.randrange(8192) for _ in range(200)]
    again = copied * (length // 200)
    return [token if kind == "copied" or draw.random() > 0.05 else draw.randrange(8192) for token in again]


LIKE_READING = DraftCosts(OLMOE, 16)._reads
CLOCKS: dict[str, Callable[[int], float]] = {
    "as guessed": lambda n: LIKE_READING[n],
    "hardly more": lambda n: 1 + 0.02 * (n - 1),
    "each alone": lambda n: float(n),
    "worse than alone": lambda n: 1 + 3.0 * (n - 1),
    "from five on much more": lambda n: 1 + 0.1 * (n - 1) if n < 5 else 6.0,
}


PAYS = {  # at least, by how a text repeats itself
    "copied": {"as guessed": 2.0, "hardly more": 5.0, "from five on much more": 2.3},
    "edited": {"as guessed": 1.2, "hardly more": 2.9, "from five on much more": 1.9},
}


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("kind", ["random", "of few words", "copied", "edited"])
def test_drafts_never_cost_and_pay_where_they_can(kind: str, clock: str) -> None:
    assert speed(text_of(kind), CLOCKS[clock]) > PAYS.get(kind, {}).get(clock, 0.97)


def test_drafts_begin_short_and_are_measured() -> None:
    costs = DraftCosts(OLMOE, 16)
    assert costs.longest(1) == 0  # what a step without takes is not known
    costs.measured(1, 1, 1, 1.0)
    guess = [LIKE_READING[n] - 1 for n in range(17)]
    assert costs.steps(1, 4) == pytest.approx(1 + guess[4])
    for longest in (1, 2, 4, 8, 15):
        assert costs.longest(1) == longest
        costs.measured(1, 1 + longest, 1 + longest, 1 + 0.5 * guess[1 + longest])
    assert costs.steps(1, 12) == pytest.approx(1 + 0.5 * guess[12])
    costs.measured(1, 9, 9, 100.0)  # something was in the way: it counts as twice what was expected, of two
    assert costs.steps(1, 9) == pytest.approx(1 + guess[9] * 0.5 + 0.5 * (1 + guess[9] * 0.5))
    assert costs.longest(2) == 0
    for _ in range(58):
        costs.measured(1, 3, 3, 1.2)
    assert costs.longest(1) == 0  # what a step without takes may have changed
    costs.measured(1, 1, 1, 1.0)
    assert costs.longest(1) == 15


def test_what_did_not_pay_is_tried_again_ever_later() -> None:
    costs, tried = DraftCosts(OLMOE, 16), list[int]()
    for step in range(2000):
        (count,) = share_out(costs, [[0.99] * 15])
        costs.measured(1, 1 + count, 1 + count, 1.0 + 4.0 * count)
        if count:
            assert count == 1
            tried.append(step)
    assert tried == [1, 33, 98, 227, 484, 997]
    (count,) = share_out(costs, [[0.99] * 15])
    assert count == 0
    while not share_out(costs, [[0.99] * 15])[0]:
        costs.measured(1, 1, 1, 1.0)
    costs.measured(1, 2, 2, 1.1)  # now it pays
    assert share_out(costs, [[0.99] * 15]) == [2]


def test_the_likeliest_tokens_of_all_drafts_pass() -> None:
    costs = DraftCosts(OLMOE, 8)
    assert share_out(costs, [[0.9, 0.8], []]) == [0, 0]  # nothing is measured yet
    costs.measured(2, 2, 2, 1.0)
    assert share_out(costs, [[0.9, 0.1], [0.95, 0.93, 0.2]]) == [0, 0]  # 1.05 tokens are guessed for one
    costs.measured(2, 3, 3, 1.1)
    assert share_out(costs, [[0.9, 0.1], [0.95, 0.93, 0.2]]) == [0, 2]
    costs.measured(2, 4, 4, 1.2)
    assert share_out(costs, [[0.9, 0.1], [0.95, 0.93, 0.01]]) == [1, 2]
    assert share_out(costs, [[0.09, 0.1], []]) == [0, 0]
    for tokens in (3, 4) * 30:
        costs.measured(2, tokens, tokens, 3.0)
    costs.measured(2, 2, 2, 1.0)
    assert costs.longest(2) > 0
    assert share_out(costs, [[0.9, 0.1], [0.95, 0.93, 0.2]]) == [0, 0]


def test_more_experts_are_read_for_more_tokens() -> None:
    """Of 64 experts, eight each: one token reads 8, two 15, three 21.125; beside them all that every token reads."""
    experts = 4 * 8 * 3 * 2048 * 1024
    one = experts + 4 * (4 * 2048 * 2048 + 64 * 2048) + 8192 * 2048
    found = DraftCosts(OLMOE, 3)._reads
    assert found[1:] == pytest.approx(
        [1, 1 + experts * 7 / 8 / one + 1 / 16, 1 + experts * 13.125 / 8 / one + 2 / 16], rel=1e-3
    )
    assert DraftCosts(dense(), 3)._reads[1:] == pytest.approx([1, 17 / 16, 18 / 16])


# ---------------------------------------------------------------------------------------------------------------------
# Whether there are any.


@pytest.mark.parametrize("speculate", [None, False])
def test_never_where_tokens_compete(speculate: bool | None) -> None:
    model = decoder(moe({"eval_capacity_factor": 1.0}), "float32")
    assert Engine(model, speculate=speculate)._costs is None
    with pytest.raises(ConfigError, match=r"^speculate = True: this router's tokens compete for places"):
        Engine(model, speculate=True)


@native
def test_by_default_only_where_no_bit_changes(tmp_path: Any) -> None:
    def drafts(model: Decoder, speculate: bool | None = None) -> bool:
        return Engine(model, speculate=speculate)._costs is not None

    ours = decoder(SHAPES["many experts"], "float32")
    assert drafts(ours)
    assert drafts(decoder(SHAPES["dense"], "bfloat16"))
    assert drafts(decoder(SHAPES["many experts"], "int4"))
    assert not drafts(ours, False)
    gated = moe(shared_width=8, shared_gate=True)
    others = [decoder(SHAPES["dense"]), decoder(LATENT, "float32"), decoder(gated, "float32")]
    loop = decoder(SHAPES["many experts"], "float32")
    loop.moe_layers[1].experts.backend = "reference"
    for model in (*others, loop):
        assert not drafts(model)
        assert drafts(model, True)
    pack(ours, tmp_path / "experts.pack")
    with attach(ours, tmp_path / "experts.pack", 1 << 20):
        assert not drafts(ours)  # a draft would fetch experts, and drive others out
        assert drafts(ours, True)
