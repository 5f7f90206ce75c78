"""Sockets and signals: a server until it is told to end.

SIGTERM, SIGINT   the first: nothing more is taken, what was taken goes on to its end; the second: at once
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from handful.errors import ConfigError
from handful.server.app import ABORT, Server

__all__ = ["http_server", "listen", "serve", "url_of"]

BACKLOG = 2048
IDLE_SECONDS = 75  # of a connection that is kept between two requests
CLOSING_SECONDS = 5  # that a connection may take to close when all has ended
CHECK_SECONDS = 0.05  # between two looks whether all has ended


def listen(host: str, port: int) -> socket.socket:
    """A socket that nobody else has. ConfigError for a port in use, and a host that is not this computer's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"host = {host!r}: no address of this computer") from None
    sock = socket.socket(family, kind, protocol)
    try:
        # Connections of a server that has ended may linger; one that listens is not to be had even so.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise ConfigError(f"port = {port}: not allowed; from 1024 on anybody may listen") from None
        in_use = error.errno == 98 or "in use" in str(error)
        what = f"port = {port}: in use; name another by --port" if in_use else f"host = {host!r}: {error.strerror}"
        raise ConfigError(what) from None
    return sock


def url_of(sock: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(server: Server, sock: socket.socket, say: Callable[[str], None] = lambda line: None) -> None:
    """Answer on a socket until a signal ends it. The server is closed then.

    say   told in a line what a signal does.
    """
    try:
        http_server(server, say).run(sockets=[sock])
    finally:
        server.close()


def http_server(server: Server, say: Callable[[str], None] = lambda line: None) -> uvicorn.Server:
    """What answers HTTP: `run(sockets=[…])` until `should_exit`, or in the main thread a signal."""
    config = uvicorn.Config(
        server,
        http=_protocol(server.settings.patience),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",  # what goes wrong, the server says itself
        timeout_graceful_shutdown=CLOSING_SECONDS,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
    )
    return _Uvicorn(config, server, say)


class _Uvicorn(uvicorn.Server):
    """Drains at the first signal with its doors open, so that who asks is told; ends at once at the second."""

    def __init__(self, config: uvicorn.Config, server: Server, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._server, self._say = server, say
        self._told = False  # that it is to end
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def pressed(number: int, frame: FrameType | None) -> None:
            if self._told:
                os._exit(128 + number)
            self._told = True
            loop.call_soon_threadsafe(self._drain)

        for number in before:
            signal.signal(number, pressed)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _drain(self) -> None:
        self._server.drain()
        open_now = self._server.requests
        self._say(f"ending after {open_now} open requests; once more: at once" if open_now else "ending")
        self._draining = asyncio.ensure_future(self._end_when_done())

    async def _end_when_done(self) -> None:
        while self._server.requests:
            await asyncio.sleep(CHECK_SECONDS)
        self.should_exit = True


def _protocol(patience: float) -> type[asyncio.Protocol]:
    class Protocol(H11Protocol):
        """uvicorn's, but for connections on which no request comes, which are closed, and for those that take nothing
        any more, which the server may abort: to close one is to wait until it has taken all."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            inner = self.app

            async def app(scope: Any, receive: Any, send: Any) -> None:
                scope[ABORT] = self.transport.abort
                await inner(scope, receive, send)

            self.app = app

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._unused = self.loop.call_later(patience, self._close_unused)

        def connection_lost(self, reason: Exception | None) -> None:
            self._unused.cancel()  # or it would hold all of this connection until then
            super().connection_lost(reason)

        def _close_unused(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return Protocol
