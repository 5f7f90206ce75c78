"""In the front: which rank has which expert now, what is missing, and what is to move where.

    members, links, what ranks hold ─► aim ─► hold these, to every rank ─► they are there ─► another map

The map that the experts compute by is exchanged between two passes, and names what ranks said that they have. An expert
that was lost is missing until another rank has it: the routers choose among the others (`on_loss` "mask"), or a rank
reads it when it is needed ("wait"), as it does for a request that asks for all. Nothing waits for what moves.

Legend: E experts of a layer · L MoE layers · a rank's index stays, its number is new whenever it joins
"""

from __future__ import annotations

import importlib.util
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from handful.cluster.control import Message
from handful.cluster.members import Lacking, Member, Outage, lacking, owners, split
from handful.cluster.plans import aim, first, room_of
from handful.config import ModelConfig
from handful.errors import HandfulError, MissingExtraError
from handful.experts.link import Link, LinkError, accept, welcome
from handful.experts.remote import Owners, RanksAsked, RanksMap
from handful.placement import Placement
from handful.routing_options import Missing, MissingLoss

__all__ = ["Keeper", "OnLoss"]

OnLoss = Literal["mask", "wait"]
PATIENCE = 60.0  # seconds that a pass waits for a rank where there is none at all
OUTAGES = 16  # of which something is told
MOVING = 30.0  # seconds after which a rank that does not say that it holds what it is to hold is asked again


class Keeper:
    """Knows the ranks of one model; `before_pass` is the engine's, all else happens in threads of its own.

    awaited  ranks, before the first map is made.
    say      to the supervisor, or to a rank through it.
    told     of what happens, in a line.
    load     gives the load of every layer's experts of late, (E,) each; who counts it sets it.
    losses   what is known of the loss without some experts, by `Missing.experts`; who measures it adds to it.
    """

    def __init__(
        self,
        config: ModelConfig,
        ranks: RanksAsked,
        *,
        awaited: int,
        say: Callable[[Message], None],
        on_loss: OnLoss = "mask",
        told: Callable[[str], None] = lambda line: None,
    ) -> None:
        assert config.router is not None
        self.config, self.ranks, self.awaited = config, ranks, awaited
        self.experts, self.layers = config.router.experts, len(config.moe_layers)
        self.say, self.on_loss, self.told = say, on_loss, told
        self.load: Callable[[], Sequence[Any]] = lambda: [np.zeros(self.experts)] * self.layers
        self.losses: dict[Lacking, MissingLoss] = {}
        self.epoch = self.maps = 0
        self.outages: list[Outage] = []
        self.lost = 0  # outages so far
        self.replacements = 0
        self.mapped = time.monotonic()  # when there was another one
        self.begun = threading.Event()  # there was a map
        self._members: dict[int, Member] = {}  # by number
        self._links: dict[int, Link] = {}  # of numbers that the supervisor may not have told of yet
        self._wanted: list[Placement] | None = None  # with all ranks
        self._target: list[Placement] = []
        self._holdable: list[int] = []
        self._settled = False  # every rank holds its part of the target, and nothing else
        self._split = False  # copies have shares by the load, not equal ones
        self._version = 0
        self._asked_at = 0.0
        self._map: RanksMap | None = None
        self._changed = threading.Condition()
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="handful-keeper", daemon=True)
        self._thread.start()

    # -----------------------------------------------------------------------------------------------------------------
    # The engine's.

    def before_pass(self) -> Missing | None:
        """Use the newest map of ranks that are there; what is missing by it. HandfulError where no rank comes for a
        minute."""
        with self._changed:
            if self._map is not None and self._map.gone:
                self._events.put(self._look)

            def usable() -> bool:
                return self._map is not None and not self._map.gone

            if not self._changed.wait_for(usable, PATIENCE):
                raise HandfulError(f"ranks: none is there since {PATIENCE:.0f} seconds; try again later")
            assert self._map is not None
            self.ranks.map = self._map
            found: Missing | None = self._map.missing
            return found

    # -----------------------------------------------------------------------------------------------------------------
    # What comes.

    def heard(self, message: Message) -> None:
        """From the supervisor."""
        if "members" in message:
            self._events.put(lambda: self._told_members(message))
        elif "held" in message:
            self._events.put(lambda: self._told_held(message))

    def replace(self, seconds: float = 60.0) -> dict[str, Any]:
        """Another placement by the load of late, near the one that there is; what was moved, once it is so, or when so
        many seconds are over. HandfulError where none was found until then."""
        if importlib.util.find_spec("scipy") is None:
            raise MissingExtraError("scipy", "placing experts anew", extra="placement")
        done: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._events.put(lambda: done.put(self._replace()))
        try:
            found = done.get(timeout=seconds)
        except queue.Empty:
            raise HandfulError(f"ranks: no placement was found in {seconds:.0f} seconds") from None
        end = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(lambda: self._settled, max(0.0, end - time.monotonic()))
            return {**found, "settled": self._settled}

    def close(self) -> None:
        self._events.put(None)
        self._thread.join(5)
        for link in list(self._links.values()):
            link.close()

    def listen(self, sock: socket.socket, secret: bytes) -> threading.Thread:
        """Let ranks link themselves to us, in a thread that ends when the socket is closed."""

        def meet(connection: socket.socket) -> None:
            try:
                number = welcome(connection, secret)
                link = Link(connection)
                # Who is let in may be asked at once: it is known to us before it knows that.
                self._events.put(lambda: self._linked(number, link))
                accept(connection)
            except (LinkError, OSError):
                connection.close()

        def run() -> None:
            while True:
                try:
                    connection, _ = sock.accept()
                except OSError:
                    return
                threading.Thread(target=meet, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=run, name="handful-links", daemon=True)
        thread.start()
        return thread

    # -----------------------------------------------------------------------------------------------------------------
    # In the keeper's thread.

    def _run(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=1.0)
            except queue.Empty:
                if self._wanted is not None and not self._settled and time.monotonic() - self._asked_at > MOVING:
                    self._move()
                continue
            if event is None:
                return
            try:
                event()
            except HandfulError as error:  # such as a package that is not there; the map stays as it is
                self.told(str(error))
            except Exception:
                traceback.print_exc(file=sys.stderr)

    def _told_members(self, message: Message) -> None:
        self.epoch = message["epoch"]
        there = {about["number"]: about for about in message["members"]}
        gone = [member for number, member in self._members.items() if number not in there]
        for number, about in there.items():
            if number not in self._members:
                empty = [set[int]() for _ in range(self.layers)]
                self._settled = self._settled and number not in self._links
                self._members[number] = Member(number, about["index"], about, self._links.get(number), empty)
        self._drop(gone)
        self._consider()

    def _linked(self, number: int, link: Link) -> None:
        """A link is there; in the place of another one, the rank has all that it had."""
        self._links[number] = link
        if number in self._members:
            member = self._members[number]
            self._settled = False  # until it says again that it has its part
            member.link, member.asked, member.ready = link, [], False
            self._publish()
            self._consider()

    def _look(self) -> None:
        """Whose link is broken is out, whatever the supervisor says; until it is linked again."""
        broken = [member for member in self._members.values() if member.link is not None and member.link.gone]
        for member in broken:
            self.told(f"the link to rank {member.index} is broken")
            member.link, member.asked, member.ready = None, [], False
            member.has = [set() for _ in range(self.layers)]
        self._lose(broken)
        self._consider()

    def _drop(self, gone: Sequence[Member]) -> None:
        for member in gone:
            del self._members[member.number]
            self._links.pop(member.number, None)
            if member.link is not None:
                member.link.close()
        self._lose([member for member in gone if member.link is not None])

    def _lose(self, gone: Sequence[Member]) -> None:
        if not gone or self._map is None:
            return
        self._publish()
        missing = self._map.missing
        for member in gone:
            self.lost += 1
            self.outages = [*self.outages[1 - OUTAGES :], Outage(member.index, time.monotonic())]
            self.outages[-1].missing = self._without_owner()
        self.told(
            f"rank {', '.join(str(member.index) for member in gone)} is out"
            + (f"; {missing.count} of {missing.of} experts are missing" if missing is not None else "")
        )
        self._note()

    def _alive(self) -> dict[int, Member]:
        """The ranks that can be asked, by index."""
        there = (member for member in tuple(self._members.values()) if member.linked)
        return {member.index: member for member in sorted(there, key=lambda member: member.index)}

    # -----------------------------------------------------------------------------------------------------------------
    # What is to be held.

    def _consider(self) -> None:
        """Whether, with those that are there, another target is right; and if so, on the way to it."""
        alive = self._alive()
        if not alive or (self._wanted is None and len(alive) < self.awaited):
            return
        known = list(self._holdable)
        self._holdable += [0] * (max(alive) + 1 - len(known))
        for index, member in alive.items():
            self._holdable[index] = member.about["holdable"]
        room = room_of(self._holdable, self.layers, self.experts)
        if self._wanted is None or self._holdable != known:  # a lower index may come after a higher one
            self._wanted = first(self._loads(), room, self._widened())
            self._split = False
        target = aim(self._wanted, self._loads(), room, list(alive))
        fresh = any(not member.ready and not member.asked for member in alive.values())
        if target != self._target or fresh:
            self._target = target
            self._move()

    def _widened(self) -> list[Placement] | None:
        if self._wanted is None:
            return None
        more = len(self._holdable)
        return [Placement((*own.experts, *[()] * (more - len(own.experts)))) for own in self._wanted]

    def _loads(self) -> list[Any]:
        """Of late; of a layer that has computed next to nothing an even one."""
        found = [np.asarray(load, np.float64) for load in self.load()]
        return [load if load.sum() >= self.experts else np.ones(self.experts) for load in found]

    def _replace(self) -> dict[str, Any]:
        """Begin with another placement."""
        if self._wanted is None or not self._settled:
            return {"moved": 0, "begun": False}
        room = room_of(self._holdable, self.layers, self.experts)
        before = self._wanted
        self._wanted = first(self._loads(), room, before)
        self._split = True
        target = aim(self._wanted, self._loads(), room, list(self._alive()))
        self.replacements += 1
        if target != self._target:
            self._target = target
            self._move()
        else:
            self._publish()
        return {"moved": sum(new.moved(old) for new, old in zip(self._wanted, before, strict=True)), "begun": True}

    def _move(self) -> None:
        """Ask every rank for its part of the target, beside what it has as long as others may not have it yet."""
        self._version += 1
        self._settled = False
        self._asked_at = time.monotonic()
        for index, member in self._alive().items():
            own = self._part(index)
            beside = [sorted(there - set(part)) for there, part in zip(member.has, own, strict=True)]
            both = [[*part, *more] for part, more in zip(own, beside, strict=True)]
            fits = sum(map(len, both)) <= member.about["holdable"]
            self._ask(member, both if fits else own)
        self._arrived()

    def _part(self, index: int) -> list[list[int]]:
        return [list(layer.experts[index]) if index < len(layer.experts) else [] for layer in self._target]

    def _ask(self, member: Member, experts: list[list[int]]) -> None:
        member.asked, member.ready = experts, False
        self.say({"to": member.number, "hold": experts, "version": self._version})

    def _told_held(self, message: Message) -> None:
        member = self._members.get(message["from"])
        if member is None or message["held"] != self._version:
            return
        if not message["all"]:
            self.told(f"rank {member.index} could not read all its experts: {message.get('error', 'its disk fails')}")
            return
        member.ready = True
        if not self._settled:
            # What had to give way is still its own, and read when it is needed, until all others have their part.
            member.has = [there | set(own) for there, own in zip(member.has, member.asked, strict=True)]
        self._arrived()

    def _arrived(self) -> None:
        """Some rank holds what it was asked for, or there was nothing to ask."""
        alive = self._alive()
        if self._settled:
            return
        if all(member.ready for member in alive.values()):
            self._settled = True
            for index, member in alive.items():
                own = self._part(index)
                member.has = [set(part) for part in own]
                if [sorted(part) for part in own] != [sorted(part) for part in member.asked]:
                    self._ask(member, own)  # what it need not have any more
                    member.ready = True
            self._publish()
        elif self._without_owner():
            self._publish()

    # -----------------------------------------------------------------------------------------------------------------
    # The map.

    def _owners(self, alive: Sequence[Member], layer: int) -> tuple[list[list[int]], list[int]]:
        return owners(alive, layer, self.experts, self._target[layer] if self._target else None)

    def _without_owner(self) -> int:
        alive = list(self._alive().values())
        if not alive:
            return self.experts * self.layers
        return sum(len(self._meant(layer).intersection(self._owners(alive, layer)[1])) for layer in range(self.layers))

    def _publish(self) -> None:
        """Make a map of what ranks have. Before the first one all have to be there."""
        alive = list(self._alive().values())
        if not alive or (self._map is None and not self._settled):
            return
        assert self.config.router is not None
        top_k = self.config.router.top_k
        layers: list[Owners] = []
        gone: dict[int, tuple[int, ...]] = {}
        loads = self._loads() if self._split and self._settled else None
        for layer, number in enumerate(self.config.moe_layers):
            copies, missing = self._owners(alive, layer)
            parts = None
            if loads is not None and not missing:
                parts = split(loads[layer], copies, len(alive))
            layers.append(Owners(copies, parts))
            # What no rank has room for is nobody's loss, and read whenever it is needed.
            lost = self._meant(layer).intersection(missing)
            if lost and self.experts - len(lost) >= top_k:
                gone[number] = tuple(sorted(lost))
        masked = Missing.among(self.config, gone) if gone and self.on_loss == "mask" else None
        if masked is not None:
            masked.loss = self.losses.get(lacking(masked.experts))
        links = tuple(member.link for member in alive if member.link is not None)
        with self._changed:
            self._map = RanksMap(links, tuple(layers), masked)
            self.maps += 1
            self.mapped = time.monotonic()
            self._changed.notify_all()
        self.begun.set()
        self._note()

    def _meant(self, layer: int) -> set[int]:
        """The experts of a layer that some rank is to hold when all are there."""
        return {expert for own in self._wanted[layer].experts for expert in own} if self._wanted else set()

    def would_lack(self) -> list[dict[int, tuple[int, ...]]]:
        """For each rank what would be missing without it, by number of the layer: nothing where others have copies."""
        alive = list(self._alive().values())
        found = []
        for gone in alive:
            lost = {}
            for layer, number in enumerate(self.config.moe_layers):
                others = set().union(*(member.has[layer] for member in alive if member is not gone))
                if own := gone.has[layer] - others:
                    lost[number] = tuple(sorted(own))
            found.append(lost)
        return found

    def _note(self) -> None:
        """What has become of the outages."""
        alive, now = self._alive(), time.monotonic()
        whole = not self._without_owner()
        for outage in self.outages:
            if whole and outage.whole is None:
                outage.whole = now - outage.at
                self.told(
                    f"all experts are to be had again, {outage.whole:.2f} seconds after rank {outage.index} was out"
                )
            if outage.back is None and outage.index in alive and alive[outage.index].ready:
                outage.back = now - outage.at

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def missing(self) -> Missing | None:
        """What is missing now."""
        current = self._map
        found: Missing | None = None if current is None else current.missing
        return found

    def know(self, experts: Lacking, loss: MissingLoss) -> None:
        """What it costs to be without some experts was measured."""
        self.losses[experts] = loss
        missing = self.missing
        if missing is not None and lacking(missing.experts) == experts:
            missing.loss = loss

    def places(self) -> list[str]:
        """Of each layer a letter for every expert: "m" a rank holds it, "d" it is on disk alone, and read when it is
        needed, "x" it is missing: answers are made without it, or there is no rank that could read it. Any thread may
        ask."""
        alive, missing = list(self._alive().values()), self.missing
        lost = {} if missing is None else missing.experts
        found = []
        for layer, number in enumerate(self.config.moe_layers):
            there = {expert for member in alive for expert in member.has[layer]}
            gone = lost.get(number, ()) if alive else range(self.experts)
            found.append("".join("m" if e in there else "x" if e in gone else "d" for e in range(self.experts)))
        return found

    def state(self) -> dict[str, Any]:
        """Who is there and has what, for people and programs."""
        members = tuple(self._members.values())  # which another thread may change meanwhile
        present = {member.index for member in members if member.linked}
        return {
            "epoch": self.epoch,
            "maps": self.maps,
            "settled": self._settled,
            "on_loss": self.on_loss,
            "replacements": self.replacements,
            "ranks": [
                member.told(self.config.moe_layers) for member in sorted(members, key=lambda member: member.index)
            ],
            "gone": [index for index in range(len(self._holdable)) if index not in present],
            "outages": [outage.told() for outage in self.outages],
        }
