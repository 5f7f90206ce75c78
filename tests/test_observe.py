"""What is seen of a routing, by hand."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from handful.config import RouterConfig
from handful.moe import NotCausalWarning, Router
from handful.observe import (
    LoadStats,
    coactivation,
    collapsed,
    dead,
    dropped,
    entropy,
    expert_load,
    kept,
    max_vio,
    stats,
    touched,
)
from handful.routing import Routing


def routing_of(experts_TK: Any, experts: int, dropped_TK: Any = None) -> Routing:
    chosen = torch.as_tensor(experts_TK)
    even = torch.full((len(chosen), experts), 1 / experts)
    out = None if dropped_TK is None else torch.as_tensor(dropped_TK)
    return Routing(even, even, chosen, torch.ones(chosen.shape), out)


def of(*values: float) -> Tensor:
    return torch.tensor(values)


CHOSEN = [[0, 1], [0, 2], [0, 1], [1, 0]]
DROPPED = [[False, False], [False, True], [True, False], [True, True]]


def test_load_counts_what_was_chosen() -> None:
    assert expert_load(routing_of(CHOSEN, 4)).tolist() == [0.5, 0.375, 0.125, 0]
    assert expert_load(routing_of(CHOSEN, 4, DROPPED)).tolist() == [0.5, 0.375, 0.125, 0]


def test_max_vio() -> None:
    assert max_vio(of(2, 2, 2, 2)) == 0
    assert max_vio(of(4, 2, 1, 1)) == 1  # (4 - 2) / 2
    assert max_vio(of(0.5, 0.25, 0.125, 0.125)) == 1  # shares do as well as counts
    assert max_vio(of(5, 5, 0, 0, 0, 0, 0, 0)) == 8 / 2 - 1  # the worst of top-2 among 8


def test_entropy() -> None:
    assert entropy(of(3, 3, 3)) == pytest.approx(1, abs=1e-6)
    assert entropy(of(7, 0, 0)) == 0
    assert entropy(of(1, 1, 0, 0)) == pytest.approx(0.5, abs=1e-6)  # ln 2 / ln 4
    assert entropy(of(2, 1, 1, 0)) == pytest.approx(0.75, abs=1e-6)  # 1.5 bits of 2
    assert entropy(of(7)) == 0


def test_kept_is_of_sets() -> None:
    assert kept([[0, 1], [2, 3]], [[1, 0], [2, 4]]) == 0.75
    assert kept([[0, 1], [2]], [[5, 6], [7]]) == 0
    assert kept([[], [2]], [[1], [2]]) == 1  # a token that no expert chose before counts for nothing
    assert kept([], []) == 0


def test_touched_grows() -> None:
    assert touched([[0, 1], [1, 0], [1, 2], [], [3, -1]]) == [2, 2, 3, 3, 4]


def test_dead() -> None:
    # Mean 100: an expert below 1 is dead, at 1 it is not.
    assert dead(of(299, 100, 1, 0)) == 1
    assert dead(of(399.5, 0.5, 0, 0)) == 3
    assert dead(of(299, 100, 1, 0), floor=0.02) == 2
    assert dead(of(1, 1)) == 0


@pytest.mark.parametrize(
    ("load_E", "top_k", "why"),
    [
        ([1] * 16, 2, None),
        ([1] * 15 + [0], 2, None),  # one of 16 is fewer than a tenth
        ([1] * 14 + [0] * 2, 2, None),  # dead ones, and an even use of the others
        ([1] * 55 + [0] * 9, 2, None),
        ([1, 1, 1, 0], 2, None),
        ([40, 40] + [2] * 8, 3, None),  # uneven, and nobody is dead
        ([30] + [2] * 35, 2, None),
        ([9] * 2 + [0] * 3, 1, "3 of 5 experts are dead, the load is as uneven as with 2 of 5 experts in even use"),
        ([30] + [2] * 35 + [0] * 4, 2, "4 of 40 experts are dead, one expert is chosen by 60% of all tokens"),
        ([24] + [2] * 38 + [0] * 5, 2, None),  # by 48 %
        ([16] + [3] * 28 + [0] * 4, 6, "4 of 33 experts are dead, one expert is chosen by 96% of all tokens"),
        ([1, 0], 1, None),
        ([5], 1, None),
    ],
)
def test_collapsed(load_E: list[float], top_k: int, why: str | None) -> None:
    assert collapsed(torch.tensor(load_E), top_k) == why


def test_collapsed_gives_all_reasons() -> None:
    got = collapsed(of(*[50, 50], *[0] * 14), 2)
    assert got == (
        "14 of 16 experts are dead, the load is as uneven as with 2 of 16 experts in even use, "
        "one expert is chosen by 100% of all tokens"
    )
    # Of 8 experts a quarter is chosen anyway: a busy one is no collapse.
    assert collapsed(of(60, *[20] * 7), 2) is None


def test_dropped() -> None:
    assert dropped(routing_of(CHOSEN, 4)) == 0
    assert dropped(routing_of(CHOSEN, 4, DROPPED)) == 0.5


def test_coactivation() -> None:
    pairs = coactivation(routing_of(CHOSEN, 4))
    assert pairs.tolist() == [[4, 3, 1, 0], [3, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    # Computed: token 0 by 0 and 1, token 1 by 0, token 2 by 1, token 3 by none.
    assert coactivation(routing_of(CHOSEN, 4, DROPPED)).tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0] * 4, [0] * 4]


def test_coactivation_of_expert_choice_is_who_chose_whom() -> None:
    with warnings.catch_warnings(action="ignore", category=NotCausalWarning):
        router = Router(3, RouterConfig(experts=3, top_k=1, choice="expert"))
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    # Experts 0 and 2 choose token 1, expert 1 chooses token 0.
    pairs = coactivation(router(of(0, 5, 0, 5, 0, 5, 0, 0, 0).view(3, 3)))
    assert pairs.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


def test_stats() -> None:
    load_LE = torch.tensor([[2.0, 2.0, 2.0, 2.0], [6.0, 2.0, 0.0, 0.0]])
    bits = (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4)
    got = stats(load_LE, [0.0, 0.25])
    assert got.load == [[0.25] * 4, [0.75, 0.25, 0, 0]]
    assert got.entropy == pytest.approx([1, bits], abs=1e-6)
    assert got == LoadStats(got.load, [0.0, 2.0], [0, 2], got.entropy, [0.0, 0.25])
