"""What "beyond chance" is counted by, beside tables, sums by hand and simulation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from handful.inspection.statistics import adjusted, both, permutation_p, ratio, student_tail


@pytest.mark.parametrize(
    ("t", "freedom", "tail"),
    [  # printed tables
        (0.0, 3, 0.5),
        (1.0, 1, 0.25),
        (12.706205, 1, 0.025),
        (2.228139, 10, 0.025),
        (4.587, 10, 0.0005),
        (3.659406, 29, 0.0005),
        (1.959966, 1_000_000, 0.025),
    ],
)
def test_students_tail(t: float, freedom: float, tail: float) -> None:
    value = torch.tensor([t, -t])
    assert student_tail(value, freedom).tolist() == pytest.approx([tail, 1 - tail], rel=1e-3)


@given(st.floats(0.01, 40), st.integers(1, 300))
def test_students_tail_is_the_integral_of_its_density(t: float, freedom: int) -> None:
    # By the angle x = √f · tan u, where the density is smooth and its range finite: Gauss-Legendre on 2,000 pieces.
    low = math.atan(t / math.sqrt(freedom))
    edges = torch.linspace(low, math.pi / 2, 2001, dtype=torch.float64)
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    points = [middle - half / math.sqrt(3), middle + half / math.sqrt(3)]
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    integral = sum(float((point.cos() ** (freedom - 1) * half).sum()) for point in points) * constant
    found = float(student_tail(torch.tensor([t], dtype=torch.float64), freedom)[0])
    assert found == pytest.approx(integral, rel=1e-6, abs=1e-300)


def test_a_ratio_and_its_error_by_hand() -> None:
    # Three documents: 2 of 4, 1 of 2, 9 of 6. 12 / 12 = 1; what is left over is -2, -1 and 3. They count for
    # 144 / 56 documents.
    found = ratio(torch.tensor([2.0, 1.0, 9.0]), torch.tensor([4.0, 2.0, 6.0]))
    assert float(found.value) == 1
    assert float(found.freedom) == pytest.approx(88 / 56)
    error = math.sqrt((4 + 1 + 9) * 144 / 88) / 12
    assert float(found.error) == pytest.approx(error)
    assert float(found.above()) == pytest.approx(float(student_tail(torch.tensor(1 / error), 88 / 56)))
    assert float(found.apart()) == pytest.approx(2 * float(found.above()))


def test_documents_that_count_alike_have_the_error_of_a_mean() -> None:
    values = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = ratio(values, torch.full((9,), 7.0))
    assert torch.allclose(found.value, values.mean(0) / 7)
    assert torch.allclose(found.error, values.std(0) / 3 / 7)
    assert found.freedom.tolist() == pytest.approx([8] * 4)


def test_a_document_that_counts_nothing_is_none() -> None:
    by_Dn = torch.tensor([[4.0, 4.0], [0.0, 5.0], [2.0, 2.0], [6.0, 6.0]])
    found = ratio(torch.tensor([[2.0, 2.0], [0.0, 5.0], [1.0, 1.0], [9.0, 9.0]]), by_Dn)
    assert found.freedom.tolist() == pytest.approx([88 / 56, 289 / 81 - 1])
    assert float(found.error[0]) == pytest.approx(math.sqrt(14 * 144 / 88) / 12)


def test_what_one_document_says_for_nearly_all_is_little_evidence() -> None:
    of_D, by_D = torch.tensor([30.0, 0.01, 0.01, 0.01]), torch.tensor([10.0, 0.01, 0.01, 0.01])
    assert float(ratio(of_D, by_D).above()) > 0.2


def test_of_one_document_nothing_can_be_said() -> None:
    found = ratio(torch.tensor([3.0]), torch.tensor([4.0]))
    assert math.isnan(float(found.error))
    assert (float(found.above()), float(found.apart())) == (1, 1)


def test_false_discoveries_by_hand() -> None:
    # Benjamini and Hochberg: p · n / rank, and no q above that of a larger p.
    q = adjusted(torch.tensor([0.04, 0.01, math.nan, 0.03, 0.02]))
    assert q.tolist() == pytest.approx([0.04, 0.04, math.nan, 0.04, 0.04], nan_ok=True)
    of_two = adjusted(torch.tensor([[0.001, 0.5], [0.9, 0.8]]))
    assert of_two.flatten().tolist() == pytest.approx([0.004, 0.9, 0.9, 0.9])
    assert adjusted(torch.tensor([])).tolist() == []


def test_both_halves_is_the_half_that_says_less() -> None:
    assert both(torch.tensor([0.01, 0.9]), torch.tensor([0.2, 0.001])).tolist() == pytest.approx([0.2, 0.9])


def test_permutations_together_reach_further_than_one_tests_own() -> None:
    generator = torch.Generator().manual_seed(0)
    scale_n = torch.logspace(-3, 3, 50, dtype=torch.float64)  # of each its own
    drawn_Rn = torch.randn(100, 50, generator=generator, dtype=torch.float64) * scale_n + 7
    found_n = torch.full((50,), 7.0, dtype=torch.float64)
    found_n[3] += 8 * scale_n[3]
    p_n, own_n = permutation_p(found_n, drawn_Rn)
    assert float(p_n[3]) == pytest.approx(1 / 5001)
    assert float(own_n[3]) == pytest.approx(1 / 101)
    assert bool((p_n[torch.arange(50) != 3] > 0.3).all())


def test_what_no_permutation_changes_is_no_test() -> None:
    p_n, own_n = permutation_p(torch.tensor([1.0, math.nan]), torch.ones(30, 2))
    assert bool(p_n.isnan().all() & own_n.isnan().all())


def test_p_of_nothing_is_even() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(101, 2000, generator=generator).exp()  # skewed
    p_n, _ = permutation_p(values[0], values[1:])
    for level in (0.5, 0.1, 0.01):
        assert float((p_n <= level).double().mean()) == pytest.approx(level, rel=0.35)


def test_p_is_even_far_out_too() -> None:
    """Thirty permutations a test: a scale that knew its own values would make small p three times too many."""
    values = torch.randn(31, 60_000, generator=torch.Generator().manual_seed(2))
    p_n, _ = permutation_p(values[0], values[1:])
    assert 30 <= int((p_n <= 0.001).sum()) <= 95
