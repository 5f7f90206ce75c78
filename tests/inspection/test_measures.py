"""Load, repeats and pairs of hand-made routings whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from routings_made import logits_of, observed, text
from torch import Tensor

from handful.errors import RoutingError
from handful.inspection.load import chance_of_load, load_of
from handful.inspection.pairs import expected_pairs, pairs
from handful.inspection.repeats import repeats
from handful.inspection.routings import Observed, halves

LEVEL = 0.05


def chosen(experts: list[list[list[int]]], of: int, windows: list[int] | None = None) -> Observed:
    """One layer's choices of some documents, (documents, tokens, K); each is a window, but for `windows`."""
    rows = [torch.tensor(document) for document in experts]
    sizes = torch.tensor([len(row) for row in rows])
    document_T = torch.arange(len(rows)).repeat_interleave(sizes)
    tokens = int(sizes.sum())
    return Observed(
        ["0"], [of], [torch.cat(rows)], torch.zeros(tokens, dtype=torch.long), document_T,
        document_T if windows is None else torch.tensor(windows), torch.arange(tokens), torch.arange(len(rows)) % 2, {},
    )  # fmt: skip


def test_repeats_by_hand() -> None:
    # Document 0: 0 0 1 1: two of three pairs; of any order 1/3 (two zeros and two ones: 4 of 12 ordered pairs).
    # Document 1: 2 2 2 and 0 in a window of its own: two of two pairs; of any order 6 of 12.
    found = repeats(chosen([[[0], [0], [1], [1]], [[2], [2], [2], [0]]], 3, windows=[0, 0, 0, 0, 1, 1, 1, 2]), LEVEL)[0]
    assert found["rate"] == pytest.approx(4 / 5)
    assert found["even"] == pytest.approx(1 / 3)
    assert found["chance"] == pytest.approx((9 + 4 + 9) / 64)
    assert found["within_documents"] == pytest.approx((3 / 3 + 2 * 6 / 12) / 5)
    assert found["halves"] == pytest.approx([2 / 3, 1])
    assert not found["beyond"]  # of one document in each half nothing can be said


def test_an_assignment_that_was_not_computed_is_no_repeat() -> None:
    found = repeats(chosen([[[0], [-1], [-1], [0], [0]]] * 2, 2), LEVEL)[0]
    assert found["rate"] == 1
    assert found["halves"] == [1, 1]


def test_runs_are_repeats_and_loads_of_documents_are_not() -> None:
    given = text()
    forgetful = logits_of(given, 8, document=3.0, runs=0.0)
    runs = logits_of(given, 8, document=0.0, runs=2.0, seed=5)
    alone, kept = repeats(observed(given, [forgetful, runs]), LEVEL)
    # Documents have their own loads, so neighbours agree far more than the text's load says, and yet it is chance.
    assert alone["rate"] > 1.5 * alone["chance"] > 1.5 * alone["even"]
    assert alone["rate"] == pytest.approx(alone["within_documents"], rel=0.05)
    assert not alone["beyond"]
    assert kept["beyond"]
    assert min(kept["halves"]) > 1.3 * kept["within_documents"]


def test_repeats_of_one_half_are_not_beyond() -> None:
    given = text()
    half_D = torch.arange(24) % 2
    runs, none = (logits_of(given, 8, document=0.0, runs=amount, seed=3) for amount in (3.0, 0.0))
    mixed = torch.where((half_D[given["document_T"]] == 0).unsqueeze(1), runs, none)
    found = repeats(observed(given, mixed, half_D=half_D), LEVEL)[0]
    assert found["halves"][0] > 1.5 * found["halves"][1]
    assert not found["beyond"]


def test_the_load_and_its_chance() -> None:
    given = text()
    even = torch.rand(len(given["tokens_T"]), 8, generator=torch.Generator().manual_seed(0))
    uneven = even.clone()
    uneven[:, 0] += 0.5
    uneven[:, 7] = -1.0
    fair, unfair = (load_of(observed(given, [even, uneven]), at, np.random.default_rng(0)) for at in (0, 1))
    assert sum(fair["load"]) == pytest.approx(1)
    assert fair["max_vio"]["value"] < 2 * fair["max_vio"]["high"]
    assert min(unfair["max_vio"]["halves"]) > 5 * unfair["max_vio"]["high"]
    assert (fair["dead"]["value"], unfair["dead"]["value"]) == (0, 1)
    assert unfair["entropy"]["value"] < unfair["entropy"]["low"] < unfair["entropy"]["chance"] <= 1
    assert unfair["agreement"] > 0.95
    assert abs(fair["agreement"]) < 0.95


def test_chance_of_a_load_is_the_multinomials() -> None:
    found = chance_of_load(40_000, 2, np.random.default_rng(0))
    # MaxVio of two is |n₀ - n₁| / n: the mean of a folded normal, √(2/π) / √n.
    assert found["max_vio"]["chance"] == pytest.approx(math.sqrt(2 / math.pi / 40_000), rel=0.15)
    assert found["max_vio"]["high"] == pytest.approx(1.96 / 200, rel=0.15)
    assert found["dead"] == {"chance": 0, "high": 0}


def test_expected_pairs_of_two_a_token_are_the_draw_of_two_different_ones() -> None:
    # Pairs drawn with probability ∝ w_e w_f: every expectation is known, and is its own fit.
    w_E = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.0], dtype=torch.float64)
    draw_EE = w_E.unsqueeze(1) * w_E
    draw_EE.fill_diagonal_(0)
    met = (1000 * draw_EE / draw_EE.sum()).unsqueeze(0)
    assert torch.allclose(expected_pairs(met), met, atol=1e-6)


def test_expected_pairs_keep_how_often_each_was_used() -> None:
    met = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 50
    met = met + met.mT
    met.diagonal(dim1=1, dim2=2).zero_()
    assert torch.allclose(expected_pairs(met).sum(-1), met.sum(-1), rtol=1e-6)


def planted_pair(given: dict[str, Tensor], where_T: Tensor) -> Tensor:
    """Experts 0 and 1 are wanted by the same tokens, and as often as before."""
    logits = logits_of(given, 8, runs=0.0, seed=2)
    wish = 2.5 * torch.randn(len(logits), 1, generator=torch.Generator().manual_seed(9)) * where_T.unsqueeze(1)
    logits[:, :2] += wish
    return logits


def test_a_pair_that_was_planted_is_found_and_no_other() -> None:
    given = text(length=400)
    everywhere = torch.ones(len(given["tokens_T"]))
    found, nothing = pairs(observed(given, [planted_pair(given, everywhere), logits_of(given, 8, seed=8)]), LEVEL)
    assert found["most"][0]["experts"] == [0, 1]
    assert min(found["most"][0]["lift"]) > 1.3
    # Who is wanted by other tokens meets neither of them.
    assert {0, 1} & set(found["least"][0]["experts"])
    assert (nothing["above"], nothing["below"]) == (0, 0)
    assert nothing["tested"] == 28


def test_a_pair_of_one_half_is_not_counted() -> None:
    given = text(length=400)
    half_D = torch.arange(24) % 2
    logits = planted_pair(given, (half_D[given["document_T"]] == 0).float())
    found = pairs(observed(given, logits, half_D=half_D), LEVEL)[0]
    assert [0, 1] not in [pair["experts"] for pair in found["most"]]


def test_one_expert_a_token_has_no_pairs() -> None:
    given = text(documents=6, length=64)
    found = pairs(observed(given, logits_of(given, 4), top_k=1), LEVEL)[0]
    assert (found["tested"], found["above"], found["below"]) == (0, 0, 0)


def test_halves_have_as_much_of_every_label() -> None:
    lengths = [100, 90, 10, 20, 30, 500, 490, 5]
    labels = {"folder": list("aabbaccb")}
    half = halves(lengths, labels)
    for label in "abc":
        sides = [
            sum(n for n, name, side in zip(lengths, labels["folder"], half, strict=True) if name == label and side == h)
            for h in (0, 1)
        ]
        assert min(sides) > 0
        assert abs(sides[0] - sides[1]) <= 30


def test_tokens_stand_in_the_order_of_their_documents() -> None:
    with pytest.raises(RoutingError, match="order of their documents"):
        Observed(
            ["0"], [2], [torch.zeros(2, 1)], torch.zeros(2), torch.tensor([1, 0]), torch.zeros(2), torch.zeros(2),
            torch.tensor([0, 1]), {},
        )  # fmt: skip
    with pytest.raises(RoutingError, match="do not fit"):
        chosen([[[0]], [[1]]], 2, windows=[0])
