"""Conversations: messages through a model's own chat template, and its answers.

    render(tokenizer, messages)       the text that the model was trained to answer
    chat_tokens(tokenizer, messages)  the same as tokens; the template's special tokens are read, and nothing is added
    chat_request(model, messages)     a `Request` for the engine, which ends where the model's answers end
    chat(model, messages)             an answer's text, piece by piece
    Conversation(model)               messages that grow by a question and an answer

A template is a program in Jinja that came with a checkpoint: it runs in Jinja's sandbox, with the names that
transformers gives one, and sees plain values alone.

A message is {"role": "user", "content": "…"}, and may have what else its template reads.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

from handful.encoder_decoder import EncoderDecoder
from handful.engine import Engine, Request
from handful.errors import CheckpointError, ConfigError, first_line
from handful.generate import stream, token_request, tokenizer_of
from handful.model import Decoder
from handful.sampling import Sampling
from handful.text import Tokenizer

if TYPE_CHECKING:
    import jinja2

__all__ = ["Conversation", "Message", "chat", "chat_request", "chat_tokens", "render"]

Message = Mapping[str, Any]


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    answer: bool = True,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
    seconds: float | None = None,
) -> str:
    """Messages as the text that the tokenizer's chat template makes of them.

    tools      descriptions of functions, as JSON Schema, for templates that have room for them.
    answer     end with the beginning of an answer, which the model goes on from.
    template   another one, in Jinja. None: the tokenizer's; with tools the one named "tool_use", if it has it.
    variables  what else the template may read, such as enable_thinking.
    seconds    that the template may take: a program need not end. None: as long as it wants.

    ConfigError for messages that are malformed or that the template refuses, and where there is no template;
    CheckpointError for a template that is malformed, does what it may not or takes too long.
    """
    import jinja2

    source = template if template is not None else _template_of(tokenizer, with_tools=bool(tools))
    values = {
        **tokenizer.named,
        **(variables or {}),
        "messages": _checked(messages),
        "tools": list(tools) if tools else None,
        "documents": None,
        "add_generation_prompt": answer,
    }
    try:
        plain = json.loads(json.dumps(values))
    except (TypeError, ValueError, RecursionError):
        raise ConfigError("messages, tools: plain values, as JSON has them") from None
    try:
        with _within(seconds):
            return _compiled(source).render(plain)
    except _RefusedError as error:
        raise ConfigError(f"messages: the chat template refuses them: {first_line(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"chat template: line {error.lineno}: {first_line(error)}") from None
    except Exception as error:  # a template can fail as any program does
        raise CheckpointError(f"chat template: {first_line(error)}") from None


def chat_tokens(tokenizer: Tokenizer, messages: Sequence[Message], **options: Any) -> list[int]:
    """`render` as tokens. What begins the text is the template's affair, so that it does not begin twice."""
    return tokenizer.encode_rendered(render(tokenizer, messages, **options))


def chat_request(
    model: Decoder,
    messages: Sequence[Message],
    *,
    max_tokens: int = 1024,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
    **options: Any,
) -> Request:
    """The request for an answer to messages. `options` are those of `render`, whose errors it has."""
    tokens = chat_tokens(tokenizer_of(model, ""), messages, **options)
    asked = token_request(model, tokens, max_tokens=max_tokens, sampling=sampling, stop=stop, logprobs=logprobs)
    return replace(asked, fresh=True)


def chat(
    model: Decoder | EncoderDecoder,
    messages: Sequence[Message],
    *,
    max_tokens: int = 1024,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    kv_cache_dtype: str = "auto",
    speculate: bool | None = None,
    **options: Any,
) -> Iterator[str]:
    """Yield the answer to messages, piece by piece, as `generate` yields text. `speculate` is the engine's, `options`
    are those of `render`."""
    if isinstance(model, EncoderDecoder):
        raise ConfigError("model: an encoder-decoder has no conversations: use generate")
    request = chat_request(model, messages, max_tokens=max_tokens, sampling=sampling, stop=stop, **options)
    engine = Engine(model, kv_cache_dtype=kv_cache_dtype, speculate=speculate)
    for delta in stream(engine, request):
        yield delta.text


class Conversation:
    """Messages that grow by a question and its answer.

    system    what stands before all others; None: nothing, or what the template says itself.
    options   those of `chat`.
    """

    def __init__(self, model: Decoder, *, system: str | None = None, **options: Any) -> None:
        self.model = model
        self.system = system
        self.options = options
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all that was said, but not the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> Generator[str]:
        """Yield the answer, piece by piece. An answer that is broken off is kept as far as it came; a question that
        could not be asked, or has no answer yet, is forgotten."""
        asked = [*self.messages, {"role": "user", "content": text}]
        said, whole = "", False
        try:
            for piece in chat(self.model, asked, **self.options):
                said += piece
                yield piece
            whole = True
        finally:
            if said or whole:
                self.messages = [*asked, {"role": "assistant", "content": said}]


@contextlib.contextmanager
def _within(seconds: float | None) -> Iterator[None]:
    """TimeoutError in what runs here, in this thread, once it has taken so long. It is looked at before every line."""
    if seconds is None:
        yield
        return
    end, before = time.monotonic() + seconds, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it did not end within {seconds:g} seconds")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _template_of(tokenizer: Tokenizer, *, with_tools: bool) -> str:
    found = tokenizer.chat_templates
    name = "tool_use" if with_tools and "tool_use" in found else "default"
    if name not in found:
        others = f"; it has {', '.join(sorted(found))}, to be given as template" if found else ""
        raise ConfigError(f"model: it has no chat template, as models for conversations have{others}")
    return found[name]


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not messages:
        raise ConfigError("messages: a list of at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f"messages: {str(message)[:80]!r}: an object with a role and a content")
        try:
            str(message.get("content")).encode()
        except UnicodeEncodeError:  # a terminal hands over any byte
            raise ConfigError("messages: must be UTF-8") from None
    return [_with_reasoning(message) for message in messages]


def _with_reasoning(message: Message) -> dict[str, Any]:
    """A message with its reasoning under the names that templates read it by, whichever it was given under."""
    names = ("reasoning_content", "thinking", "reasoning")
    found = next((message[name] for name in names if message.get(name) is not None), None)
    return dict(message) if found is None else {"thinking": found, **message, "reasoning_content": found}


# ---------------------------------------------------------------------------------------------------------------------
# Jinja, as transformers sets it up: templates are written against that.


class _RefusedError(Exception):
    """The template said raise_exception: the messages are not what its model knows."""


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> jinja2.Environment:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}, which marks answers for training: its content as it is."""

        tags = {"generation"}  # noqa: RUF012 - what Jinja asks for

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(value: Any, **how: Any) -> str:
        # Jinja's own writes < and ' as HTML wants them.
        return json.dumps(value, **{"ensure_ascii": False, **how})

    def refuse(message: str) -> None:
        raise _RefusedError(" ".join(str(message).split()))

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    found.filters["tojson"] = tojson
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found
