"""The rule of what may be said of two losses, case by case."""

from __future__ import annotations

import math

import pytest

from handful.verdict import CHANCE, ENOUGH, Verdict, judge, tokens_per_expert_weight

PARTED = [(100.0, 5.0, 5.0), (200.0, 4.2, 4.1), (300.0, 3.9, 4.0), (400.0, 3.5, 3.6)]


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [
        ([3.50], [3.60], "lower"),  # 0.10, and one seed is worth 0.03
        ([3.50], [3.52], "level"),
        ([3.50], [3.48], "level"),
        ([3.60], [3.50], "higher"),
        ([3.50, 3.52], [3.60, 3.62], "lower"),  # 0.10, and seeds differ by 0.02
        ([3.50, 3.60], [3.54, 3.66], "level"),  # 0.05, and they differ by 0.12
        ([3.60, 3.61], [3.50, 3.52], "higher"),
        ([3.50, 3.501], [3.51, 3.511], "lower"),  # 0.01 counts where seeds differ by 0.001
    ],
)
def test_chance(ours: list[float], theirs: list[float], kind: str) -> None:
    found = judge(ours, theirs, tokens_per_weight=ENOUGH, curves=PARTED)
    assert (found.kind, found.why) == (kind, ())
    assert found.lead == pytest.approx(sum(theirs) / len(theirs) - sum(ours) / len(ours))
    # A dense model has no experts that could be short of tokens.
    assert judge(ours, theirs, tokens_per_weight=math.inf).kind == kind


def test_few_tokens_are_too_short_whoever_leads() -> None:
    for ours in (3.4, 3.6, 3.5):
        found = judge([ours], [3.5], tokens_per_weight=4.32, curves=PARTED)
        assert found.kind == "too short"
        assert found.why == (
            "an expert was trained on 4.3 tokens for each of its weights; about 8 are needed before its lead can show",
        )


def test_curves_that_still_cross_are_too_short() -> None:
    # The last third begins at 266.7 tokens: what was before does not count.
    assert judge([3.5], [3.6], tokens_per_weight=9.0, curves=PARTED).kind == "lower"
    crossing = [*PARTED[:2], (300.0, 4.0, 3.9), PARTED[3]]
    found = judge([3.5], [3.6], tokens_per_weight=9.0, curves=crossing)
    assert (found.kind, found.why) == ("too short", ("the curves still crossed in the last third of the run",))
    # A touch is no crossing.
    touching = [*PARTED[:2], (300.0, 4.0005, 4.0), PARTED[3]]
    assert judge([3.5], [3.6], tokens_per_weight=9.0, curves=touching).kind == "lower"
    assert len(judge([3.5], [3.6], tokens_per_weight=1.0, curves=crossing).why) == 2


def test_the_default_comparison_is_long_enough_and_half_of_it_is_not() -> None:
    # 64 experts of three matrices of 64 × 32, of which a token uses two; 2.048 M tokens, and what ten minutes gave.
    weights = 3 * 64 * 32
    assert tokens_per_expert_weight(2_048_000, 2, 64, weights) == pytest.approx(10.4, abs=0.02)
    assert tokens_per_expert_weight(850_000, 2, 64, weights) == pytest.approx(4.32, abs=0.01)


def test_a_verdict_is_a_value() -> None:
    assert Verdict("level", 0.0) == judge([1.0], [1.0], tokens_per_weight=math.inf)
    assert CHANCE == 0.03
