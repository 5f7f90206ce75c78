"""Routing, seen: how even the load is, how sure the router, who works with whom.

Legend: T tokens · E experts · K experts per token · L MoE layers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handful.routing import Routing

__all__ = ["LoadStats", "coactivation", "collapsed", "dead", "dropped", "entropy", "load", "max_vio", "stats"]


def load(routing: Routing) -> Tensor:
    """(E,) the share of the T·K assignments that chose each expert; sums to 1."""
    return routing.chosen_E / routing.chosen_E.sum()


def max_vio(load_E: Tensor) -> float:
    """(max load - mean load) / mean load: 0 is perfectly even, E/K - 1 the worst that top-K routing can do."""
    return float(load_E.max() * len(load_E) / load_E.sum() - 1)


def entropy(load_E: Tensor) -> float:
    """The load's entropy as a share of an even load's: 1 is even, 0 all on one expert (or there is only one)."""
    share_E = load_E / load_E.sum()
    if len(share_E) < 2:
        return 0.0
    bits = -(share_E * share_E.clamp_min(1e-30).log()).sum() / torch.log(torch.tensor(float(len(share_E))))
    return float(bits)


def dead(load_E: Tensor, floor: float = 0.01) -> int:
    """How many experts get less than `floor` of an even share."""
    return int((load_E * len(load_E) < floor * load_E.sum()).sum())


def collapsed(load_E: Tensor, top_k: int) -> str | None:
    """Why a layer's load is a collapse, in words; None when it is not one.

    Any of three makes it one: a tenth of the experts dead; a load no more spread than an even one over half of them;
    an expert that more than half of all tokens choose although an even share would be less than half of that.
    """
    experts = len(load_E)
    if experts < 2:
        return None
    idle, spread, busiest = dead(load_E), experts ** entropy(load_E), float(load_E.max() / load_E.sum()) * top_k
    reasons = []
    if idle >= max(1, experts / 10):
        reasons.append(f"{idle} of {experts} experts are dead")
    if spread < experts / 2:
        reasons.append(f"the load is as uneven as with {spread:.0f} of {experts} experts in even use")
    if busiest > 0.5 and top_k / experts < 0.25:
        reasons.append(f"one expert is chosen by {busiest:.0%} of all tokens")
    return ", ".join(reasons) or None


def dropped(routing: Routing) -> float:
    """The share of assignments that were not computed because their expert was full."""
    return 0.0 if routing.dropped_TK is None else float(routing.dropped_TK.float().mean())


def coactivation(routing: Routing) -> Tensor:
    """(E, E) how many tokens both experts of a pair computed (dropped ones left out); the diagonal: each expert's."""
    used_TK = torch.ones_like(routing.weights_TK) if routing.dropped_TK is None else ~routing.dropped_TK
    used_TE = torch.zeros(routing.tokens, routing.experts, device=routing.experts_TK.device)
    used_TE.scatter_(1, routing.experts_TK, used_TK.float())
    return used_TE.T @ used_TE


@dataclass(frozen=True)
class LoadStats:
    """The load of every MoE layer over some steps, in plain values."""

    load: list[list[float]]
    max_vio: list[float]
    dead: list[int]
    entropy: list[float]
    dropped: list[float]


def stats(load_LE: Tensor, dropped_L: Sequence[float]) -> LoadStats:
    """Summarise per-layer loads (counts or shares, (L, E)) and dropped shares."""
    share_LE = load_LE / load_LE.sum(-1, keepdim=True)
    return LoadStats(
        load=[[round(v, 6) for v in row] for row in share_LE.tolist()],
        max_vio=[max_vio(row) for row in share_LE],
        dead=[dead(row) for row in share_LE],
        entropy=[entropy(row) for row in share_LE],
        dropped=list(dropped_L),
    )
