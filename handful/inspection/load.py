"""How even the load is, beside that of a router which picks at random: pure functions of routings.

Legend: T tokens · E experts · K experts per token
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from handful.inspection.routings import Observed
from handful.observe import dead, entropy, max_vio

__all__ = ["chance_of_load", "load_of"]

DRAWS = 200


def load_of(observed: Observed, layer: int, generator: np.random.Generator) -> dict[str, Any]:
    """The load of a layer, and MaxVio, entropy and dead experts with their chance level and in each half.

    Chance: as many assignments that go to experts drawn evenly, by simulation; 95 of 100 such routers
    stay below `high` or above `low`.
    """
    used_TE = observed.used_TE(layer)
    load_E = used_TE.sum(0)
    of_halves = [used_TE[observed.half_T == half].sum(0) for half in (0, 1)]
    chance = chance_of_load(int(load_E.sum()), observed.experts[layer], generator)

    def share(count_E: Tensor) -> list[float]:
        return (count_E / count_E.sum().clamp_min(1)).tolist()

    return {
        "load": share(load_E),
        "load_halves": [share(half_E) for half_E in of_halves],
        "agreement": _correlation(*of_halves),
        "max_vio": {"value": max_vio(load_E), "halves": [max_vio(half_E) for half_E in of_halves], **chance["max_vio"]},
        "entropy": {"value": entropy(load_E), "halves": [entropy(half_E) for half_E in of_halves], **chance["entropy"]},
        "dead": {"value": dead(load_E), "halves": [dead(half_E) for half_E in of_halves], **chance["dead"]},
    }


def chance_of_load(assignments: int, experts: int, generator: np.random.Generator) -> dict[str, dict[str, float]]:
    """What MaxVio, entropy and dead experts come to where experts are drawn evenly: the mean, and the 95 % bound."""
    drawn_RE = generator.multinomial(assignments, [1 / experts] * experts, size=DRAWS)
    count_RE = torch.from_numpy(drawn_RE).float()
    values = {name: torch.tensor([float(f(row)) for row in count_RE]) for name, f in _MEASURES.items()}
    return {
        name: {
            "chance": float(value_R.mean()),
            **(
                {"low": float(value_R.quantile(0.05))} if name == "entropy" else {"high": float(value_R.quantile(0.95))}
            ),
        }
        for name, value_R in values.items()
    }


_MEASURES = {"max_vio": max_vio, "entropy": entropy, "dead": dead}


def _correlation(one_E: Tensor, two_E: Tensor) -> float | None:
    """Pearson's r; None where a side is all alike."""
    if len(one_E) < 2 or float(one_E.std()) == 0 or float(two_E.std()) == 0:
        return None
    return float(torch.corrcoef(torch.stack([one_E, two_E]))[0, 1])
