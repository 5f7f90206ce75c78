"""Bodies into the engine's requests: everything that a client may ask of the engine passes here, in one type.

A batch becomes requests whole, or an error does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from handful.chat import chat_tokens
from handful.engine import Request
from handful.errors import CheckpointError, HandfulError
from handful.generate import stop_ids
from handful.model import Decoder
from handful.routing_options import RoutingOptions
from handful.sampling import Sampling
from handful.server.errors import ApiError, invalid, of_engine
from handful.server.routed import replayed, routed_bytes
from handful.server.schema import ChatBody, CompletionBody, DrawnBody, Limited, Message, TokenizeBody
from handful.server.settings import ServerSettings
from handful.text import Tokenizer

__all__ = ["Asked", "experts_off", "of_chat", "of_completion", "prompt_tokens", "tokenizer_of"]

TEMPLATE_SECONDS = 5.0  # a chat template is a program that was downloaded, and need not end


@dataclass(frozen=True)
class Asked:
    """One choice of an answer: the request that makes it, and the text that it begins with (echo)."""

    request: Request
    echo: str | None = None


def of_completion(body: CompletionBody, model: Decoder, settings: ServerSettings) -> list[Asked]:
    """A choice for each prompt and each of its n, in order."""
    n = body.n or 1
    if len(body.prompt) * n > settings.max_batch:
        many = f"{len(body.prompt)} × n {n} choices"
        raise invalid("prompt", f"{many}: at most {settings.max_batch} a request")
    most = _max_tokens("max_tokens", 16 if body.max_tokens is None else body.max_tokens, settings)
    asked = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            tokens = _encode(tokenizer_of(model), prompt, special=body.add_special_tokens is not False)
            echo = prompt
        else:
            tokens, echo = prompt, "" if model.tokenizer is None else model.tokenizer.decode(prompt, special=True)
        request = Request(
            prompt=tokens,
            max_tokens=most,
            logprobs=body.logprobs,
            # A prompt that nothing is to follow is read all the same.
            prompt_logprobs=body.logprobs if body.echo and body.logprobs is not None else None if most else 0,
            stop=body.stops(),
            stop_tokens=_stop_tokens(body, model),
            sampling=_sampling(body, model),
            routing=_routing(body, model),
        )
        asked += [Asked(one, echo if body.echo else None) for one in _seeded(request, n)]
    if body.replay_routed_experts is not None and len(body.prompt) > 1:
        raise invalid("replay_routed_experts", f"{len(body.prompt)} prompts: it is of one")
    _check_routed(body, asked, model, settings)
    return asked


def of_chat(body: ChatBody, model: Decoder, settings: ServerSettings) -> list[Asked]:
    """A choice for each of n."""
    n = body.n or 1
    if n > settings.max_batch:
        raise invalid("n", f"{n}: at most {settings.max_batch} choices a request")
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "needs logprobs = true")
    tokens = _rendered(model, body.messages, body.add_generation_prompt is not False, body.chat_template_kwargs)
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    given = getattr(body, name)
    if given is None:
        given = max(1, min(model.config.context - len(tokens), settings.max_output or model.config.context))
    request = Request(
        prompt=tokens,
        max_tokens=_max_tokens(name, given, settings),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stop=body.stops(),
        stop_tokens=_stop_tokens(body, model),
        sampling=_sampling(body, model),
        fresh=True,
        routing=_routing(body, model),
    )
    asked = [Asked(one) for one in _seeded(request, n)]
    _check_routed(body, asked, model, settings)
    return asked


def prompt_tokens(body: TokenizeBody, model: Decoder) -> list[int]:
    """What a completion or a chat would read."""
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "give a prompt or messages, one of them")
    if body.messages is not None:
        return _rendered(model, body.messages, body.add_generation_prompt is not False, body.chat_template_kwargs)
    assert body.prompt is not None
    return _encode(tokenizer_of(model), body.prompt, special=body.add_special_tokens is not False)


def tokenizer_of(model: Decoder) -> Tokenizer:
    if model.tokenizer is None:
        raise invalid("prompt", "the model has no tokenizer: give token ids")
    return model.tokenizer


def _encode(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    return tokenizer.encode_prompt(text) if special else tokenizer.encode_rendered(text)


def _rendered(model: Decoder, messages: Sequence[Message], answer: bool, variables: dict[str, Any] | None) -> list[int]:
    tokenizer = tokenizer_of(model)
    try:
        return chat_tokens(
            tokenizer,
            [message.plain() for message in messages],
            answer=answer,
            variables=variables,
            seconds=TEMPLATE_SECONDS,
        )
    except CheckpointError as error:
        raise ApiError(500, str(error), kind="server_error", code="chat_template_failed") from None
    except HandfulError as error:
        raise of_engine(error) from None


def _max_tokens(name: str, asked: int, settings: ServerSettings) -> int:
    if settings.max_output is not None and asked > settings.max_output:
        raise invalid(name, f"{asked}: at most {settings.max_output}")
    return asked


def _stop_tokens(body: DrawnBody, model: Decoder) -> tuple[int, ...]:
    return (*(() if body.ignore_eos else stop_ids(model)), *(body.stop_token_ids or ()))


def _routing(body: DrawnBody, model: Decoder) -> RoutingOptions | None:
    router = model.config.router
    for name in ("routed_weights", "routed_experts_prompt_start"):
        if getattr(body, name) and not body.return_routed_experts:
            raise invalid(name, "needs return_routed_experts = true")
    record, replay = bool(body.return_routed_experts), body.replay_routed_experts
    if router is None and (record or replay is not None or body.experts_off or body.top_k_experts is not None):
        field = "return_routed_experts" if record else "replay_routed_experts" if replay is not None else "experts_off"
        raise invalid(field if body.top_k_experts is None else "top_k_experts", "the model is dense, and has no router")
    options = RoutingOptions(
        record=record,
        replay=None if replay is None or router is None else replayed(replay, router),
        experts_off=experts_off(body),
        top_k=body.top_k_experts,
    )
    return options if options.record or options.changes else None


def experts_off(body: Limited) -> dict[int, list[int]]:
    """By number of a layer. ApiError for a name that is none."""
    for name in body.experts_off or ():
        if not (name.isascii() and name.isdecimal() and len(name) < 9):
            raise invalid("experts_off", f"{name[:40]!r}: the number of a layer")
    return {int(name): off for name, off in (body.experts_off or {}).items()}


def _check_routed(body: DrawnBody, asked: Sequence[Asked], model: Decoder, settings: ServerSettings) -> None:
    """ApiError for more routing than an answer may hold."""
    router = model.config.router
    if router is None or not body.return_routed_experts:
        return
    skipped = body.routed_experts_prompt_start or 0
    tokens = sum(max(0, len(one.request.prompt) - skipped) + one.request.max_tokens for one in asked)
    size = routed_bytes(tokens, len(model.moe_layers), router, bool(body.routed_weights))
    if size > settings.max_routed:
        most = f"at most {settings.max_routed:,} a request; routed_experts_prompt_start leaves the prompt's out"
        raise invalid("return_routed_experts", f"up to {size:,} bytes: {most}")


def _sampling(body: DrawnBody, model: Decoder) -> Sampling:
    """As was said, or else as the model's generation_config.json asks, or else from the model's own probabilities."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    asked = None if model.origin is None else model.origin.sampling
    try:
        return replace(asked or Sampling(temperature=1.0, top_p=1.0), **given)
    except HandfulError as error:
        raise of_engine(error) from None


def _seeded(request: Request, n: int) -> list[Request]:
    """n of a request: each has a seed of its own, the first the one that was given."""
    seed = request.sampling.seed
    if seed is None:
        return [request] * n
    seeds = [(seed + i + 2**63) % 2**64 - 2**63 for i in range(n)]
    return [replace(request, sampling=replace(request.sampling, seed=one)) for one in seeds]
