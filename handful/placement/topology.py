"""Where devices stand: which share a node, what each has room for, how quick the links are, who is dead.

    Topology         a value; Topology.even makes one of nodes that are alike
    read_topology    of a TOML or JSON file, for nodes that are not
    parse_link       "50GB/s,10us" of an option

Legend: D devices
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from handful.checkpoint import read_json
from handful.errors import ConfigError
from handful.placement.placement import Floats, Ints
from handful.units import parse_bytes

__all__ = ["Link", "Topology", "parse_link", "read_topology"]

_LATENCY = re.compile(r"(\d+(?:\.\d+)?) ?(s|ms|us|ns)", re.ASCII)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


@dataclass(frozen=True)
class Link:
    """Bytes a second that one device sends over it, and receives at the same time; and the seconds of a message before
    its first byte."""

    bytes_per_second: float
    latency: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices, in order.

    nodes       the node of each.
    slots       experts of a layer that each has room for, copies too; None: `memory` says.
    memory      bytes of each for the experts of all layers; None: `slots` says.
    dead        devices that are gone.
    link        between two devices of a node; None: not known.
    node_link   of a device to those of other nodes; None: the same as `link`.
    """

    nodes: tuple[int, ...]
    slots: tuple[int, ...] | None = None
    memory: tuple[int, ...] | None = None
    dead: frozenset[int] = frozenset()
    link: Link | None = None
    node_link: Link | None = None

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ConfigError("devices = 0: at least 1")
        if (self.slots is None) == (self.memory is None):
            raise ConfigError("slots, memory: exactly one of them says what a device has room for")
        held = self.memory if self.slots is None else self.slots
        assert held is not None
        if len(held) != len(self.nodes):
            raise ConfigError(f"{'memory' if self.slots is None else 'slots'}: {len(held)}; devices: {len(self.nodes)}")
        wrong = sorted(device for device in self.dead if not 0 <= device < len(self.nodes))
        if wrong:
            raise ConfigError(f"dead = {wrong[0]}: a device from 0 to {len(self.nodes) - 1}")

    @staticmethod
    def even(
        devices: int,
        nodes: int = 1,
        *,
        slots: int | None = None,
        memory: int | None = None,
        link: Link | None = None,
        node_link: Link | None = None,
    ) -> Topology:
        """Nodes of as many devices, all with the same room. ConfigError if the devices cannot be dealt to them."""
        if nodes < 1 or devices % nodes:
            raise ConfigError(f"nodes = {nodes}: a number that divides the {devices} devices")
        return Topology(
            nodes=tuple(device * nodes // devices for device in range(devices)),
            slots=None if slots is None else (slots,) * devices,
            memory=None if memory is None else (memory,) * devices,
            link=link,
            node_link=node_link,
        )

    def without(self, devices: Sequence[int] = (), nodes: Sequence[int] = ()) -> Topology:
        """The same with some devices, and all of some nodes, gone as well. ConfigError for one that is not there."""
        wrong = sorted(set(nodes) - set(self.nodes))
        if wrong:
            raise ConfigError(f"dead-node = {wrong[0]}: a node from 0 to {max(self.nodes)}")
        gone = {device for device, node in enumerate(self.nodes) if node in nodes}
        return replace(self, dead=self.dead | set(devices) | gone)

    @property
    def devices(self) -> int:
        return len(self.nodes)

    def room(self, expert_bytes: int | None = None) -> list[int]:
        """Experts of a layer that each device has room for; 0 of a dead one.

        expert_bytes   of one expert in all layers together, where `memory` says what there is room for. ConfigError if
                       it is then missing.
        """
        if self.slots is not None:
            room: Sequence[int] = self.slots
        else:
            assert self.memory is not None
            if expert_bytes is None:
                raise ConfigError("memory: the bytes of an expert are not known; name the model, or give slots")
            room = [count // expert_bytes for count in self.memory]
        return [0 if device in self.dead else count for device, count in enumerate(room)]

    @cached_property
    def node_D(self) -> Ints:
        return np.array(self.nodes, np.int64)

    @cached_property
    def alive_D(self) -> Ints:
        """The devices that are not dead, in order."""
        return np.array([device for device in range(self.devices) if device not in self.dead], np.int64)

    def between(self, bytes_DD: ArrayLike) -> float:
        """Of what devices send each other, the bytes that go to another node."""
        apart = self.node_D[:, None] != self.node_D
        return float(np.asarray(bytes_DD, np.float64)[apart].sum())

    def seconds(self, bytes_DD: ArrayLike, messages_DD: ArrayLike | None = None) -> float | None:
        """How long devices send each other so many bytes, (from, to): as long as the busiest device, in and out, within
        a node and between nodes at the same time. None: links are not known.

        messages_DD   in how many messages, each of which waits for the link's latency; None: one for each pair.
        """
        if self.link is None:
            return None
        sent = np.asarray(bytes_DD, np.float64) * ~np.eye(self.devices, dtype=bool)
        messages = (sent > 0) if messages_DD is None else np.asarray(messages_DD, np.float64) * (sent > 0)
        apart = self.node_D[:, None] != self.node_D
        longest = 0.0
        for link, these in ((self.link, ~apart), (self.node_link or self.link, apart)):
            seconds_DD = np.where(these, sent / link.bytes_per_second + messages * link.latency, 0.0)
            longest = max(longest, float(seconds_DD.sum(0).max()), float(seconds_DD.sum(1).max()))
        return longest


def shares_of_nodes(topology: Topology) -> Floats:
    """Of all tokens, those whose home is a device of each node: tokens stand evenly on the devices that are alive."""
    alive = topology.node_D[topology.alive_D]
    found: Floats = np.bincount(alive, minlength=max(topology.nodes) + 1) / len(alive)
    return found


def parse_link(text: str, name: str = "link") -> Link:
    """A speed, and a latency if there is one: "450GB/s", "50GB/s,10us". ConfigError for anything else."""
    speed, comma, latency = text.partition(",")
    found = _LATENCY.fullmatch(latency.strip())
    if not speed.strip().endswith("/s") or (comma and found is None):
        raise ConfigError(f"{name} = {text!r}: bytes a second, and a latency if there is one, such as 50GB/s,10us")
    rate = parse_bytes(speed.strip().removesuffix("/s"), name)
    return Link(rate, 0.0 if found is None else float(found[1]) * _SECONDS[found[2]])


def read_topology(path: str | Path) -> Topology:
    """Of a TOML or JSON file: `link` and `node_link` as options have them, and a list `nodes`, each with `devices`,
    either `slots` or `memory` (one for all of its devices, or a list), and `dead`, which of them are gone, from 0.
    ConfigError for another file."""
    path = Path(path)
    try:
        found: Any = tomllib.loads(path.read_text("utf-8")) if path.suffix == ".toml" else read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"topology = {str(path)!r}: {error}") from None
    where = f"topology = {str(path)!r}"
    _known(found, {"link", "node_link", "nodes"}, where)
    nodes: list[int] = []
    room: dict[str, list[int]] = {"slots": [], "memory": []}
    dead: set[int] = set()
    for number, node in enumerate(_a_list(found.get("nodes"), f"{where}: nodes")):
        named = f"{where}: nodes[{number}]"
        _known(node, {"devices", "slots", "memory", "dead"}, named)
        devices = node.get("devices")
        if not _is_count(devices) or devices < 1:
            raise ConfigError(f"{named}.devices = {devices!r}: a number from 1")
        for kind in ("slots", "memory"):
            if kind in node:
                room[kind] += _of_devices(node[kind], kind, devices, named)
        gone = node.get("dead", [])
        if not isinstance(gone, list) or not all(_is_count(device) and device < devices for device in gone):
            raise ConfigError(f"{named}.dead = {gone!r}: a list of devices from 0 to {devices - 1}")
        dead |= {len(nodes) + device for device in gone}
        nodes += [number] * devices
    links = {name: parse_link(str(found[name]), f"{where}: {name}") for name in ("link", "node_link") if name in found}
    sizes = {kind: tuple(values) for kind, values in room.items() if values}
    return Topology(nodes=tuple(nodes), dead=frozenset(dead), **sizes, **links)  # type: ignore[arg-type]


def _of_devices(value: Any, kind: str, devices: int, where: str) -> list[int]:
    """Of every device of a node: the same, or a list."""
    values = value if isinstance(value, list) else [value] * devices
    if len(values) != devices:
        raise ConfigError(f"{where}.{kind}: {len(values)}; devices: {devices}")
    if kind == "memory":
        return [parse_bytes(str(one), f"{where}.memory") for one in values]
    if not all(_is_count(one) for one in values):
        raise ConfigError(f"{where}.slots = {value!r}: a number from 0, or a list of them")
    return values


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _a_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: a list of nodes")
    return value


def _known(table: Any, names: set[str], where: str) -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: {', '.join(sorted(names))} are its names")
    for name in sorted(set(table) - names):
        raise ConfigError(f"{where}: {name!r} is none of {', '.join(sorted(names))}")
