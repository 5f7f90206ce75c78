"""Who may ask, and how much, before a request is read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from handful.server.errors import ApiError, busy
from handful.server.pages import is_page
from handful.server.settings import ServerSettings, is_loopback
from handful.server.stream import GoneError

__all__ = ["Guard", "error_response", "read_body"]

OPEN = {"/health", "/ready"}  # for who watches a server and has no key


class Guard:
    """Before the routes: keys, hosts, how many at a time, and whether the server is about to end."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings
        self.draining = False
        self.requests = 0  # that are open now
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())
        # A web page anywhere can make its visitor's browser ask this computer, under a name of the page's own.
        self._local = settings.api_key is None and not settings.no_auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        self.requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.requests -= 1

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._key is not None and scope["method"] != "OPTIONS" and not is_page(scope["path"]):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(
                _digest(given.strip().encode("latin-1")), self._key
            ):
                raise ApiError(
                    401,
                    "a key is needed: Authorization: Bearer KEY" if not given else "the API key is wrong",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self._local and not is_loopback(_name(headers.get("host", ""))):
            raise ApiError(
                403,
                f"host {headers.get('host', '')[:80]!r}: this server is for its own computer; start it with --api-key, "
                "or with --no-auth, to let it be asked by another name",
                code="unknown_host",
            )
        if self.draining and scope["method"] == "POST":
            raise busy("the server is about to end", 503)
        if self.requests >= self.settings.max_requests:
            raise busy(f"{self.requests} requests are open, of at most {self.settings.max_requests}")


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _name(host: str) -> str:
    """A Host header without its port."""
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


async def read_body(request: Request, settings: ServerSettings) -> bytes:
    """A request's body. ApiError for one that is too large, is no JSON, or does not come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"Content-Type = {kind[:80]!r}: application/json", code="unsupported_media_type")
    too_large = ApiError(413, f"the body: at most {settings.max_body:,} bytes", code="request_too_large")
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > settings.max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.patience):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise GoneError
                body += message.get("body", b"")
                if len(body) > settings.max_body:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {settings.patience:g} seconds") from None


def error_response(error: ApiError) -> JSONResponse:
    body: dict[str, Any] = error.body()
    # What was not read of a body would be taken for the next request.
    headers = {**error.headers, **({"Connection": "close"} if error.status in (408, 413) else {})}
    return JSONResponse(body, status_code=error.status, headers=headers)
