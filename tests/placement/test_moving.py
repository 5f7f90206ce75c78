"""What coming to another placement costs, by hand; and when it has paid."""

from __future__ import annotations

import numpy as np
import pytest

from handful.errors import ConfigError
from handful.placement import Link, Placement, Topology, moves, payoff, place_layers

TWO = Topology.even(4, 2, slots=3, link=Link(100.0), node_link=Link(10.0, 0.5))


def test_experts_come_from_their_node_and_by_turns() -> None:
    before = Placement(((0, 1), (0,), (0,), (2,)))
    after = Placement(((0, 1), (0, 2), (0, 1), (2, 0)))
    found = moves([before], [after], TWO, expert_bytes=20)
    right = np.zeros((4, 4), int)
    right[3, 1] = 1  # expert 2 to device 1, from the other node
    right[0, 2] = 1  # expert 1 to device 2, likewise
    right[2, 3] = 1  # expert 0 to device 3, from its neighbour
    assert (found.experts_DD == right).all()
    assert (found.experts, found.unheld, found.node_bytes) == (3, 0, 40)
    assert found.seconds == pytest.approx(2.5)  # 20 bytes at 10 a second, after 0.5
    # Two layers: of those that have an expert, the one that has sent least sends it.
    many = moves([Placement(((0,), (0,), (), ()))] * 2, [Placement(((0,), (0,), (0,), (0,)))] * 2, TWO, 20)
    assert many.experts_DD.sum(1).tolist() == [1, 1, 2, 0] or many.experts_DD.sum(1).tolist() == [2, 2, 0, 0]


def test_what_nobody_has_comes_from_elsewhere() -> None:
    before, after = Placement(((0,), (1,), (), ())), Placement(((), (1,), (0, 1), ()))
    found = moves([before], [after], TWO.without([0]), 20)
    assert (found.unheld, found.experts) == (1, 2)
    assert found.experts_DD[1, 2] == 1
    unknown = moves([before], [after], TWO)
    assert (unknown.bytes_DD, unknown.seconds) == (None, None)


def test_when_it_has_paid() -> None:
    """Two layers that took 3 and 1 of 4 seconds take 2 and 1: a second saved in each step."""
    found = payoff(2.5, 4.0, [3, 1], [2, 1])
    assert found.saved == pytest.approx(1.0)
    assert found.steps == 3
    assert payoff(2.5, 4.0, [3, 1], [3, 1]).steps is None
    assert payoff(2.5, 4.0, [3, 1], [3, 2]).steps is None
    assert payoff(0.0, 4.0, [3, 1], [2, 1]).steps == 0


def test_a_placement_that_is_no_worse_stays() -> None:
    """An even one is kept to the device; of two layers only the uneven one moves, and that pays."""
    even, uneven = Placement(((0, 1), (2, 3))), Placement(((0, 1), (2, 3)))
    loads = [[1, 1, 1, 1], [9, 1, 1, 1]]
    topology = Topology.even(2, 1, slots=3, link=Link(100.0))
    found = place_layers(loads, topology, [even, uneven], expert_bytes=100, step_seconds=10.0)
    assert [one.stays for one in found.layers] == [True, False]
    assert found.layers[0].placement == even
    assert found.layers[0].moved == 0
    assert found.pays is not None
    assert found.moves is not None
    assert found.pays.steps is not None
    assert found.pays.saved == pytest.approx(10 * (12 - 2 - 6) / 12)
    assert found.moves.seconds is not None
    # Without any gain it never pays.
    again = place_layers(loads, topology, [one.placement for one in found.layers], expert_bytes=100, step_seconds=10.0)
    assert again.pays is not None
    assert again.pays.steps is None
    assert all(one.stays for one in again.layers)
    assert again.moves is not None
    assert again.moves.experts == 0


def test_an_expert_that_was_nowhere_must_move() -> None:
    topology = Topology.even(2, 1, slots=3, link=Link(100.0)).without([1])
    found = place_layers([[1, 1, 1]], topology, [Placement(((0, 1), (2,)))], expert_bytes=1, step_seconds=1.0)
    assert found.pays is None
    assert found.moves is not None
    assert found.moves.unheld == 1


def test_other_layers() -> None:
    with pytest.raises(ConfigError, match=r"^before: 1 layers; the load has 2$"):
        place_layers([[1], [1]], Topology.even(1, slots=1), [Placement(((0,),))])
