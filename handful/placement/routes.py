"""Which copy of an expert a token goes to: the one on its own device first, then one in its own node, then any.

Legend: T tokens · K experts per token · E experts · D devices · C copies of an expert
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from handful.placement.placement import Floats, Ints, Placement
from handful.placement.topology import Topology

__all__ = ["Routes", "homes"]

# Steps of a sequence whose beginnings are all spread evenly from 0 to 1: the golden ratio's, and one beside it.
STEP, ASIDE = 0.6180339887498949, 0.7548776662466927


class Routes:
    """Of every expert, to which of its copies the tokens of each device go.

    Tokens stand evenly on the devices that are alive, and each copy gets its share of the expert's tokens: those of its
    own device as far as it goes, then those of its node, then others, in proportion.

    devices     of each expert, the devices that have it, (C,).
    portions    of each expert, (D, C): of the tokens of a device, those that go to each copy. Rows of dead ones are 0.
    """

    def __init__(self, placement: Placement, topology: Topology, shares: Sequence[Sequence[float]] | None = None):
        experts = 1 + max((max(own) for own in placement.experts if own), default=-1)
        held: list[list[int]] = [[] for _ in range(experts)]
        parts: list[list[float]] = [[] for _ in range(experts)]
        for device, own in enumerate(placement.experts):
            for place, expert in enumerate(own):
                held[expert].append(device)
                parts[expert].append(1.0 if shares is None else shares[device][place])
        self.devices: list[Ints] = [np.array(each, np.int64) for each in held]
        self.portions: list[Floats] = [
            _portions(own, np.array(part) / sum(part) if part else np.zeros(0), topology)
            for own, part in zip(self.devices, parts, strict=True)
        ]

    def devices_of(self, experts_TK: ArrayLike, home_T: ArrayLike) -> Ints:
        """The device that computes each assignment, (T, K). Tokens of one device take the copies by turns, in the order
        of tokens: the same every time, and known to the device from its own tokens."""
        experts_TK, home_T = np.asarray(experts_TK, np.int64), np.asarray(home_T, np.int64)
        experts_N, home_N = experts_TK.ravel(), np.repeat(home_T, experts_TK.shape[1])
        found_N = np.empty(len(experts_N), np.int64)
        order = np.lexsort((home_N, experts_N))
        # The number of each assignment among those of its expert and device.
        keys = experts_N[order] * (int(home_N.max(initial=0)) + 1) + home_N[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        turn = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
        turn_N = np.empty(len(order), np.int64)
        turn_N[order] = turn
        bounds = np.searchsorted(experts_N[order], np.arange(len(self.devices) + 1))
        for expert, devices in enumerate(self.devices):
            these = order[bounds[expert] : bounds[expert + 1]]
            at = (0.5 + turn_N[these] * STEP + expert * ASIDE) % 1.0
            until = self.portions[expert].cumsum(1)[home_N[these], :-1]
            found_N[these] = devices[(at[:, None] >= until).sum(1)] if len(these) else 0
        return found_N.reshape(experts_TK.shape)


def homes(tokens: int, topology: Topology) -> Ints:
    """The device that each of so many tokens stands on, if they are dealt to those that are alive, by turns, (T,)."""
    return topology.alive_D[np.arange(tokens) % len(topology.alive_D)]


def _portions(devices: Ints, part_C: Floats, topology: Topology) -> Floats:
    """(D, C) of one expert; `part_C`: of all of its tokens, those that each copy gets."""
    alive, left_C = topology.alive_D, part_C.copy()
    need_D = np.zeros(topology.devices)
    need_D[alive] = 1 / len(alive)
    found = np.zeros((topology.devices, len(devices)))
    for area_D in (np.arange(topology.devices), topology.node_D, np.zeros(topology.devices, np.int64)):
        # In each area the lesser of what its tokens need and what its copies have left, in proportion to both.
        area_C = area_D[devices]
        need_A = np.bincount(area_D, need_D)
        left_A = np.bincount(area_C, left_C, len(need_A))
        served_A = np.minimum(need_A, left_A)
        of_need = np.divide(served_A, need_A, out=np.zeros_like(need_A), where=need_A > 0)
        of_left = np.divide(1, left_A, out=np.zeros_like(left_A), where=left_A > 0)
        taken_DC = (need_D * of_need[area_D])[:, None] * (left_C * of_left[area_C]) * (area_D[:, None] == area_C)
        found += taken_DC
        need_D = need_D - taken_DC.sum(1)
        left_C = (left_C - taken_DC.sum(0)).clip(0)
    found[alive] *= len(alive)
    return found
