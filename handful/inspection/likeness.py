"""Which experts are redundant: alike in what they give, and each free to lose.

    alike       the cosine of two experts' outputs for the same held-out tokens of their layer, every expert given every
                token. Its mean is far above those of the layer's other pairs: above the third quartile by three times
                the range between the quartiles (Tukey's far outliers), in both halves of the text.
    redundant   alike, and switching either off costs nothing beyond noise, with 0 inside its own 95 % interval too.

For what it is worth, a redundant pair is also switched off together.

Legend: T tokens · D model width · E experts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from handful.inspection.ablation import Ablated, worth
from handful.inspection.collect import batches, more_nats, stages
from handful.inspection.statistics import student_tail
from handful.inspection.subject import Subject
from handful.inspection.texts import Window

__all__ = ["TOKENS", "alike", "cosines", "far_above", "redundant"]

TOKENS = 256  # of each half, whose outputs are compared
CHUNK = 64  # tokens whose outputs of all experts are held at once
TOGETHER = 24  # redundant pairs that are switched off together, at most


def cosines(
    subject: Subject,
    windows: Sequence[Window],
    half_of: Mapping[int, int],
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """For each layer (2, E, E): the mean cosine of two experts' outputs in each half. half_of: that of a document."""
    inputs: list[list[list[Tensor]]] = [[[], []] for _ in subject.layers]
    held = [0, 0]
    for places, tokens_BS in batches(windows):
        halves_B = [half_of[windows[place].document] for place in places]
        for half in (0, 1):
            mine = [row for row, which in enumerate(halves_B) if which == half]
            if mine and held[half] < TOKENS:
                tokens = tokens_BS[mine, :-1]
                # A few tokens of many windows, not one window whole.
                every = max(1, tokens.numel() // TOKENS)
                for layer, x_TD in enumerate(subject.seen(tokens)):
                    inputs[layer][half].append(x_TD[::every])
                held[half] += len(range(0, tokens.numel(), every))
    found = []
    for layer, (one, two) in enumerate(inputs):
        found.append(torch.stack([_cosine(subject, layer, torch.cat(x)) for x in (one, two)]))
        if progress is not None:
            progress(layer + 1, len(inputs))
    return found


def _cosine(subject: Subject, layer: int, x_TD: Tensor) -> Tensor:
    E = subject.experts[layer]
    sum_EE = torch.zeros(E, E, dtype=torch.float64)
    x_TD = x_TD[:TOKENS]
    for part in x_TD.split(CHUNK):
        y_ETD = torch.stack([subject.output(layer, expert, part).float().cpu() for expert in range(E)])
        y_ETD = torch.nn.functional.normalize(y_ETD, dim=-1)
        sum_EE += torch.einsum("etd,ftd->ef", y_ETD, y_ETD).double()
    return sum_EE / len(x_TD)


def far_above(cosine_HEE: Tensor) -> Tensor:
    """(E, E) True above the diagonal for pairs that are far above the layer's others in both halves."""
    E = cosine_HEE.shape[-1]
    at = torch.triu_indices(E, E, 1)
    far = torch.zeros(E, E, dtype=torch.bool)
    value_Hn = cosine_HEE[:, at[0], at[1]]
    if value_Hn.shape[1] < 8:  # of so few none is far from the others
        return far
    low_H, high_H = value_Hn.quantile(0.25, dim=1), value_Hn.quantile(0.75, dim=1)
    far[at[0], at[1]] = (value_Hn > (high_H + 3 * (high_H - low_H)).unsqueeze(1)).all(0)
    return far


def alike(cosine_HEE: Tensor) -> dict[str, Any]:
    """A layer's pairs that are alike, the most so first, and what its pairs come to: the chance level."""
    E = cosine_HEE.shape[-1]
    at = torch.triu_indices(E, E, 1)
    value_n = cosine_HEE.mean(0)[at[0], at[1]]
    pairs = [
        {"experts": [e, f], "cosine": cosine_HEE[:, e, f].tolist()} for e, f in far_above(cosine_HEE).nonzero().tolist()
    ]
    pairs.sort(key=lambda pair: -min(pair["cosine"]))
    quartiles = value_n.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=value_n.dtype)).tolist() if len(value_n) else []
    return {"quartiles": quartiles, "pairs": pairs}


def redundant(
    subject: Subject,
    windows: Sequence[Window],
    ablated: Ablated,
    layers: Sequence[Mapping[str, Any]],
    costs: Sequence[Sequence[Mapping[str, Any]]],
) -> None:
    """Mark the pairs of `alike` of each layer that are redundant, and measure both off together for the first of
    them; `together` is None for the others."""
    documents = len(ablated.tokens_D)
    freedom = float(worth(torch.zeros(1, documents), ablated.tokens_D).freedom)
    for layer, found in enumerate(layers):
        for pair in found["pairs"]:
            pair["redundant"] = all(_free(costs[layer][e], freedom) for e in pair["experts"])
            pair["together"] = None
    left = TOGETHER
    for layer, found in enumerate(layers):
        spare = [pair for pair in found["pairs"] if pair["redundant"]][:left]
        left -= len(spare)
        staged = stages(subject, windows, layer) if spare else []
        for pair in spare:
            both = worth(more_nats(subject, staged, documents, pair["experts"]).unsqueeze(0), ablated.tokens_D)
            pair["together"] = {"cost": float(both.value), "error": float(both.error)}


def _free(cost: Mapping[str, Any], freedom: float) -> bool:
    """Whether an expert was measured, and 0 is inside the 95 % interval of what it costs, or above it."""
    if cost["cost"] is None or cost["beyond"]:
        return False
    if not cost["error"]:
        return bool(cost["cost"] == 0)
    return bool(student_tail(torch.tensor(cost["cost"] / cost["error"]), freedom) > 0.025)
