"""What a front knows of its ranks: who they are, what each has, and what became of those that were lost.

Legend: a rank's index stays, its number is new whenever it joins
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from handful.cluster.control import Message
from handful.experts.link import Link
from handful.placement import Placement, shares

__all__ = ["Lacking", "Member", "Outage", "lacking", "owners", "split"]

Lacking = tuple[tuple[int, tuple[int, ...]], ...]  # of layers by their number, in order, the experts that they lack


@dataclass
class Member:
    """A rank that is there.

    has     the experts of each layer that it computes, and holds if it has room.
    asked   those that it was last asked to hold; ready: it does.
    """

    number: int
    index: int
    about: Message
    link: Link | None = None
    has: list[set[int]] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)
    ready: bool = False

    @property
    def linked(self) -> bool:
        return self.link is not None and not self.link.gone

    def told(self, layers: Sequence[int]) -> dict[str, Any]:
        """For people and programs; layers: the numbers of those that have experts."""
        link = self.link
        return {
            "rank": self.index,
            "host": self.about.get("host"),
            "pid": self.about.get("pid"),
            "linked": self.linked,
            "experts": {str(layer): sorted(own) for layer, own in zip(layers, self.has, strict=True)},
            "holdable": self.about.get("holdable"),
            "assignments": 0 if link is None else link.assignments,
            "bytes_sent": 0 if link is None else link.sent,
            "bytes_received": 0 if link is None else link.received,
            "waited_seconds": 0.0 if link is None else round(link.waited, 6),
            "computed_seconds": 0.0 if link is None else round(link.computed, 6),
        }


@dataclass
class Outage:
    """A time in which a rank was not there.

    missing      experts that nobody had at its beginning.
    whole, back  seconds until all experts were to be had again, and until the rank was back; None: not yet.
    """

    index: int
    at: float
    missing: int = 0
    whole: float | None = None
    back: float | None = None

    def told(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "rank": self.index,
            "seconds_ago": round(time.monotonic() - self.at, 3),
            "missing": self.missing,
            "whole_seconds": None if self.whole is None else round(self.whole, 3),
            "back_seconds": None if self.back is None else round(self.back, 3),
        }


def lacking(experts: Mapping[int, Sequence[int]]) -> Lacking:
    return tuple((layer, tuple(own)) for layer, own in sorted(experts.items()) if own)


def owners(
    alive: Sequence[Member], layer: int, experts: int, target: Placement | None
) -> tuple[list[list[int]], list[int]]:
    """Of each of a layer's experts the places of the ranks that have it among those alive; and which have none: of
    these the rank that reads them, which is to hold them by the target if one is."""
    copies: list[list[int]] = [[] for _ in range(experts)]
    for place, member in enumerate(alive):
        for expert in member.has[layer]:
            copies[expert].append(place)
    missing = [expert for expert, own in enumerate(copies) if not own]
    aimed = () if target is None else target.experts
    for expert in missing:
        to_hold = [i for i, m in enumerate(alive) if m.index < len(aimed) and expert in aimed[m.index]]
        copies[expert] = to_hold[:1] or [expert % len(alive)]
    return copies, missing


def split(load: Any, copies: Sequence[Sequence[int]], ranks: int) -> list[list[float]]:
    """Of each expert's copies the shares by which the busiest rank has least."""
    experts = [[expert for expert, own in enumerate(copies) if rank in own] for rank in range(ranks)]
    made = shares(load, Placement(tuple(map(tuple, experts))))
    of = [dict(zip(own, part, strict=True)) for own, part in zip(experts, made, strict=True)]
    return [[of[rank][expert] for rank in own] for expert, own in enumerate(copies)]
