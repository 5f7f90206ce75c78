"""What members and their supervisor say to each other: JSON, a line each.

Legend: a member is a front or a rank. Its number is new whenever it joins, its index stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

from handful.errors import ConfigError, HandfulError
from handful.experts.link import greet

__all__ = ["BEAT", "SILENCE", "Control", "LineError", "address_of", "connect", "lines_of"]

BEAT = 0.2  # seconds between two signs of life
SILENCE = 1.0  # seconds without one after which the other is gone
LONGEST = 1 << 26  # bytes of a line
Message = dict[str, Any]


class LineError(HandfulError):
    """What came is no line of ours."""


def lines_of(buffer: bytearray) -> Iterator[Message]:
    """The messages that are whole, which are taken out. LineError for what is none."""
    while (end := buffer.find(b"\n")) >= 0:
        line = bytes(buffer[:end])
        del buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            raise LineError("control: a line that is no JSON") from None
        if not isinstance(message, dict):
            raise LineError("control: a line that is no object")
        yield message
    if len(buffer) > LONGEST:
        raise LineError(f"control: a line of more than {LONGEST:,} bytes")


def address_of(text: str) -> tuple[str, int]:
    """HOST:PORT. ConfigError for another text."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"address = {text!r}: HOST:PORT, such as node0:29400")
    return host.strip("[]"), int(port)


def connect(address: tuple[str, int], secret: bytes, who: int = 0, seconds: float = SILENCE * 5) -> socket.socket:
    """A connection that was let in. OSError or LinkError where it was not."""
    sock = socket.create_connection(address, timeout=seconds)
    try:
        greet(sock, secret, who)
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


class Control:
    """A member's side: messages to and from the supervisor, with beats in a thread. `messages` ends when the supervisor
    has gone, or is silent for so many seconds, or `close` was called."""

    def __init__(self, address: tuple[str, int], secret: bytes, about: Message, silence: float = SILENCE) -> None:
        self.sock = connect(address, secret)
        self._silence = silence
        self.closed = False
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self.say({**about, "pid": os.getpid(), "host": socket.gethostname()})
        threading.Thread(target=self._beat, name="handful-beat", daemon=True).start()

    def say(self, message: Message) -> None:
        """Best effort: whether it arrives, what comes back tells."""
        with self._sending:
            try:
                self.sock.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            except OSError:  # of a line that was cut off no other may follow
                self.close()

    def messages(self) -> Iterator[Message]:
        """All but beats."""
        buffer = bytearray()
        self.sock.settimeout(self._silence)
        try:
            while not self.closed:
                part = self.sock.recv(1 << 16)
                if not part:
                    return
                buffer += part
                for message in lines_of(buffer):
                    if "beat" not in message:
                        yield message
        except (OSError, LineError):
            return
        finally:
            self.close()

    def close(self) -> None:
        self.closed = True
        self._ended.set()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def wait_closed(self, seconds: float) -> bool:
        return self._ended.wait(seconds)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self.say({"beat": 1})
