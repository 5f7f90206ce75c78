"""What experts cost, and which are redundant: models in which it is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from builders import moe
from serving import tokenizer
from torch import Tensor

from handful.inspection.ablation import Ablated, ablate, costs
from handful.inspection.likeness import alike, cosines, far_above, redundant
from handful.inspection.subject import Stage, subject_of
from handful.inspection.texts import Window
from handful.model import Decoder

DOCUMENTS, LENGTH = 16, 12


class Known:
    """A subject whose costs are said: what each expert's absence adds to a document's nats, and each expert's output.

    more_LED   nats a document; outputs_LEW, of expert e for input x: x · weight.
    """

    tokenizer = tokenizer()
    context = 64
    removal = "replaced"

    def __init__(self, more_LED: Tensor, outputs_LED: Tensor | None = None) -> None:
        self.more_LED, self.outputs_LED = more_LED, outputs_LED
        self.layers = [str(i) for i in range(len(more_LED))]
        self.experts = [more_LED.shape[1]] * len(more_LED)
        self.top_k = [1] * len(more_LED)
        self.pressed_after = 10**9

    def run(self, tokens_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        raise AssertionError

    def before(self, tokens_BS: Tensor, targets_BS: Tensor, layer: int) -> Stage:
        return Stage(layer, tokens_BS, targets_BS, torch.full(targets_BS.shape, 2.0), torch.zeros(1, 1))

    def without(self, stage: Stage, experts: Sequence[int]) -> Tensor:
        self.pressed_after -= 1
        if self.pressed_after < 0:
            raise KeyboardInterrupt
        more_D = self.more_LED[stage.layer, list(experts)].sum(0)
        return (more_D[stage.tokens_BS[:, 0]] / LENGTH).unsqueeze(1).expand(stage.targets_BS.shape)

    def seen(self, tokens_BS: Tensor) -> list[Tensor]:
        generator = torch.Generator().manual_seed(int(tokens_BS.sum()))
        return [torch.randn(tokens_BS.numel(), 32, generator=generator) for _ in self.layers]

    def output(self, layer: int, expert: int, x_TD: Tensor) -> Tensor:
        assert self.outputs_LED is not None
        return x_TD @ self.outputs_LED[layer, expert]


def some_windows() -> list[Window]:
    """One of each document, whose tokens are its number."""
    return [Window(document, (document,) * (LENGTH + 1)) for document in range(DOCUMENTS)]


def test_costs_are_those_of_the_text_with_their_error() -> None:
    generator = torch.Generator().manual_seed(0)
    more_LED = torch.randn(2, 20, DOCUMENTS, generator=generator, dtype=torch.float64)
    more_LED[0, 3] += 6.0
    more_LED[1, 7] -= 6.0
    done = ablate(Known(more_LED), some_windows())
    assert done.whole
    assert done.loss == 2
    found = costs(done, 0.05)
    row = found[1][7]
    tokens = DOCUMENTS * LENGTH
    assert row["cost"] == pytest.approx(float(more_LED[1, 7].sum()) / tokens, rel=1e-5)
    error = float(more_LED[1, 7].std()) * math.sqrt(DOCUMENTS) / tokens  # documents are all as long
    assert row["error"] == pytest.approx(error, rel=1e-5)
    beyond = [(layer, e) for layer, rows in enumerate(found) for e, row in enumerate(rows) if row["beyond"]]
    assert beyond == [(0, 3), (1, 7)]


def test_noise_is_not_called_a_cost() -> None:
    generator = torch.Generator().manual_seed(1)
    found = costs(ablate(Known(torch.randn(3, 60, DOCUMENTS, generator=generator)), some_windows()), 0.05)
    assert sum(row["p"] <= 0.05 for rows in found for row in rows) > 2  # of 180
    assert sum(row["beyond"] for rows in found for row in rows) == 0


def test_an_expert_that_nobody_chose_costs_nothing_and_is_not_beyond() -> None:
    row = costs(ablate(Known(torch.zeros(1, 3, DOCUMENTS)), some_windows()), 0.05)[0][1]
    assert (row["cost"], row["error"], row["p"], row["beyond"]) == (0, 0, 1, False)


def test_a_ctrl_c_keeps_the_costs_until_then() -> None:
    known = Known(torch.ones(2, 5, DOCUMENTS))
    known.pressed_after = 7
    done = ablate(known, some_windows())
    assert not done.whole
    rows = [row["cost"] for layer in costs(done, 0.05) for row in layer]
    assert [cost is not None for cost in rows] == [True] * 7 + [False] * 3
    assert rows[0] == pytest.approx(1 / LENGTH)


def twins() -> Tensor:
    """(1, 12, 32, 32) twelve experts' outputs, of which 2 and 9 are nearly the same."""
    outputs = torch.randn(1, 12, 32, 32, generator=torch.Generator().manual_seed(4))
    outputs[0, 9] = outputs[0, 2] + 0.1 * outputs[0, 9]
    return outputs


HALF_OF = {document: document % 2 for document in range(DOCUMENTS)}


def test_experts_whose_outputs_are_alike() -> None:
    known = Known(torch.zeros(1, 12, DOCUMENTS), twins())
    (cosine_HEE,) = cosines(known, some_windows(), HALF_OF)
    assert cosine_HEE.shape == (2, 12, 12)
    assert torch.allclose(cosine_HEE.diagonal(dim1=1, dim2=2), torch.ones(2, 12, dtype=torch.float64), atol=1e-5)
    found = alike(cosine_HEE)
    assert [pair["experts"] for pair in found["pairs"]] == [[2, 9]]
    assert min(found["pairs"][0]["cosine"]) > 0.95
    assert found["quartiles"][0] < found["quartiles"][1] < found["quartiles"][2]
    assert abs(found["quartiles"][1]) < 0.1
    # In one half alone it does not count.
    cosine_HEE[1, 2, 9] = cosine_HEE[1, 9, 2] = 0.0
    assert alike(cosine_HEE)["pairs"] == []


def test_a_copied_expert_of_a_model_is_found() -> None:
    torch.manual_seed(0)
    own = tokenizer()
    model = Decoder(moe({"experts": 12}, vocab=own.vocab_size, context=64))
    model.tokenizer = own
    experts = model.moe_layers[1].experts
    with torch.no_grad():
        for weight in (experts.gate_up, experts.down):
            weight[7] = weight[3]
    first, second = (alike(cosine_HEE) for cosine_HEE in cosines(subject_of(model), some_windows(), HALF_OF))
    assert first["pairs"] == []
    assert second["pairs"] == [{"experts": [3, 7], "cosine": pytest.approx([1.0, 1.0])}]


def test_random_experts_are_not_alike() -> None:
    values = torch.randn(20, 2, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.02
    assert sum(int(far_above(cosine_HEE).sum()) for cosine_HEE in values) == 0
    assert not bool(far_above(torch.ones(2, 3, 3)).any())  # too few to be far from


@pytest.mark.parametrize(
    ("cost", "spare"),
    [
        ({}, True),  # neither costs anything
        ({9: 3.0}, False),  # one does
        ({2: 0.75}, False),  # not beyond noise among twelve, but 0 is outside its own interval
        ({2: -3.0}, False),  # it matters, if for the worse
    ],
)
def test_a_pair_is_redundant_where_both_are_free(cost: dict[int, float], spare: bool) -> None:
    noise = torch.randn(1, 12, DOCUMENTS, generator=torch.Generator().manual_seed(3))
    more_LED = noise - noise.mean(2, keepdim=True)
    for expert, amount in cost.items():
        more_LED[0, expert] += amount
    known = Known(more_LED, twins())
    done: Ablated = ablate(known, some_windows())
    priced = costs(done, 0.05)
    near = [alike(cosine_HEE) for cosine_HEE in cosines(known, some_windows(), HALF_OF)]
    redundant(known, some_windows(), done, near, priced)
    (pair,) = near[0]["pairs"]
    assert pair["experts"] == [2, 9]
    assert pair["redundant"] is spare
    if spare:
        assert pair["together"]["cost"] == pytest.approx(
            float(more_LED[0, [2, 9]].sum()) / DOCUMENTS / LENGTH, abs=1e-6
        )
        assert pair["together"]["error"] > 0
    else:
        assert pair["together"] is None
