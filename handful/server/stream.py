"""Server-sent events, and clients that go away.

An answer begins when there is something to tell, so that what fails before is an error with a status of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.types import Message, Receive, Send

from handful.server.answers import Answer
from handful.server.errors import ApiError, of_engine
from handful.server.settings import ServerSettings
from handful.server.worker import Made, Ticket

__all__ = ["GoneError", "patient", "send_events", "unless_gone"]

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class GoneError(Exception):
    """The client has gone, or takes nothing any more."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """What work gives. GoneError as soon as the client has gone; work is cancelled then."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise GoneError
    finally:
        for task in (working, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def patient(send: Send, seconds: float) -> Send:
    """`send` to a client that must take what it is sent within so many seconds, or else is gone."""

    async def sending(message: Message) -> None:
        try:
            async with asyncio.timeout(seconds):
                await send(message)
        except (TimeoutError, OSError):
            raise GoneError from None

    return sending


async def send_events(
    send: Send, ticket: Ticket, answer: Answer, settings: ServerSettings, *, usage: bool, headers: Mapping[str, str]
) -> None:
    """An answer as events, to its end. ApiError for one that fails before anything was sent."""
    begun = False
    async for events in _events(ticket, answer, settings, usage):
        if not begun:
            more = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *more]})
            begun = True
        await send({"type": "http.response.body", "body": events, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(ticket: Ticket, answer: Answer, settings: ServerSettings, usage: bool) -> AsyncIterator[bytes]:
    """What is there to tell, as often as there is something, and a comment where there was nothing for long."""
    told: set[int] = set()
    started = False
    while ticket.left:
        try:
            async with asyncio.timeout(settings.quiet_seconds):
                made = await ticket.take()
        except TimeoutError:
            started = True
            yield WAITING
            continue
        chunks, error = _chunks(made, answer, told)
        if usage:
            chunks = [{**chunk, "usage": None} for chunk in chunks]
        if chunks:
            started = True
            yield b"".join(map(_event, chunks))
        if error is not None:
            if not started:
                raise error
            yield _event(error.body()) + DONE
            return
    yield (_event({**answer.chunk_of([]), "usage": answer.usage()}) if usage else b"") + DONE


def _chunks(made: Sequence[Made], answer: Answer, told: set[int]) -> tuple[list[dict[str, Any]], ApiError | None]:
    """The chunks up to a choice that failed, and what it failed by."""
    chunks: list[dict[str, Any]] = []
    for one in made:
        if one.delta.error is not None:
            return chunks, of_engine(one.delta.error)
        chunks += answer.chunks(one.index, answer.take(one.index, one.delta), one.index not in told)
        told.add(one.index)
    return chunks, None


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
