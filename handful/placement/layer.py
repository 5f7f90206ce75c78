"""Every layer's placement with its shares, beside other placements and the bound; what coming to it costs.

Legend: T tokens · K experts per token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from handful.errors import ConfigError
from handful.placement.eplb import rebalance_experts
from handful.placement.moving import Moves, Payoff, moves, payoff
from handful.placement.near import near, sent
from handful.placement.placement import Ints, Placement, lower_bound
from handful.placement.search import place
from handful.placement.split import shares
from handful.placement.topology import Topology
from handful.placement.traffic import Crossings

__all__ = ["Placed", "PlacedModel", "as_they_come", "place_layer", "place_layers"]


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
    stays             that other placement is kept, for a new one's busiest device has no less.
    crossings         what recorded tokens send, with equal shares: experts as they come, placed by their load alone,
                      and as they are placed; None: no tokens.
    """

    experts: list[list[int]]
    shares: list[list[float]]
    as_they_come: float
    published: float | None
    equal: float
    split: float
    bound: float
    moved: int | None
    stays: bool
    crossings: tuple[Crossings, Crossings, Crossings] | None

    @property
    def placement(self) -> Placement:
        return Placement(tuple(map(tuple, self.experts)))


@dataclass(frozen=True, kw_only=True)
class PlacedModel:
    """All layers.

    moves   what coming from another placement costs; None: from none.
    pays    whether it does; None: a step's time, links or an expert's bytes are not known, or experts were nowhere.
    """

    layers: list[Placed]
    moves: Moves | None
    pays: Payoff | None


def place_layer(
    load: Sequence[float],
    topology: Topology,
    slots: Sequence[int],
    before: Placement | None = None,
    experts_TK: Ints | None = None,
    worse: float | None = None,
) -> Placed:
    """`place`, `near` and `shares`, measured.

    slots        of every device (`Topology.room`).
    experts_TK   the experts of recorded tokens.
    worse        put experts that are used together near each other, the busiest device at most this share busier; None:
                 only copies apart, as far as it costs nothing, and with another placement before not even these.

    ConfigError as `place`.
    """
    made = alone = place(load, slots, before)
    if worse is not None or before is None:
        made = near(load, alone, topology, slots, None if worse is None else experts_TK, worse or 0.0)
    stays = before is not None and _usable(before, load, slots) and _busiest(made, load) >= _busiest(before, load)
    if stays:
        assert before is not None
        made = before
    split = shares(load, made)
    alive = [device for device, room in enumerate(slots) if room]
    mean = sum(load) / len(alive) or 1.0
    dealt = as_they_come(len(load), slots)
    found = None
    if experts_TK is not None and len(experts_TK):
        a, b, c = (sent(one, topology, experts_TK) for one in (dealt, alone, made))
        found = a, b, c
    return Placed(
        experts=[list(own) for own in made.experts],
        shares=[[round(share, 9) for share in own] for own in split],
        as_they_come=_busiest(dealt, load) / mean,
        published=_published(load, slots, mean),
        equal=_busiest(made, load) / mean,
        split=float(made.loads(load, split).max()) / mean,
        bound=lower_bound(load, slots) / mean,
        moved=None if before is None else made.moved(before),
        stays=stays,
        crossings=found,
    )


def place_layers(
    loads: Sequence[Sequence[float]],
    topology: Topology,
    before: Sequence[Placement] | None = None,
    tokens: Sequence[Ints] | None = None,
    *,
    worse: float | None = None,
    expert_bytes: int | None = None,
    step_seconds: float | None = None,
) -> PlacedModel:
    """Every layer, and what it costs to come there.

    expert_bytes   of one expert of one layer.
    step_seconds   that the experts of all layers take in a step as they are placed before.

    ConfigError for as many placements, or layers of tokens, as there are not layers; and as `place_layer`.
    """
    for name, given in (("before", before), ("tokens", tokens)):
        if given is not None and len(given) != len(loads):
            raise ConfigError(f"{name}: {len(given)} layers; the load has {len(loads)}")
    slots = topology.room(None if expert_bytes is None else expert_bytes * len(loads))
    made = [
        place_layer(
            load, topology, slots, before[i] if before is not None else None, tokens[i] if tokens else None, worse
        )
        for i, load in enumerate(loads)
    ]
    if before is None:
        return PlacedModel(layers=made, moves=None, pays=None)
    moving = moves(before, [one.placement for one in made], topology, expert_bytes)
    pays = None
    whole = all(_usable(was, load, slots) for was, load in zip(before, loads, strict=True))
    if moving.seconds is not None and step_seconds is not None and whole:
        was = [_busiest(one, load) for one, load in zip(before, loads, strict=True)]
        now = [_busiest(one.placement, load) for one, load in zip(made, loads, strict=True)]
        pays = payoff(moving.seconds, step_seconds, was, now)
    return PlacedModel(layers=made, moves=moving, pays=pays)


def as_they_come(experts: int, slots: Sequence[int]) -> Placement:
    """Experts dealt in order to the devices that have slots, without copies."""
    alive = [device for device, room in enumerate(slots) if room]
    dealt: list[tuple[int, ...]] = [()] * len(slots)
    for device, own in zip(alive, np.array_split(np.arange(experts), len(alive)), strict=True):
        dealt[device] = tuple(own.tolist())
    return Placement(tuple(dealt))


def _busiest(placement: Placement, load: Sequence[float]) -> float:
    return float(placement.loads(load).max())


def _usable(placement: Placement, load: Sequence[float], slots: Sequence[int]) -> bool:
    """Every expert is on a device that is alive, and no device has more than its room."""
    fits = all(len(own) <= room for own, room in zip(placement.experts, slots, strict=True))
    return fits and bool((placement.copies(len(load)) > 0).all())


def _published(load: Sequence[float], slots: Sequence[int], mean: float) -> float | None:
    if len(set(slots)) > 1:
        return None
    devices = len(slots)
    physical, _, counts = rebalance_experts(torch.tensor([list(load)]), sum(slots), 1, 1, devices)
    each = np.array([load[expert] / int(counts[0, expert]) for expert in physical[0].tolist()])
    return float(each.reshape(devices, -1).sum(1).max()) / mean
