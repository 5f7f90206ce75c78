"""How the tokens of an expert are split between its copies so that the busiest device has least."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from handful.errors import ConfigError, MissingExtraError
from handful.placement.placement import Placement

__all__ = ["shares"]


def shares(load: ArrayLike, placement: Placement) -> list[list[float]]:
    """Of each device, the share that it takes of each of its experts' tokens, so that the busiest device has the least
    that this placement allows: a linear program. The shares of an expert's copies sum to 1."""
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError:
        raise MissingExtraError("scipy", "splitting experts between devices", extra="placement") from None

    load_E = np.asarray(load, np.float64)
    pairs = [(device, expert) for device, own in enumerate(placement.experts) for expert in own]
    missing = set(range(len(load_E))) - {expert for _, expert in pairs}
    if missing:
        raise ConfigError(f"placement: expert {min(missing)} is on no device")
    scale = float(load_E.max()) or 1.0
    device, expert = (np.array(column) for column in zip(*pairs, strict=True))
    N, D = len(pairs), len(placement.experts)
    # Variables: each pair's share, and last the busiest device's load.
    cost = np.zeros(N + 1)
    cost[-1] = 1
    rows, columns = np.concatenate([device, np.arange(D)]), np.concatenate([np.arange(N), np.full(D, N)])
    below = coo_array((np.concatenate([load_E[expert] / scale, -np.ones(D)]), (rows, columns)), shape=(D, N + 1))
    whole = coo_array((np.ones(N), (expert, np.arange(N))), shape=(len(load_E), N + 1))
    found = linprog(
        cost, A_ub=below.tocsr(), b_ub=np.zeros(D), A_eq=whole.tocsr(), b_eq=np.ones(len(load_E)), method="highs"
    )
    assert found.status == 0, found.message
    made: list[list[float]] = [[] for _ in placement.experts]
    for (owner, _), share in zip(pairs, found.x[:-1].tolist(), strict=True):
        made[owner].append(max(0.0, share))
    return made
