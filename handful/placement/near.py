"""Experts that tokens use together put near each other, and copies of one expert apart, so that less is sent.

    near    a placement to one that sends less, its busiest device hardly busier

By exchanges of two copies, or of a copy with an empty slot, each the one after which least is sent: first between
nodes, for their link is the slow one, then between the devices of each node.

Legend: T tokens · K experts per token · E experts · D devices · R slots of all devices · P places (nodes, or devices)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from handful.placement.placement import Bools, Floats, Ints, Placement
from handful.placement.routes import Routes, homes
from handful.placement.topology import Topology, shares_of_nodes
from handful.placement.traffic import Crossings, crossings

__all__ = ["near", "sent"]

TOKENS = 8192  # that the search looks at, at most
ROUNDS = 4  # of exchanges, after each of which the tokens take their copies anew
EXCHANGES, WORK = 1000, 2 * 10**8  # one after another at most: fewer for more slots

# What exchanges are judged by: of slot r, what is sent less when its copy leaves for each place, (R, P); and what two
# that change places save too much by this, (R, R).
Gains = Callable[["_Slots"], tuple[Floats, Floats]]


def sent(
    placement: Placement, topology: Topology, experts_TK: ArrayLike, shares: Sequence[Sequence[float]] | None = None
) -> Crossings:
    """What tokens send in the mean, if they stand by turns on the devices that are alive."""
    experts_TK = np.asarray(experts_TK, np.int64)
    home_T = homes(len(experts_TK), topology)
    return crossings(Routes(placement, topology, shares).devices_of(experts_TK, home_T), home_T, topology)


def near(
    load: ArrayLike,
    made: Placement,
    topology: Topology,
    slots: Sequence[int],
    experts_TK: ArrayLike | None = None,
    worse: float = 0.0,
) -> Placement:
    """A placement with the same copies on other devices.

    experts_TK   the experts of recorded tokens, which say what is used together; None: only copies of one expert are
                 put on different nodes, so that more tokens find one in their own.
    worse        the share by which the busiest device may have more than before, with equal shares of copies.
    """
    load_E = np.asarray(load, np.float64)
    limit = float(made.loads(load_E).max()) * (1 + worse) * (1 + 1e-12)
    several = len(set(topology.node_D[topology.alive_D].tolist())) > 1
    if several:
        found = _Slots(made, slots, topology, load_E, limit)
        _exchange(found, topology.node_D, None, lambda state: _apart(state, topology))
        made = found.placement()
    if experts_TK is None:
        return made
    experts_TK = np.asarray(experts_TK, np.int64)
    experts_TK = experts_TK[:: -(-len(experts_TK) // TOKENS)] if len(experts_TK) else experts_TK
    if not len(experts_TK):
        return made
    if several:
        made = _together(made, slots, topology, load_E, limit, experts_TK, topology.node_D, None)
    return _together(made, slots, topology, load_E, limit, experts_TK, np.arange(topology.devices), topology.node_D)


class _Slots:
    """A placement as a list of slots.

    device_R, expert_R   of each; -1: it is empty.
    """

    def __init__(self, made: Placement, slots: Sequence[int], topology: Topology, load_E: Floats, limit: float) -> None:
        filled = [
            (device, expert)
            for device, (own, room) in enumerate(zip(made.experts, slots, strict=True))
            for expert in (*own, *[-1] * (room - len(own)))
        ]
        self.device_R, self.expert_R = (np.array(column, np.int64) for column in zip(*filled, strict=True))
        self.copies_E = made.copies(len(load_E))
        self.load_E, self.limit, self.devices = load_E, limit, topology.devices
        each_E = load_E / self.copies_E.clip(1)
        self.load_R = np.where(self.expert_R < 0, 0.0, each_E[self.expert_R])

    @property
    def has_DE(self) -> Bools:
        found = np.zeros((self.devices, len(self.load_E) + 1), bool)
        found[self.device_R, self.expert_R] = self.expert_R >= 0  # an empty one's falls behind the last expert
        return found

    def fits_RR(self) -> Bools:
        """Which two may change places: no expert twice on a device, no device with more than the limit."""
        load_D = np.bincount(self.device_R, self.load_R, self.devices)
        after_RR = load_D[self.device_R][:, None] - self.load_R[:, None] + self.load_R
        there_RR = self.has_DE[self.device_R][:, self.expert_R]  # the expert of s is on the device of r
        good: Bools = (after_RR <= self.limit) & ~there_RR
        return good & good.T

    def swap(self, r: int, s: int) -> None:
        for values in (self.expert_R, self.load_R):
            values[r], values[s] = values[s], values[r]

    def placement(self) -> Placement:
        experts: list[list[int]] = [[] for _ in range(self.devices)]
        for device, expert in zip(self.device_R.tolist(), self.expert_R.tolist(), strict=True):
            if expert >= 0:
                experts[device].append(expert)
        return Placement(tuple(tuple(sorted(own)) for own in experts))


def _exchange(
    state: _Slots, place_D: Ints, within_D: Ints | None, gains: Gains, swapped: Callable[[int, int], None] | None = None
) -> None:
    """While less is sent: the best exchange of slots in different places, if need be within the same area."""
    place_R = place_D[state.device_R]
    allowed = place_R[:, None] != place_R
    if within_D is not None:
        area_R = within_D[state.device_R]
        allowed &= area_R[:, None] == area_R
    for _ in range(min(EXCHANGES, WORK // len(place_R) ** 2)):
        gain_RP, twice_RR = gains(state)
        gain_RR = gain_RP[:, place_R]
        gain_RR = np.where(allowed & state.fits_RR(), gain_RR + gain_RR.T - twice_RR, 0)
        r, s = np.unravel_index(int(gain_RR.argmax()), gain_RR.shape)
        if gain_RR[r, s] <= 1e-9 * max(1.0, float(state.load_E.sum())):
            return
        state.swap(int(r), int(s))
        if swapped is not None:
            swapped(int(r), int(s))


def _apart(state: _Slots, topology: Topology) -> tuple[Floats, Floats]:
    """By the tokens that find a copy in their own node: of an expert the lesser of the node's share of tokens and of
    its copies."""
    share_P = shares_of_nodes(topology)
    node_R, expert_R = topology.node_D[state.device_R], state.expert_R
    there_EP = np.zeros((len(state.load_E) + 1, len(share_P)))
    np.add.at(there_EP, (expert_R, node_R), 1)
    count_E = np.append(state.copies_E.clip(1), 1)[:, None]

    def found(copies_EP: Floats) -> Floats:
        lesser: Floats = np.minimum(copies_EP / count_E, share_P)
        return lesser

    comes_EP = found(there_EP + 1) - found(there_EP)
    leaves_EP = found(there_EP) - found(there_EP - 1)
    of_E = np.append(state.load_E, 0)[:, None]
    gain_RP = (of_E * comes_EP)[expert_R] - (of_E * leaves_EP)[expert_R, node_R][:, None]
    same = expert_R[:, None] == expert_R  # two copies of one expert: nothing changes
    return gain_RP, np.where(same, np.inf, 0.0)


def _together(
    made: Placement,
    slots: Sequence[int],
    topology: Topology,
    load_E: Floats,
    limit: float,
    experts_TK: Ints,
    place_D: Ints,
    within_D: Ints | None,
) -> Placement:
    """By the places that recorded tokens go to, beside their own."""
    home_T = homes(len(experts_TK), topology)

    def total(placement: Placement) -> float:
        found = sent(placement, topology, experts_TK)
        return found.nodes if within_D is None else found.devices

    def better(start: Placement, *ways: Callable[[_Tokens], Gains]) -> Placement:
        state = _Slots(start, slots, topology, load_E, limit)
        tokens = _Tokens(state, Routes(start, topology).devices_of(experts_TK, home_T), experts_TK, home_T, place_D)
        for way in ways:
            _exchange(state, place_D, within_D, way(tokens), tokens.swapped)
        return state.placement()

    best, least = made, total(made)
    # Pairs lead out of where no single exchange sends less.
    found = better(made, lambda tokens: tokens.pairs, lambda tokens: tokens.places)
    for _ in range(ROUNDS):
        value = total(found)
        if value < least * (1 - 1e-6):
            best, least = found, value
        elif found != best:
            break
        found = better(best, lambda tokens: tokens.places)
    return best


class _Tokens:
    """The slots that tokens use, whichever device they are moved to; and how often a token uses each place."""

    def __init__(self, state: _Slots, device_TK: Ints, experts_TK: Ints, home_T: Ints, place_D: Ints) -> None:
        R = len(state.device_R)
        slot_DE = np.full((state.devices, len(state.load_E) + 1), -1)
        slot_DE[state.device_R, state.expert_R] = np.arange(R)
        # What is exchanged are copies, and slots stay: a copy is named by the slot that it began in.
        self.copy_TK = slot_DE[device_TK, experts_TK]
        self.slot_of = np.arange(R)  # of each copy
        self.copy_in = np.arange(R)  # of each slot
        self.place_R = place_D[state.device_R]
        places = int(place_D.max()) + 1
        T = len(experts_TK)
        # A token is at home already.
        self.used_TP = np.zeros((T, places), np.int64)
        self.used_TP[np.arange(T), place_D[home_T]] = 1
        np.add.at(self.used_TP, (np.arange(T)[:, None], self.place_R[self.copy_TK]), 1)
        self.pairs_N = (self.copy_TK[:, :, None] * R + self.copy_TK[:, None, :]).ravel()
        together_RR = np.bincount(self.pairs_N, minlength=R * R).reshape(R, R).astype(np.float64)
        np.fill_diagonal(together_RR, 0)
        self.together_RR = together_RR
        # Tokens of each place that use each copy.
        self.homes_RP = np.zeros((R, places))
        np.add.at(self.homes_RP, (self.copy_TK, place_D[home_T][:, None]), 1)

    def pairs(self, state: _Slots) -> tuple[Floats, Floats]:
        """By how many pairs of a token's copies, its home among them, are in one place."""
        place_R = self.place_R[self.slot_of]  # of each copy
        drawn_RP = self.together_RR @ np.eye(self.homes_RP.shape[1])[place_R] + self.homes_RP
        gain_RP: Floats = drawn_RP - np.take_along_axis(drawn_RP, place_R[:, None], 1)
        order = self.copy_in
        return gain_RP[order], 2 * self.together_RR[order][:, order]

    def places(self, state: _Slots) -> tuple[Floats, Floats]:
        """By how many places tokens go to, beside their own."""
        K, R, P = self.copy_TK.shape[1], len(self.place_R), self.used_TP.shape[1]
        alone_TK = (np.take_along_axis(self.used_TP, self.place_R[self.slot_of[self.copy_TK]], 1) == 1).astype(float)
        leaves_R: Floats = np.bincount(self.copy_TK.ravel(), alone_TK.ravel(), R).astype(np.float64)
        new_TP = (self.used_TP == 0).astype(np.float64)
        comes_RP = np.stack(
            [np.bincount(self.copy_TK.ravel(), np.repeat(new_TP[:, place], K), R) for place in range(P)], 1
        )
        first_RR = np.bincount(self.pairs_N, np.repeat(alone_TK, K, axis=1).ravel(), R * R).reshape(R, R)
        both_RR: Floats = (first_RR + first_RR.T).astype(np.float64)
        order = self.copy_in
        return (leaves_R[:, None] - comes_RP)[order], both_RR[order][:, order]

    def swapped(self, r: int, s: int) -> None:
        """The copies in two slots have changed places."""
        for slot, other in ((r, s), (s, r)):
            users = np.nonzero((self.copy_TK == self.copy_in[slot]).any(1))[0]
            self.used_TP[users, self.place_R[slot]] -= 1
            self.used_TP[users, self.place_R[other]] += 1
        self.copy_in[r], self.copy_in[s] = self.copy_in[s], self.copy_in[r]
        self.slot_of[self.copy_in[r]], self.slot_of[self.copy_in[s]] = r, s
