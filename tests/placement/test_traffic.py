"""Which copy a token goes to, and what devices send each other, by hand and by plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from builders import moe
from hypothesis import given, settings
from hypothesis import strategies as st

from handful.cost import cost
from handful.placement import Placement, Routes, Topology, crossings, exchange, homes, place, shares
from handful.placement.placement import Ints
from handful.placement.topology import shares_of_nodes

FOUR = Topology.even(4, 2, slots=4)


def test_a_token_goes_to_its_own_device_then_to_its_node() -> None:
    """Expert 0 is on devices 0 and 2, of different nodes: everyone finds it in their node. Expert 1 is on 1 alone."""
    found = Routes(Placement(((0,), (1,), (0,), ())), FOUR)
    assert found.portions[0].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert found.portions[1].tolist() == [[1]] * 4
    # Both copies in one node: the other node's tokens are split evenly.
    near = Routes(Placement(((0,), (0,), (), ())), FOUR)
    assert near.portions[0].tolist() == [[1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]]


def test_shares_are_kept() -> None:
    """A copy that is given less than its own device's tokens sends some of them on."""
    found = Routes(Placement(((0,), (), (0,), ())), FOUR, [[0.1], [], [0.9], []])
    assert found.portions[0].mean(0) == pytest.approx([0.1, 0.9])
    assert found.portions[0][0] == pytest.approx([0.4, 0.6])
    assert found.portions[0][1:, 0] == pytest.approx(np.zeros(3))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**30))
def test_every_copy_gets_its_share_and_as_much_as_can_be_is_near(seed: int) -> None:
    draw = np.random.default_rng(seed)
    devices, nodes = [(4, 2), (6, 3), (8, 2), (5, 1)][int(draw.integers(4))]
    topology = Topology.even(devices, nodes, slots=3).without([0] if draw.integers(2) else [])
    load = draw.exponential(10, int(draw.integers(2, 9)))
    made = place(load, topology.room())
    split = shares(load, made) if draw.integers(2) else None
    found = Routes(made, topology, split)
    alive, node_share = topology.alive_D, shares_of_nodes(topology)
    for expert, (own, portions) in enumerate(zip(found.devices, found.portions, strict=True)):
        assert portions[alive].sum(1) == pytest.approx(np.ones(len(alive)))
        given_C = portions.sum(0) / len(alive)
        part = [1 / len(own)] * len(own)
        if split is not None:
            part = [split[device][made.experts[device].index(expert)] for device in own]
        assert given_C == pytest.approx(np.array(part), abs=1e-9)
        node_C = topology.node_D[own]
        here = sum(portions[topology.node_D == node][:, node_C == node].sum() for node in range(nodes)) / len(alive)
        most = sum(min(np.array(part)[node_C == node].sum(), node_share[node]) for node in range(nodes))
        assert here == pytest.approx(most)


def test_tokens_take_copies_by_turns() -> None:
    """In the portions, to within a token or two; and the same every time."""
    topology = Topology.even(4, 1, slots=2)
    routes = Routes(Placement(((0,), (0,), (1,), (1,))), topology)
    experts_TK, home_T = np.tile([0, 1], (4000, 1)), homes(4000, topology)
    device_TK = routes.devices_of(experts_TK, home_T)
    assert (routes.devices_of(experts_TK, home_T) == device_TK).all()
    assert (device_TK[home_T == 0, 0] == 0).all()
    for device in (0, 1):
        assert abs(int((device_TK[home_T == 2, 0] == device).sum()) - 500) <= 2
    # A device knows it from its own tokens.
    assert (routes.devices_of(experts_TK[home_T == 3], home_T[home_T == 3]) == device_TK[home_T == 3]).all()


def test_bytes_by_hand() -> None:
    """Three tokens with two experts each, width 10 in 2 bytes: a row is 20 + 8 bytes, an answer 40."""
    device_TK = [[1, 1], [0, 3], [2, 3]]
    home_T = [0, 0, 1]
    found = exchange(device_TK, home_T, FOUR)
    rows, answers = np.zeros((4, 4), int), np.zeros((4, 4), int)
    rows[0, 1], rows[0, 3], rows[1, 2], rows[1, 3] = 1, 1, 1, 1
    answers[1, 0], answers[3, 0], answers[2, 1], answers[3, 1] = 2, 1, 1, 1
    assert (found.rows_DD == rows).all()
    assert (found.answers_DD == answers).all()
    assert (found.forward(10, 2) == 28 * rows + 40 * answers).all()
    assert (found.backward(10, 2) == 40 * answers.T + 20 * rows.T).all()
    assert found.by_node(found.forward(10, 2), FOUR).tolist() == [[28 + 80, 84], [120, 0]]
    # In two levels: token 2 of device 1 crosses once, to device 3, its like; that hands it on to 2. Token 1 of device 0
    # crosses to 2, which hands it on to 3.
    two = exchange(device_TK, home_T, FOUR, levels=2)
    rows = np.zeros((4, 4), int)
    rows[0, 1], rows[0, 2], rows[2, 3], rows[1, 3], rows[3, 2] = 1, 1, 1, 1, 1
    assert (two.rows_DD == rows).all()
    answers[:] = 0
    answers[1, 0], answers[3, 2], answers[2, 0], answers[2, 3], answers[3, 1] = 2, 1, 1, 1, 2
    assert (two.answers_DD == answers).all()
    assert (two.forward(10, 2) == 32 * rows + 40 * answers).all()
    # What is dropped is not sent.
    less = exchange(device_TK, home_T, FOUR, dropped_TK=[[False, False], [False, True], [True, True]])
    assert (less.rows_DD.sum(), less.answers_DD.sum()) == (1, 2)


def slowly(device_TK: Ints, home_T: Ints, topology: Topology, levels: int) -> tuple[Ints, Ints]:
    """Rows and answers, token by token."""
    D, node = topology.devices, topology.nodes
    rows, answers = np.zeros((D, D), np.int64), np.zeros((D, D), np.int64)
    for devices, home in zip(device_TK.tolist(), home_T.tolist(), strict=True):

        def door_of(other: int, home: int = home) -> int:
            of_home = [d for d in range(D) if node[d] == node[home]].index(home)
            others = [d for d in range(D) if node[d] == other]
            return others[of_home % len(others)]

        for device in devices:
            if levels == 1 or node[device] == node[home]:
                answers[device, home] += device != home
            else:
                answers[device, door_of(node[device])] += device != door_of(node[device])
                answers[door_of(node[device]), home] += 1
        for other in sorted({node[device] for device in devices}):
            there = {device for device in devices if node[device] == other} - {home}
            if levels == 1 or other == node[home]:
                for device in there:
                    rows[home, device] += 1
                continue
            door = door_of(other)
            rows[home, door] += 1
            for device in there - {door}:
                rows[door, device] += 1
    return rows, answers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [1, 2])
def test_counted_as_token_by_token(seed: int, levels: int) -> None:
    draw = np.random.default_rng(seed)
    topology = Topology(nodes=(0, 0, 1, 1, 1, 2), slots=(1,) * 6)
    device_TK, home_T = draw.integers(0, 6, (50, 3)), draw.integers(0, 6, 50)
    found = exchange(device_TK, home_T, topology, levels=levels)
    rows, answers = slowly(device_TK, home_T, topology, levels)
    assert (found.rows_DD == rows).all()
    assert (found.answers_DD == answers).all()
    mean = crossings(device_TK, home_T, topology)
    by_node = found.by_node(found.answers_DD, topology)
    assert mean.node_answers == pytest.approx((by_node.sum() - by_node.trace()) / 50)
    if levels == 1:
        assert mean.device_answers == pytest.approx(answers.sum() / 50)
        assert mean.devices == pytest.approx(rows.sum() / 50)
        assert mean.bytes(10, 2, 3)[0] == pytest.approx(found.forward(10, 2).sum() / 50)
    else:
        crossed = found.by_node(found.rows_DD, topology)
        assert mean.nodes == pytest.approx((crossed.sum() - crossed.trace()) / 50)


def test_the_expectation_is_what_even_routings_send_in_the_mean() -> None:
    """`cost` from a config alone beside 20,000 tokens, counted: in one level, between nodes, forward and backward."""
    config = moe({"experts": 16, "top_k": 3}, layers=1)
    priced = cost(config, ranks=8, hosts=2).communication
    topology = Topology.even(8, 2, slots=2)
    draw = np.random.default_rng(0)
    experts_TK = np.argsort(draw.random((20_000, 16)), 1)[:, :3]
    home_T = homes(len(experts_TK), topology)
    placement = Placement(tuple((2 * device, 2 * device + 1) for device in range(8)))
    device_TK = Routes(placement, topology).devices_of(experts_TK, home_T)
    found = exchange(device_TK, home_T, topology)
    forward, backward = (way(config.width, 2).sum() / len(home_T) for way in (found.forward, found.backward))
    assert forward == pytest.approx(priced.exchange.layer, rel=0.01)
    assert forward + backward == pytest.approx(priced.exchange.training, rel=0.01)
    two = exchange(device_TK, home_T, topology, levels=2)
    for way, expected in (
        (two.forward, priced.between_hosts.layer),
        (two.backward, priced.between_hosts.training - priced.between_hosts.layer),
    ):
        between = two.by_node(way(config.width, 2), topology)
        assert (between.sum() - between.trace()) / len(home_T) == pytest.approx(expected, rel=0.01)
