"""How often consecutive tokens go to the same first expert, beside chance: a pure function of routings.

Mixtral's paper (arXiv:2401.04088, table 5): 27.9 % at layer 15, where an even and forgetful router has 1/E = 12.5 %.
1/E is chance only for an even load, so it is set beside two that know the load:

    Σ_e p_e²          of the shares p_e of first choices over the whole text
    within documents  the same from each document's own shares, counted without replacement: what the document's
                      tokens in any random order would give. It is what the test compares with.

Legend: T tokens · D documents · E experts
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from handful.inspection.routings import Observed
from handful.inspection.statistics import Ratio, adjusted, both, ratio

__all__ = ["repeats"]


def repeats(observed: Observed, level: float) -> list[dict[str, Any]]:
    """For each layer the share of consecutive tokens with one first expert, its chance levels, and whether both halves
    have more than their documents' chance: Student's t over documents, Benjamini-Hochberg over layers."""
    layers, p_halves = [], []
    for layer in range(len(observed.layers)):
        same_D, pairs_D, within_D, shares_E = _counts(observed, layer)
        of_halves = []
        for half in (0, 1):
            mine = observed.half_D == half
            of_halves.append(ratio((same_D - within_D * pairs_D)[mine], pairs_D[mine]))
        total = float(pairs_D.sum())
        layers.append(
            {
                "rate": _share(same_D.sum(), total),
                "even": 1 / observed.experts[layer],
                "chance": float(shares_E.square().sum()),
                "within_documents": _share((within_D * pairs_D).sum(), total),
                "halves": [
                    _share(same_D[observed.half_D == h].sum(), float(pairs_D[observed.half_D == h].sum()))
                    for h in (0, 1)
                ],
                "excess": [_number(side.value) for side in of_halves],
                "error": [_number(side.error) for side in of_halves],
            }
        )
        p_halves.append(both(*(_p(side) for side in of_halves)))
    q = adjusted(torch.stack(p_halves)) if p_halves else torch.zeros(0)
    for found, p, q_layer in zip(layers, p_halves, q.tolist(), strict=True):
        found.update(p=float(p), q=q_layer, beyond=q_layer <= level)
    return layers


def _counts(observed: Observed, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each document: repeats, pairs of neighbours, the chance that two of its tokens agree; and first choices."""
    first_T = observed.experts_TK[layer][:, 0].long()
    together_t = (observed.window_T[1:] == observed.window_T[:-1]) & (first_T[1:] >= 0) & (first_T[:-1] >= 0)
    same_t = together_t & (first_T[1:] == first_T[:-1])
    at_t = observed.document_T[1:]

    def count(which_t: Tensor) -> Tensor:
        return torch.zeros(observed.documents, dtype=torch.float64).index_add_(0, at_t, which_t.double())

    first_DE = observed.by_document(observed.first_TE(layer).double())
    tokens_D = first_DE.sum(1)
    within_D = (first_DE * (first_DE - 1)).sum(1) / (tokens_D * (tokens_D - 1)).clamp_min(1)
    shares_E = first_DE.sum(0) / first_DE.sum().clamp_min(1)
    return count(same_t), count(together_t), within_D, shares_E


def _p(side: Ratio) -> Tensor:
    return side.above()


def _share(part: Tensor, whole: float) -> float:
    return float(part) / whole if whole else 0.0


def _number(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None
