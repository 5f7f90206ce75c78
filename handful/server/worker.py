"""The thread that owns the engine.

    event loop                              engine's thread
    accept(requests) ─► Ticket ──inbox──►   submit, step, step, …
    async for in ticket  ◄──deltas of a step, in one call──┘

The event loop never waits for the engine: what it asks lies in an inbox until the next step, and what a step made comes
back in one call for each loop.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from handful.engine import Delta, Engine, Job, Request
from handful.errors import HandfulError
from handful.server.errors import busy, of_engine

__all__ = ["Made", "Ticket", "Worker"]


@dataclass(frozen=True)
class Made:
    """A delta of one of a ticket's requests, by its number among them, and when it was made (`time.monotonic`)."""

    index: int
    delta: Delta
    at: float


class Ticket:
    """Requests that were accepted together, and what is made of them."""

    def __init__(self, worker: Worker, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.left = len(requests)  # that have not ended
        self.loop = asyncio.get_running_loop()
        self._worker = worker
        self._made: deque[Made] = deque()
        self._news = asyncio.Event()

    def tell(self, made: Sequence[Made]) -> None:
        """On its own loop."""
        self._made.extend(made)
        self._news.set()

    async def take(self) -> list[Made]:
        """All that was made since the last call, at least one delta."""
        await self._news.wait()
        self._news.clear()
        made = list(self._made)
        self._made.clear()
        self.left -= sum(one.delta.finish is not None for one in made)
        return made

    async def __aiter__(self) -> AsyncIterator[Made]:
        while self.left:
            for made in await self.take():
                yield made

    def cancel(self) -> None:
        """End what has not ended."""
        if self.left:
            self._worker.cancel(self)


class Worker:
    """Runs an engine in a thread of its own, until `stop`.

    queue   requests that may wait beside the `max_sequences` that run.
    told    called with what each step made for each ticket, on the ticket's loop: for who counts.
    """

    def __init__(self, engine: Engine, *, queue: int, told: Callable[[Made], None] | None = None) -> None:
        self.engine = engine
        self.failure: Exception | None = None  # what ended the thread, if it was not `stop`
        self._room = engine.max_sequences + queue
        self._told = told
        self._open = 0  # accepted, not ended
        self._lock = threading.Lock()
        self._inbox: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._owner: dict[Job, tuple[Ticket, int]] = {}
        self._own: dict[Job, Future[Job]] = {}  # the server's, that no client waits for
        self._thread = threading.Thread(target=self._run, name="handful-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open(self) -> int:
        """Requests that were accepted and have not ended."""
        return self._open

    def accept(self, requests: Sequence[Request]) -> Ticket:
        """Take all of these requests, or none: ApiError for one that cannot be run, and where there is no room."""
        for request in requests:
            try:
                self.engine.check(request)
            except HandfulError as error:
                raise of_engine(error) from None
        ticket = Ticket(self, requests)
        with self._lock:
            if self.failure is not None or self._stopping:
                raise busy("the engine has stopped", 503)
            if self._open + len(requests) > self._room:
                raise busy(f"{self._open} requests are running or waiting, of at most {self._room}")
            self._open += len(requests)
        self._do(lambda: self._begin(ticket))
        return ticket

    def run(self, request: Request) -> Future[Job]:
        """A request of the server's own, beside those of clients: its job, once it has ended. ConfigError for one that
        cannot be run."""
        self.engine.check(request)
        future: Future[Job] = Future()

        def begin() -> None:
            self._own[self.engine.submit(request)] = future

        self._do(begin)
        return future

    def cancel(self, ticket: Ticket) -> None:
        self._do(lambda: self._cancel(ticket))

    def stop(self, seconds: float = 10.0) -> None:
        """End the thread after the step that it is in."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(seconds)

    def _do(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(command)
            self._changed.notify()

    # -----------------------------------------------------------------------------------------------------------------
    # In the engine's thread.

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._inbox or self.engine.busy or self._stopping):
                        self._changed.wait()
                    commands, self._inbox = self._inbox, deque()
                if self._stopping:
                    return
                for command in commands:
                    command()
                self._tell(self.engine.step())
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            with self._lock:
                self.failure = error
            owners, self._owner = self._owner, {}
            for job, (ticket, index) in owners.items():
                failed = Made(index, Delta(job=job, token=None, finish="failed", error=error), time.monotonic())
                ticket.loop.call_soon_threadsafe(ticket.tell, [failed])
            for future in self._own.values():
                future.set_exception(error)

    def _begin(self, ticket: Ticket) -> None:
        for index, request in enumerate(ticket.requests):
            self._owner[self.engine.submit(request)] = ticket, index

    def _cancel(self, ticket: Ticket) -> None:
        for job in [job for job, (owner, _) in self._owner.items() if owner is ticket]:
            self.engine.cancel(job)

    def _tell(self, deltas: Sequence[Delta]) -> None:
        now = time.monotonic()
        news: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Made]]] = {}
        ended = 0
        for delta in deltas:
            if delta.job in self._own:
                self._told_own(delta)
                continue
            ticket, index = self._owner[delta.job] if delta.finish is None else self._owner.pop(delta.job)
            ended += delta.finish is not None
            news.setdefault(ticket.loop, []).append((ticket, Made(index, delta, now)))
            if delta.error is not None and not isinstance(delta.error, HandfulError):
                traceback.print_exception(delta.error, file=sys.stderr)
        if ended:
            with self._lock:
                self._open -= ended
        for loop, made in news.items():
            try:
                loop.call_soon_threadsafe(self._deliver, made)
            except RuntimeError:  # the loop has ended, and nobody is there to be told
                for ticket, _ in made:
                    self._cancel(ticket)

    def _told_own(self, delta: Delta) -> None:
        if delta.finish is not None:
            future = self._own.pop(delta.job)
            if delta.error is None:
                future.set_result(delta.job)
            else:
                future.set_exception(delta.error)

    def _deliver(self, news: Sequence[tuple[Ticket, Made]]) -> None:
        """On the tickets' loop."""
        for ticket, made in news:
            ticket.tell([made])
            if self._told is not None:
                self._told(made)
