"""Experts that are off: a router chooses among the others, of whatever kind it is.

Legend: T tokens · D model width · E experts · K experts per token
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import moe
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handful.config import RouterConfig
from handful.errors import RoutingError
from handful.model import Decoder
from handful.moe import MoE, Router
from handful.positions import KVCache
from handful.routing import Routing, Without

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "not normalized": {"normalize": False},
    "sigmoid with a bias": {"score": "sigmoid", "balance_bias": True, "scale": 2.5},
    "with a bias of its logits": {"logits_bias": True},
    "groups by their best": {"groups": 4, "top_groups": 2, "group_score": "max"},
    "groups by their best two": {"groups": 4, "top_groups": 2, "group_score": "top2", "score": "sigmoid"},
    "capacity": {"capacity_factor": 1.0, "eval_capacity_factor": 1.0},
    "noise": {"noisy_top_k": True, "jitter": 0.1},
    "expert choice": {"choice": "expert"},
}


def router(kind: str, **changes: Any) -> Router:
    torch.manual_seed(0)
    made = Router(6, RouterConfig(**{"experts": 8, "top_k": 2, **KINDS[kind], **changes})).double()
    with torch.no_grad():
        for value in (made.bias, made.balance_bias):
            if value is not None:
                value.normal_(0, 0.3)
    return made


def chosen(routing: Routing) -> Tensor:
    """(T, E): True where a token goes to an expert."""
    kept_TK = torch.ones_like(routing.experts_TK, dtype=torch.bool)
    if routing.dropped_TK is not None:
        kept_TK = ~routing.dropped_TK
    found_TE = torch.zeros(routing.tokens, routing.experts, dtype=torch.bool)
    return found_TE.scatter_(1, routing.experts_TK, kept_TK)


@pytest.mark.filterwarnings("ignore:.*not causal")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 7), max_size=6, unique=True), st.integers(0, 2**30))
def test_no_token_goes_to_an_expert_that_is_off(
    kind: str, training: bool, tokens: int, off: list[int], seed: int
) -> None:
    made = router(kind).train(training)
    torch.manual_seed(seed)
    x_TD, off_E = torch.randn(tokens, 6, dtype=torch.float64), torch.zeros(8, dtype=torch.bool)
    off_E[off] = True
    routing = made(x_TD, choice=Without(off_E))
    assert not chosen(routing)[:, off_E].any()
    assert routing.weights_TK.isfinite().all()
    if kind not in ("expert choice", "capacity"):
        assert (chosen(routing).sum(1) == 2).all()  # as many experts as ever, each another
        each_TE = made(x_TD, choice=Without(off_E.expand(tokens, 8)))
        if kind != "noise" or not training:
            assert each_TE.experts_TK.equal(routing.experts_TK)


@pytest.mark.parametrize("kind", ["softmax", "not normalized", "sigmoid with a bias", "with a bias of its logits"])
def test_it_is_the_router_without_these_rows(kind: str) -> None:
    """The same experts; the same weights where they are normalized, and else the same share of the scores of all."""
    made, on = router(kind).eval(), [0, 2, 3, 6, 7]
    smaller = router(kind, experts=5).eval()
    with torch.no_grad():
        for name in ("weight", "bias", "balance_bias"):
            if getattr(made, name) is not None:
                getattr(smaller, name).copy_(getattr(made, name)[on])
    x_TD, off_E = torch.randn(20, 6, dtype=torch.float64), torch.ones(8, dtype=torch.bool)
    off_E[on] = False
    got, want = made(x_TD, choice=Without(off_E)), smaller(x_TD)
    assert got.experts_TK.equal(torch.tensor(on)[want.experts_TK])
    if kind != "not normalized":
        assert got.weights_TK.allclose(want.weights_TK, rtol=1e-12)
    else:
        assert got.weights_TK.allclose(made(x_TD).scores_TE.gather(1, got.experts_TK), rtol=1e-12)


def test_groups_by_hand() -> None:
    """Two groups of four, of which a token uses the better one: further groups come in where too few are left."""
    made = Router(8, RouterConfig(experts=8, top_k=2, groups=4, top_groups=1, group_score="max")).double().eval()
    with torch.no_grad():
        made.weight.copy_(torch.eye(8, dtype=torch.float64))
    x_1D = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2]], dtype=torch.float64)

    def experts(*off: int) -> list[int]:
        off_E = torch.zeros(8, dtype=torch.bool)
        off_E[list(off)] = True
        return made(x_1D, choice=Without(off_E)).experts_TK[0].tolist()  # type: ignore[no-any-return]

    assert experts() == [0, 1]
    assert experts(2, 7) == [0, 1]
    assert experts(0) == [1, 2]  # the first group has one left: the next one helps out
    assert experts(0, 1) == [2, 3]
    assert experts(0, 1, 3, 4, 5, 6) == [2, 7]


@pytest.mark.filterwarnings("ignore:.*not causal")
def test_too_few_are_refused() -> None:
    x_TD = torch.randn(3, 6, dtype=torch.float64)
    all_but_one = torch.ones(3, 8, dtype=torch.bool)
    all_but_one[:, 5] = False
    with pytest.raises(RoutingError, match=r"^without its experts that are off a router has 1 of 8: it takes 2$"):
        router("softmax")(x_TD, choice=Without(all_but_one))
    assert chosen(router("expert choice")(x_TD, choice=Without(all_but_one))).sum(0).tolist() == [0] * 5 + [1, 0, 0]
    with pytest.raises(RoutingError, match=r"^without its experts that are off a router has 0 of 8: it takes 1$"):
        router("expert choice")(x_TD, choice=Without(torch.ones(8, dtype=torch.bool)))
    for wrong, said in (
        (torch.ones(8), r"float32 of shape \(8,\)"),
        (torch.zeros(2, 8, dtype=torch.bool), r"bool of shape \(2, 8\)"),
        (torch.zeros(7, dtype=torch.bool), r"bool of shape \(7,\)"),
    ):
        with pytest.raises(RoutingError, match=rf"^off_TE is {said}: it must be bool of \(3, 8\) or \(8,\)$"):
            router("softmax")(x_TD, choice=Without(wrong))


def test_gradients_reach_the_router_as_ever() -> None:
    layer = MoE(6, 5, RouterConfig(experts=4, top_k=2)).double()
    off_E = torch.tensor([False, True, False, False])
    y, routing = layer(torch.randn(7, 6, dtype=torch.float64), Without(off_E))
    y.sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().sum() > 0
    assert layer.experts.gate_up.grad is not None
    assert not layer.experts.gate_up.grad[1].any()
    assert 1 not in routing.experts_TK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_decodes_without_them(dtype: torch.dtype) -> None:
    """In a layer alone, token by token as in one pass; who asks for nothing gets the bits that it always got."""
    model = Decoder(replace(moe(), layers=3)).to(dtype).eval()
    layers = len(model.moe_layers)
    E = model.moe_layers[0].router.config.experts
    tokens_BS = torch.tensor([[5, 1, 7, 2]])
    with torch.inference_mode():
        _, plain = model(tokens_BS)
        off_E = torch.zeros(E, dtype=torch.bool)
        off_E[plain[1].experts_TK[:, 0].mode().values] = True
        told = [None, Without(off_E), *[None] * (layers - 2)]
        whole, routings = model(tokens_BS, routing=told)
        assert not chosen(routings[1])[:, off_E].any()
        assert routings[0].experts_TK.equal(plain[0].experts_TK)
        cache = KVCache(model.config, 1, 4, dtype=dtype)
        parts = [model(part, cache, routing=told) for part in tokens_BS.split(1, dim=1)]
        assert all(not chosen(made[1])[:, off_E].any() for _, made in parts)
        apart = torch.cat([logits for logits, _ in parts], dim=1) - whole
        assert float(apart.norm() / whole.norm()) < (1e-5 if dtype == torch.float32 else 5e-2)
        nothing, _ = model(tokens_BS, routing=[Without(torch.zeros(E, dtype=torch.bool))] * layers)
        again, _ = model(tokens_BS)
        assert float((nothing - again).norm() / again.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)
        assert again.equal(model(tokens_BS, routing=[None] * layers)[0])
