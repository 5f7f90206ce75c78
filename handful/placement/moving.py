"""What it takes to come from one placement to another, and after how many steps it has paid.

Legend: D devices
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from handful.placement.placement import Floats, Ints, Placement
from handful.placement.topology import Topology

__all__ = ["Moves", "Payoff", "moves", "payoff"]


@dataclass(frozen=True, eq=False)
class Moves:
    """Of all layers, from device to device, (from, to).

    experts_DD   experts that are sent.
    unheld       that no device has which is alive: they come from a checkpoint.
    bytes_DD     of their weights; None: the bytes of an expert are not known.
    node_bytes   of these, between nodes.
    seconds      as long as the busiest device sends or receives; None: bytes or links are not known.
    """

    experts_DD: Ints
    unheld: int
    bytes_DD: Floats | None
    node_bytes: float | None
    seconds: float | None

    @property
    def experts(self) -> int:
        """That devices must be given."""
        return int(self.experts_DD.sum()) + self.unheld


def moves(
    before: Sequence[Placement], after: Sequence[Placement], topology: Topology, expert_bytes: int | None = None
) -> Moves:
    """Of every layer. Each expert comes from a device that had it: of the same node if there is one, and of those from
    the one that has sent least so far.

    expert_bytes   of one expert of one layer.
    """
    node_D, alive = topology.node_D, set(topology.alive_D.tolist())
    experts_DD = np.zeros((topology.devices, topology.devices), np.int64)
    sent = [0] * topology.devices
    unheld = 0
    for was, now in zip(before, after, strict=True):
        held: dict[int, list[int]] = {}
        for device, own in enumerate(was.experts):
            for expert in own if device in alive else ():
                held.setdefault(expert, []).append(device)
        for device, own in enumerate(now.experts):
            for expert in sorted(set(own) - set(was.experts[device])):
                if expert not in held:
                    unheld += 1
                    continue
                near = [other for other in held[expert] if node_D[other] == node_D[device]]
                source = min(near or held[expert], key=sent.__getitem__)
                sent[source] += 1
                experts_DD[source, device] += 1
    if expert_bytes is None:
        return Moves(experts_DD, unheld, None, None, None)
    bytes_DD = experts_DD.astype(np.float64) * expert_bytes
    seconds = topology.seconds(bytes_DD, experts_DD)
    return Moves(experts_DD, unheld, bytes_DD, topology.between(bytes_DD), seconds)


@dataclass(frozen=True)
class Payoff:
    """Whether moving pays.

    saved   seconds of a step that the new placement saves.
    steps   after which the move has paid; None: never.
    """

    saved: float
    steps: int | None


def payoff(seconds: float, step_seconds: float, before: Sequence[float], after: Sequence[float]) -> Payoff:
    """Of a move that takes so long.

    step_seconds    that the experts of all layers take in a step, as they were placed before.
    before, after   what the busiest device of each layer computes, in any unit: a layer takes as long as it does.
    """
    was, now = sum(before), sum(after)
    saved = step_seconds * (was - now) / was if was else 0.0
    if saved <= 0:
        return Payoff(saved, None)
    return Payoff(saved, math.ceil(seconds / saved))
