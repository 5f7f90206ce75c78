"""Who is to hold what, and what members say to each other: without processes."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handful.cluster.control import LineError, address_of, connect, lines_of
from handful.cluster.keeper import Keeper
from handful.cluster.members import lacking
from handful.cluster.plans import aim, first, mend, room_of
from handful.cluster.supervisor import Supervisor
from handful.errors import ConfigError
from handful.experts.link import Link
from handful.experts.remote import RanksAsked
from handful.placement import Placement
from handful.routing_options import MissingLoss

# ---------------------------------------------------------------------------------------------------------------------
# Plans.


def test_room_is_dealt_to_the_layers() -> None:
    assert room_of([7, 3, 0, 100], 3, 8) == [[3, 1, 0, 8], [2, 1, 0, 8], [2, 1, 0, 8]]


def test_by_hand() -> None:
    """The busiest lost expert goes to the least busy rank; where there is no room, in the place of a copy."""
    before = Placement(((0, 1), (2, 3), (4, 5)))
    load = [4.0, 1.0, 1.0, 1.0, 3.0, 2.0]
    assert mend(load, [3, 3, 0], before).experts == ((0, 1, 5), (2, 3, 4), ())
    assert mend(load, [3, 2, 0], before).experts == ((0, 1, 4), (2, 3), ())  # 5, the less busy one, has no place
    assert mend(load, [2, 2, 2], before) == before
    copied = Placement(((0, 1), (0, 2), (3,)))
    assert mend([5, 1, 1, 1], [2, 2, 0], copied).experts == ((0, 1), (2, 3), ())


@st.composite
def placements(draw: st.DrawFn) -> tuple[list[float], list[int], Placement]:
    experts, ranks = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    owns = st.lists(st.integers(0, experts - 1), unique=True).map(lambda own: tuple(sorted(own)))
    load = [float(draw(st.integers(0, 9))) for _ in range(experts)]
    return (
        load,
        [draw(st.integers(0, experts)) for _ in range(ranks)],
        Placement(tuple(draw(owns) for _ in range(ranks))),
    )


@given(case=placements())
def test_what_can_be_kept_is_kept_and_what_fits_is_somewhere(case: tuple[list[float], list[int], Placement]) -> None:
    load, slots, before = case
    found = mend(load, slots, before)
    assert [len(own) <= room for own, room in zip(found.experts, slots, strict=True)] == [True] * len(slots)
    somewhere = {expert for own in found.experts for expert in own}
    assert len(somewhere) == min(len(load), sum(slots))
    if all(len(own) <= room for own, room in zip(before.experts, slots, strict=True)):
        kept = [set(own) & set(was) for own, was in zip(found.experts, before.experts, strict=True)]
        once = {expert for own in before.experts for expert in own}
        assert once <= set().union(*kept) | somewhere
    assert mend(load, slots, found) == found


def test_while_all_are_there_what_is_wanted_is_aimed_at() -> None:
    loads, room = [np.ones(6)], [[3, 3, 3]]
    wanted = first(loads, room)
    assert {expert for own in wanted[0].experts for expert in own} == set(range(6))
    assert aim(wanted, loads, room, [0, 1, 2]) == wanted
    (without,) = aim(wanted, loads, room, [0, 2])
    assert without.experts[1] == ()
    assert set(without.experts[0]) | set(without.experts[2]) == set(range(6))
    (alone,) = aim(wanted, loads, room, [2])
    assert set(wanted[0].experts[2]) == set(alone.experts[2])
    assert first([np.ones(6)], [[2, 2]])[0].copies(6).sum() == 4  # what does not fit is nowhere


# ---------------------------------------------------------------------------------------------------------------------
# What is said.


def test_lines() -> None:
    buffer = bytearray(b'{"a":1}\n{"b":')
    assert list(lines_of(buffer)) == [{"a": 1}]
    buffer += b"2}\n"
    assert list(lines_of(buffer)) == [{"b": 2}]
    for wrong in (b"x\n", b"[1]\n"):
        with pytest.raises(LineError):
            list(lines_of(bytearray(wrong)))
    assert address_of("node0:29400") == ("node0", 29400)
    assert address_of("[::1]:1") == ("::1", 1)
    for text in ("node0", ":1", "node0:", "node0:0", "node0:x", "node0:70000"):
        with pytest.raises(ConfigError, match="address = "):
            address_of(text)


TALKS: list[Talk] = []


class Talk:
    """One who has joined a supervisor by hand."""

    def __init__(self, port: int, **about: Any) -> None:
        self.sock = connect(("127.0.0.1", port), b"s")
        TALKS.append(self)
        self.buffer = bytearray()
        self.heard: list[dict[str, Any]] = []
        self.say(about)

    def say(self, message: dict[str, Any]) -> None:
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    def until(self, name: str, beats: bool = True, **values: Any) -> dict[str, Any]:
        """The first message that has a name, and these values; a beat is sent for each that was heard."""
        self.sock.settimeout(10)
        while True:
            for at, message in enumerate(self.heard):
                if name in message and all(message[key] == value for key, value in values.items()):
                    del self.heard[: at + 1]
                    return message
            part = self.sock.recv(1 << 16)
            assert part, "it was closed"
            self.buffer += part
            self.heard += lines_of(self.buffer)
            if beats:
                self.say({"beat": 1})

    def closed(self) -> bool:
        self.sock.settimeout(10)
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Supervisor, int]]:
    """A supervisor in a thread, without processes."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as control, socket.create_server(("127.0.0.1", 0)) as http:
        found = Supervisor(control, http, b"s", "weights", ranks=2, link_port=7)
        thread = threading.Thread(target=found.run)
        thread.start()
        yield found, control.getsockname()[1]
        found._status = 0
        thread.join(10)
        while TALKS:
            TALKS.pop().sock.close()
        assert not thread.is_alive()


def numbers(message: dict[str, Any]) -> list[int]:
    return [member["index"] for member in message["members"]]


def test_who_is_there(supervised: tuple[Supervisor, int]) -> None:
    """Indices stay, numbers are new; who closes is out at once, who is silent within two seconds, who comes again in
    the place of himself replaces himself."""
    _, port = supervised
    front = Talk(port, kind="front")
    first_one = Talk(port, kind="rank", index=0, source="weights", holdable=3)
    assert first_one.until("number") == {"number": 2, "index": 0, "link_port": 7}
    joined = Talk(port, kind="rank", index=None, source="weights", holdable=3)
    assert joined.until("number")["index"] == 2  # after those of the supervisor's own
    while numbers(message := front.until("members")) != [0, 2]:
        pass
    assert message["members"][0]["holdable"] == 3
    front.say({"to": 2, "hold": [[1]], "version": 5})
    assert first_one.until("hold")["hold"] == [[1]]
    first_one.say({"to": "front", "held": 5, "all": True})
    assert front.until("held")["from"] == 2

    again = Talk(port, kind="rank", index=0, source="weights", holdable=3)
    assert again.until("number")["index"] == 0
    assert first_one.closed()
    epoch = front.until("members")["epoch"]
    joined.sock.close()
    message = front.until("members")
    while numbers(message) != [0]:
        message = front.until("members")
    assert message["epoch"] > epoch
    began = time.monotonic()  # `again` says nothing any more
    while numbers(front.until("members")):
        pass
    assert time.monotonic() - began < 3
    assert again.closed()


def test_who_is_not_wanted(supervised: tuple[Supervisor, int]) -> None:
    _, port = supervised
    other = Talk(port, kind="rank", index=0, source="other weights")
    assert "of other weights" in other.until("refused")["refused"]
    assert other.closed()
    assert Talk(port, kind="king").closed()
    noise = Talk(port, kind="front")
    noise.sock.sendall(b"what?\n")
    assert noise.closed()


def test_without_a_front_who_asks_is_told_to_come_again(supervised: tuple[Supervisor, int]) -> None:
    found, port = supervised
    address = found.http.getsockname()[:2]

    def ask() -> bytes:
        with socket.create_connection(address, timeout=10) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while part := sock.recv(1 << 16):
                answer += part
        return answer

    said = ask()
    assert said.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 1\r\n" in said
    front = Talk(port, kind="front")
    front.until("members")
    front.say({"ready": True})
    end = time.monotonic() + 10
    while not found._answering:  # from now on the front accepts
        assert time.monotonic() < end
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# The keeper.


class Told:
    """A keeper with ranks that are nothing but links, which hold what they are asked to when the test says so."""

    def __init__(self, config: Any, count: int, holdable: int, **options: Any) -> None:
        self.asked: dict[int, dict[str, Any]] = {}
        self.keeper = Keeper(config, RanksAsked(), awaited=count, say=self.say, **options)
        self.ends: list[socket.socket] = []
        self.links: list[Link] = []
        self.there = {
            number: {"number": number, "index": number - 1, "holdable": holdable} for number in range(1, count + 1)
        }
        self.epoch = 0
        for number in self.there:
            self.link(number)
        self.members()

    def say(self, message: dict[str, Any]) -> None:
        self.asked[message["to"]] = message

    def link(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        link = Link(ours)
        self.ends.append(theirs)
        self.links.append(link)
        self.keeper._events.put(lambda: self.keeper._linked(number, link))

    def members(self) -> None:
        self.epoch += 1
        self.keeper.heard({"epoch": self.epoch, "members": list(self.there.values())})
        self.quiet()

    def quiet(self) -> None:
        done = threading.Event()
        self.keeper._events.put(done.set)
        assert done.wait(10)

    def hold(self, *numbers: int) -> None:
        for number in numbers or tuple(self.there):
            if number in self.asked:
                version = self.asked[number]["version"]
                self.keeper.heard({"held": version, "all": True, "from": number})
        self.quiet()

    def close(self) -> None:
        self.keeper.close()
        for link, end in zip(self.links, self.ends, strict=True):
            link.release()
            end.close()


def marked(keeper: Keeper, letter: str) -> dict[int, set[int]]:
    """The experts whose place has a letter, of the layers that have some, by their number."""
    numbered = zip(keeper.config.moe_layers, keeper.places(), strict=True)
    found = {layer: {e for e, place in enumerate(places) if place == letter} for layer, places in numbered}
    return {layer: experts for layer, experts in found.items() if experts}


def config() -> Any:
    from builders import moe

    return moe({"experts": 6, "top_k": 2})


def test_a_loss_is_masked_until_others_have_it() -> None:
    own = config()
    told = Told(own, 3, 8)
    keeper = told.keeper
    assert not keeper.begun.is_set()
    told.hold()
    assert keeper.begun.is_set()
    assert keeper.before_pass() is None
    assert keeper.places() == ["m" * 6] * own.layers
    before = keeper.ranks.map
    assert before is not None
    lost = keeper.would_lack()[1]
    told.keeper.know(lacking(lost), MissingLoss(without=2.0, whole=1.5, tokens=9))
    del told.there[2]
    told.members()
    missing = keeper.before_pass()
    if lost:
        assert missing is not None
        assert dict(missing.experts) == lost
        assert marked(keeper, "x") == {layer: set(experts) for layer, experts in lost.items()}
        assert missing.loss is not None
    assert before.gone
    told.hold()
    assert keeper.before_pass() is None
    state = keeper.state()
    assert (state["gone"], state["settled"], state["outages"][0]["rank"]) == ([1], True, 1)
    told.there[4] = {"number": 4, "index": 1, "holdable": 8}
    told.link(4)
    told.members()
    assert not keeper.state()["settled"]  # it has nothing yet
    told.hold()
    assert keeper.state()["gone"] == []
    assert keeper.state()["settled"]
    assert keeper.ranks.map is not before
    told.close()


def test_whoever_comes_first_those_who_come_later_have_their_part() -> None:
    """A rank of another computer may be there before the first of this one, whose index is lower."""
    told = Told(config(), 0, 16)
    try:
        for number, index, computing in ((1, 1, [1]), (2, 0, [0, 1])):
            told.there[number] = {"number": number, "index": index, "holdable": 16}
            told.link(number)
            told.members()
            told.hold()
            ranks = told.keeper.state()["ranks"]
            assert [rank["rank"] for rank in ranks if any(rank["experts"].values())] == computing
    finally:
        told.close()


def test_a_broken_link_is_a_loss() -> None:
    """Though the supervisor has not said so; and it mends when the rank links itself again."""
    told = Told(config(), 2, 6)
    told.hold()
    keeper = told.keeper
    told.keeper.before_pass()
    assert keeper.ranks.map is not None
    keeper.ranks.map.links[0].close()
    missing = keeper.before_pass()
    assert missing is not None
    assert missing.count == 6  # of each layer three of six, as there is no room for more than a copy
    assert marked(keeper, "x") == {layer: set(experts) for layer, experts in missing.experts.items()}
    assert [places.count("m") for places in keeper.places()] == [3, 3]
    told.link(1)
    told.quiet()
    told.hold()
    assert keeper.before_pass() is None
    told.close()


def test_waiting_masks_nothing() -> None:
    told = Told(config(), 2, 6, on_loss="wait")
    told.hold()
    del told.there[1]
    told.members()
    assert told.keeper.before_pass() is None
    assert told.keeper.ranks.map is not None
    assert len(told.keeper.ranks.map.links) == 1
    # They are on disk then, and the rank that is left reads them.
    assert [sorted(places) for places in told.keeper.places()] == [[*"dddmmm"]] * 2
    told.close()


def test_where_there_is_no_rank_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handful.cluster.keeper.PATIENCE", 0.2)
    told = Told(config(), 1, 12)
    told.hold()
    told.there.clear()
    told.members()
    with pytest.raises(Exception, match="ranks: none is there since"):
        told.keeper.before_pass()
    assert told.keeper.places() == ["x" * 6] * 2
    told.close()
