"""The routes: what is asked, checked, handed to the engine and answered."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from handful.cluster.keeper import Keeper
from handful.engine import Engine
from handful.errors import HandfulError
from handful.experts.expert_file import Layout
from handful.experts.store import Store
from handful.model import Decoder
from handful.server.answers import Answer, ChatAnswer, CompletionAnswer, Piece, Tells, degraded
from handful.server.errors import RETRY, ApiError, busy, invalid, of_engine
from handful.server.guard import Guard, error_response, read_body
from handful.server.inside import experts_now, model_facts, path_of, path_request
from handful.server.load import LoadWatch
from handful.server.metrics import TEXT, Metrics
from handful.server.openapi import describe
from handful.server.pages import page_routes
from handful.server.requests import Asked, of_chat, of_completion, prompt_tokens, tokenizer_of
from handful.server.schema import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    DrawnBody,
    PathBody,
    ReplaceBody,
    TokenizeBody,
    parse,
)
from handful.server.settings import ServerSettings
from handful.server.stream import GoneError, patient, send_events, unless_gone
from handful.server.worker import Ticket, Worker

__all__ = ["ABORT", "Server"]

ABORT = "handful.abort"  # in a scope: what ends its connection at once

T = TypeVar("T")
B = TypeVar("B", bound=Body)

SMALL = 1 << 15  # bytes of a body that is read on the event loop: it takes less time than to hand it over


class Server:
    """An ASGI application around a model, and the engine's thread, which `close` ends.

    max_sequences, cache_tokens, speculate   of its engine.
    store            of the model's experts, under a memory budget: for its metrics. It stays the caller's.
    keeper, layout   where ranks hold the experts: who knows them, and how they are packed.
    """

    def __init__(
        self,
        model: Decoder,
        settings: ServerSettings,
        *,
        max_sequences: int = 16,
        cache_tokens: int | None = None,
        kv_cache_dtype: str = "auto",
        speculate: bool | None = None,
        store: Store | None = None,
        keeper: Keeper | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.model, self.settings = model, settings
        self._load, self._store, self._keeper = LoadWatch(model.config), store, keeper
        self._model_facts = model_facts(settings.name, model, store, layout)
        if keeper is not None:
            keeper.load = lambda: list(self._load.counts().values())
        engine = Engine(
            model,
            max_sequences=max_sequences,
            cache_tokens=cache_tokens,
            kv_cache_dtype=kv_cache_dtype,
            on_routing=self._load,
            before_pass=None if keeper is None else keeper.before_pass,
            speculate=speculate,
        )
        self.metrics = Metrics(settings.name, engine, self._load, store, keeper)
        self.worker = Worker(engine, queue=settings.queue, told=self.metrics.told)
        self._created = int(time.time())
        self._described = json.dumps(describe()).encode()
        handlers = {HTTPException: _http_error, ApiError: _api_error, Exception: _mistake}
        app = Starlette(routes=self._routes(), exception_handlers=handlers)
        self._guard = Guard(app, settings)
        self._app: ASGIApp = self._guard
        if settings.origins:
            allow: dict[str, Any] = {"allow_origins": settings.origins, "allow_methods": ["*"], "allow_headers": ["*"]}
            self._app = CORSMiddleware(self._guard, **allow)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("the caller closes the server")
        try:
            await self._app(scope, receive, patient(send, self.settings.patience))
        except GoneError:
            if ABORT in scope:
                scope[ABORT]()
                await asyncio.sleep(0)
        except Exception:  # a mistake of ours: the client was told that there is one
            traceback.print_exc(file=sys.stderr)

    def close(self) -> None:
        self.worker.stop()

    def drain(self) -> None:
        """Take no more: who asks is refused with 503; what was taken goes on."""
        self._guard.draining = True

    @property
    def requests(self) -> int:
        """That are open now."""
        return self._guard.requests

    def _routes(self) -> list[Route]:
        return [
            Route("/v1/completions", _Endpoint(self._completion), methods=["POST"]),
            Route("/v1/chat/completions", _Endpoint(self._chat), methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{model:path}", self._one_model, methods=["GET"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/tokenizer_info", self._tokenizer_info, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/ready", self._ready, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
            Route("/routing/model", self._facts, methods=["GET"]),
            Route("/routing/experts", self._experts, methods=["GET"]),
            Route("/routing/path", self._path, methods=["POST"]),
            Route("/ranks", self._ranks, methods=["GET"]),
            Route("/ranks/replace", self._replace, methods=["POST"]),
            *page_routes(),
        ]

    # -----------------------------------------------------------------------------------------------------------------
    # What the engine makes.

    async def _completion(self, request: Request, send: Send) -> None:
        def ask(content: bytes) -> tuple[CompletionBody, list[Asked]]:
            body = self._parse(CompletionBody, content)
            return body, of_completion(body, self.model, self.settings)

        body, asked = await self._read(request, ask)
        await self._answer(request, send, body, asked, CompletionAnswer)

    async def _chat(self, request: Request, send: Send) -> None:
        def ask(content: bytes) -> tuple[ChatBody, list[Asked]]:
            body = self._parse(ChatBody, content)
            return body, of_chat(body, self.model, self.settings)

        body, asked = await self._read(request, ask, slow=True)
        await self._answer(request, send, body, asked, ChatAnswer)

    async def _answer(
        self, request: Request, send: Send, body: DrawnBody, asked: Sequence[Asked], kind: type[Answer]
    ) -> None:
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options", "only with stream = true")
        answer = kind(self.settings.name, self.model, asked, body.n or 1, Tells.of(body))
        ticket = self.worker.accept([one.request for one in asked])
        headers = {"X-Request-Id": str(answer.head["id"])}
        try:
            if body.stream:
                usage = body.stream_options is not None and bool(body.stream_options.include_usage)
                events = send_events(send, ticket, answer, self.settings, usage=usage, headers=headers)
                await unless_gone(request.receive, events)
            else:
                whole = await unless_gone(request.receive, _collect(ticket, answer))
                await JSONResponse(whole, headers=headers)(request.scope, request.receive, send)
        finally:
            ticket.cancel()

    async def _read(self, request: Request, ask: Callable[[bytes], T], *, slow: bool = False) -> T:
        """What `ask` makes of the body; aside from the event loop where that may take long."""
        content = await read_body(request, self.settings)
        if slow or len(content) > SMALL:
            return await asyncio.to_thread(ask, content)
        return ask(content)

    def _parse(self, kind: type[B], content: bytes) -> B:
        body = parse(kind, content)
        self._check_model(getattr(body, "model", None))
        return body

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.settings.name):
            message = f"model {str(name)[:80]!r}: this server has {self.settings.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    # -----------------------------------------------------------------------------------------------------------------
    # The model, its tokenizer, the server.

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self._created,
            "owned_by": "handful",
            "max_model_len": self.model.config.context,
        }

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def _tokenize(self, request: Request) -> Response:
        def ask(content: bytes) -> dict[str, Any]:
            body = self._parse(TokenizeBody, content)
            tokens = prompt_tokens(body, self.model)
            strings = tokenizer_of(self.model).pieces(tokens) if body.return_token_strs else None
            return {
                "count": len(tokens), "max_model_len": self.model.config.context, "tokens": tokens,
                "token_strs": strings,
            }  # fmt: skip

        return JSONResponse(await self._read(request, ask, slow=True))

    async def _detokenize(self, request: Request) -> Response:
        def ask(content: bytes) -> dict[str, Any]:
            body = self._parse(DetokenizeBody, content)
            tokenizer, vocab = tokenizer_of(self.model), self.model.config.vocab
            if any(token >= vocab for token in body.tokens):
                raise invalid("tokens", f"a token is outside the vocabulary of {vocab}")
            return {"prompt": tokenizer.decode(body.tokens, special=True)}

        return JSONResponse(await self._read(request, ask))

    async def _tokenizer_info(self, request: Request) -> Response:
        tokenizer = tokenizer_of(self.model)
        own = json.loads(tokenizer.files().get("tokenizer_config.json", b"{}"))
        template = tokenizer.chat_templates.get("default")
        named = {"bos_token": None, "pad_token": None, **tokenizer.named}
        return JSONResponse({"tokenizer_class": "PreTrainedTokenizerFast", **own, **named, "chat_template": template})

    # -----------------------------------------------------------------------------------------------------------------
    # What is inside.

    async def _facts(self, request: Request) -> Response:
        return JSONResponse(self._model_facts)

    async def _experts(self, request: Request) -> Response:
        held = self._store, self._keeper
        return JSONResponse(await asyncio.to_thread(experts_now, self.model.config, self._load, *held))

    async def _path(self, request: Request) -> Response:
        asked = await self._read(request, lambda content: path_request(self._parse(PathBody, content), self.model))
        ticket = self.worker.accept([asked])
        try:
            made = await unless_gone(request.receive, ticket.take())
        finally:
            ticket.cancel()
        if made[0].delta.error is not None:
            raise of_engine(made[0].delta.error)
        return JSONResponse(path_of(made[0].delta, self.model))

    async def _ranks(self, request: Request) -> Response:
        if self._keeper is None:
            return JSONResponse({"ranks": []})
        state, missing = self._keeper.state(), self._keeper.missing
        return JSONResponse({**state, "degraded": None if missing is None else degraded(missing)})

    async def _replace(self, request: Request) -> Response:
        body = await self._read(request, lambda content: self._parse(ReplaceBody, content))
        if self._keeper is None:
            raise invalid(None, "the experts are not on ranks: start the server with --ranks")
        try:
            return JSONResponse(await asyncio.to_thread(self._keeper.replace, body.seconds or 0.0))
        except HandfulError as error:
            raise busy(str(error), 503) from None

    # -----------------------------------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        if not self.worker.alive:
            raise ApiError(503, "the engine has stopped", kind="server_error", code="unavailable", headers=RETRY)
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        if not self.worker.alive or self._guard.draining:
            what = "about to end" if self.worker.alive else "the engine has stopped"
            raise ApiError(503, what, kind="server_error", code="unavailable", headers=RETRY)
        return JSONResponse({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(self.metrics.page), headers={"Content-Type": TEXT})

    async def _openapi(self, request: Request) -> Response:
        return Response(self._described, media_type="application/json")


class _Endpoint:
    """A route that writes its answer itself: Starlette takes it for an application, as it is no function."""

    def __init__(self, handle: Callable[[Request, Send], Awaitable[None]]) -> None:
        self.handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.handle(Request(scope, receive), send)


async def _collect(ticket: Ticket, answer: Answer) -> dict[str, Any]:
    """The whole answer. ApiError if one of its choices fails."""
    pieces: list[list[Piece]] = [[] for _ in answer.choices]
    async for made in ticket:
        if made.delta.error is not None:
            raise of_engine(made.delta.error)
        pieces[made.index].append(answer.take(made.index, made.delta))
    return answer.of_pieces(pieces)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _mistake(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "a mistake of the server's, which its log tells", kind="server_error"))


async def _http_error(request: Request, error: Exception) -> Response:
    """Of the routes themselves: no such path, another method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(ApiError(error.status_code, message, headers=error.headers))
