"""The engine behind HTTP, as OpenAI's clients know it.

settings      what a server allows, and who may ask
schema        requests as they come: strict, every wrong field named
requests      bodies into the engine's `Request`s, and nothing else goes to it
worker        the thread that owns the engine; what it makes goes to the event loop
answers       what was made, in the shapes of completions and chats, whole or in chunks
stream        server-sent events, to clients that are slow or go away
metrics       what Prometheus reads; `load`: how even the experts' load is
guard         keys, hosts, limits, before a request is read
openapi       the description of all of it
app           the routes; `run`: sockets and signals
"""

from __future__ import annotations

import importlib.util

from handful.errors import MissingExtraError

__all__: list[str] = []

for _package in ("pydantic", "starlette", "uvicorn", "prometheus_client"):
    if importlib.util.find_spec(_package) is None:
        raise MissingExtraError(_package.replace("_", "-"), "handful serve", "server")
