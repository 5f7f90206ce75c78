"""A load to a placement whose busiest device has as little as can be found.

Legend: E experts · D devices
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from handful.errors import ConfigError, MissingExtraError
from handful.placement.placement import Floats, Ints, Placement, checked, greedy_copies, lower_bound

__all__ = ["place"]

STARTS, WORK = 200, 20_000  # beginnings of a search: fewer for more experts × devices
CHANGES = 400  # of a placement, one after another, at most
NEAR = 0.02  # more than the best that was found, for a placement that moves little
CHOICES = 48  # copies that are thought of giving way, in each change


def place(load: ArrayLike, slots: Sequence[int], before: Placement | None = None, *, quick: bool = False) -> Placement:
    """A placement of a layer's experts.

    load     of every expert, (E,).
    slots    of every device, the experts that it has room for; 0: it is dead, or takes part in nothing.
    before   a placement to stay near: it is mended and changed while that helps, and kept if its busiest device has at
             most 2 % more than a new one's; of a new one each device gets the set that it has the most of already.
    quick    search from one beginning alone, where time is worth more than a percent of evenness.

    Slots may stay empty. The search is greedy, then by single changes while the busiest device's load falls, for small
    layers from many beginnings: the same result every time. ConfigError where the experts do not fit.
    """
    load_E, alive = checked(load, slots)
    room = np.array([slots[d] for d in alive])
    bound = lower_bound(load_E, slots)
    best: _Search | None = None
    for copies in _starts(load_E, int(room.sum()), len(alive), bound):
        found = _Search(load_E, room, copies)
        found.improve()
        if best is None or found.worst < best.worst * (1 - 1e-12):
            best = found
        if quick or best.worst <= bound * (1 + 1e-12):
            break
    assert best is not None
    if before is not None:
        if len(before.experts) != len(slots):
            raise ConfigError(f"before: {len(before.experts)} devices; there are {len(slots)}")
        mended = _Search.mended(load_E, room, [before.experts[device] for device in alive])
        mended.improve(enough=best.worst * (1 + NEAR))
        if mended.worst <= best.worst * (1 + NEAR):
            return mended.placement(alive, len(slots))
    made = best.placement(alive, len(slots))
    return made if before is None else _near(made, before, slots)


def _starts(load_E: Floats, slots: int, devices: int, bound: float) -> Iterator[Ints]:
    """Numbers of copies to begin from: the greedy one; and for small layers, where a single copy decides, those that a
    limit of a copy's load asks for, with some more by chance."""
    yield greedy_copies(load_E, slots, devices)
    if not bound:
        return
    draw = np.random.default_rng(0)
    for _ in range(min(STARTS, WORK // (len(load_E) * devices))):
        limit = bound * draw.uniform(1, 1.5)
        counts = np.ceil(load_E / limit - 1e-9).clip(1, devices).astype(np.int64)
        spare = slots - int(counts.sum())
        if spare < 0:
            continue
        for expert in draw.choice(len(load_E), draw.integers(0, spare + 1), p=load_E / load_E.sum()):
            counts[expert] = min(counts[expert] + 1, devices)
        yield counts


class _Search:
    """A placement that is being made: the heaviest copies first, each on the least busy device that has room and not
    the same expert; then changed while the busiest device's load falls."""

    def __init__(self, load_E: Floats, room: Ints, copies: Ints) -> None:
        self.load_E, self.room = load_E, room
        self.has_DE = np.zeros((len(room), len(load_E)), bool)
        self.copies = np.zeros(len(load_E), np.int64)
        for expert in np.argsort(-load_E / copies, kind="stable").tolist():
            self._add(expert, int(copies[expert]))

    @staticmethod
    def mended(load_E: Floats, room: Ints, experts: Sequence[Sequence[int]]) -> _Search:
        """What devices have already, as far as there is room, and beside it the experts that none of them has."""
        found = _Search.__new__(_Search)
        found.load_E, found.room = load_E, room
        found.has_DE = np.zeros((len(room), len(load_E)), bool)
        for own, count, has_E in zip(experts, room, found.has_DE, strict=True):
            has_E[[expert for expert in own if expert < len(load_E)][:count]] = True
        found.copies = found.has_DE.sum(0)
        for expert in np.flatnonzero(found.copies == 0).tolist():
            found._add(expert, 1)
        return found

    def _add(self, expert: int, copies: int) -> None:
        """Copies of an expert that has none, on the least busy devices with room."""
        fits = np.flatnonzero(self.has_DE.sum(1) < self.room)
        load_D = self.has_DE @ (self.load_E / self.copies.clip(1))
        chosen = fits[np.argsort(load_D[fits], kind="stable")[:copies]]
        if not len(chosen):
            chosen = self._make_room()
        self.has_DE[chosen, expert] = True
        self.copies[expert] = len(chosen)

    def placement(self, alive: Sequence[int], devices: int) -> Placement:
        experts: list[tuple[int, ...]] = [()] * devices
        for device, own in zip(alive, self.has_DE, strict=True):
            experts[device] = tuple(np.flatnonzero(own).tolist())
        return Placement(tuple(experts))

    def _make_room(self) -> Ints:
        """A copy of the expert whose copies have least gives way, where an expert would have no place at all."""
        spare = np.flatnonzero(self.copies > 1)
        expert = spare[np.argmin(self.load_E[spare] / self.copies[spare])]
        device = int(np.flatnonzero(self.has_DE[:, expert])[-1])
        self.has_DE[device, expert] = False
        self.copies[expert] -= 1
        return np.array([device])

    @property
    def each_E(self) -> Floats:
        """The load of a copy of each expert."""
        found: Floats = self.load_E / self.copies.clip(1)
        return found

    @property
    def load_D(self) -> Floats:
        found: Floats = self.has_DE @ self.each_E
        return found

    @property
    def worst(self) -> float:
        return float(self.load_D.max())

    def improve(self, enough: float = 0.0) -> None:
        """While it helps, and the busiest device has more than is enough."""
        for _ in range(CHANGES):
            load_D = self.load_D
            if load_D.max() <= enough or not self._change(load_D, int(np.argmax(load_D))):
                return

    def _change(self, load_D: Floats, busiest: int) -> bool:
        """The best single change for the busiest device; whether there was one that helps."""
        now = (float(load_D.max()), float((load_D**2).sum()))
        best, result = now, None
        held = np.nonzero(self.has_DE)
        for expert in np.flatnonzero(self.has_DE[busiest]).tolist():
            for change in (
                *self._exchanges(load_D, busiest, expert, held),
                *self._copied(load_D, busiest, expert, held),
            ):
                load = self._after(load_D, change)
                value = (float(load.max()), float((load**2).sum()))
                if value[0] < best[0] * (1 - 1e-12) or (value[0] <= best[0] and value[1] < best[1] * (1 - 1e-9)):
                    best, result = value, change
        if result is None:
            return False
        self._apply(result)
        return True

    def _after(self, load_D: Floats, change: Sequence[tuple[int, int, bool]]) -> Floats:
        """What devices would have: only those of the experts that change are looked at."""
        found = load_D.copy()
        for expert in {expert for _, expert, _ in change}:
            mine = [(device, there) for device, other, there in change if other == expert]
            copies = self.copies[expert] + sum(1 if there else -1 for _, there in mine)
            each = self.load_E[expert] / max(1, int(copies))
            found += self.has_DE[:, expert] * (each - self.load_E[expert] / max(1, int(self.copies[expert])))
            for device, there in mine:
                found[device] += each if there else -each
        return found

    def _apply(self, change: Sequence[tuple[int, int, bool]]) -> None:
        for device, expert, there in change:
            self.has_DE[device, expert] = there
            self.copies[expert] += 1 if there else -1

    def _exchanges(
        self, load_D: Floats, busiest: int, expert: int, held: tuple[Ints, ...]
    ) -> list[list[tuple[int, int, bool]]]:
        """Its copy goes to another device, alone or for one of that device's. held: devices, and experts on them."""
        each_E = self.each_E
        others = np.flatnonzero(~self.has_DE[:, expert])
        found = []
        free = others[self.has_DE[others].sum(1) < self.room[others]]
        if len(free):
            least = int(free[np.argmin(load_D[free])])
            found.append([(busiest, expert, False), (least, expert, True)])
        devices, experts = held
        these = ~self.has_DE[devices, expert] & ~self.has_DE[busiest, experts]
        devices, experts = devices[these], experts[these]
        lighter = each_E[expert] - each_E[experts]
        after = np.maximum(load_D[busiest] - lighter, load_D[devices] + lighter)
        for i in np.argsort(np.where(lighter > 0, after, np.inf), kind="stable")[:4].tolist():
            if lighter[i] > 0:
                device, other = int(devices[i]), int(experts[i])
                found.append(
                    [(busiest, expert, False), (device, expert, True), (device, other, False), (busiest, other, True)]
                )
        return found

    def _copied(
        self, load_D: Floats, busiest: int, expert: int, held: tuple[Ints, ...]
    ) -> list[list[tuple[int, int, bool]]]:
        """It has a copy more, in a free slot or in that of an expert that has several; or the busiest device does
        without it."""
        found = []
        others = np.flatnonzero(~self.has_DE[:, expert])
        free = others[self.has_DE[others].sum(1) < self.room[others]]
        if len(free):
            found.append([(int(free[np.argmin(load_D[free])]), expert, True)])
        devices, experts = held
        these = ~self.has_DE[devices, expert] & (self.copies[experts] > 1)
        devices, experts = devices[these], experts[these]
        after = self.load_E[experts] / (self.copies[experts] - 1)
        for i in np.argsort(after, kind="stable")[:CHOICES].tolist():
            device, other = int(devices[i]), int(experts[i])
            found.append([(device, other, False), (device, expert, True)])
        if self.copies[expert] > 1:
            found.append([(busiest, expert, False)])
        return found


def _near(made: Placement, before: Placement, slots: Sequence[int]) -> Placement:
    """The same sets of experts, dealt anew among devices of as many slots, so that few experts move."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtraError("scipy", "a placement near another", extra="placement") from None

    experts: list[tuple[int, ...]] = [()] * len(slots)
    for count in sorted(set(slots) - {0}):
        devices = [device for device, room in enumerate(slots) if room == count]
        kept = [[len(set(made.experts[a]) & set(before.experts[b])) for b in devices] for a in devices]
        for a, b in zip(*linear_sum_assignment(np.array(kept), maximize=True), strict=True):
            experts[devices[b]] = made.experts[devices[a]]
    return Placement(tuple(experts))
