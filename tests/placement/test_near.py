"""Experts that are used together near each other: planted ones are found, nobody is busier than was allowed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handful.placement import Placement, Topology, near, place, sent
from handful.placement.placement import Ints


def planted(seed: int, tokens: int, groups: int, size: int, top_k: int) -> Ints:
    """Tokens all of whose experts are of one group; the groups' experts stand anywhere."""
    draw = np.random.default_rng(seed)
    members = draw.permutation(groups * size).reshape(groups, size)
    of = draw.integers(0, groups, tokens)
    return np.stack([draw.permutation(members[group])[:top_k] for group in of])


@pytest.mark.parametrize("nodes", [1, 2])
def test_planted_groups_are_found(nodes: int) -> None:
    """Four devices, four groups of four: of a token's devices one is left, whether there are one node or two."""
    experts_TK = planted(0, 2000, 4, 4, 3)
    load = np.bincount(experts_TK.ravel(), minlength=16)
    topology = Topology.even(4, nodes, slots=4)
    made = place(load, [4] * 4)
    before = sent(made, topology, experts_TK)
    found = near(load, made, topology, [4] * 4, experts_TK, worse=0.1)
    after = sent(found, topology, experts_TK)
    assert before.devices > 1.5
    assert after.devices == pytest.approx(0.75, abs=0.02)  # 3 of 4 tokens stand elsewhere
    assert after.nodes == pytest.approx(0.5 if nodes == 2 else 0, abs=0.02)
    assert found.loads(load).max() <= made.loads(load).max() * 1.1 * (1 + 1e-9)


def test_copies_of_an_expert_stand_on_different_nodes() -> None:
    """Both copies of expert 0 in one node: one of them changes places with an expert that has as much."""
    made = Placement(((0, 1), (0, 2), (3, 5), (4, 6)))
    load = [2, 1, 1, 1, 1, 1, 1]
    topology = Topology.even(4, 2, slots=2)
    found = near(load, made, topology, [2] * 4)
    nodes = [topology.nodes[device] for device, own in enumerate(found.experts) if 0 in own]
    assert sorted(nodes) == [0, 1]
    assert found.loads(load).tolist() == made.loads(load).tolist()
    # With one node there is nothing to do.
    assert near(load, made, Topology.even(4, 1, slots=2), [2] * 4) == made


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**30))
def test_never_more_is_sent_and_nobody_is_busier_than_allowed(seed: int) -> None:
    draw = np.random.default_rng(seed)
    devices, nodes = [(4, 2), (4, 1), (6, 3), (6, 2)][int(draw.integers(4))]
    topology = Topology.even(devices, nodes, slots=4).without([1] if draw.integers(2) else [])
    experts = int(draw.integers(6, 12))
    chance = draw.dirichlet(np.ones(experts))
    experts_TK = np.stack([draw.choice(experts, 2, replace=False, p=chance * 0.9 + 0.1 / experts) for _ in range(120)])
    load = np.bincount(experts_TK.ravel(), minlength=experts)
    slots, worse = topology.room(), float(draw.choice([0.0, 0.05, 0.3]))
    made = place(load, slots)
    apart = near(load, made, topology, slots)
    found = near(load, made, topology, slots, experts_TK, worse)
    for one, allowed in ((apart, 0.0), (found, worse)):
        assert one.copies(experts).tolist() == made.copies(experts).tolist()
        for own, room in zip(one.experts, slots, strict=True):
            assert len(set(own)) == len(own) <= room
        assert one.loads(load).max() <= made.loads(load).max() * (1 + allowed) * (1 + 1e-9)
    if nodes == 1:
        assert sent(found, topology, experts_TK).devices <= sent(made, topology, experts_TK).devices


def test_the_best_exchange_of_small_ones_is_found() -> None:
    """Where experts have no copies and loads do not matter, no single exchange of two sends less."""
    draw = np.random.default_rng(3)
    experts_TK = np.stack([draw.permutation(6)[:3] for _ in range(40)])
    topology = Topology.even(3, 1, slots=2)
    made = Placement(((0, 1), (2, 3), (4, 5)))
    found = near(np.ones(6), made, topology, [2] * 3, experts_TK, worse=9.0)
    least = sent(found, topology, experts_TK).devices
    assert least < sent(made, topology, experts_TK).devices
    for a in range(6):
        for b in range(6):
            turned = [tuple(b if e == a else a if e == b else e for e in own) for own in found.experts]
            assert sent(Placement(tuple(turned)), topology, experts_TK).devices >= least - 1e-9
