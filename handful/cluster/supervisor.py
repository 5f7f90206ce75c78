"""Who is there: a process that starts front and ranks, hears their beats, and tells all of them.

It computes nothing and stores nothing. A member whose connection closes is gone at once; a rank that is silent for a
second is gone until it joins again. What died is started again, later and later where it keeps dying. While there is no
front, who asks over HTTP is told to come again.

Legend: a rank's index stays; its number is new whenever it joins
"""

from __future__ import annotations

import contextlib
import json
import queue
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

from handful.cluster.children import Child
from handful.cluster.control import BEAT, SILENCE, LineError, Message, lines_of
from handful.experts.link import LinkError, accept, welcome

__all__ = ["Member", "Supervisor"]

BEHIND = 1 << 26  # bytes that a member may be behind in reading
BODY = b'{"error":{"message":"the server is starting again","type":"server_error","param":null,"code":"unavailable"}}'
UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
QUIET = 10.0  # seconds in which it is told once that somebody was not let in
HOPELESS = 3  # deaths of a process that never joined, one soon after the other


class Member:
    """Someone who has joined. about: what it said of itself."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock, self.number = sock, number
        self.about: Message | None = None
        self.index: int | None = None
        self.heard = time.monotonic()
        self.read = bytearray()
        self.unsent = bytearray()

    @property
    def is_front(self) -> bool:
        return self.about is not None and self.about["kind"] == "front"


class Supervisor:
    """`run` until told to `end`, or by a signal; the exit status is what it returns.

    control   a socket that listens for members.
    http      the one that clients ask, which the front answers when it is ready.
    source    of the model's pack: a rank with another is refused.
    told      of what happens, in a line.
    """

    def __init__(
        self,
        control: socket.socket,
        http: socket.socket,
        secret: bytes,
        source: str,
        *,
        ranks: int,
        link_port: int,
        told: Callable[[str], None] = lambda line: None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.control, self.http, self.secret, self.source = control, http, secret, source
        self.ranks, self.link_port = ranks, link_port
        self.told, self.on_ready = told, on_ready
        self.front: Child | None = None
        self.children: list[Child] = []  # ranks of this host
        self.members: dict[int, Member] = {}
        self.epoch = 0
        self._next = 1
        self._let_in: queue.SimpleQueue[tuple[socket.socket, int]] = queue.SimpleQueue()
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._answering = False  # the front answers HTTP
        self._was_ready = False
        self._signals = 0
        self._refused = -QUIET  # when that was last told
        self._status: int | None = None

    # -----------------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, self._pressed)
        for sock in (self.control, self.http, self._wake, self._waker):
            sock.setblocking(False)
        self._selector.register(self.control, selectors.EVENT_READ, self._connected)
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._selector.register(self.http, selectors.EVENT_READ, self._asked)
        beat = looked = 0.0
        try:
            while self._status is None:
                self._tend()
                events = self._selector.select(BEAT / 2)
                now = time.monotonic()
                if now - looked > SILENCE / 2:  # it was us who slept
                    for member in self.members.values():
                        member.heard = max(member.heard, now - SILENCE / 2)
                looked = now
                for key, mask in events:
                    key.data(mask)
                for member in list(self.members.values()):
                    if now - member.heard > SILENCE and not member.is_front:
                        self._leave(member, "is silent")
                    elif now - beat >= BEAT:
                        self._say(member, {"beat": 1})
                if now - beat >= BEAT:
                    beat = now
            return self._status
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._close()

    def _close(self) -> None:
        for member in list(self.members.values()):
            member.sock.close()
        for child in (*([self.front] if self.front else []), *self.children):
            child.end()
        self._selector.close()
        self._wake.close()
        self._waker.close()

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        """The first signal lets the front end what it began; the second ends all."""
        self._signals += 1
        if self._signals > 1 or self.front is None or self.front.process is None or not self._was_ready:
            for child in (*([self.front] if self.front else []), *self.children):
                child.signal(signal.SIGKILL)
            self._status = 128 + number
        else:
            self.front.signal(signal.SIGTERM)

    def _tend(self) -> None:
        """Start what is not there, and see what has ended."""
        if self.front is not None:
            if self._signals:
                ended = None if self.front.process is None else self.front.process.poll()
                if ended is not None or self.front.process is None:
                    self._status = ended or 0
                return
            ended = self.front.tend()
            if ended is not None:
                self._front_ended(ended)
        for child in self.children:
            index = child.options["index"]
            ended = child.tend()
            if ended is not None:
                self.told(f"rank {index} has ended ({_how(ended)}); it is started again")
            if child.deaths >= HOPELESS and not self._was_ready:
                self._status = 1

    def _front_ended(self, status: int) -> None:
        if not self._was_ready:
            self._status = status or 1
            return
        self.told(f"the front has ended ({_how(status)}); it is started again")
        if self._answering:
            self._answering = False
            self._selector.register(self.http, selectors.EVENT_READ, self._asked)

    # -----------------------------------------------------------------------------------------------------------------
    # Who comes.

    def _connected(self, mask: int) -> None:
        try:
            sock, _ = self.control.accept()
        except OSError:
            return
        number, self._next = self._next, self._next + 1
        threading.Thread(target=self._meet, args=(sock, number), daemon=True).start()

    def _meet(self, sock: socket.socket, number: int) -> None:
        try:
            sock.setblocking(True)
            welcome(sock, self.secret)
            accept(sock)
            sock.setblocking(False)
        except (LinkError, OSError) as error:
            if time.monotonic() - self._refused > QUIET:
                self._refused = time.monotonic()
                self.told(f"somebody was not let in: {error}")
            sock.close()
            return
        self._let_in.put((sock, number))
        with contextlib.suppress(OSError):
            self._waker.send(b"1")

    def _woken(self, mask: int) -> None:
        with contextlib.suppress(OSError):
            self._wake.recv(1 << 10)
        while not self._let_in.empty():
            sock, number = self._let_in.get()
            member = self.members[number] = Member(sock, number)
            self._selector.register(sock, selectors.EVENT_READ, lambda mask, member=member: self._io(member, mask))

    def _introduced(self, member: Member, about: Message) -> None:
        """The first message of a member."""
        kind = about.get("kind")
        if kind not in ("front", "rank"):
            self._leave(member, "is nobody we know")
            return
        if kind == "rank" and about.get("source") != self.source:
            what = f"the rank's pack is of other weights, or of another format ({about.get('format')})"
            self._say(member, {"refused": f"model: {what} than the front's"})
            self._leave(member, f"was refused: {what}")
            return
        if kind == "rank":
            member.index = self._index_of(about)
            self._say(member, {"number": member.number, "index": member.index, "link_port": self.link_port})
            self.told(f"rank {member.index} of {about.get('host')} is there")
        member.about = about
        self._changed()

    def _index_of(self, about: Message) -> int:
        """The one that a rank had, whoever has it now having been replaced; or a new one."""
        taken = {other.index: other for other in self.members.values() if other.index is not None}
        asked = about.get("index")
        if isinstance(asked, int) and 0 <= asked < 1 << 16:
            if asked in taken:
                self._leave(taken[asked], "was replaced")
            return asked
        return next(index for index in range(self.ranks, 1 << 16) if index not in taken)

    def _leave(self, member: Member, why: str) -> None:
        if self.members.pop(member.number, None) is None:
            return
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(member.sock)
        member.sock.close()
        if member.index is not None:
            self.told(f"rank {member.index} {why}")
        if member.about is not None:
            self._changed()

    def _changed(self) -> None:
        """Tell all who is there."""
        self.epoch += 1
        ranks = [
            {
                "number": member.number,
                "index": member.index,
                **{name: member.about.get(name) for name in ("pid", "host", "holdable", "slots")},
            }
            for member in self.members.values()
            if member.about is not None and member.index is not None
        ]
        for member in list(self.members.values()):
            if member.about is not None:
                self._say(member, {"epoch": self.epoch, "members": ranks})

    # -----------------------------------------------------------------------------------------------------------------
    # What is said.

    def _say(self, member: Member, message: Message) -> None:
        member.unsent += json.dumps(message, separators=(",", ":")).encode() + b"\n"
        self._send(member)

    def _send(self, member: Member) -> None:
        try:
            while member.unsent:
                done = member.sock.send(member.unsent)
                del member.unsent[:done]
        except BlockingIOError:
            if len(member.unsent) > BEHIND:
                self._leave(member, "does not listen")
                return
        except OSError:
            return  # what it says next is that it has gone
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if member.unsent else 0)
        with contextlib.suppress(KeyError, ValueError):
            key = self._selector.get_key(member.sock)
            if key.events != wanted:
                self._selector.modify(member.sock, wanted, key.data)

    def _io(self, member: Member, mask: int) -> None:
        if member.number not in self.members:
            return
        if mask & selectors.EVENT_WRITE:
            self._send(member)
        if not mask & selectors.EVENT_READ or member.number not in self.members:
            return
        try:
            part = member.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part:
            self._leave(member, "has gone")
            return
        member.heard = time.monotonic()
        member.read += part
        try:
            for message in lines_of(member.read):
                self._heard(member, message)
        except (LineError, KeyError, TypeError, ValueError):
            self._leave(member, "says what nobody understands")

    def _heard(self, member: Member, message: Message) -> None:
        if "beat" in message or member.number not in self.members:
            return
        if member.about is None:
            self._introduced(member, message)
        elif message.get("to") == "front":
            for other in list(self.members.values()):
                if other.is_front:
                    self._say(other, {**message, "from": member.number})
        elif "to" in message and member.is_front:
            if message["to"] in self.members:
                self._say(self.members[message["to"]], message)
        elif "ready" in message and member.is_front and not self._answering:
            self._selector.unregister(self.http)
            self._answering = True
            if self._was_ready:
                self.told("the front is back")
            self._was_ready = True
            self.on_ready()

    # -----------------------------------------------------------------------------------------------------------------
    # While there is no front.

    def _asked(self, mask: int) -> None:
        try:
            sock, _ = self.http.accept()
        except OSError:
            return
        threading.Thread(target=_come_again, args=(sock,), daemon=True).start()


def _come_again(sock: socket.socket) -> None:
    """Read a request, as one that is not read may be answered with a reset, and say when to ask again."""
    with sock, contextlib.suppress(OSError):
        sock.settimeout(1.0)
        head = b""
        while b"\r\n\r\n" not in head and len(head) < 1 << 16:
            part = sock.recv(1 << 14)
            if not part:
                return
            head += part
        sock.sendall(UNAVAILABLE)
        sock.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 1
        while time.monotonic() < end and sock.recv(1 << 16):
            pass


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
