"""Experts that are off, and fewer of them a token: a router chooses within limits, of whatever kind it is.

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
from handful.routing import Choice, Limits, Piecewise, Routing

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
    found_TE = torch.zeros(routing.tokens, routing.experts, dtype=torch.int64)
    return found_TE.scatter_add_(1, routing.experts_TK, kept_TK.long()) > 0


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
    routing = made(x_TD, choice=Limits(off_E))
    assert not chosen(routing)[:, off_E].any()
    assert routing.weights_TK.isfinite().all()
    if kind not in ("expert choice", "capacity"):
        assert (chosen(routing).sum(1) == 2).all()  # as many experts as ever, each another
        each_TE = made(x_TD, choice=Limits(off_E.expand(tokens, 8)))
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
    got, want = made(x_TD, choice=Limits(off_E)), smaller(x_TD)
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
        return made(x_1D, choice=Limits(off_E)).experts_TK[0].tolist()  # type: ignore[no-any-return]

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
        router("softmax")(x_TD, choice=Limits(all_but_one))
    assert chosen(router("expert choice")(x_TD, choice=Limits(all_but_one))).sum(0).tolist() == [0] * 5 + [1, 0, 0]
    with pytest.raises(RoutingError, match=r"^without its experts that are off a router has 0 of 8: it takes 1$"):
        router("expert choice")(x_TD, choice=Limits(torch.ones(8, dtype=torch.bool)))
    for wrong, said in (
        (torch.ones(8), r"float32 of shape \(8,\)"),
        (torch.zeros(2, 8, dtype=torch.bool), r"bool of shape \(2, 8\)"),
        (torch.zeros(7, dtype=torch.bool), r"bool of shape \(7,\)"),
    ):
        with pytest.raises(RoutingError, match=rf"^off_TE is {said}: it must be bool of \(3, 8\) or \(8,\)$"):
            router("softmax")(x_TD, choice=Limits(wrong))


def test_gradients_reach_the_router_as_ever() -> None:
    layer = MoE(6, 5, RouterConfig(experts=4, top_k=2)).double()
    off_E = torch.tensor([False, True, False, False])
    y, routing = layer(torch.randn(7, 6, dtype=torch.float64), Limits(off_E))
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
        told = [None, Limits(off_E), *[None] * (layers - 2)]
        whole, routings = model(tokens_BS, routing=told)
        assert not chosen(routings[1])[:, off_E].any()
        assert routings[0].experts_TK.equal(plain[0].experts_TK)
        cache = KVCache(model.config, 1, 4, dtype=dtype)
        parts = [model(part, cache, routing=told) for part in tokens_BS.split(1, dim=1)]
        assert all(not chosen(made[1])[:, off_E].any() for _, made in parts)
        apart = torch.cat([logits for logits, _ in parts], dim=1) - whole
        assert float(apart.norm() / whole.norm()) < (1e-5 if dtype == torch.float32 else 5e-2)
        nothing, _ = model(tokens_BS, routing=[Limits(torch.zeros(E, dtype=torch.bool))] * layers)
        again, _ = model(tokens_BS)
        assert float((nothing - again).norm() / again.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)
        assert again.equal(model(tokens_BS, routing=[None] * layers)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Fewer experts a token.


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("expert choice", "capacity")])
@pytest.mark.parametrize("off", [[], [1, 5]])
def test_fewer_is_the_router_that_takes_fewer(kind: str, off: list[int]) -> None:
    """The same experts and weights, best first, as a router of the same weights whose own top_k is that."""
    made, fewer = router(kind, top_k=4).eval(), router(kind, top_k=3).eval()
    fewer.load_state_dict(made.state_dict())
    off_E = torch.zeros(8, dtype=torch.bool)
    off_E[off] = True
    x_TD = torch.randn(20, 6, dtype=torch.float64)
    got, want = made(x_TD, choice=Limits(off_E, top_k=3)), fewer(x_TD, choice=Limits(off_E))
    assert got.experts_TK.equal(want.experts_TK)
    assert got.weights_TK.equal(want.weights_TK)
    for wrong in (0, 5):
        with pytest.raises(RoutingError, match=rf"^top_k = {wrong}: from 1 to the router's own 4$"):
            made(x_TD, choice=Limits(top_k=wrong))


@pytest.mark.filterwarnings("ignore:.*not causal")
def test_experts_choose_fewer_tokens() -> None:
    routing = router("expert choice")(torch.randn(16, 6, dtype=torch.float64), choice=Limits(top_k=1))
    assert chosen(routing).sum(0).tolist() == [2] * 8


def test_so_many_are_enough_where_others_are_off() -> None:
    """As many as a token takes must be left, and no more."""
    off_E = torch.ones(8, dtype=torch.bool)
    off_E[3] = False
    routing = router("softmax")(torch.randn(5, 6, dtype=torch.float64), choice=Limits(off_E, top_k=1))
    assert routing.experts_TK.tolist() == [[3]] * 5
    assert routing.weights_TK.tolist() == [[1.0]] * 5


# ---------------------------------------------------------------------------------------------------------------------
# Another for each run of tokens.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [11, 60])
def test_pieces_are_what_each_is_alone(dtype: torch.dtype, tokens: int) -> None:
    """Free, within limits, with fewer experts and replayed: a layer's results are those of its pieces, one by one."""
    torch.manual_seed(1)
    layer = MoE(16, 8, RouterConfig(experts=8, top_k=3)).to(dtype).eval()
    x_TD = torch.randn(tokens, 16, dtype=dtype)
    off_E = torch.zeros(8, dtype=torch.bool)
    off_E[2] = True
    replayed = Choice(torch.tensor([[4, 1], [0, 7], [5, 6]]))
    told = [None, Limits(off_E), Limits(top_k=1), replayed]
    counts = [tokens - 9, 2, 4, 3]
    with torch.inference_mode():
        y_TD, routing = layer(x_TD, Piecewise(tuple(zip(counts, told, strict=True))))
        assert [kept.sum().item() for kept in chosen(routing).split(counts)] == [3 * (tokens - 9), 6, 4, 6]
        assert not chosen(routing)[tokens - 9 : tokens - 7, 2].any()
        for part_XD, y_XD, one in zip(x_TD.split(counts), y_TD.split(counts), told, strict=True):
            alone_XD, _ = layer(part_XD, one)
            assert float((alone_XD - y_XD).norm() / alone_XD.norm()) < {8: 1e-12, 4: 1e-5, 2: 2e-2}[dtype.itemsize]


def test_pieces_that_do_not_fit() -> None:
    x_TD = torch.randn(5, 6, dtype=torch.float64)
    with pytest.raises(RoutingError, match=r"^choice is of 4 tokens: there are 5$"):
        router("softmax")(x_TD, choice=Piecewise(((4, None),)))
    with pytest.raises(RoutingError, match=r"^choice is Piecewise: this router's tokens compete for places"):
        router("capacity")(x_TD, choice=Piecewise(((5, None),)))
    with pytest.raises(RoutingError, match=r"has shape \(5, 3\): it must be \(5, 2\), or of fewer experts$"):
        router("softmax")(x_TD, choice=Choice(torch.zeros(5, 3, dtype=torch.int64)))


def test_pieces_keep_their_padding() -> None:
    real_T = torch.tensor([True, True, False, False, True])
    told = Piecewise(((3, None), (2, Limits(top_k=1))))
    routing = router("softmax")(torch.randn(5, 6, dtype=torch.float64), choice=told, real_T=real_T)
    assert routing.real_T is not None
    assert routing.real_T.equal(real_T)
    assert chosen(routing).sum(1).tolist() == [2, 2, 0, 0, 1]


def test_few_tokens_within_limits_have_the_kernels_bits() -> None:
    """Nothing off and as many experts as ever is what a router does that is told nothing; and what was chosen within
    limits, replayed, has the same weights."""
    torch.manual_seed(2)
    made = Router(32, RouterConfig(experts=16, top_k=4)).eval()
    x_TD = torch.randn(7, 32)
    with torch.inference_mode():
        free, told = made(x_TD), made(x_TD, choice=Limits(torch.zeros(16, dtype=torch.bool)))
        assert told.experts_TK.equal(free.experts_TK)
        assert told.weights_TK.equal(free.weights_TK)
        off_E = torch.zeros(16, dtype=torch.bool)
        off_E[free.experts_TK[0]] = True
        within = made(x_TD, choice=Limits(off_E, top_k=2))
        again = made(x_TD, choice=Choice(within.experts_TK))
        assert again.weights_TK.equal(within.weights_TK)
