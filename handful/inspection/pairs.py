"""Which experts work together, beside chance: a pure function of routings.

Chance knows how often each expert is used in each document, and no more: pairs meet as a_e · a_f, with a fitted so that
every expert has as many partners as it had (quasi-independence: two different experts, so nothing on the diagonal). For
two experts a token that is exactly the draw of two different experts with these frequencies.

Legend: T tokens · D documents · E experts
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from handful.inspection.routings import Observed
from handful.inspection.statistics import adjusted, both, ratio

__all__ = ["expected_pairs", "pairs"]

FEW_MEETINGS = 10  # expected in each half, for a pair to be judged
SHOWN = 12  # pairs of each layer and sign that are listed


def pairs(observed: Observed, level: float) -> list[dict[str, Any]]:
    """For each layer how many pairs of experts meet more and less often than chance in both halves (Student's t over
    documents, Benjamini-Hochberg over all pairs of all layers), and those that do so most."""
    found = [_of_layer(observed, layer) for layer in range(len(observed.layers))]
    q_all = adjusted(torch.cat([p for _, p, _, _ in found])) if found else torch.zeros(0)
    layers = []
    for (at, _, lift_H, count), q in zip(found, q_all.split([len(p) for _, p, _, _ in found]), strict=True):
        beyond = q <= level
        above = beyond & (lift_H > 1).all(0)
        below = beyond & (lift_H < 1).all(0)
        nearest = torch.where((lift_H > 1).all(0), lift_H.min(0).values, lift_H.max(0).values)  # the half nearer to 1

        def listed(which: Tensor, most: bool, at: Tensor = at, lift_H: Tensor = lift_H, count: Tensor = count,
                   q: Tensor = q, nearest: Tensor = nearest) -> list[dict[str, Any]]:  # fmt: skip
            order = nearest.argsort(descending=most, stable=True)
            return [
                {"experts": at[:, i].tolist(), "lift": lift_H[:, i].tolist(), "tokens": int(count[i]), "q": float(q[i])}
                for i in order[which[order]][:SHOWN].tolist()
            ]

        layers.append(
            {
                "tested": int((~q.isnan()).sum()),
                "above": int(above.sum()),
                "below": int(below.sum()),
                "most": listed(above, True),
                "least": listed(below, False),
            }
        )
    return layers


def _of_layer(observed: Observed, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each pair: its experts, p, the ratio to chance in both halves, the tokens that both had."""
    used_TE = observed.used_TE(layer)
    E = used_TE.shape[1]
    met_DEE = torch.stack([part.T @ part for part in used_TE.split(observed.length_D.tolist())]).double()
    met_DEE.diagonal(dim1=1, dim2=2).zero_()
    chance_DEE = expected_pairs(met_DEE)
    at = torch.triu_indices(E, E, 1)
    met_Dn, chance_Dn = met_DEE[:, at[0], at[1]], chance_DEE[:, at[0], at[1]]
    p, lift, enough = [], [], torch.ones(at.shape[1], dtype=torch.bool)
    for half in (0, 1):
        mine = observed.half_D == half
        excess = ratio((met_Dn - chance_Dn)[mine], chance_Dn[mine])
        enough &= chance_Dn[mine].sum(0) >= FEW_MEETINGS
        p.append(excess.apart())
        lift.append(1 + excess.value)
    lift_H = torch.stack(lift)
    same = ((lift_H > 1).all(0)) | ((lift_H < 1).all(0))
    p_n = torch.where(same, both(p[0], p[1]), 1.0)
    return at, torch.where(enough, p_n, torch.nan), lift_H, met_Dn.sum(0)


def expected_pairs(met_DEE: Tensor, rounds: int = 200) -> Tensor:
    """Meetings by quasi-independence: a_e · a_f off the diagonal, with the row sums of what was met (symmetric,
    nothing on the diagonal). Iterative proportional fitting."""
    row_DE = met_DEE.sum(-1)
    a_DE = row_DE / row_DE.sum(-1, keepdim=True).clamp_min(1e-12).sqrt()
    for _ in range(rounds):
        others_DE = a_DE.sum(-1, keepdim=True) - a_DE
        wanted_DE = torch.where(others_DE > 1e-12, row_DE / others_DE.clamp_min(1e-12), 0.0)
        step_DE = (a_DE * wanted_DE).sqrt()  # a geometric mean: the plain step swings between two answers
        done = bool(((step_DE - a_DE).abs() <= 1e-10 * (1 + a_DE)).all())
        a_DE = step_DE
        if done:
            break
    expected_DEE = a_DE.unsqueeze(-1) * a_DE.unsqueeze(-2)
    expected_DEE.diagonal(dim1=1, dim2=2).zero_()
    return expected_DEE
