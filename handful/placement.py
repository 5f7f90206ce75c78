"""Which expert on which device, with copies of the busy ones: from a load to a placement.

    rebalance_experts   DeepSeek's published balancing (EPLB), with its interface and its results
    place               ours: a layer's load to a placement whose busiest device has as little as can be found
    lower_bound         below which no placement can be
    shares              how the tokens of an expert are split between its copies so that the busiest device has least
    place_layer         a placement with its shares, beside the published one and the bound
    read_load           a recorded load, from the files that have one

A device computes for all who routed to its experts, and a layer is done when the busiest device is: so the busiest
device's load, beside the mean, is what an uneven placement costs.

Legend: L layers · E experts · R replicas (slots of all devices) · D devices
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from handful.checkpoint import read_json
from handful.errors import ConfigError, MissingExtraError
from handful.observe import Recording

__all__ = [
    "Placed", "Placement", "lower_bound", "place", "place_layer", "read_load", "rebalance_experts", "shares",
]  # fmt: skip

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STARTS, WORK = 200, 20_000  # beginnings of a search: fewer for more experts × devices
CHANGES = 400  # of a placement, one after another, at most
NEAR = 0.02  # more than the best that was found, for a placement that moves little
CHOICES = 48  # copies that are thought of giving way, in each change

# ---------------------------------------------------------------------------------------------------------------------
# DeepSeek's.


def rebalance_experts(
    weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Expert parallelism load balancer (https://github.com/deepseek-ai/EPLB): hierarchical where the groups of experts
    can be dealt to the nodes, else over all devices at once.

    weight   (L, E): the load of every logical expert.

    Returns physical to logical (L, R), logical to physical (L, E, most copies; -1 where there is none) and the number
    of copies (L, E). ConfigError for numbers that do not divide.
    """
    layers, experts = weight.shape
    for name, whole, part in (
        ("experts", experts, num_groups),
        ("num_gpus", num_gpus, num_nodes),
        ("num_replicas", num_replicas, num_gpus),
    ):
        if part < 1 or whole % part:
            raise ConfigError(f"{name} = {whole}: a multiple of {part}")
    if num_replicas < experts:
        raise ConfigError(f"num_replicas = {num_replicas}: at least one for each of {experts} experts")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    physical = np.empty((layers, num_replicas), np.int64)
    counts = np.empty((layers, experts), np.int64)
    ranks = np.empty((layers, num_replicas), np.int64)
    for layer, load_E in enumerate(weight.float().cpu().numpy().astype(np.float64)):
        found = _rebalanced(load_E, num_replicas, num_groups, num_nodes, num_gpus)
        physical[layer], ranks[layer], counts[layer] = found
    logical = np.full((layers, experts, int(counts.max())), -1, np.int64)
    for layer in range(layers):
        logical[layer, physical[layer], ranks[layer]] = np.arange(num_replicas)
    return torch.from_numpy(physical), torch.from_numpy(logical), torch.from_numpy(counts)


def _rebalanced(load_E: Floats, replicas: int, groups: int, nodes: int, gpus: int) -> tuple[Ints, Ints, Ints]:
    """One layer: groups are packed to nodes, experts copied within a node, and the copies packed to its devices."""
    size, per_node = len(load_E) // groups, replicas // nodes
    members = np.arange(len(load_E)).reshape(groups, size)
    node_of, place_of = _packed(load_E.reshape(groups, size).sum(1), nodes)
    physical, ranks, counts = [], [], np.empty(len(load_E), np.int64)
    for node in range(nodes):
        own = np.flatnonzero(node_of == node)
        experts = members[own[np.argsort(place_of[own])]].reshape(-1)
        copied, rank, copies = _copied(load_E[experts], per_node)
        device, slot = _packed((load_E[experts] / copies)[copied], gpus // nodes)
        order = np.argsort(device * (per_node * nodes // gpus) + slot)
        physical.append(experts[copied[order]])
        ranks.append(rank[order])
        counts[experts] = copies
    return np.concatenate(physical), np.concatenate(ranks), counts


def _packed(load_N: Floats, packs: int) -> tuple[Ints, Ints]:
    """Items to packs of as many, the heaviest first, each to the lightest pack with room: the pack of each item, and
    its place in it."""
    room = len(load_N) // packs
    pack_N, place_N = np.arange(len(load_N)), np.zeros(len(load_N), np.int64)
    if room == 1:
        return pack_N, place_N
    # In float32 and by torch's sort, so that equal loads are taken in the published order.
    order = torch.from_numpy(load_N).float().sort(descending=True).indices.tolist()
    held, weighs = [0] * packs, [0.0] * packs
    for item in order:
        pack = min((p for p in range(packs) if held[p] < room), key=weighs.__getitem__)
        pack_N[item], place_N[item] = pack, held[pack]
        held[pack] += 1
        weighs[pack] += float(np.float32(load_N[item]))
    return pack_N, place_N


def _copied(load_E: Floats, replicas: int) -> tuple[Ints, Ints, Ints]:
    """Copies, each of the expert whose copies have the most: the expert of each, its number among them, and how many
    each expert has."""
    experts = len(load_E)
    copied, rank = np.arange(replicas), np.zeros(replicas, np.int64)
    counts = np.ones(experts, np.int64)
    for i in range(experts, replicas):
        busiest = int(np.argmax(load_E.astype(np.float32) / counts.astype(np.float32)))
        copied[i], rank[i] = busiest, counts[busiest]
        counts[busiest] += 1
    return copied, rank, counts


# ---------------------------------------------------------------------------------------------------------------------
# Ours.


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
    load_E, alive = _checked(load, slots)
    devices, total = len(alive), sum(slots)
    mean = float(load_E.sum()) / devices
    # The least busiest copy: the greedy number of copies is the best one for it.
    return max(mean, float((load_E / _copies(load_E, total, devices)).max()))


def place(load: ArrayLike, slots: Sequence[int], before: Placement | None = None, *, quick: bool = False) -> Placement:
    """A placement of a layer's experts.

    load     of every expert, (E,).
    slots    of every device, the experts that it has room for; 0: it is dead, or takes part in nothing.
    before   a placement to stay near: it is mended and changed while that helps, and kept if its busiest device has at
             most 2 % more than a new one's; of a new one each device gets the set that it has the most of already.

    quick    search from one beginning alone, where the time is more than a percent of evenness is worth.

    Slots may stay empty. The search is greedy, then by single changes while the busiest device's load falls, for small
    layers from many beginnings: the same result every time. ConfigError where the experts do not fit.
    """
    load_E, alive = _checked(load, slots)
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
    yield _copies(load_E, slots, devices)
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


def _checked(load: ArrayLike, slots: Sequence[int]) -> tuple[Floats, list[int]]:
    load_E = np.asarray(load, np.float64)
    if load_E.ndim != 1 or not len(load_E) or not np.isfinite(load_E).all() or (load_E < 0).any():
        raise ConfigError("load: a number from 0 for each expert")
    alive = [device for device, count in enumerate(slots) if count > 0]
    if sum(slots[device] for device in alive) < len(load_E):
        raise ConfigError(f"slots: {sum(slots)} of {len(alive)} devices; {len(load_E)} experts do not fit")
    return load_E, alive


def _copies(load_E: Floats, slots: int, devices: int) -> Ints:
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
        for expert in np.flatnonzero(self.has_DE[busiest]).tolist():
            for change in (*self._exchanges(load_D, busiest, expert), *self._copied(busiest, expert)):
                self._apply(change)
                load = self.load_D
                value = (float(load.max()), float((load**2).sum()))
                self._apply([(device, e, not there) for device, e, there in change])
                if value[0] < best[0] * (1 - 1e-12) or (value[0] <= best[0] and value[1] < best[1] * (1 - 1e-9)):
                    best, result = value, change
        if result is None:
            return False
        self._apply(result)
        return True

    def _apply(self, change: Sequence[tuple[int, int, bool]]) -> None:
        for device, expert, there in change:
            self.has_DE[device, expert] = there
            self.copies[expert] += 1 if there else -1

    def _exchanges(self, load_D: Floats, busiest: int, expert: int) -> list[list[tuple[int, int, bool]]]:
        """Its copy goes to another device, alone or for one of that device's."""
        each_E = self.each_E
        others = np.flatnonzero(~self.has_DE[:, expert])
        found = []
        free = others[self.has_DE[others].sum(1) < self.room[others]]
        if len(free):
            least = int(free[np.argmin(load_D[free])])
            found.append([(busiest, expert, False), (least, expert, True)])
        devices, experts = np.nonzero(self.has_DE[others] & ~self.has_DE[busiest])
        devices = others[devices]
        lighter = each_E[expert] - each_E[experts]
        after = np.maximum(load_D[busiest] - lighter, load_D[devices] + lighter)
        for i in np.argsort(np.where(lighter > 0, after, np.inf), kind="stable")[:4].tolist():
            if lighter[i] > 0:
                device, other = int(devices[i]), int(experts[i])
                found.append(
                    [(busiest, expert, False), (device, expert, True), (device, other, False), (busiest, other, True)]
                )
        return found

    def _copied(self, busiest: int, expert: int) -> list[list[tuple[int, int, bool]]]:
        """It has a copy more, in a free slot or in that of an expert that has several; or the busiest device does
        without it."""
        found = []
        others = np.flatnonzero(~self.has_DE[:, expert])
        free = others[self.has_DE[others].sum(1) < self.room[others]]
        if len(free):
            found.append([(int(free[np.argmin(self.load_D[free])]), expert, True)])
        devices, experts = np.nonzero(self.has_DE[others] & (self.copies > 1))
        after = self.load_E[experts] / (self.copies[experts] - 1)
        for i in np.argsort(after, kind="stable")[:CHOICES].tolist():
            device, other = int(others[devices[i]]), int(experts[i])
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


# ---------------------------------------------------------------------------------------------------------------------
# A layer, beside what else there is.


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A layer's placement, and what the busiest device has of the load, beside the mean of those that are alive: 1 is
    even.

    experts, shares   of each device.
    as_they_come      the experts dealt to the devices in order, without copies.
    published         DeepSeek's balancing, where its numbers divide; None where they do not, or a device is dead.
    equal, split      this placement with equal shares, and with those of `shares`.
    bound             what equal shares cannot be below.
    moved             experts that devices must be sent, coming from another placement; None: from none.
    """

    experts: list[list[int]]
    shares: list[list[float]]
    as_they_come: float
    published: float | None
    equal: float
    split: float
    bound: float
    moved: int | None


def place_layer(load: Sequence[float], slots: Sequence[int], before: Placement | None = None) -> Placed:
    """`place` and `shares`, measured. ConfigError as there."""
    made = place(load, slots, before)
    split = shares(load, made)
    alive = [device for device, room in enumerate(slots) if room]
    mean = sum(load) / len(alive) or 1.0
    dealt: list[tuple[int, ...]] = [()] * len(slots)
    for device, own in zip(alive, np.array_split(np.arange(len(load)), len(alive)), strict=True):
        dealt[device] = tuple(own.tolist())
    return Placed(
        experts=[list(own) for own in made.experts],
        shares=[[round(share, 9) for share in own] for own in split],
        as_they_come=float(Placement(tuple(dealt)).loads(load).max()) / mean,
        published=_published(load, slots, mean),
        equal=float(made.loads(load).max()) / mean,
        split=float(made.loads(load, split).max()) / mean,
        bound=lower_bound(load, slots) / mean,
        moved=None if before is None else made.moved(before),
    )


def _published(load: Sequence[float], slots: Sequence[int], mean: float) -> float | None:
    if len(set(slots)) > 1:
        return None
    devices = len(slots)
    physical, _, counts = rebalance_experts(torch.tensor([list(load)]), sum(slots), 1, 1, devices)
    each = np.array([load[expert] / int(counts[0, expert]) for expert in physical[0].tolist()])
    return float(each.reshape(devices, -1).sum(1).max()) / mean


def read_load(path: str | Path) -> list[list[float]]:
    """The load of every expert in each MoE layer: of `inspect.json` of `handful inspect`, of a routing that `handful
    generate --routing` wrote (.safetensors), or of a JSON file {"load": [[...], ...]}. ConfigError for another one."""
    path = Path(path)
    if path.suffix == ".safetensors":
        recording = Recording.read(path)
        most = 1 + max((int(experts_TK.max()) for experts_TK in recording.experts_TK if experts_TK.numel()), default=0)
        return [
            np.bincount(experts_TK.long().flatten().numpy(), minlength=most).astype(float).tolist()
            for experts_TK in recording.experts_TK
        ]
    found: Any = read_json(path)
    try:
        if "sides" in found:
            rows = [[expert["load"] for expert in layer["experts"]] for layer in found["sides"][0]["layers"]]
        else:
            rows = found["load"]
        loads = [[float(value) for value in row] for row in rows]
    except (KeyError, TypeError, ValueError, IndexError):
        loads = []
    if not loads:
        raise ConfigError(f'load = {str(path)!r}: neither inspect.json, nor a routing, nor {{"load": [[...], ...]}}')
    return loads
