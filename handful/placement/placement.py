"""A layer's placement: which experts each device has. And below which busiest device none can be.

Legend: E experts · D devices
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from handful.errors import ConfigError

__all__ = ["Bools", "Floats", "Ints", "Placement", "checked", "greedy_copies", "lower_bound"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Placement:
    """The experts that each device has, no expert twice on one. A device that has none may be dead."""

    experts: tuple[tuple[int, ...], ...]

    def copies(self, experts: int) -> Ints:
        """How many each of so many experts has, (E,)."""
        return np.bincount([e for own in self.experts for e in own], minlength=experts)

    def loads(self, load: ArrayLike, shares: Sequence[Sequence[float]] | None = None) -> Floats:
        """What each device computes of the load of every expert, (D,), if the copies of an expert have equal shares of
        it, or those that are given: of each device, one for each of its experts."""
        load_E = np.asarray(load, np.float64)
        if shares is None:
            each_E = load_E / self.copies(len(load_E)).clip(1)
            return np.array([each_E[list(own)].sum() for own in self.experts])
        pairs = zip(self.experts, shares, strict=True)
        return np.array([(load_E[list(own)] * np.asarray(part)).sum() for own, part in pairs])

    def moved(self, before: Placement) -> int:
        """Experts that a device must be sent, coming from another placement."""
        return sum(len(set(own) - set(was)) for own, was in zip(self.experts, before.experts, strict=True))


def lower_bound(load: ArrayLike, slots: Sequence[int]) -> float:
    """What the busiest device has at least, whatever the placement, with equal shares: the mean; and what the busiest
    copy has, for there are only so many copies."""
    load_E, alive = checked(load, slots)
    devices, total = len(alive), sum(slots)
    mean = float(load_E.sum()) / devices
    # The least busiest copy: the greedy number of copies is the best one for it.
    return max(mean, float((load_E / greedy_copies(load_E, total, devices)).max()))


def checked(load: ArrayLike, slots: Sequence[int]) -> tuple[Floats, list[int]]:
    load_E = np.asarray(load, np.float64)
    if load_E.ndim != 1 or not len(load_E) or not np.isfinite(load_E).all() or (load_E < 0).any():
        raise ConfigError("load: a number from 0 for each expert")
    alive = [device for device, count in enumerate(slots) if count > 0]
    if sum(slots[device] for device in alive) < len(load_E):
        raise ConfigError(f"slots: {sum(slots)} of {len(alive)} devices; {len(load_E)} experts do not fit")
    return load_E, alive


def greedy_copies(load_E: Floats, slots: int, devices: int) -> Ints:
    """One more for the expert whose copies have the most, while there are slots; at most one on a device."""
    counts = np.ones(len(load_E), np.int64)
    heap = [(-load, expert) for expert, load in enumerate(load_E.tolist()) if devices > 1]
    heapq.heapify(heap)
    for _ in range(slots - len(load_E)):
        if not heap or heap[0][0] == 0:
            break
        _, expert = heapq.heappop(heap)
        counts[expert] += 1
        if counts[expert] < devices:
            heapq.heappush(heap, (-load_E[expert] / counts[expert], expert))
    return counts
