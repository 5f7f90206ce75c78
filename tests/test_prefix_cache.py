"""Prompts that begin as one in memory does: found as far as they are alike, within the bound, and to the same bits."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from builders import VOCAB, dense, moe
from hypothesis import given, settings
from hypothesis import strategies as st

from handful import positions
from handful.config import MLAConfig, ModelConfig
from handful.engine import Delta, Engine, Job, Request
from handful.experts.quantize_model import quantize_model
from handful.kernels import steady_tokens
from handful.machine import native_error
from handful.model import Decoder
from handful.moe import NotCausalWarning
from handful.positions import Held
from handful.prefix_cache import Prefix, PrefixCache, common
from handful.routing_options import RoutingOptions
from handful.sampling import Sampling

GREEDY = Sampling(temperature=0)
RECORD = RoutingOptions(record=True)


def decoder(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore", category=NotCausalWarning):
        return Decoder(config).to(dtype).eval()


def prompt(*parts: tuple[int, int]) -> list[int]:
    """Random tokens: of each part so many of a seed."""
    return [random.Random(f"{seed} {i}").randrange(VOCAB) for seed, count in parts for i in range(count)]


def request(tokens: Sequence[int], max_tokens: int = 4, **options: Any) -> Request:
    return Request(prompt=tokens, max_tokens=max_tokens, sampling=GREEDY, **options)


def deltas(engine: Engine, *requests: Request) -> Iterator[Delta]:
    for one in requests:
        engine.submit(one)
    while engine.busy:
        yield from engine.step()


# ---------------------------------------------------------------------------------------------------------------------
# The same bits.

SHAPES: dict[str, ModelConfig] = {
    "many experts": moe({"experts": 16, "top_k": 2}, width=64, context=2048, layers=3, expert_width=32),
    "window, sinks, shared": moe(width=64, context=2048, layers=3, window=70, full_layers=(1,), sinks=True,
                                 shared_width=16),
    "dense": dense(width=64, context=2048, ffn=96),
}  # fmt: skip


def seen(engine: Engine, asked: Request) -> list[Any]:
    """All that an engine tells of a request, to the last bit."""
    found: list[Any] = []
    for delta in deltas(engine, asked):
        if delta.job.request is asked:
            routed = delta.routed
            layers = [] if routed is None else [layer.tolist() for layer in (*routed.experts_TK, *routed.weights_TK)]
            found.append((delta.token, delta.logprobs, layers))
    return found


@pytest.mark.skipif(native_error() is not None, reason="the bits are the kernels'")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_bits_are_those_of_the_run_without_it(kind: str, shape: str) -> None:
    model = decoder(SHAPES[shape], torch.float32 if kind == "float32" else torch.bfloat16)
    if kind.startswith("int"):
        quantize_model(model, bits=int(kind[3:]))
    routing = RECORD if model.moe_layers else None
    first = prompt((1, 700))
    asked = request(prompt((1, 600), (2, 50)), logprobs=3, routing=routing)
    want = seen(Engine(model), asked)
    engine = Engine(model)
    list(deltas(engine, request(first, routing=routing)))
    assert engine.stats().prefix_hits == 0
    assert seen(engine, asked) == want
    steady = steady_tokens(model.embed.weight.dtype, 16, 2)
    assert steady is not None
    assert engine.stats().prefix_hits >= 650 - steady
    # And read beside others, who take a part of every step.
    engine = Engine(model)
    engine.submit(request(prompt((3, 5)), max_tokens=60))
    list(deltas(engine, request(first, routing=routing), request(prompt((4, 900)))))
    assert engine.stats().kept_tokens >= 1600 - 2 * steady
    assert seen(engine, asked) == want
    assert engine.stats().prefix_hits >= 650 - steady


@pytest.mark.skipif(native_error() is not None, reason="the bits are the kernels'")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_layers_hold_their_window_alone(dtype: torch.dtype) -> None:
    """A prompt's end is kept before its answer makes it go: others may leave out some hundred tokens, not more."""
    model = decoder(moe(width=64, context=4096, layers=3, window=70, full_layers=(1,), sinks=True), dtype)
    first = request(prompt((1, 1500)), max_tokens=900)
    for asked, found in (
        (request(prompt((1, 1450), (2, 200)), logprobs=3), range(1450, 1451)),
        (request(prompt((1, 1500)), logprobs=3), range(1500 - 257, 1500)),
        (request(prompt((1, 400), (2, 300)), logprobs=3), range(1)),
        (request(prompt((5, 300)), logprobs=3), range(1)),
    ):
        engine = Engine(model)
        list(deltas(engine, first))
        want = seen(Engine(model), asked)
        assert seen(engine, asked) == want
        assert engine.stats().prefix_hits in found
    # Read at once: what comes later waits only for what it can still begin with.
    for after in (0, 1, 3):
        engine = Engine(model, chunk=600)
        engine.submit(request(prompt((1, 3000))))
        for _ in range(after):
            engine.step()
        job = engine.submit(request(prompt((1, 700), (2, 300)), logprobs=3))
        engine.step()
        assert job._begun == (after > 1)
        engine.run([])
        assert job.cached == (700 if after < 3 else 0)
        assert job.made == Engine(model).run([job.request])[0].made


@pytest.mark.skipif(native_error() is not None, reason="the bits are the kernels'")
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**30))
def test_a_tokens_bits_do_not_depend_on_its_neighbours(seed: int) -> None:
    """Wherever a prompt is cut into passes of so many tokens, and whoever is beside it."""
    draw = random.Random(seed)
    dtype = draw.choice([torch.float32, torch.bfloat16])
    model = decoder(SHAPES["many experts"], dtype)
    steady = steady_tokens(dtype, 16, 2)
    assert steady is not None
    tokens = [draw.randrange(VOCAB) for _ in range(draw.randrange(2 * steady, 4 * steady))]

    def logits(*cuts: int) -> torch.Tensor:
        engine = Engine(model)
        job = engine.submit(request(tokens, 1, prompt_logprobs=0))
        if draw.random() < 0.5:
            engine.submit(request([draw.randrange(VOCAB) for _ in range(draw.randrange(1, 60))], 5))
        for cut in cuts:
            engine.chunk = cut
            engine.step()
        engine.chunk = 4096
        engine.run([])
        return torch.tensor([one.token for one in job.prompt_logprobs if one is not None])

    assert logits(draw.randrange(steady, len(tokens) - steady)).equal(logits())


def test_no_few_tokens_are_left_for_the_last_pass() -> None:
    """They would be multiplied by other kernels, and the bits would be other ones."""
    model = decoder(SHAPES["many experts"], torch.bfloat16)
    engine = Engine(model, chunk=512)
    sizes: list[int] = []
    engine.on_routing = lambda jobs, new, routings: sizes.append(sum(new))
    engine.run([request(prompt((1, 530)), 1)])
    steady = engine._steady
    assert sizes == ([512, 18] if steady is None else [530 - steady, steady])


# ---------------------------------------------------------------------------------------------------------------------
# What is found.


def found(engine: Engine, *requests: Request) -> list[int]:
    """Tokens of each that were found."""
    jobs = [engine.submit(one) for one in requests]
    engine.run([])
    return [job.cached for job in jobs]


def test_a_chat_that_goes_on() -> None:
    """In float64, where results are the same up to rounding, the answer is found too, but for its last token."""
    engine = Engine(decoder(moe(context=256)))
    (job,) = engine.run([request(prompt((1, 30)), 6)])
    said = [*job.request.prompt, *job.made]
    assert found(engine, request([*said, *prompt((2, 9))])) == [35]
    assert found(engine, request(prompt((1, 30)))) == [29]  # of a prompt that is all in memory, one token is read
    assert found(engine, request(prompt((3, 30)))) == [0]


def test_many_choices_of_a_prompt_read_it_once() -> None:
    """The others wait for the first, and take it from its cache; one that is alike in part takes that part."""
    engine = Engine(decoder(moe(context=512)), chunk=50)
    assert found(engine, *[request(prompt((1, 200)))] * 4, request(prompt((1, 120), (2, 50)))) == [
        0,
        199,
        199,
        199,
        120,
    ]
    assert engine.stats().prompt_tokens == 4 * 200 + 170
    assert (engine.stats().prefix_tokens, engine.stats().prefix_hits) == (970, 3 * 199 + 120)


def test_who_is_waited_for_may_go() -> None:
    engine = Engine(decoder(moe(context=512)), chunk=50)
    first, second = engine.submit(request(prompt((1, 200)))), engine.submit(request(prompt((1, 200))))
    engine.step()
    assert (first._read, second._read) == (50, 0)
    engine.cancel(first)
    engine.run([])
    assert second.cached == 50
    assert len(second.made) == 4


def test_the_routing_is_found_with_it_or_nothing_is() -> None:
    engine = Engine(decoder(moe(context=256)))
    assert found(engine, request(prompt((1, 40)))) == [0]
    told = [delta.routed for delta in deltas(engine, request(prompt((1, 40)), routing=RECORD))]
    assert engine.stats().prefix_hits == 0  # it was read without being recorded
    assert found(engine, request(prompt((1, 40)))) == [39]
    again = [delta.routed for delta in deltas(engine, request(prompt((1, 40)), routing=RECORD))]
    assert engine.stats().prefix_hits == 2 * 39
    assert [one is None for one in told] == [one is None for one in again]
    for one, other in zip(told, again, strict=True):
        assert one is not None
        assert other is not None
        assert one.tokens == other.tokens
        for layer, same in zip(one.experts_TK, other.experts_TK, strict=True):
            assert layer.equal(same)


def test_what_was_computed_otherwise_is_neither_kept_nor_used() -> None:
    engine = Engine(decoder(moe(context=256)))
    off = RoutingOptions(experts_off={0: [1]})
    assert found(engine, request(prompt((1, 40)), routing=off)) == [0]
    assert engine.stats().kept_tokens == 0
    assert found(engine, request(prompt((1, 40))), request(prompt((1, 40)), routing=off)) == [0, 0]
    assert found(engine, request(prompt((1, 40)), prompt_logprobs=1)) == [0]  # all of it is scored
    assert found(engine, request(prompt((1, 40)), routing=RoutingOptions())) == [39]


@pytest.mark.parametrize("router", [{"eval_capacity_factor": 1.0}, {"choice": "expert"}])
def test_off_where_tokens_compete(router: dict[str, Any]) -> None:
    engine = Engine(decoder(moe(router, context=256)))
    assert found(engine, *[request(prompt((1, 40)))] * 3) == [0, 0, 0]
    assert vars(engine.stats()) | {"kept_tokens": 0, "prefix_tokens": 0} == vars(engine.stats())


def test_a_failure_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(decoder(moe(context=256)), chunk=20)
    job = engine.submit(request(prompt((1, 40))))
    engine.step()
    monkeypatch.setattr(engine.model, "hidden_states", None)
    with pytest.raises(TypeError):
        engine.run([])
    assert job.finish == "failed"
    assert engine.stats().kept_tokens == 0


# ---------------------------------------------------------------------------------------------------------------------
# Within the bound, and as without.

KINDS = {
    "moe": moe(context=64),
    "latent": dense(mla=MLAConfig(q_rank=None, kv_rank=6, nope_dim=4, rope_dim=4, v_dim=5), context=64),
    "window": moe(window=3, full_layers=(1,), context=64),
}


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers with a window."""
    for name, value in (("WINDOW_ROOM", 24), ("WINDOW_LEFT", 8), ("WINDOW_GRID", 1)):
        monkeypatch.setattr(positions, name, value)


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**30))
def test_many_requests_that_begin_alike_get_what_each_gets_alone(kind: str, seed: int) -> None:
    """Some of them are cancelled; never do caches and what is kept take more room than they may."""
    draw = random.Random(seed)
    model = decoder(KINDS[kind])
    engine = Engine(model, max_sequences=3, cache_tokens=draw.choice([70, 150]), chunk=draw.choice([3, 20, 512]))
    jobs: list[Job] = []
    for _ in range(14):
        tokens = prompt((draw.randrange(2), draw.randrange(1, 45)), (draw.randrange(9), draw.randrange(8)))
        jobs.append(engine.submit(request(tokens, draw.randrange(1, 9))))
        for _ in range(draw.randrange(4)):
            engine.step()
            stats = engine.stats()
            assert stats.cached_tokens + stats.kept_tokens <= engine.cache_tokens
        if draw.random() < 0.2:
            engine.cancel(draw.choice(jobs))
    engine.run([])
    for job in jobs:
        (alone,) = Engine(model).run([job.request])
        assert job.made == alone.made[: len(job.made)]
        assert job.finish == "cancelled" or job.made == alone.made


def kept(*seeds: int, length: int = 20, routed: bool = False) -> list[Prefix]:
    held = Held([(torch.zeros(1, 1, 99, 2), torch.zeros(1, 1, 99, 2))], 0, 0)
    return [Prefix(np.asarray(prompt((seed, length))), held, object() if routed else None) for seed in seeds]  # type: ignore[arg-type]


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = PrefixCache()
    for one in kept(1, 2, 3):
        cache.keep(one)
    assert cache.tokens == 60
    assert cache.find(np.asarray(prompt((1, 20), (5, 5))), False)[1] == 20
    cache.shrink(45)
    assert cache.tokens == 40
    assert [cache.find(np.asarray(prompt((seed, 30))), False)[1] for seed in (1, 2, 3)] == [20, 0, 20]
    cache.shrink(0)
    assert cache.tokens == 0


def test_nothing_is_kept_twice() -> None:
    """What goes on from another takes its place, unless it lacks the other's routing; little is not kept at all."""
    cache = PrefixCache()
    for length, routed, tokens in ((20, False, 20), (30, False, 30), (25, False, 30), (25, True, 55), (40, True, 40),
                                   (15, False, 40)):  # fmt: skip
        cache.keep(kept(1, length=length, routed=routed)[0])
        assert cache.tokens == tokens
    cache.keep(kept(2, length=15)[0])
    assert cache.tokens == 40


def test_common() -> None:
    one = np.asarray([1, 2, 3, 4])
    assert [common(one, np.asarray(other)) for other in ([1, 2, 3, 4], [1, 2], [1, 2, 9, 4], [9], [])] == [
        4,
        2,
        2,
        0,
        0,
    ]
