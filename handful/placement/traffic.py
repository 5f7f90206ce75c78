"""What devices send each other in a layer of experts, counted: rows, answers, bytes by link.

Every device has tokens of its own. A token's row goes once to each other device that computes for it, with its experts'
numbers; back comes one row in float32 for every assignment, to be summed at home in the order of the router's choice.
In two levels a row goes once to each other node, with its home's number, to the device there that stands where its own
does in its node, and is handed on inside; answers come by the same way. What stays on a device does not travel.

Legend: T tokens · K experts per token · D devices (ranks) · M nodes (hosts)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from handful.cost import ANSWER, NUMBER
from handful.placement.placement import Floats, Ints
from handful.placement.topology import Topology

__all__ = ["Crossings", "Exchange", "crossings", "exchange"]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Of one layer's tokens, what goes from one device to another, (from, to); nothing on the diagonal.

    rows_DD      tokens' rows.
    answers_DD   assignments whose rows come back.
    numbers      that go with a token's row.
    """

    rows_DD: Ints
    answers_DD: Ints
    numbers: int

    def forward(self, width: int, itemsize: int) -> Ints:
        """Bytes from device to device; of tokens of `width` numbers of so many bytes."""
        row, answer = width * itemsize + NUMBER * self.numbers, ANSWER * width
        return row * self.rows_DD + answer * self.answers_DD

    def backward(self, width: int, itemsize: int) -> Ints:
        """The same of a backward pass: the gradient of every answer, and back that of every row."""
        return ANSWER * width * self.answers_DD.T + width * itemsize * self.rows_DD.T

    @staticmethod
    def by_node(bytes_DD: ArrayLike, topology: Topology) -> Ints:
        """Between nodes, (M, M); what stays in one is on the diagonal."""
        nodes = max(topology.nodes) + 1
        of = np.eye(nodes, dtype=np.int64)[topology.node_D]
        found: Ints = of.T @ np.asarray(bytes_DD) @ of
        return found


def exchange(
    device_TK: ArrayLike, home_T: ArrayLike, topology: Topology, *, levels: int = 1, dropped_TK: ArrayLike | None = None
) -> Exchange:
    """Count it.

    device_TK    the device that computes each assignment (`Routes.devices_of`).
    home_T       the device that each token stands on.
    levels       1: a row goes to each device by itself; 2: once to each other node.
    dropped_TK   True: not computed, and not sent.
    """
    device_TK, home_T = np.asarray(device_TK, np.int64), np.asarray(home_T, np.int64)
    T, K = device_TK.shape
    D = topology.devices
    kept_TK = np.ones((T, K), bool) if dropped_TK is None else ~np.asarray(dropped_TK, bool)
    token_N, to_N = np.nonzero(kept_TK)[0], device_TK[kept_TK]
    answers_DD = _counted(to_N, home_T[token_N], D)
    # Each pair of a token and a device once.
    token_N, to_N = np.divmod(np.unique(token_N * D + to_N), D)
    from_N = home_T[token_N]
    if levels == 1:
        return Exchange(_counted(from_N, to_N, D), answers_DD, K)
    node_D = topology.node_D
    away = node_D[from_N] != node_D[to_N]
    door_N = np.where(away, _doors(topology)[from_N, node_D[to_N]], from_N)
    crossing = np.unique(token_N[away] * D + door_N[away])
    rows_DD = _counted(home_T[crossing // D], crossing % D, D) + _counted(door_N, to_N, D)
    from_N, home_N = device_TK[kept_TK], home_T[np.nonzero(kept_TK)[0]]
    door_N = np.where(node_D[from_N] != node_D[home_N], _doors(topology)[home_N, node_D[from_N]], home_N)
    return Exchange(rows_DD, _counted(from_N, door_N, D) + _counted(door_N, home_N, D), K + 1)


def _counted(from_N: Ints, to_N: Ints, devices: int) -> Ints:
    """How many pairs there are of each kind, (D, D), but for those of a device with itself."""
    found = np.bincount(from_N * devices + to_N, minlength=devices * devices).reshape(devices, devices)
    np.fill_diagonal(found, 0)
    return found


def _doors(topology: Topology) -> Ints:
    """The device of each node that the rows of each device come to, (D, M): of those that are alive the one with the
    same number; where there are fewer, counted round."""
    alive_in = [topology.alive_D[topology.node_D[topology.alive_D] == node] for node in range(max(topology.nodes) + 1)]
    number_D = np.zeros(topology.devices, np.int64)
    for own in alive_in:
        number_D[own] = np.arange(len(own))
    columns = [own[number_D % len(own)] if len(own) else number_D * 0 - 1 for own in alive_in]
    return np.stack(columns, 1)


@dataclass(frozen=True)
class Crossings:
    """Of a token in the mean: other devices and other nodes that its row goes to, and assignments that other devices,
    and other nodes, compute."""

    devices: float
    nodes: float
    device_answers: float
    node_answers: float

    def bytes(self, width: int, itemsize: int, top_k: int) -> tuple[float, float]:
        """That a token sends and is sent in one layer, forward: to other devices; and to other nodes, in two levels."""
        row, answer = width * itemsize + NUMBER * top_k, ANSWER * width
        straight = row * self.devices + answer * self.device_answers
        return straight, (row + NUMBER) * self.nodes + answer * self.node_answers


def crossings(device_TK: ArrayLike, home_T: ArrayLike, topology: Topology) -> Crossings:
    """Of tokens with a home, whose assignments are computed there."""
    device_TK, home_T = np.asarray(device_TK, np.int64), np.asarray(home_T, np.int64)
    node_D = topology.node_D
    levels = [(device_TK, home_T), (node_D[device_TK], node_D[home_T])]
    rows = [_others(place_TK, own_T) for place_TK, own_T in levels]
    answers = [float((place_TK != own_T[:, None]).sum(1).mean()) for place_TK, own_T in levels]
    return Crossings(rows[0], rows[1], answers[0], answers[1])


def _others(place_TK: Ints, own_T: Ints) -> float:
    """Different places of a token's assignments, but for its own, in the mean."""
    all_TK = np.sort(np.concatenate([own_T[:, None], place_TK], 1), 1)
    different: Floats = (np.diff(all_TK, axis=1) != 0).sum(1).astype(np.float64)
    return float(different.mean())
