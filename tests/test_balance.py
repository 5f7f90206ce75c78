"""The losses and the bias update against their papers' equations, worked by hand.

Legend: T tokens · E experts · K experts per token · L MoE layers
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from handful.balance import (
    balance_loss,
    global_loss,
    gshard_loss,
    sequence_loss,
    step_load,
    switch_loss,
    update_bias,
    z_loss,
)
from handful.config import BalanceConfig, RouterConfig
from handful.moe import Router
from handful.observe import max_vio
from handful.routing import Routing

F64 = torch.float64


def routing_of(scores_TE: Any, experts_TK: Any, logits_TE: Any = None, dropped_TK: Any = None) -> Routing:
    scores = torch.as_tensor(scores_TE, dtype=F64)
    chosen = torch.as_tensor(experts_TK)
    logits = scores if logits_TE is None else torch.as_tensor(logits_TE, dtype=F64)
    out = None if dropped_TK is None else torch.as_tensor(dropped_TK)
    return Routing(logits, scores, chosen, torch.ones(chosen.shape, dtype=F64), out)


# Four tokens, two sequences of two; the probabilities of three experts.
SCORES = [[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.5, 0.3]]
TOP1 = [[0], [0], [1], [1]]
TOP2 = [[0, 1], [0, 1], [1, 2], [1, 2]]
# Mean probabilities: all four (0.375, 0.4, 0.225), the first two (0.6, 0.25, 0.15), the last two (0.15, 0.55, 0.3).


def test_switch_by_hand() -> None:
    # Load (1/2, 1/2, 0): 3 · (0.5 · 0.375 + 0.5 · 0.4) = 1.1625
    assert float(switch_loss(routing_of(SCORES, TOP1))) == pytest.approx(1.1625, rel=1e-12)
    # Load (2, 4, 2) / 8: 3 · (0.25 · 0.375 + 0.5 · 0.4 + 0.25 · 0.225) = 1.05
    assert float(switch_loss(routing_of(SCORES, TOP2))) == pytest.approx(1.05, rel=1e-12)
    # Collapsed: everything on one expert that has all the probability gives E.
    assert float(switch_loss(routing_of([[1, 0, 0]] * 4, [[0]] * 4))) == pytest.approx(3, rel=1e-12)


def test_what_was_dropped_counts_as_chosen() -> None:
    dropped = routing_of(SCORES, TOP1, dropped_TK=[[False], [True], [True], [True]])
    assert float(switch_loss(dropped)) == pytest.approx(1.1625, rel=1e-12)
    assert step_load([[dropped]]).tolist() == [[2, 2, 0]]


def test_sequence_by_hand() -> None:
    # Sequence 1, load (1, 0, 0): 3 · 0.6 = 1.8. Sequence 2, load (0, 1, 0): 3 · 0.55 = 1.65. Mean 1.725.
    assert float(sequence_loss(routing_of(SCORES, TOP1), 2)) == pytest.approx(1.725, rel=1e-12)
    # Load (1/2, 1/2, 0): 3 · (0.3 + 0.125) = 1.275. Load (0, 1/2, 1/2): 3 · (0.275 + 0.15) = 1.275.
    assert float(sequence_loss(routing_of(SCORES, TOP2), 2)) == pytest.approx(1.275, rel=1e-12)
    # One sequence: Switch's.
    assert float(sequence_loss(routing_of(SCORES, TOP2), 1)) == pytest.approx(1.05, rel=1e-12)


def test_sequence_with_sigmoid_scores_by_hand() -> None:
    """DeepSeek-V3's equations 17-20: affinities 0.9 and 0.3 are probabilities 0.75 and 0.25."""
    # f = E / (K T) · counts = 2 / (1 · 2) · (2, 0) = (2, 0); P = ((0.75 + 0.5) / 2, …) = (0.625, 0.375): 1.25
    routing = routing_of([[0.9, 0.3], [0.2, 0.2]], [[0], [0]])
    assert float(sequence_loss(routing, 1)) == pytest.approx(1.25, rel=1e-12)
    assert float(switch_loss(routing)) == pytest.approx(1.25, rel=1e-12)


def test_global_by_hand() -> None:
    # The whole batch's load (6, 2, 2) / 10: 3 · (0.6 · 0.375 + 0.2 · 0.4 + 0.2 · 0.225) = 1.05
    load_E = torch.tensor([6.0, 2.0, 2.0])
    assert float(global_loss(routing_of(SCORES, TOP1), load_E)) == pytest.approx(1.05, rel=1e-7)


def test_gshard_by_hand() -> None:
    # First choices (2, 2, 0) / 4 whatever the second: mean over experts of c / S · m is (0.1875 + 0.2 + 0) / 3, the
    # paper's loss, 0.1291…; times E² it is 1.1625.
    paper = (0.5 * 0.375 + 0.5 * 0.4 + 0 * 0.225) / 3
    for chosen in (TOP1, TOP2):
        assert float(gshard_loss(routing_of(SCORES, chosen))) == pytest.approx(9 * paper, rel=1e-12)
    assert 9 * paper == pytest.approx(1.1625, rel=1e-12)


def test_z_by_hand() -> None:
    # log(1 + 1) = ln 2 and log(3 + 1) = 2 ln 2: the mean of the squares is 2.5 (ln 2)² = 1.2011…
    routing = routing_of([[0.5, 0.5], [0.75, 0.25]], [[0], [0]], logits_TE=[[0, 0], [math.log(3), 0]])
    assert float(z_loss(routing)) == pytest.approx(2.5 * math.log(2) ** 2, rel=1e-12)
    assert float(z_loss(routing)) == pytest.approx(1.2011325, rel=1e-7)


LOSSES: dict[str, Callable[[Routing], Tensor]] = {
    "switch": switch_loss,
    "sequence": lambda routing: sequence_loss(routing, 2),
    "global": lambda routing: global_loss(routing, torch.tensor([4.0, 4.0, 4.0])),
    "gshard": gshard_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_an_even_load_costs_1_whatever_the_probabilities(name: str) -> None:
    scores_TE = torch.rand(6, 3, dtype=F64).softmax(-1)
    even = routing_of(scores_TE, [[0, 1], [1, 2], [2, 0], [0, 2], [2, 1], [1, 0]])
    assert float(LOSSES[name](even)) == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_flows_through_the_probabilities_alone(name: str) -> None:
    """Through a softmax it is E / T · p_te · (f_e - Σ_i f_i p_ti) for loads f, here of each token's own sequence."""
    logits_TE = torch.randn(4, 3, dtype=F64, requires_grad=True)
    chosen_TK = torch.tensor([[0, 1], [0, 2], [1, 2], [1, 0]])
    weights_TK = torch.ones(4, 2, dtype=F64, requires_grad=True)
    routing = Routing(logits_TE, logits_TE.softmax(-1), chosen_TK, weights_TK)
    LOSSES[name](routing).backward()
    load_TE = {
        "switch": torch.tensor([[3, 3, 2]] * 4) / 8,
        "sequence": torch.tensor([[2, 1, 1]] * 2 + [[1, 2, 1]] * 2) / 4,
        "global": torch.tensor([[1, 1, 1]] * 4) / 3,
        "gshard": torch.tensor([[2, 2, 0]] * 4) / 4,
    }[name].to(F64)
    p_TE = logits_TE.detach().softmax(-1)
    want_TE = 3 / 4 * p_TE * (load_TE - (load_TE * p_TE).sum(-1, keepdim=True))
    assert logits_TE.grad is not None
    assert float((logits_TE.grad - want_TE).norm()) < 1e-7 * float(want_TE.norm()) + 1e-9
    assert weights_TK.grad is None


def test_the_z_gradient() -> None:
    logits_TE = torch.randn(4, 3, dtype=F64, requires_grad=True)
    scores_TE = logits_TE.softmax(-1).detach()
    assert torch.autograd.gradcheck(
        lambda v: z_loss(Routing(v, scores_TE, torch.zeros(4, 1, dtype=torch.long), scores_TE[:, :1])), logits_TE
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_global_over_micro_batches_is_the_whole_batch(score: Any) -> None:
    """Equal micro-batches, each with the whole load: the mean of the losses and of the gradients is the whole's.
    Switch's, with each micro-batch's own load, is another number."""
    router = Router(5, RouterConfig(experts=6, top_k=2, score=score)).to(F64)
    x_TD = torch.randn(24, 5, dtype=F64)
    config = BalanceConfig(loss="global", weight=1.0)

    def gradient(loss: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss, router.weight)
        return grad

    whole = balance_loss(config, [router(x_TD)], 1)
    routings = [[router(part)] for part in x_TD.chunk(4)]
    load_LE = step_load(routings)
    parts = torch.stack([balance_loss(config, r, 1, load_LE) for r in routings]).mean()
    assert float(parts.detach()) == pytest.approx(float(whole.detach()), rel=1e-12)
    want = gradient(whole)
    assert float((gradient(parts) - want).norm()) < 1e-12 * float(want.norm())
    separate = torch.stack([switch_loss(router(part)) for part in x_TD.chunk(4)]).mean()
    assert abs(float((separate - whole).detach())) > 1e-3
    assert float(whole.detach()) == pytest.approx(float(switch_loss(router(x_TD)).detach()), rel=1e-12)


def test_balance_loss_is_the_mean_over_layers() -> None:
    layers = [routing_of(SCORES, TOP1), routing_of(SCORES, TOP2)]
    hand = {"switch": (1.1625, 1.05), "sequence": (1.725, 1.275), "gshard": (1.1625, 1.1625), "global": (1.1625, 1.05)}
    for kind, (first, second) in hand.items():
        config = BalanceConfig(loss=kind, weight=7.0)  # type: ignore[arg-type]
        assert float(balance_loss(config, layers, 2)) == pytest.approx((first + second) / 2, rel=1e-7)
    given_load = balance_loss(
        BalanceConfig(loss="global", weight=1.0), layers, 2, torch.tensor([[6.0, 2, 2], [1, 1, 1]])
    )
    assert float(given_load) == pytest.approx((1.05 + 1) / 2, rel=1e-7)
    assert float(balance_loss(BalanceConfig(), layers, 2)) == 0
    assert float(balance_loss(BalanceConfig(loss="switch", weight=1.0), [], 2)) == 0


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_losses_equal_slow_sums(experts: int, top_k: int, length: int, seed: int) -> None:
    K, T = min(top_k, experts), 2 * length
    random = torch.Generator().manual_seed(seed)
    p = torch.randn(T, experts, generator=random, dtype=F64).softmax(-1)
    chosen = torch.rand(T, experts, generator=random).topk(K).indices

    def slow(tokens: range) -> float:
        total = 0.0
        for e in range(experts):
            f = sum(int(i) == e for t in tokens for i in chosen[t]) / (len(tokens) * K)
            total += f * sum(float(p[t, e]) for t in tokens) / len(tokens)
        return experts * total

    routing = routing_of(p, chosen)
    assert float(switch_loss(routing)) == pytest.approx(slow(range(T)), rel=1e-6)
    both = (slow(range(length)) + slow(range(length, T))) / 2
    assert float(sequence_loss(routing, 2)) == pytest.approx(both, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The load of a step.


def test_step_load_by_hand() -> None:
    # Two micro-batches of two layers.
    first = [routing_of(SCORES, TOP1), routing_of(SCORES, TOP2)]
    second = [routing_of(SCORES, [[2], [2], [2], [0]]), routing_of(SCORES, [[0, 2]] * 4)]
    assert step_load([first]).tolist() == [[2, 2, 0], [2, 4, 2]]
    assert step_load([first, second]).tolist() == [[3, 2, 3], [6, 4, 6]]


RANK = """
import sys
import torch
import torch.distributed as dist
from handful.balance import step_load
from handful.routing import Routing

rank, meet = int(sys.argv[1]), sys.argv[2]
chosen_TK = torch.tensor([[[0, 1], [0, 2]], [[2, 0], [0, 1]]][rank])  # this rank's two tokens
weights_TK, scores_TE = torch.ones(2, 2), torch.ones(2, 4)
layer = Routing(scores_TE, scores_TE, chosen_TK, weights_TK)
dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
print(step_load([[layer, layer], [layer, layer]]).tolist())
dist.destroy_process_group()
"""


def test_step_load_over_two_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    ranks = [
        fresh.Process("-c", RANK, str(rank), tmp_path / "meet", env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
        for rank in range(2)
    ]
    printed = [rank.wait(100).stdout.strip() for rank in ranks]
    scores_TE = torch.ones(4, 4)
    layer = routing_of(scores_TE, [[0, 1], [0, 2], [2, 0], [0, 1]])  # both ranks' tokens
    want = step_load([[layer, layer], [layer, layer]])
    assert want.tolist() == [[8, 4, 4, 0]] * 2
    assert printed == [str(want.tolist())] * 2


# ---------------------------------------------------------------------------------------------------------------------
# The loss-free bias.


def test_update_bias_by_hand() -> None:
    bias_E = torch.tensor([0.0, 0.1, -0.2, 0.5])
    # Mean load 2: expert 0 is over it, 1 under, 2 and 3 at it, where sign(0) = 0 leaves them.
    update_bias(bias_E, torch.tensor([4.0, 0.0, 2.0, 2.0]), 0.01)
    assert bias_E.tolist() == pytest.approx([-0.01, 0.11, -0.2, 0.5], rel=1e-6)


def test_an_even_load_moves_no_bias() -> None:
    for E, each in ((3, 7), (7, 3), (60, 1001)):  # means that have no exact 1/E
        bias_E = torch.zeros(E)
        update_bias(bias_E, torch.full((E,), float(each)), 0.001)
        assert bias_E.count_nonzero() == 0


def test_update_bias_has_no_gradient() -> None:
    router = Router(4, RouterConfig(experts=3, top_k=1, score="sigmoid", balance_bias=True))
    routing = router(torch.randn(6, 4))
    assert router.balance_bias is not None
    update_bias(router.balance_bias, routing.chosen_E, 0.1)
    assert not router.balance_bias.requires_grad
    routing.weights_TK.sum().backward()  # nothing that backward needs was changed in place


def test_the_bias_evens_a_skewed_load() -> None:
    """Tokens that all lean to the same experts: after enough updates every expert has its share."""
    router = Router(8, RouterConfig(experts=8, top_k=2, score="sigmoid", balance_bias=True))
    x_TD = torch.randn(400, 8) + 1.0
    assert router.balance_bias is not None
    before = max_vio(router(x_TD).chosen_E)
    for _ in range(200):
        update_bias(router.balance_bias, router(x_TD).chosen_E, 0.01)
    after = max_vio(router(x_TD).chosen_E)
    assert before > 1
    assert after < 0.15
