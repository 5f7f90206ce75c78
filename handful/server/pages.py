"""The page of a served model: the files of `web/`, read once, with the headers that keep a browser to them.

The page holds no secret and fetches nothing from another host. It asks this server as any client does, with the key
that its reader types where there is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["is_page", "page_routes"]

FOLDER = Path(__file__).parent / "web"
INDEX = "index.html"
# JavaScript's is what a module is refused without.
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for every time, and answered with 304 while it is the same
}


def is_page(path: str) -> bool:
    """Whether a path is the page's: it is open without a key."""
    return path == "/" or path.startswith("/web/")


def page_routes() -> list[Route]:
    """`/`, and every file of `web/` under its own path: what has no route is no file of ours."""
    files = sorted(path for path in FOLDER.rglob("*") if path.suffix in TYPES)
    return [
        Route("/" if path == FOLDER / INDEX else f"/web/{path.relative_to(FOLDER).as_posix()}", _file(path))
        for path in files
    ]


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}

    async def answer(request: Request) -> Response:
        known = (one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(","))
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers={**headers, "Content-Type": TYPES[path.suffix]})

    return answer
