"""Which rank is to hold which experts: pure functions of loads, room and who is there.

Legend: E experts · R ranks
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from handful.errors import MissingExtraError
from handful.placement import Placement, place

__all__ = ["aim", "first", "mend", "room_of"]


def room_of(holdable: Sequence[int], layers: int, experts: int) -> list[list[int]]:
    """Of each layer the experts that each rank has room for, where it has room for so many of all layers together."""
    return [[min(experts, count // layers + (layer < count % layers)) for count in holdable] for layer in range(layers)]


def first(
    loads: Sequence[ArrayLike], room: Sequence[Sequence[int]], before: Sequence[Placement] | None = None
) -> list[Placement]:
    """Of every layer a placement by its load, near another one; what does not fit is on no rank."""
    found = []
    for layer, (load, slots) in enumerate(zip(loads, room, strict=True)):
        load_E = np.asarray(load, np.float64)
        was = None if before is None else before[layer]
        if sum(slots) < len(load_E):
            nothing = Placement(((),) * len(slots))
            found.append(mend(load_E, slots, nothing if was is None else was))
        else:
            found.append(_placed(load_E, slots, was))
    return found


def _placed(load_E: NDArray[np.float64], slots: Sequence[int], before: Placement | None) -> Placement:
    try:
        return place(load_E, slots, before, quick=True)
    except MissingExtraError:  # a new one that is near another is found with scipy; that more moves changes no answer
        return place(load_E, slots, quick=True)


def aim(
    wanted: Sequence[Placement], loads: Sequence[ArrayLike], room: Sequence[Sequence[int]], alive: Sequence[int]
) -> list[Placement]:
    """What is to be held while these ranks alone are there: what is wanted, and of each layer what the others had."""
    if set(alive) >= {rank for layer in wanted for rank, own in enumerate(layer.experts) if own}:
        return list(wanted)
    found = []
    for layer, load, slots in zip(wanted, loads, room, strict=True):
        left = [count if rank in alive else 0 for rank, count in enumerate(slots)]
        found.append(mend(load, left, layer))
    return found


def mend(load: ArrayLike, slots: Sequence[int], before: Placement) -> Placement:
    """A placement at once, without a search: each rank keeps what it has as far as it has room, and the experts that
    none has any more go, the busiest first, to the least busy rank with room; where there is none, in the place of a
    copy of which there is another. Experts for which there is no room at all are on no rank."""
    load_E = np.asarray(load, np.float64)
    has_RE = np.zeros((len(slots), len(load_E)), bool)
    for has_E, own, room in zip(has_RE, before.experts, slots, strict=False):
        has_E[sorted(own, key=lambda expert: -load_E[expert])[:room]] = True
    room_R = np.array(slots) - has_RE.sum(1)
    for expert in np.argsort(-load_E, kind="stable").tolist():
        copies_E = has_RE.sum(0)
        if copies_E[expert]:
            continue
        if (room_R > 0).any():
            load_R = has_RE @ (load_E / copies_E.clip(1))
            fits = np.flatnonzero(room_R > 0)
            rank = int(fits[np.argmin(load_R[fits])])
            room_R[rank] -= 1
        else:
            spare = np.flatnonzero(copies_E > 1)
            if not len(spare):
                break
            given = spare[np.argmin(load_E[spare] / copies_E[spare])]
            rank = int(np.flatnonzero(has_RE[:, given])[-1])
            has_RE[rank, given] = False
        has_RE[rank, expert] = True
    return Placement(tuple(tuple(np.flatnonzero(own).tolist()) for own in has_RE))
