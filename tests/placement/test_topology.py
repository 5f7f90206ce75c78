"""Devices on nodes: their room, who is dead, how long links take; and the files and options that say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handful.errors import ConfigError, HandfulError
from handful.placement import Link, Topology, parse_link, read_topology

TWO = Topology.even(4, 2, slots=3, link=Link(100.0), node_link=Link(10.0, 0.5))


def test_nodes_that_are_alike() -> None:
    assert TWO.nodes == (0, 0, 1, 1)
    assert TWO.room() == [3, 3, 3, 3]
    assert TWO.without([1]).room() == [3, 0, 3, 3]
    gone = TWO.without([0], nodes=[1])
    assert gone.room() == [0, 3, 0, 0]
    assert gone.alive_D.tolist() == [1]


def test_memory_is_room_for_whole_experts() -> None:
    """Of every device; an expert's bytes are those of all layers."""
    found = Topology(nodes=(0, 0, 0), memory=(999, 1000, 250))
    assert found.room(250) == [3, 4, 1]
    with pytest.raises(ConfigError, match="the bytes of an expert are not known"):
        found.room()


def test_seconds_by_hand() -> None:
    """The busiest device in each direction; links within and between nodes work at once; latency for each message."""
    sent = np.zeros((4, 4))
    assert TWO.seconds(sent) == 0
    sent[0, 1] = 50  # within: 0.5 s
    assert TWO.seconds(sent) == pytest.approx(0.5)
    sent[0, 2] = sent[1, 2] = 20  # device 2 is sent 40 from another node: 4 s, and two messages
    assert TWO.seconds(sent) == pytest.approx(4 + 2 * 0.5)
    sent[0, 0] = 1e9  # to itself
    assert TWO.seconds(sent) == pytest.approx(5)
    assert TWO.between(sent) == 40
    assert TWO.seconds(sent, np.full((4, 4), 3)) == pytest.approx(4 + 6 * 0.5)
    assert Topology.even(4, 2, slots=1).seconds(sent) is None
    assert Topology.even(4, 2, slots=1, link=Link(10)).seconds(sent) == pytest.approx(5)  # the same link between nodes


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("450GB/s", Link(450e9)),
        ("50GB/s,10us", Link(50e9, 1e-5)),
        ("1.5MiB/s, 2 ms", Link(1.5 * 2**20, 2e-3)),
    ],
)
def test_links_of_options(text: str, link: Link) -> None:
    found = parse_link(text)
    assert (found.bytes_per_second, found.latency) == pytest.approx((link.bytes_per_second, link.latency))


@pytest.mark.parametrize("text", ["450GB", "450/s", "fast/s", "50GB/s,10", "50GB/s,", "50GB/s,-1us", ""])
def test_links_that_are_none(text: str) -> None:
    if text == "450/s":  # bytes
        assert parse_link(text) == Link(450)
        return
    with pytest.raises(ConfigError, match=r"^node-link = "):
        parse_link(text, "node-link")


def test_an_uneven_cluster_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        'link = "450GB/s,2us"\nnode_link = "50GB/s"\n[[nodes]]\ndevices = 2\nmemory = "1kB"\n'
        '[[nodes]]\ndevices = 3\nmemory = ["2kB", "1kB", "500"]\ndead = [1]\n'
    )
    found = read_topology(file)
    assert found.nodes == (0, 0, 1, 1, 1)
    assert found.room(500) == [2, 2, 4, 0, 1]
    assert found.link == Link(450e9, 2 * 1e-6)
    assert found.node_link == Link(50e9)
    other = tmp_path / "cluster.json"
    other.write_text('{"nodes": [{"devices": 2, "slots": [1, 4]}, {"devices": 1, "slots": 3}]}')
    assert read_topology(other).room() == [1, 4, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed = 1", "'speed' is none of"),
        ("", "a list of nodes"),
        ("nodes = []", "a list of nodes"),
        ("[[nodes]]\nslots = 2", r"devices = None: a number from 1"),
        ("[[nodes]]\ndevices = 0\nslots = 2", r"devices = 0: a number from 1"),
        ("[[nodes]]\ndevices = 2\nslots = [1]", r"nodes\[0\].slots: 1; devices: 2"),
        ("[[nodes]]\ndevices = 1\nslots = -1", "slots = -1: a number from 0"),
        ("[[nodes]]\ndevices = 1\nmemory = 'much'", "memory = 'much': a size"),
        ("[[nodes]]\ndevices = 1\nslots = 1\ndead = [1]", "a list of devices from 0 to 0"),
        ("[[nodes]]\ndevices = 1", "exactly one of them"),
        ("[[nodes]]\ndevices = 1\nslots = 1\nmemory = '1kB'", "exactly one of them"),
        ("[[nodes]]\ndevices = 1\nslots = 1\n[[nodes]]\ndevices = 1\n", "slots: 1; devices: 2"),
        ("link = '4'\n[[nodes]]\ndevices = 1\nslots = 1", "link = '4': bytes a second"),
        ("nodes = [1]", "are its names"),
        ("no toml", "topology = "),
    ],
)
def test_files_that_are_wrong(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(text)
    with pytest.raises(HandfulError, match=said):
        read_topology(tmp_path / "cluster.toml")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Topology.even(4, 3, slots=1), "nodes = 3: a number that divides the 4 devices"),
        (lambda: Topology.even(4, 2), "slots, memory: exactly one"),
        (lambda: TWO.without([4]), "dead = 4: a device from 0 to 3"),
        (lambda: TWO.without(nodes=[2]), "dead-node = 2: a node from 0 to 1"),
        (lambda: Topology(nodes=(), slots=()), "devices = 0"),
    ],
)
def test_wrong_devices(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
