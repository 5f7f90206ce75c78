"""What a request may ask of the routers: to be told, to replay, to do without; alone as beside others.

Legend: T tokens · E experts · K experts per token
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from builders import VOCAB, dense, moe
from hypothesis import given, settings
from hypothesis import strategies as st

from handful.config import ModelConfig
from handful.engine import Engine, Job, Request
from handful.errors import ConfigError
from handful.model import Decoder
from handful.moe import NotCausalWarning
from handful.observe import Recording
from handful.routing_options import RoutingOptions
from handful.sampling import Sampling

GREEDY = Sampling(temperature=0)
RECORD = RoutingOptions(record=True)
KINDS: dict[str, ModelConfig] = {
    "softmax": moe({"experts": 6, "top_k": 3}, layers=3, dense_layers=(1,), ffn=8, context=64),
    "groups": moe({"experts": 8, "groups": 4, "top_groups": 2, "score": "sigmoid", "balance_bias": True}, context=64),
    "capacity": moe({"eval_capacity_factor": 0.75}, context=64),
    "expert choice": moe({"choice": "expert"}, context=64),
}


def decoder(kind: str, dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore", category=NotCausalWarning):
        return Decoder(KINDS[kind]).to(dtype).eval()


def request(tokens: list[int], max_tokens: int = 5, **options: Any) -> Request:
    return Request(prompt=tokens, max_tokens=max_tokens, sampling=GREEDY, **options)


def ran(engine: Engine, *requests: Request) -> list[tuple[Job, Recording | None]]:
    """Each request's job, and its routing in one."""
    jobs = [engine.submit(one) for one in requests]
    told: dict[Job, list[Recording]] = {job: [] for job in jobs}
    while engine.busy:
        for delta in engine.step():
            assert delta.error is None
            if delta.routed is not None:
                assert len(delta.routings) == len(delta.routed)
                for routing, experts_TK in zip(delta.routings, delta.routed.experts_TK, strict=True):
                    assert routing.tokens == 1
                    assert routing.experts_TK[0].equal(experts_TK[-1].long())
                told[delta.job].append(delta.routed)
    return [(job, Recording.joined(told[job]) if told[job] else None) for job in jobs]


def same(one: Recording | None, other: Recording | None) -> bool:
    assert one is not None
    assert other is not None
    layers = zip(one.experts_TK, other.experts_TK, one.weights_TK, other.weights_TK, strict=True)
    return all(a.equal(b) and c.equal(d) for a, b, c, d in layers)


# ---------------------------------------------------------------------------------------------------------------------
# Told.


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_models_own(kind: str) -> None:
    """Of every token but the last, prompt and made ones, as one pass over all of them routes where each token is
    routed for itself."""
    model = decoder(kind)
    ((job, routed),) = ran(Engine(model, chunk=4), request([5, 1, 7, 2, 9, 3], routing=RECORD))
    assert routed is not None
    tokens = [*job.request.prompt, *job.made]
    assert routed.tokens == len(tokens) - 1
    assert len(routed) == len(model.moe_layers)
    if model.config.router is not None and model.config.router.independent:
        with torch.inference_mode():
            _, routings = model(torch.tensor([tokens[:-1]]))
        for routing, experts_TK, weights_TK in zip(routings, routed.experts_TK, routed.weights_TK, strict=True):
            assert experts_TK.dtype == torch.uint8
            assert experts_TK.long().equal(routing.experts_TK)
            assert weights_TK.float().allclose(routing.weights_TK.float(), atol=1e-3)


def test_it_comes_with_the_deltas() -> None:
    """The prompt's with the first, however many passes read it; then one token's with each; also with one that ends."""
    engine = Engine(decoder("softmax"), chunk=4)
    job = engine.submit(request([5, 1, 7, 2, 9, 3], 3, routing=RECORD))
    engine.submit(request([5, 1]))
    counts = [delta.routed and delta.routed.tokens for _ in range(5) for delta in engine.step() if delta.job is job]
    assert counts == [6, 1, 1]
    ((job, _),) = ran(Engine(decoder("softmax")), request([5, 1, 7], 6, routing=RECORD))
    stop = request([5, 1, 7], 6, routing=RECORD, stop_tokens=[job.made[-1]])
    ((job, routed),) = ran(Engine(decoder("softmax")), stop)
    assert routed is not None
    assert routed.tokens == 3 + len(job.made)  # the token that ended it was drawn after all of these
    ((job, routed),) = ran(Engine(decoder("softmax")), request([5, 1, 7], 0, prompt_logprobs=0, routing=RECORD))
    assert routed is not None
    assert routed.tokens == 3


# ---------------------------------------------------------------------------------------------------------------------
# Replayed.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_replayed_to_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """With log-probabilities that say so; also where only a part is replayed, and the router goes on by itself."""
    model = decoder(kind, dtype)

    def run(**options: Any) -> tuple[list[Any], Recording | None]:
        engine = Engine(model)
        job = engine.submit(request([5, 1, 7, 2, 9, 3], 6, logprobs=2, routing=RoutingOptions(record=True, **options)))
        found, parts = [], []
        while engine.busy:
            for delta in engine.step():
                assert delta.error is None
                assert delta.job is job
                found.append((delta.token, delta.logprobs))
                parts.append(delta.routed)
        return found, Recording.joined([part for part in parts if part is not None])

    want, routed = run()
    assert routed is not None
    again, replayed = run(replay=routed)
    assert again == want
    assert same(routed, replayed)
    assert run(replay=routed.part(0, 8))[0] == want
    if kind in ("softmax", "groups"):
        assert run(replay=routed.part(0, 3))[0] == want


def test_another_routing_is_another_answer() -> None:
    """What is replayed is taken, whatever the scores say."""
    engine = Engine(decoder("softmax"))
    ((_, routed),) = ran(engine, request([5, 1, 7], routing=RECORD))
    assert routed is not None
    wrong = Recording([(experts + 1) % 6 for experts in routed.experts_TK], routed.weights_TK, routed.dropped_TK)
    ((_, replayed),) = ran(engine, request([5, 1, 7], routing=RoutingOptions(record=True, replay=wrong)))
    assert replayed is not None
    assert all(a.equal(b) for a, b in zip(replayed.experts_TK, wrong.experts_TK, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Without some, and with fewer.


def off_of(routed: Recording | None, layer: int, expert: int) -> bool:
    assert routed is not None
    return not bool((routed.experts_TK[layer] == expert).any())


def test_without_some_experts_and_with_fewer() -> None:
    """In their layers alone, by the layers' own numbers: layer 1 is dense."""
    engine = Engine(decoder("softmax"))
    plain, both, fewer = (
        RECORD, RoutingOptions(record=True, experts_off={0: [2, 4], 2: [5]}, top_k=2),
        RoutingOptions(record=True, top_k=1),
    )  # fmt: skip
    results = ran(engine, *(request([5, 1, 7, 2], routing=options) for options in (plain, both, fewer)))
    routed = [found for _, found in results]
    assert all(one is not None and one.tokens == 8 for one in routed)
    assert not any(off_of(routed[0], *off) for off in ((0, 2), (0, 4), (1, 5)))
    assert all(off_of(routed[1], *off) for off in ((0, 2), (0, 4), (1, 5)))
    assert [one.experts_TK[0].shape[1] for one in routed if one is not None] == [3, 2, 1]


@pytest.mark.parametrize("kind", ["softmax", "groups"])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**30))
def test_beside_others_as_alone(kind: str, seed: int) -> None:
    """Requests that ask for this and that, together in one batch: each as alone, and those that ask for nothing too."""
    draw = random.Random(seed)
    model = decoder(kind)
    router = model.config.router
    assert router is not None

    def options() -> RoutingOptions | None:
        off = {layer: draw.sample(range(router.experts), draw.randrange(3)) for layer in model.config.moe_layers}
        replay, top_k = None, draw.choice([None, 1, router.top_k])
        if draw.random() < 0.4:
            scores = [torch.rand(draw.randrange(1, 9), router.experts)] * len(model.moe_layers)
            chosen = [score_TE.topk(top_k or router.top_k).indices for score_TE in scores]
            replay = Recording(chosen, [torch.zeros(c.shape) for c in chosen], [None] * len(chosen))
        return draw.choice([None, RoutingOptions(record=True, replay=replay, experts_off=off, top_k=top_k)])

    torch.manual_seed(seed)
    requests = [
        request([draw.randrange(VOCAB) for _ in range(draw.randrange(1, 9))], draw.randrange(8, 12), routing=options())
        for _ in range(6)
    ]
    together = ran(Engine(model, max_sequences=4, chunk=draw.choice([3, 512])), *requests)
    for (job, routed), asked in zip(together, requests, strict=True):
        ((alone, want),) = ran(Engine(model), asked)
        assert job.made == alone.made
        assert (routed is None) == (want is None)
        if routed is not None and want is not None:
            assert all(a.equal(b) for a, b in zip(routed.experts_TK, want.experts_TK, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Refused.


def recording(*experts: list[list[int]]) -> Recording:
    chosen = [torch.tensor(one) for one in experts]
    return Recording(chosen, [torch.zeros(one.shape) for one in chosen], [None] * len(chosen))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (RoutingOptions(experts_off={1: [0]}), "experts_off: layer 1 has no experts; those that have: 0, 2"),
        (RoutingOptions(experts_off={0: [6]}), "experts_off: layer 0 has experts 0 to 5"),
        (RoutingOptions(experts_off={2: [0, 1, 2, 3, 3]}),
         "experts_off: layer 2 would have 2 of 6 experts: it takes 3"),
        (RoutingOptions(top_k=4), "top_k_experts = 4: from 1 to the model's own 3"),
        (RoutingOptions(top_k=0), "top_k_experts = 0: from 1 to the model's own 3"),
        (RoutingOptions(replay=recording([[0, 1, 2]])), "replay: a routing of 1 MoE layers; the model has 2"),
        (RoutingOptions(replay=recording([[0, 1, 2, 3]], [[0, 1, 2, 3]])),
         "replay: 4 experts a token; the request takes 3"),
        (RoutingOptions(replay=recording([[0, 1]], [[0, 1]])), "replay: 2 experts a token; the request takes 3"),
        (RoutingOptions(replay=recording([[0, 6]], [[0, 1]]), top_k=2),
         "replay: names expert 6; there are 6, counted from 0"),
        (RoutingOptions(replay=recording([[0, 1]], [[1, 1]]), top_k=2), "replay: names an expert twice for one token"),
        (RoutingOptions(replay=recording([[0]] * 9, [[0]] * 9), top_k=1),
         "replay: 9 tokens; prompt and max_tokens are 8"),
    ],
)  # fmt: skip
def test_refused(options: RoutingOptions, said: str) -> None:
    engine = Engine(decoder("softmax"))
    with pytest.raises(ConfigError, match=f"^{said}$"):
        engine.submit(request([1, 2, 3], routing=options))
    assert not engine.busy
    engine.check(request([1, 2, 3], routing=RoutingOptions(experts_off={2: [0, 1, 2, 3]}, top_k=2)))


def test_refused_of_other_models() -> None:
    with pytest.raises(ConfigError, match=r"^routing: the model is dense, and has no router$"):
        Engine(Decoder(dense())).submit(request([1], routing=RECORD))
    part = RoutingOptions(replay=recording([[0, 1]], [[0, 1]]))
    with pytest.raises(ConfigError, match=r"^replay: 1 tokens of a prompt of 3; this router's tokens compete"):
        Engine(decoder("capacity")).submit(request([1, 2, 3], routing=part))
