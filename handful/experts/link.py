"""One link between who routes and a rank that holds experts: frames over a socket.

    call ─►  layer · the tokens' rows x · the experts of each, -1 for those of other ranks · T of the whole call
    ◄─ rows  a row for each assignment that is, by expert, earlier tokens first

A frame is a header of fixed size and bytes as they lie in memory. Whoever connects proves by a keyed digest of the
other's random bytes that it knows the secret that both were started with. A wait ends when the other side closes, or
`close` is called here, by any thread.

Legend: T tokens, t those of a call that a rank gets · D model width · K experts per token · N assignments
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handful.errors import HandfulError

__all__ = ["Call", "Header", "Link", "LinkError", "RefusedError", "accept", "greet", "welcome"]

MAGIC = b"HfL1"
CALL, ROWS, FAILED = 1, 2, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST = 1 << 32  # bytes of a frame: more is no frame of ours
NONCE, DIGEST = 32, 32
GREETING = struct.Struct("<4sQ")  # who it is, by its number
LET_IN, REFUSED = b"\x01", b"\x00"
HELLO_SECONDS = 5.0


class LinkError(HandfulError):
    """The other side has gone, or does not keep to the form."""


class RefusedError(HandfulError):
    """The other side does not let us in."""


class Header(NamedTuple):
    """kind, dtype of x or of the rows, layer, rows t or N, K, D; T of the whole call, or the nanoseconds that a call
    took; the call's number, and the bytes that follow."""

    kind: int
    dtype: int
    layer: int
    rows: int
    top_k: int
    width: int
    tokens: int
    number: int
    size: int


HEADER = struct.Struct("<4sBBHIIIQQQ")


class Call(NamedTuple):
    """What a rank is asked. experts_TK: -1 for an expert that it does not compute."""

    number: int
    layer: int
    tokens: int
    x_TD: Tensor
    experts_TK: Tensor


class Link:
    """A connected socket with frames on it. One thread sends and receives at a time.

    sent, received   bytes.
    waited           seconds that its side stood still for the other: counted by who waits.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.gone = False
        self.sent = self.received = 0
        self.waited = self.computed = 0.0
        self.assignments = self.calls = 0
        self._lock = threading.Lock()
        self._head = bytearray(HEADER.size)
        self._body = bytearray(1 << 16)
        sock.settimeout(None)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # -----------------------------------------------------------------------------------------------------------------
    # Who asks.

    def ask(self, number: int, layer: int, tokens: int, x_TD: Tensor, experts_TK: NDArray[np.int32]) -> None:
        """x (t, D) contiguous, on the CPU; experts (t, K)."""
        rows, width = x_TD.shape
        body = _bytes(x_TD), memoryview(experts_TK.data).cast("B")
        dtype = DTYPES.index(x_TD.dtype)
        self._send(Header(CALL, dtype, layer, rows, experts_TK.shape[1], width, tokens, number, 0), body)
        self.calls += 1

    def answer(self, number: int, rows: int, width: int) -> Tensor:
        """The rows of a call, (rows, width): a view that the next answer overwrites. What is still on its way of a call
        that was given up is passed over. LinkError if it does not come, HandfulError if the rank could not."""
        while True:
            head = self._receive_head()
            if head.kind not in (ROWS, FAILED) or head.number > number:
                raise self._malformed("an answer to nothing")
            body = self._receive_body(head.size)
            if head.number < number:
                continue
            if head.kind == FAILED:
                raise HandfulError(bytes(body).decode("utf-8", "replace"))
            dtype = DTYPES[head.dtype]
            if (head.rows, head.width) != (rows, width) or head.size != rows * width * dtype.itemsize:
                raise self._malformed(f"{head.rows} rows of {head.width}; {rows} of {width} were asked for")
            self.computed += head.tokens / 1e9
            self.assignments += rows
            return _tensor(body, dtype, (rows, width))

    # -----------------------------------------------------------------------------------------------------------------
    # Who is asked.

    def next_call(self, layers: int, width: int) -> Call:
        """The next one, whose tensors the one after it overwrites. LinkError when there is none any more."""
        head = self._receive_head()
        if head.kind != CALL or head.layer >= layers or head.width != width or not head.top_k:
            raise self._malformed("no call of this model")
        dtype = DTYPES[head.dtype]
        x_bytes, chosen = head.rows * width * dtype.itemsize, head.rows * head.top_k * 4
        if head.size != x_bytes + chosen or head.rows > head.tokens:
            raise self._malformed(f"a call of {head.size} bytes for {head.rows} tokens")
        body = self._receive_body(head.size)
        experts = np.frombuffer(body[x_bytes:], np.int32).reshape(head.rows, head.top_k)
        experts_TK = torch.from_numpy(experts.astype(np.int64))
        return Call(head.number, head.layer, head.tokens, _tensor(body, dtype, (head.rows, width)), experts_TK)

    def give(self, number: int, rows_ND: Tensor, nanoseconds: int) -> None:
        head = Header(ROWS, DTYPES.index(rows_ND.dtype), 0, len(rows_ND), 0, rows_ND.shape[1], nanoseconds, number, 0)
        self._send(head, (_bytes(rows_ND),))

    def refuse(self, number: int, error: BaseException) -> None:
        text = (str(error) if isinstance(error, HandfulError) else f"{type(error).__name__}: {error}").encode()
        self._send(Header(FAILED, 0, 0, 0, 0, 0, 0, number, 0), (memoryview(text),))

    # -----------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """From any thread; whoever sends or receives gets a LinkError. Twice does no harm."""
        with self._lock:
            self.gone = True
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Give the socket back, when nobody uses the link any more."""
        self.close()
        self.sock.close()

    def _send(self, head: Header, body: Sequence[memoryview]) -> None:
        size = sum(part.nbytes for part in body)
        parts: list[memoryview] = [memoryview(HEADER.pack(MAGIC, *head[:-1], size)), *body]
        try:
            while parts:
                done = self.sock.sendmsg(parts)
                self.sent += done
                while parts and done >= parts[0].nbytes:
                    done -= parts.pop(0).nbytes
                if parts and done:
                    parts[0] = parts[0][done:]
        except (OSError, ValueError) as error:
            raise self._lost(error) from None

    def _receive_head(self) -> Header:
        self._fill(memoryview(self._head))
        magic, *rest = HEADER.unpack(self._head)
        head = Header(*rest)
        if magic != MAGIC or head.dtype >= len(DTYPES) or head.size > MOST:
            raise self._malformed("not a frame")
        return head

    def _receive_body(self, size: int) -> memoryview:
        if len(self._body) < size:
            self._body = bytearray(max(size, 2 * len(self._body)))
        view = memoryview(self._body)[:size]
        self._fill(view)
        return view

    def _fill(self, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                count = self.sock.recv_into(view[done:])
                if not count:
                    raise self._lost(None)
                done += count
        except (OSError, ValueError) as error:
            raise self._lost(error) from None
        self.received += done

    def _lost(self, error: Exception | None) -> LinkError:
        self.close()
        return LinkError(f"link: {'the other side has gone' if error is None else error}")

    def _malformed(self, what: str) -> LinkError:
        self.close()
        return LinkError(f"link: {what}")


def _bytes(value: Tensor) -> memoryview:
    return memoryview(value.contiguous().view(-1).view(torch.uint8).numpy().data)


def _tensor(body: memoryview, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    count = shape[0] * shape[1]
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(body, dtype=dtype, count=count).view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Who is there.


def greet(sock: socket.socket, secret: bytes, who: int) -> None:
    """Say who we are to one that `welcome`s us, and show that we know the secret. RefusedError if we do not."""
    nonce = _exactly(sock, NONCE)
    who_bytes = GREETING.pack(MAGIC, who)
    sock.sendall(who_bytes + hmac.digest(secret, nonce + who_bytes, "sha256"))
    if _exactly(sock, 1) != LET_IN:
        raise RefusedError("token: not the secret that the other side was started with")


def welcome(sock: socket.socket, secret: bytes) -> int:
    """Who it is that has connected. LinkError for one that does not know the secret. `accept` it then."""
    before = sock.gettimeout()
    sock.settimeout(HELLO_SECONDS)
    nonce = secrets.token_bytes(NONCE)
    try:
        sock.sendall(nonce)
        said = _exactly(sock, GREETING.size)
        digest = _exactly(sock, DIGEST)
        magic, who = GREETING.unpack(said)
        if magic != MAGIC or not hmac.compare_digest(digest, hmac.digest(secret, nonce + said, "sha256")):
            sock.sendall(REFUSED)
            raise LinkError("link: whoever connected does not know the secret")
        sock.settimeout(before)
    except OSError as error:
        raise LinkError(f"link: {error}") from None
    return int(who)


def accept(sock: socket.socket) -> None:
    """Let in one that was `welcome`."""
    try:
        sock.sendall(LET_IN)
    except OSError as error:
        raise LinkError(f"link: {error}") from None


def _exactly(sock: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = sock.recv(size - len(found))
        if not part:
            raise LinkError("link: the other side has gone")
        found += part
    return found
