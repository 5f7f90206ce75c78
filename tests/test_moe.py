"""The router's equations by hand, its choices against slow rewrites, its noise by statistics; the layer against dense.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from handful.config import Activation, RouterConfig
from handful.errors import ConfigError, RoutingError
from handful.experts import FeedForward
from handful.moe import MoE, NotCausalWarning, Router
from handful.presets import PRESETS
from handful.routing import Routing

F64 = torch.float64
LN3 = math.log(3)  # sigmoid: 1/4, 1/2 and 3/4 at -ln 3, 0 and ln 3


def quiet_router(width: int, config: RouterConfig) -> Router:
    with warnings.catch_warnings(action="ignore", category=NotCausalWarning):
        return Router(width, config)


def given_logits(config: RouterConfig, bias: Sequence[float] | Tensor | None = None) -> Router:
    """A router whose logits are its input: its matrix is the identity. In evaluation mode."""
    router = quiet_router(config.experts, config).to(F64).eval()
    with torch.no_grad():
        router.weight.copy_(torch.eye(config.experts))
        if bias is not None:
            assert router.balance_bias is not None
            router.balance_bias.copy_(torch.as_tensor(bias))
    return router


def route(config: RouterConfig, logits_TE: Any, **kwargs: Any) -> Routing:
    routing: Routing = given_logits(config, **kwargs)(torch.as_tensor(logits_TE, dtype=F64))
    return routing


def preferring(choices: Sequence[Sequence[int]], experts: int) -> Tensor:
    """Logits of tokens that choose these experts in this order."""
    logits_TE = torch.zeros(len(choices), experts, dtype=F64)
    for t, ranked in enumerate(choices):
        for place, expert in enumerate(ranked):
            logits_TE[t, expert] = 9.0 - place
    return logits_TE


def close(got: Tensor, want: Any, rel: float = 1e-12) -> None:
    want = torch.as_tensor(want, dtype=got.dtype)
    assert got.shape == want.shape
    assert (got - want).norm() <= rel * want.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Scores and weights.


def test_softmax_by_hand() -> None:
    # e^logit = 1, 2, 5: scores 1/8, 2/8, 5/8.
    logits = [[0.0, math.log(2), math.log(5)]]
    raw = route(RouterConfig(experts=3, top_k=2, normalize=False), logits)
    close(raw.scores_TE, [[0.125, 0.25, 0.625]])
    assert raw.experts_TK.tolist() == [[2, 1]]
    close(raw.weights_TK, [[0.625, 0.25]])
    close(route(RouterConfig(experts=3, top_k=2), logits).weights_TK, [[5 / 7, 2 / 7]])
    close(route(RouterConfig(experts=3, top_k=2, scale=3.0), logits).weights_TK, [[15 / 7, 6 / 7]])
    close(route(RouterConfig(experts=3, top_k=2, normalize=False, scale=2.0), logits).weights_TK, [[1.25, 0.5]])


def test_sigmoid_by_hand() -> None:
    logits = [[0.0, LN3, -LN3]]
    raw = route(RouterConfig(experts=3, top_k=2, score="sigmoid", normalize=False), logits)
    close(raw.scores_TE, [[0.5, 0.75, 0.25]])
    assert raw.experts_TK.tolist() == [[1, 0]]
    close(raw.weights_TK, [[0.75, 0.5]])
    close(route(RouterConfig(experts=3, top_k=2, score="sigmoid", scale=2.5), logits).weights_TK, [[1.5, 1.0]])


def test_the_linear_map_and_its_bias() -> None:
    router = Router(2, RouterConfig(experts=3, top_k=1, logits_bias=True))
    assert router.bias is not None
    assert router.bias.tolist() == [0, 0, 0]
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]]))
        router.bias.copy_(torch.tensor([0.0, 10.0, -4.0]))
    routing = router(torch.tensor([[1.0, 1.0], [2.0, -1.0]]))
    assert routing.logits_TE.tolist() == [[3, 9, -1], [0, 11, 2]]
    assert routing.experts_TK.tolist() == [[1], [1]]


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["softmax", "sigmoid"]),
    st.sampled_from([0.5, 1.0, 2.5]),
    st.integers(0, 10**6),
)
def test_normalised_weights_sum_to_scale(experts: int, top_k: int, score: Any, scale: float, seed: int) -> None:
    config = RouterConfig(experts=experts, top_k=min(top_k, experts), score=score, scale=scale)
    logits_TE = 3 * torch.randn(5, experts, generator=torch.Generator().manual_seed(seed), dtype=F64)
    close(route(config, logits_TE).weights_TK.sum(-1), [scale] * 5)


def test_normalising_scores_that_vanish_gives_no_nan() -> None:
    router = given_logits(RouterConfig(experts=3, top_k=2, score="sigmoid")).float()
    assert router(torch.full((1, 3), -200.0)).weights_TK.isfinite().all()


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "gpt-oss"])
def test_softmax_over_the_chosen_logits(name: str) -> None:
    """How Mixtral and gpt-oss write it, and what Qwen3's normalised softmax comes to."""
    config = PRESETS[name].router
    logits_TE = 2 * torch.randn(20, config.experts, dtype=F64)
    best = logits_TE.topk(config.top_k)
    routing = route(config, logits_TE)
    assert routing.experts_TK.equal(best.indices)
    close(routing.weights_TK, best.values.softmax(-1))


@pytest.mark.parametrize("name", ["switch", "olmoe", "deepseek-moe"])
def test_raw_probabilities_of_the_chosen(name: str) -> None:
    config = replace(PRESETS[name].router, eval_capacity_factor=None)
    logits_TE = 2 * torch.randn(20, config.experts, dtype=F64)
    best = logits_TE.softmax(-1).topk(config.top_k)
    routing = route(config, logits_TE)
    assert routing.experts_TK.equal(best.indices)
    close(routing.weights_TK, best.values)


def test_deepseek_v3_equals_a_plain_rewrite() -> None:
    """arXiv:2412.19437, section 2.1.2: eq. 13-16, and node-limited routing over the groups."""
    config = PRESETS["deepseek-v3"].router
    logits_TE, bias_E = torch.randn(12, 256, dtype=F64), 0.3 * torch.randn(256)
    routing = route(config, logits_TE, bias=bias_E)
    for t in range(12):
        affinity = [1 / (1 + math.exp(-v)) for v in logits_TE[t].tolist()]
        biased = [s + b for s, b in zip(affinity, bias_E.tolist(), strict=True)]
        groups = [range(32 * g, 32 * (g + 1)) for g in range(8)]
        groups.sort(key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))
        allowed = [e for group in groups[:4] for e in group]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:8]
        total = sum(affinity[e] for e in chosen)
        assert routing.experts_TK[t].tolist() == chosen
        close(routing.weights_TK[t], [2.5 * affinity[e] / total for e in chosen])


# ---------------------------------------------------------------------------------------------------------------------
# The balance bias.

BIASED = RouterConfig(experts=4, top_k=2, score="sigmoid", balance_bias=True)


def test_balance_bias_changes_selection_only() -> None:
    logits = [[LN3, 0.0, -LN3, -5.0]]  # scores 0.75, 0.5, 0.25, 0.0067
    plain, moved = route(BIASED, logits), route(BIASED, logits, bias=[0.0, -0.3, 0.0, 0.9])
    assert plain.experts_TK.tolist() == [[0, 1]]
    assert moved.experts_TK.tolist() == [[3, 0]]
    assert moved.scores_TE.equal(plain.scores_TE)
    assert moved.logits_TE.equal(plain.logits_TE)
    last = 1 / (1 + math.exp(5))
    close(moved.weights_TK, [[last / (last + 0.75), 0.75 / (last + 0.75)]])


def test_balance_bias_is_a_buffer_without_gradient() -> None:
    router = Router(4, BIASED)
    assert "balance_bias" in router.state_dict()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router.balance_bias is not None
    router.balance_bias.requires_grad_()  # even then
    router(torch.randn(5, 4)).weights_TK[:, 0].sum().backward()
    assert router.balance_bias.grad is None
    assert router.weight.grad is not None
    assert router.weight.grad.count_nonzero() > 0
    assert "balance_bias" not in Router(4, replace(BIASED, balance_bias=False)).state_dict()


def test_balance_bias_comes_back_with_the_state_dict() -> None:
    router, other = Router(4, BIASED), Router(4, BIASED)
    assert router.balance_bias is not None
    router.balance_bias.uniform_()
    other.load_state_dict(router.state_dict())
    x_TD = torch.randn(9, 4)
    assert other(x_TD).experts_TK.equal(router(x_TD).experts_TK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
def test_balance_bias_keeps_its_precision_in_any_model(dtype: torch.dtype) -> None:
    moe = MoE(4, 4, BIASED)
    assert moe.router.balance_bias is not None
    moe.router.balance_bias.fill_(0.501)
    before = moe.router.balance_bias.clone()
    moe.to(dtype)
    assert moe.router.weight.dtype == dtype
    assert moe.router.balance_bias.equal(before)
    assert moe.router.balance_bias.dtype == torch.float32
    with torch.device("meta"):
        blank = MoE(4, 4, BIASED).to(dtype).to_empty(device="cpu")
    assert blank.router.balance_bias is not None
    assert blank.router.balance_bias.device.type == "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# Groups.


@given(st.data())
def test_groups_equal_a_slow_selection(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 5), "groups")
    score: Any = data.draw(st.sampled_from(["max", "top2"]), "score")
    size = data.draw(st.integers(2 if score == "top2" else 1, 5), "size")
    top_groups = data.draw(st.integers(1, groups), "top_groups")
    top_k = data.draw(st.integers(1, size * top_groups), "top_k")
    biased = data.draw(st.booleans(), "biased")
    config = RouterConfig(
        experts=groups * size,
        top_k=top_k,
        score=data.draw(st.sampled_from(["softmax", "sigmoid"]), "kind"),
        groups=groups,
        top_groups=top_groups,
        group_score=score,
        balance_bias=biased,
    )
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6), "seed"))
    logits_TE = torch.randn(4, config.experts, generator=random, dtype=F64)
    bias_E = torch.randn(config.experts, generator=random) if biased else torch.zeros(config.experts)
    routing = route(config, logits_TE, bias=bias_E if biased else None)
    for t in range(4):
        select = (routing.scores_TE[t] + bias_E).tolist()
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        rank = sorted(members, key=lambda group: -sum(sorted(select[e] for e in group)[-(1 + (score == "top2")) :]))
        allowed = {e for group in rank[:top_groups] for e in group}
        assert routing.experts_TK[t].tolist() == sorted(allowed, key=lambda e: -select[e])[:top_k]
        assert len({e // size for e in routing.experts_TK[t].tolist()}) <= top_groups


def test_group_scores_differ_by_hand() -> None:
    # Groups {0, 1} and {2, 3}: the best single expert is in the first, the best two together in the second.
    logits = [[LN3, -9.0, 0.0, -0.1]]
    config = RouterConfig(experts=4, top_k=2, score="sigmoid", groups=2, top_groups=1)
    assert route(config, logits).experts_TK.tolist() == [[0, 1]]
    assert route(replace(config, group_score="top2"), logits).experts_TK.tolist() == [[2, 3]]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_all_groups_are_no_limit(groups: int) -> None:
    logits_TE = torch.randn(30, 8, dtype=F64)
    config = RouterConfig(experts=8, top_k=3)
    limited = route(replace(config, groups=groups, top_groups=groups), logits_TE)
    assert limited.experts_TK.equal(route(config, logits_TE).experts_TK)


# ---------------------------------------------------------------------------------------------------------------------
# Capacity.

# Four tokens' first and second choices among three experts; capacity ceil(0.75 · 4 · 2 / 3) = 2.
CHOICES = [[0, 1], [0, 1], [1, 0], [0, 2]]


@pytest.mark.parametrize(
    ("drop_order", "dropped"),
    [
        # Token 0 takes a place of experts 0 and 1, token 1 the other: token 2 finds both full, token 3 expert 0.
        ("token", [[0, 0], [0, 0], [1, 1], [1, 0]]),
        # First choices: 0, 0, 1, and token 3 finds 0 full. Second ones: token 0 takes the last place of 1.
        ("choice", [[0, 0], [0, 1], [0, 1], [1, 0]]),
    ],
)
def test_capacity_drops_the_right_ones(drop_order: Any, dropped: list[list[int]]) -> None:
    config = RouterConfig(experts=3, top_k=2, eval_capacity_factor=0.75, drop_order=drop_order)
    routing = route(config, preferring(CHOICES, 3))
    assert routing.experts_TK.tolist() == CHOICES
    assert routing.dropped_TK is not None
    assert routing.dropped_TK.int().tolist() == dropped
    free = route(replace(config, eval_capacity_factor=None), preferring(CHOICES, 3))
    assert free.dropped_TK is None
    assert routing.weights_TK.equal(free.weights_TK)  # those that stay keep their weights


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "capacity"),
    [
        (1.0, 8, 1, 4, 2),
        (1.0, 9, 1, 4, 3),
        (1.25, 8, 1, 4, 3),
        (1.25, 16, 1, 4, 5),
        (2.0, 8, 1, 4, 4),
        (0.01, 8, 1, 4, 1),
        (1.0, 10, 2, 4, 5),
        (1.1, 25, 4, 10, 11),  # 11.000000000000002 in floating point
        (1.1, 90, 4, 4, 99),
    ],
)
def test_capacity(factor: float, tokens: int, top_k: int, experts: int, capacity: int) -> None:
    assert capacity == math.ceil(Fraction(str(factor)) * tokens * top_k / experts)
    config = RouterConfig(experts=experts, top_k=top_k, eval_capacity_factor=factor)
    routing = route(config, preferring([list(range(top_k))] * tokens, experts))
    assert routing.plan().counts_E.tolist() == [min(tokens, capacity)] * top_k + [0] * (experts - top_k)


def test_training_and_evaluation_have_their_own_factor() -> None:
    logits_TE = preferring([[0]] * 8, 4)
    router = given_logits(RouterConfig(experts=4, top_k=1, capacity_factor=0.5, eval_capacity_factor=1.5))
    assert router.train()(logits_TE).plan().counts_E.tolist() == [1, 0, 0, 0]
    assert router.eval()(logits_TE).plan().counts_E.tolist() == [3, 0, 0, 0]
    training_only = given_logits(RouterConfig(experts=4, top_k=1, capacity_factor=0.5))
    assert training_only.train()(logits_TE).plan().counts_E.tolist() == [1, 0, 0, 0]
    assert training_only.eval()(logits_TE).dropped_TK is None


@given(
    st.integers(1, 20), st.integers(1, 6), st.integers(1, 6), st.integers(1, 60), st.booleans(), st.integers(0, 10**6)
)
def test_an_expert_drops_what_is_over_capacity_and_no_more(
    tokens: int, experts: int, top_k: int, twentieths: int, by_choice: bool, seed: int
) -> None:
    top_k = min(top_k, experts)
    order: Any = "choice" if by_choice else "token"
    config = RouterConfig(experts=experts, top_k=top_k, eval_capacity_factor=twentieths / 20, drop_order=order)
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=F64)
    routing = route(config, logits_TE)
    assert routing.dropped_TK is not None
    capacity = math.ceil(Fraction(twentieths, 20) * tokens * top_k / experts)
    places = [capacity] * experts
    slots = [(t, k) for k in range(top_k) for t in range(tokens)] if by_choice else None
    for t, k in slots or [(t, k) for t in range(tokens) for k in range(top_k)]:
        places[int(routing.experts_TK[t, k])] -= 1
        assert bool(routing.dropped_TK[t, k]) == (places[int(routing.experts_TK[t, k])] < 0)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans())
def test_sequence_capacity_is_counted_in_each_sequence(
    sequences: int, length: int, experts: int, capacity: int, by_choice: bool, training: bool
) -> None:
    order: Any = "choice" if by_choice else "token"
    top_k = min(2, experts)
    config = RouterConfig(experts=experts, top_k=top_k, sequence_capacity=capacity, drop_order=order)
    random = torch.Generator().manual_seed(sequences + 10 * length + 100 * capacity)
    logits_TE = torch.randn(sequences * length, experts, generator=random, dtype=F64)
    routing = given_logits(config).train(training)(logits_TE, length)
    assert routing.dropped_TK is not None
    for start in range(0, sequences * length, length):
        tokens = range(start, start + length)
        slots = [(t, k) for k in range(top_k) for t in tokens] if by_choice else None
        places = [capacity] * experts
        for t, k in slots or [(t, k) for t in tokens for k in range(top_k)]:
            places[int(routing.experts_TK[t, k])] -= 1
            assert bool(routing.dropped_TK[t, k]) == (places[int(routing.experts_TK[t, k])] < 0)


def test_the_layer_knows_where_sequences_end() -> None:
    config = RouterConfig(experts=2, top_k=1, normalize=False, sequence_capacity=2)
    moe = MoE(2, 3, config)
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(2))
    x_BSD = torch.tensor([[[1.0, 0.0]] * 3, [[1.0, 0.0]] * 3])
    y_BSD, routing = moe(x_BSD)
    assert routing.dropped_TK is not None
    assert routing.dropped_TK.flatten().tolist() == [False, False, True] * 2
    assert y_BSD[:, 2].abs().max() == 0
    assert y_BSD[:, :2].abs().min() > 0
    _, flat = moe(x_BSD.flatten(0, 1))  # one sequence
    assert flat.dropped_TK.flatten().tolist() == [False, False, True, True, True, True]
    _, one = moe(x_BSD[0, 0])
    assert one.dropped_TK.flatten().tolist() == [False]
    for empty in (x_BSD[:0], x_BSD[:, :0]):
        assert moe(empty)[0].shape == empty.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_capacity": 0}, "router.sequence_capacity = 0: at least 1, or none for dropless"),
        ({"sequence_capacity": 3, "capacity_factor": 1.0}, "capacity_factor = 1.0: none with sequence_capacity = 3"),
        ({"sequence_capacity": 3, "eval_capacity_factor": 1.0}, "eval_capacity_factor = 1.0: none with sequence_cap"),
        ({"sequence_capacity": 3, "choice": "expert"}, "sequence_capacity = 3: none with choice = 'expert'"),
    ],
)
def test_a_wrong_sequence_capacity_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterConfig(experts=4, top_k=2, **changes)


def test_nothing_is_dropped_when_the_capacity_suffices() -> None:
    config = RouterConfig(experts=5, top_k=2, eval_capacity_factor=2.5)  # 2.5 = E / K: room for every token
    routing = route(config, preferring([[0, 1]] * 7, 5))
    assert routing.dropped_TK is not None
    assert not routing.dropped_TK.any()


def test_drop_order_choice_lets_a_later_token_push_out_an_earlier_one() -> None:
    # Capacity ceil(1 · 2 · 2 / 4) = 1. Token 0's second choice, 0, is the first choice of the second token 1.
    config = RouterConfig(experts=4, top_k=2, eval_capacity_factor=1.0, drop_order="choice")
    alone, pushed = ([[1, 0], [2, 3]], [[1, 0], [0, 3]])
    dropped = {name: route(config, preferring(c, 4)).dropped_TK for name, c in (("alone", alone), ("pushed", pushed))}
    assert dropped["alone"] is not None
    assert dropped["pushed"] is not None
    assert dropped["alone"].tolist() == [[False, False], [False, False]]
    assert dropped["pushed"].tolist() == [[False, True], [False, False]]
    causal = route(replace(config, drop_order="token"), preferring(pushed, 4)).dropped_TK
    assert causal is not None
    assert causal.tolist() == [[False, False], [True, False]]


def test_what_is_not_causal_warns() -> None:
    for config in (
        RouterConfig(experts=4, top_k=2, choice="expert"),
        RouterConfig(experts=4, top_k=2, capacity_factor=1.0, drop_order="choice"),
        RouterConfig(experts=4, top_k=2, eval_capacity_factor=1.0, drop_order="choice"),
        RouterConfig(experts=4, top_k=2, sequence_capacity=1, drop_order="choice"),
    ):
        with pytest.warns(NotCausalWarning, match="not causal"):
            Router(4, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Router(4, RouterConfig(experts=4, top_k=2, capacity_factor=1.0))
        Router(4, RouterConfig(experts=4, top_k=2, drop_order="choice"))  # dropless: the order is not used


# ---------------------------------------------------------------------------------------------------------------------
# Noise, in training alone. Bounds are four standard deviations of each statistic; draws come from a fixed seed.


def test_random_second_keeps_with_twice_its_weight() -> None:
    T = 20_000
    router = given_logits(RouterConfig(experts=3, top_k=2, random_second=True)).train()
    for share, kept in ((0.2, 0.4), (0.45, 0.9), (0.05, 0.1)):
        logits_TE = torch.tensor([[math.log(1 - share), math.log(share), -50.0]], dtype=F64).expand(T, 3)
        dropped_TK = router(logits_TE).dropped_TK
        assert dropped_TK is not None
        assert not dropped_TK[:, 0].any()
        assert float((~dropped_TK[:, 1]).double().mean()) == pytest.approx(
            kept, abs=4 * math.sqrt(kept * (1 - kept) / T)
        )
    assert router.eval()(logits_TE).dropped_TK is None


def test_random_second_leaves_the_weights_alone() -> None:
    router = given_logits(RouterConfig(experts=2, top_k=2, random_second=True)).train()
    logits_TE = torch.tensor([[math.log(3), 0.0]], dtype=F64).expand(50, 2)
    routing = router(logits_TE)
    assert routing.dropped_TK is not None
    assert 0 < int(routing.dropped_TK.sum()) < 50
    close(routing.weights_TK, [[0.75, 0.25]] * 50)


def test_randomly_dropped_seconds_take_no_place() -> None:
    # Capacity 1. Token 0's second, of weight 1e-22, is out; expert 1's place is token 1's, whose second, of weight
    # almost 1/2, stays.
    config = RouterConfig(experts=4, top_k=2, random_second=True, capacity_factor=1.0)
    logits = torch.tensor([[50.0, 0.0, -99.0, -99.0], [-99.0, 9.0 - 1e-9, 9.0, -99.0]], dtype=F64)
    for order in ("token", "choice"):
        routing = given_logits(replace(config, drop_order=order)).train()(logits)
        assert routing.experts_TK.tolist() == [[0, 1], [2, 1]]
        assert routing.dropped_TK is not None
        assert routing.dropped_TK.tolist() == [[False, True], [False, False]]


def test_jitter_is_uniform_in_training_only() -> None:
    router = given_logits(RouterConfig(experts=4, top_k=1, jitter=0.1)).train()
    x_TD = torch.ones(10_000, 4, dtype=F64)
    factors = router(x_TD).logits_TE.flatten()  # the input is 1 and the matrix the identity
    assert 0.9 <= float(factors.detach().min()) < 0.901
    assert 1.099 < float(factors.detach().max()) <= 1.1
    deviation, n = 0.2 / math.sqrt(12), factors.numel()
    assert float(factors.detach().mean()) == pytest.approx(1, abs=4 * deviation / math.sqrt(n))
    assert float(factors.detach().std()) == pytest.approx(deviation, rel=4 * math.sqrt(0.8 / 4 / n))
    quarter = float((factors < 0.95).double().mean())
    assert quarter == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / n))
    assert not router(x_TD).logits_TE.equal(router(x_TD).logits_TE)
    assert router.eval()(x_TD).logits_TE.equal(x_TD)


def test_jitter_does_not_touch_what_the_experts_see() -> None:
    moe = MoE(4, 4, RouterConfig(experts=1, top_k=1, jitter=0.5)).train()
    x_TD = torch.randn(6, 4)
    assert moe(x_TD)[0].equal(moe.eval()(x_TD)[0])  # one expert, its normalised weight 1 whatever the logit


def test_noisy_top_k_is_normal_with_a_learned_size() -> None:
    router = given_logits(RouterConfig(experts=3, top_k=1, noisy_top_k=True)).train()
    T = 20_000
    x_TD = torch.tensor([[1.0, -2.0, 0.5]], dtype=F64).expand(T, 3)
    noise_TE = (router(x_TD).logits_TE - x_TD).detach()
    assert float(noise_TE.std()) == pytest.approx(math.log(2), rel=4 / math.sqrt(2 * 3 * T))  # softplus(0)
    assert router.noise_weight is not None
    with torch.no_grad():
        router.noise_weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 4.0])))
    noise_TE = (router(x_TD).logits_TE - x_TD).detach()
    for e, z in enumerate((1.0, -2.0, 2.0)):
        size = math.log1p(math.exp(z))
        n_T = noise_TE[:, e] / size
        assert float(n_T.mean()) == pytest.approx(0, abs=4 / math.sqrt(T))
        assert float(n_T.std()) == pytest.approx(1, rel=4 / math.sqrt(2 * T))
        within = float((n_T.abs() < 1).double().mean())
        assert within == pytest.approx(0.6827, abs=4 * math.sqrt(0.68 * 0.32 / T))
    correlation = torch.corrcoef(noise_TE.T) - torch.eye(3)
    assert float(correlation.abs().max()) < 4 / math.sqrt(T)
    assert not router(x_TD).logits_TE.equal(router(x_TD).logits_TE)
    assert router.eval()(x_TD).logits_TE.equal(x_TD)


def test_the_noise_has_a_gradient() -> None:
    router = Router(3, RouterConfig(experts=3, top_k=2, noisy_top_k=True)).train()
    router(torch.randn(8, 3)).weights_TK[:, 0].sum().backward()
    assert router.noise_weight is not None
    assert router.noise_weight.grad is not None
    assert router.noise_weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", PRESETS)
def test_evaluation_is_deterministic(name: str) -> None:
    router = quiet_router(6, PRESETS[name].router).eval()
    x_TD = torch.randn(10, 6)
    first, second = router(x_TD), router(x_TD)
    assert first.logits_TE.equal(second.logits_TE)
    assert first.experts_TK.equal(second.experts_TK)
    assert first.weights_TK.equal(second.weights_TK)


# ---------------------------------------------------------------------------------------------------------------------
# Expert choice.


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "each"),
    [(8, 4, 2, 4), (8, 4, 1, 2), (7, 3, 1, 2), (8, 3, 1, 3), (5, 8, 1, 1), (1, 8, 2, 1), (4, 4, 4, 4)],
)
def test_every_expert_gets_its_number_of_tokens(tokens: int, experts: int, top_k: int, each: int) -> None:
    config = RouterConfig(experts=experts, top_k=top_k, choice="expert", normalize=False)
    scores_TE = torch.randn(tokens, experts, dtype=F64)
    routing = route(config, scores_TE)
    assert routing.plan().counts_E.tolist() == [each] * experts
    best_nE = routing.scores_TE.topk(each, dim=0).indices
    for e in range(experts):
        mine = routing.plan().token_N[each * e : each * (e + 1)]
        assert mine.tolist() == sorted(best_nE[:, e].tolist())


def test_expert_choice_weights_by_hand() -> None:
    # Expert 0 likes token 1 best, expert 1 token 0, expert 2 token 1: token 1 has two experts, token 2 none.
    logits = [[0.0, LN3, 0.0], [LN3, 0.0, LN3], [0.0, 0.0, 0.0]]
    config = RouterConfig(experts=3, top_k=1, choice="expert", score="sigmoid", normalize=False, scale=2.0)
    raw = route(config, logits)
    close(raw.weights_TK, [[0, 1.5, 0], [1.5, 0, 1.5], [0, 0, 0]])
    assert raw.dropped_TK is not None
    assert (~raw.dropped_TK).int().tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]
    close(route(replace(config, normalize=True), logits).weights_TK, [[0, 2, 0], [1, 0, 1], [0, 0, 0]])


# ---------------------------------------------------------------------------------------------------------------------
# The layer.

BACKENDS = ["grouped", "reference"]
ACTIVATIONS: list[Activation] = ["swiglu", "geglu", "relu", "gelu", "swiglu_clamped"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_moe_of_one_expert_is_the_dense_layer(backend: str, activation: Activation) -> None:
    moe = MoE(6, 10, RouterConfig(experts=1, top_k=1), activation=activation, backend=backend).to(F64)
    dense = FeedForward(6, 10, activation).to(F64)
    with torch.no_grad():
        moe.experts.gate_up[0].copy_(dense.gate_up.weight)
        moe.experts.down[0].copy_(dense.down.weight)
    x_BSD = torch.randn(2, 5, 6, dtype=F64)
    close(moe(x_BSD)[0], dense(x_BSD))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_slices_of_a_dense_layer_are_the_dense_layer(backend: str, activation: Activation) -> None:
    """Its hidden neurons cut into E experts, all of which fire with the same weight, scaled to 1."""
    E, D, hidden = 4, 6, 12
    moe = MoE(D, hidden // E, RouterConfig(experts=E, top_k=E, scale=E), activation=activation, backend=backend)
    moe.to(F64)
    dense = FeedForward(D, hidden, activation).to(F64)
    parts = dense.gate_up.weight.chunk(2) if len(dense.gate_up.weight) == 2 * hidden else (dense.gate_up.weight,)
    with torch.no_grad():
        moe.router.weight.zero_()  # every expert as likely
        for e in range(E):
            mine = slice(e * hidden // E, (e + 1) * hidden // E)
            moe.experts.gate_up[e].copy_(torch.cat([part[mine] for part in parts]))
            moe.experts.down[e].copy_(dense.down.weight[:, mine])
    x_TD = torch.randn(9, D, dtype=F64)
    y_TD, routing = moe(x_TD)
    close(routing.weights_TK, torch.ones(9, E))
    close(y_TD, dense(x_TD))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(experts=6, top_k=2),
        replace(BIASED, experts=6, groups=3, top_groups=2, logits_bias=True),
        RouterConfig(experts=6, top_k=2, eval_capacity_factor=0.7),
    ],
    ids=["plain", "biased", "capacity"],
)
def test_permuting_experts_permutes_nothing_else(backend: str, router: RouterConfig) -> None:
    moe = MoE(5, 7, router, bias=True, shared_width=3, backend=backend).to(F64).eval()
    permuted = MoE(5, 7, router, bias=True, shared_width=3, backend=backend).to(F64).eval()
    # Within groups and groups as a whole, so that group limits still mean the same.
    order = torch.tensor([5, 4, 0, 1, 3, 2])
    with torch.no_grad():
        for t in moe.parameters():
            t.normal_()
        if moe.router.balance_bias is not None:
            moe.router.balance_bias.normal_()
    state = moe.state_dict()
    permuted.load_state_dict({name: t if "shared" in name else t[order] for name, t in state.items()})
    x_TD = torch.randn(40, 5, dtype=F64)
    (y_TD, routing), (yp_TD, routing_p) = moe(x_TD), permuted(x_TD)
    assert order[routing_p.experts_TK].equal(routing.experts_TK)
    close(routing_p.weights_TK, routing.weights_TK)
    close(yp_TD, y_TD)


def test_shared_experts_and_their_gate() -> None:
    moe = MoE(4, 6, RouterConfig(experts=3, top_k=1), shared_width=5, shared_gate=True).to(F64)
    x_TD = torch.randn(7, 4, dtype=F64)
    y_TD, routing = moe(x_TD)
    assert moe.shared is not None
    assert moe.shared_gate is not None
    gate_T1 = 1 / (1 + torch.exp(-(x_TD @ moe.shared_gate.weight.T)))
    gate, up = (x_TD @ moe.shared.gate_up.weight.T).chunk(2, -1)
    shared_TD = (gate / (1 + torch.exp(-gate)) * up) @ moe.shared.down.weight.T
    close(y_TD, moe.experts(x_TD, routing) + gate_T1 * shared_TD)
    moe.shared_gate = None
    close(moe(x_TD)[0], moe.experts(x_TD, routing) + shared_TD)


def test_leading_dimensions() -> None:
    moe = MoE(4, 6, RouterConfig(experts=3, top_k=2)).to(F64)
    x_BSD = torch.randn(2, 5, 4, dtype=F64)
    y_BSD, routing = moe(x_BSD)
    assert y_BSD.shape == x_BSD.shape
    assert routing.tokens == 10
    close(y_BSD[1, 2], moe(x_BSD[1, 2])[0])
    crossed_SBD = x_BSD.transpose(0, 1)  # not contiguous
    close(moe(crossed_SBD)[0], y_BSD.transpose(0, 1))
    y_0, empty = moe(x_BSD[:, :0])
    assert y_0.shape == (2, 0, 4)
    assert empty.tokens == 0
    with pytest.raises(RoutingError, match=r"^MoE input has width 3: it must be 4$"):
        moe(x_BSD[..., :3])


def test_router_maths_is_float32_whatever_the_model() -> None:
    """A model in bfloat16, and autocast, give the logits and weights of float32."""
    router = Router(64, RouterConfig(experts=16, top_k=4)).to(torch.bfloat16)
    x_TD = torch.randn(50, 64, dtype=torch.bfloat16)
    want = x_TD.float() @ router.weight.float().T
    routing = router(x_TD)
    assert routing.logits_TE.dtype == routing.scores_TE.dtype == routing.weights_TK.dtype == torch.float32
    close(routing.logits_TE, want, rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router.float()(x_TD)
    close(cast.logits_TE, want, rel=1e-6)
    assert cast.weights_TK.dtype == torch.float32


def test_a_wrong_token_does_not_change_how_others_are_routed() -> None:
    router = Router(4, replace(BIASED, groups=2, top_groups=1))
    x_TD = torch.randn(6, 4)
    poisoned_TD = x_TD.clone()
    poisoned_TD[2] = math.nan
    clean, poisoned = router(x_TD), router(poisoned_TD)
    others = [0, 1, 3, 4, 5]
    assert poisoned.experts_TK[others].equal(clean.experts_TK[others])
    assert poisoned.weights_TK[others].equal(clean.weights_TK[others])
    assert 0 <= int(poisoned.experts_TK.min()) <= int(poisoned.experts_TK.max()) < 4  # it is routed somewhere


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "fast"}, r"^experts backend 'fast': one of auto, "),
        ({"activation": "silu"}, r"^activation = 'silu': one of swiglu, geglu, relu, gelu, swiglu_clamped$"),
        ({"expert_width": 0}, r"^expert_width = 0: at least 1$"),
        ({"shared_width": -1}, r"^hidden = -1: at least 1$"),
        ({"shared_gate": True}, r"^shared_gate = True: needs shared_width above 0$"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoE(**{"width": 4, "expert_width": 4, "router": RouterConfig(experts=2, top_k=1), **changes})


def test_the_experts_weights_carry_the_routers_gradient() -> None:
    """The router learns through the weights alone: by the chain rule, from each chosen expert's output."""
    moe = MoE(4, 6, RouterConfig(experts=3, top_k=2, normalize=False)).to(F64)
    x_TD = torch.randn(5, 4, dtype=F64)
    y_TD, _ = moe(x_TD)
    y_TD.sum().backward()
    with torch.no_grad():
        routing = moe.router(x_TD)
        want_ED = torch.zeros_like(moe.router.weight)
        for t in range(5):
            p_E = routing.scores_TE[t]
            for e in routing.experts_TK[t].tolist():
                gate, up = (moe.experts.gate_up[e] @ x_TD[t]).chunk(2)
                out = (moe.experts.down[e] @ (F.silu(gate) * up)).sum()
                d_logits_E = out * p_E[e] * (F.one_hot(torch.tensor(e), 3) - p_E)
                want_ED += torch.outer(d_logits_E, x_TD[t])
    assert moe.router.weight.grad is not None
    close(moe.router.weight.grad, want_ED)
