"""Routing: sorted by expert as by hand and as by a slow loop; what does not fit together is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from handful.errors import RoutingError
from handful.routing import Routing, SortedAssignments


def routing_of(
    experts_TK: Sequence[Sequence[int]], experts: int, dropped: Sequence[Sequence[bool]] | None = None
) -> Routing:
    """Experts as given; logits, scores and weights that do not matter."""
    chosen = torch.tensor(experts_TK)
    even = torch.full((len(chosen), experts), 1 / experts)
    return Routing(even, even, chosen, torch.ones(chosen.shape), None if dropped is None else torch.tensor(dropped))


def plain(plan: SortedAssignments) -> list[list[int]]:
    return [t.tolist() for t in (plan.order_N, plan.token_N, plan.counts_E, plan.offsets_E)]


def test_plan_by_hand() -> None:
    routing = routing_of([[2, 0], [2, 1], [0, 2]], experts=4)
    # Positions: 0 and 1 are token 0's, 2 and 3 token 1's, 4 and 5 token 2's.
    assert plain(routing.plan()) == [[1, 4, 3, 0, 2, 5], [0, 2, 1, 0, 1, 2], [2, 1, 3, 0], [2, 3, 6, 6]]
    assert (routing.tokens, routing.experts, routing.top_k) == (3, 4, 2)
    assert routing.chosen_E.tolist() == [2, 1, 3, 0]


def test_plan_leaves_dropped_assignments_out() -> None:
    routing = routing_of([[2, 0], [2, 1], [0, 2]], 4, dropped=[[False, True], [True, True], [False, False]])
    assert plain(routing.plan()) == [[4, 0, 5], [2, 0, 2], [1, 0, 2, 0], [1, 1, 3, 3]]
    assert routing.chosen_E.tolist() == [2, 1, 3, 0]  # what was chosen, dropped or not


def test_plan_is_made_once() -> None:
    routing = routing_of([[0]], 1)
    assert routing.plan() is routing.plan()


@given(st.integers(0, 9), st.integers(1, 7), st.data())
def test_plan_equals_a_slow_one(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    seed = data.draw(st.integers(0, 10**6))
    random = torch.Generator().manual_seed(seed)
    experts_TK = torch.rand(tokens, experts, generator=random).topk(top_k).indices
    dropped_TK = torch.rand(tokens, top_k, generator=random) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    even = torch.full((tokens, experts), 1 / experts)
    plan = Routing(even, even, experts_TK, torch.ones(tokens, top_k), dropped_TK).plan()

    kept = [i for i in range(tokens * top_k) if not dropped_TK.flatten()[i]]
    order = sorted(kept, key=lambda i: (int(experts_TK.flatten()[i]), i))
    counts = [sum(int(experts_TK.flatten()[i]) == e for i in kept) for e in range(experts)]
    offsets = [sum(counts[: e + 1]) for e in range(experts)]
    assert plain(plan) == [order, [i // top_k for i in order], counts, offsets]


def test_no_tokens() -> None:
    empty = torch.zeros(0, 3)
    routing = Routing(empty, empty, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert plain(routing.plan()) == [[], [], [0, 0, 0], [0, 0, 0]]
    assert routing.chosen_E.tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrong", [-1, 3, 7])
def test_an_expert_that_does_not_exist(wrong: int) -> None:
    with pytest.raises(RoutingError, match=rf"^routing names expert {wrong}: there are 3, counted from 0$"):
        routing_of([[0, 1], [2, wrong]], 3).plan()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weights_TK", torch.ones(3, 1), r"routing.weights_TK has shape \(3, 1\): it must be \(3, 2\) like experts_TK"),
        ("weights_TK", torch.ones(6), r"routing.weights_TK has shape \(6,\): it must be \(3, 2\) like experts_TK"),
        ("dropped_TK", torch.ones(2, 2) > 0, r"routing.dropped_TK has shape \(2, 2\): it must be \(3, 2\) like"),
        ("logits_TE", torch.ones(3, 5), r"routing.logits_TE has shape \(3, 5\): it must be \(3, 4\) like scores_TE"),
        ("scores_TE", torch.ones(2, 4), r"routing.experts_TK has shape \(3, 2\) and scores_TE \(2, 4\): they must be"),
        ("experts_TK", torch.zeros(6, dtype=torch.long), r"routing.experts_TK has shape \(6,\) and scores_TE \(3, 4\)"),
    ],
)
def test_shapes_that_do_not_fit(field: str, value: Tensor, message: str) -> None:
    right = routing_of([[2, 0], [2, 1], [0, 2]], 4)
    with pytest.raises(RoutingError, match=message):
        dataclasses.replace(right, **{field: value})


def test_it_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing_of([[0]], 1).weights_TK = torch.zeros(1, 1)  # type: ignore[misc]
