"""Padding changes nothing: outputs, drops, losses and loads are those of the real tokens alone.

Legend: B sequences · S tokens in one · T tokens · D width · E experts
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handful.balance import global_loss, gshard_loss, sequence_loss, step_load, switch_loss, z_loss
from handful.config import ModelConfig, RouterConfig
from handful.errors import RoutingError
from handful.model import Decoder
from handful.moe import MoE, UntrainableWarning
from handful.observe import coactivation, dropped, expert_load
from handful.positions import KVCache
from handful.routing import Choice, Routing

D, E = 6, 4
F64 = torch.float64

ROUTERS: list[dict[str, Any]] = [
    {},
    {"score": "sigmoid", "balance_bias": True, "scale": 2.5},
    {"groups": 2, "top_groups": 1},
    {"capacity_factor": 1.0, "eval_capacity_factor": 1.0},
    {"capacity_factor": 0.7, "eval_capacity_factor": 0.7, "drop_order": "choice"},
    {"sequence_capacity": 2},
    {"choice": "expert"},
]
LOSSES: dict[str, Callable[[Routing], Tensor]] = {
    "switch": switch_loss,
    "gshard": gshard_loss,
    "z": z_loss,
    "global": lambda routing: global_loss(routing, step_load([[routing]])[0]),
    "one sequence": lambda routing: sequence_loss(routing, 1),
}


@pytest.mark.filterwarnings("ignore:expert choice looks", "ignore:drop_order = 'choice'")
@pytest.mark.parametrize("changes", ROUTERS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_padding_changes_nothing(changes: dict[str, Any], training: bool, real: list[bool], seed: int) -> None:
    torch.manual_seed(seed)
    layer = MoE(D, 5, RouterConfig(**{"experts": E, "top_k": 2, **changes})).to(F64).train(training)
    mask = torch.tensor(real)
    x_TD = torch.randn(len(real), D, dtype=F64)
    x_TD[~mask] = 1.0  # all alike: they would all choose the same expert
    y_TD, routing = layer(x_TD, mask=mask)
    alone_TD, alone = layer(x_TD[mask])
    assert torch.allclose(y_TD[mask], alone_TD, atol=1e-12)
    assert not y_TD[~mask].any()
    assert routing.dropped_TK is not None
    assert bool(routing.dropped_TK[~mask].all())
    kept = torch.zeros_like(alone.experts_TK, dtype=torch.bool) if alone.dropped_TK is None else alone.dropped_TK
    assert routing.dropped_TK[mask].equal(kept)
    for name, loss in LOSSES.items():
        assert torch.allclose(loss(routing), loss(alone), atol=1e-6), name
        assert bool(loss(routing).isfinite()), name
    assert torch.allclose(expert_load(routing), expert_load(alone))
    assert coactivation(routing).equal(coactivation(alone))
    assert dropped(routing) == pytest.approx(dropped(alone))


def gradient(layer: MoE, loss: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, [layer.router.weight], allow_unused=True)
    return torch.zeros_like(layer.router.weight) if found is None else found


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_comes_from_padding(name: str) -> None:
    layer = MoE(D, 5, RouterConfig(experts=E, top_k=2)).to(F64)
    mask = torch.tensor([True, False, True, True, False])
    x_TD = torch.randn(5, D, dtype=F64)
    x_TD[1] = 1e3
    got = gradient(layer, LOSSES[name](layer(x_TD, mask=mask)[1]))
    assert torch.allclose(got, gradient(layer, LOSSES[name](layer(x_TD[mask])[1])))


def test_sequences_are_averaged_over_those_that_there_are() -> None:
    layer = MoE(D, 5, RouterConfig(experts=E, top_k=2)).to(F64)
    x_BSD = torch.randn(3, 4, D, dtype=F64)
    mask = torch.tensor([[False, True, True, True], [True] * 4, [False] * 4])
    got = sequence_loss(layer(x_BSD, mask=mask)[1], 3)
    each = [sequence_loss(layer(x_BSD[b][mask[b]])[1], 1) for b in (0, 1)]
    assert torch.allclose(got, torch.stack(each).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_no_tokens_are_zero(name: str) -> None:
    layer = MoE(D, 5, RouterConfig(experts=E, top_k=2))
    _, none = layer(torch.randn(0, D))
    _, padding = layer(torch.randn(3, D), mask=torch.zeros(3, dtype=torch.bool))
    for routing in (none, padding):
        loss = LOSSES[name](routing)
        assert loss.item() == 0
        assert not gradient(layer, loss + 0 * layer.router.weight.sum()).any()
        assert not expert_load(routing).any()


def test_a_mask_of_another_shape_or_type_is_refused() -> None:
    layer = MoE(D, 5, RouterConfig(experts=E, top_k=2))
    with pytest.raises(RoutingError, match=r"mask is bool of shape \(2,\): it must be bool of \(2, 3\)"):
        layer(torch.randn(2, 3, D), mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(RoutingError, match=r"mask is int64 of shape \(2, 3\): it must be bool of"):
        layer(torch.randn(2, 3, D), mask=torch.ones(2, 3, dtype=torch.long))
    _, routing = layer(torch.randn(3, D))
    with pytest.raises(RoutingError, match=r"real_T has shape \(2,\): it must be \(3,\)"):
        Routing(
            routing.logits_TE, routing.scores_TE, routing.experts_TK, routing.weights_TK,
            real_T=torch.ones(2, dtype=torch.bool),
        )  # fmt: skip


def test_a_replayed_choice_leaves_padding_out() -> None:
    layer = MoE(D, 5, RouterConfig(experts=E, top_k=2))
    x_TD, mask = torch.randn(3, D), torch.tensor([False, True, True])
    _, routing = layer(x_TD, mask=mask)
    _, again = layer(x_TD, Choice(routing.experts_TK), mask=mask)
    assert again.dropped_TK is not None
    assert again.dropped_TK.equal(~mask.unsqueeze(1).expand(3, 2))


@pytest.mark.parametrize("cached", [True, False])
def test_a_decoders_padding_takes_no_capacity(cached: bool) -> None:
    """And counts in no routing; a token that is decoded after it is real."""
    router = RouterConfig(experts=E, top_k=2, capacity_factor=1.0, eval_capacity_factor=1.0)
    config = ModelConfig(vocab=20, width=8, layers=2, heads=2, ffn=0, context=40, router=router, expert_width=8)
    model = Decoder(config).double().eval()
    tokens = torch.randint(20, (1, 9))
    padded = torch.cat([torch.zeros(1, 20, dtype=torch.long), tokens], dim=1)
    with torch.inference_mode():
        want, alone = model(tokens)
        cache = KVCache(config, 1, 40, dtype=F64) if cached else None
        got, routings = model(padded, cache, padding_B=torch.tensor([20]))
        assert torch.allclose(got[:, 20:], want, atol=1e-12)
        for routing, other in zip(routings, alone, strict=True):
            assert torch.allclose(switch_loss(routing), switch_loss(other))
            assert routing.chosen_E.equal(other.chosen_E)
        if cache is not None:
            _, after = model(tokens[:, :1], cache)
            assert all(routing.real_T is None for routing in after)


@pytest.mark.filterwarnings("error:router.normalize")
def test_one_expert_a_token_with_weights_of_one_is_told() -> None:
    """Its router gets no gradient: 1 is 1 whatever the scores are."""
    with pytest.warns(UntrainableWarning, match="set normalize=False"):
        layer = MoE(D, 5, RouterConfig(experts=E, top_k=1))
    layer(torch.randn(7, D))[0].square().sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.norm() < 1e-4
    other = MoE(D, 5, RouterConfig(experts=E, top_k=1, normalize=False))  # and nothing is said
    other(torch.randn(7, D))[0].square().sum().backward()
    assert other.router.weight.grad is not None
    assert other.router.weight.grad.norm() > 1e-4
