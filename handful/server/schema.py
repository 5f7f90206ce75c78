"""Requests as clients send them.

Types are strict: a string where a number belongs is an error of the sender's, and so is a field that nobody knows. What
OpenAI has and Handful has not is named as such, unless it asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError, from_json

from handful.server.errors import ApiError, invalid

__all__ = [
    "ChatBody", "CompletionBody", "DetokenizeBody", "DrawnBody", "Limited", "Message", "PathBody", "ReplaceBody",
    "TokenizeBody", "parse",
]  # fmt: skip

MOST_LOGPROBS = 20
TOKEN = {"type": "integer", "minimum": 0}

# What OpenAI's API has and this server has not, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "frequency_penalty": (0,), "function_call": ("none",), "functions": ([],),
    "logit_bias": ({},), "modalities": (["text"],), "moderation": (), "parallel_tool_calls": (True, False),
    "prediction": (), "presence_penalty": (0,), "reasoning_effort": ("none",), "response_format": ({"type": "text"},),
    "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],), "verbosity": ("medium",),
    "web_search_options": (),
}  # fmt: skip


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    EXAMPLE: ClassVar[dict[str, Any]] = {}


B = TypeVar("B", bound=Body)


def _whole(value: Any) -> Any:
    """5.0 is an integer in JSON Schema, and to some languages' writers: of a field, and of what a value holds."""
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse(kind: type[B], content: bytes) -> B:
    """A request's body. ApiError that names the first field that is wrong."""
    try:
        values = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(None, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise invalid(None, "the body: a JSON object")
    for name, neutral in UNSUPPORTED.items():
        if name in values and name not in kind.model_fields:
            value = values.pop(name)
            if value is not None and value not in neutral:
                raise ApiError(400, f"{name}: is not supported", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate({name: _whole(value) for name, value in values.items()})
    except pydantic.ValidationError as error:
        raise _named(error) from None


def _named(error: pydantic.ValidationError) -> ApiError:
    """What is wrong with the first wrong field. One that may be of several types has an error for each."""
    found = error.errors(include_url=False, include_context=False)
    first = found[0]["loc"][0] if found[0]["loc"] else None
    same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    what = " or ".join(dict.fromkeys(one["msg"] for one in same))
    if same[0]["type"] == "extra_forbidden":
        return ApiError(400, f"{str(first)[:80]}: no such field", param=str(first)[:80], code="unknown_parameter")
    given = same[0]["input"]
    shown = f" = {repr(given)[:40]}" if isinstance(given, str | int | float) and same[0]["type"] != "missing" else ""
    param = None if first is None else str(first)
    return ApiError(400, what if param is None else f"{param}{shown}: {what}", param=param)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts.


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or many, each a text or token ids: as a list."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return value
        many = value if all(isinstance(one, list) for one in value) else [value]
        if all(one and all(type(token) is int and token >= 0 for token in one) for one in many):
            return many
    raise PydanticCustomError("prompt", "a text, a list of token ids, or a list of texts or of lists of token ids")


_IDS = {"type": "array", "items": TOKEN, "minItems": 1}
Prompts = Annotated[
    Any,
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(description="Token ids.")]


class Part(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A role and what it said. Whatever else a chat template reads may stand beside them."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str = Field(min_length=1)
    content: str | list[Part] | None = Field(default=None, description="A text, or parts of type text.")

    def plain(self) -> dict[str, Any]:
        """As a chat template reads it: parts are lines of one text."""
        values = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            values["content"] = "\n".join(part.text for part in self.content)
        return values


# ---------------------------------------------------------------------------------------------------------------------
# Bodies.


class StreamOptions(Body):
    include_usage: bool | None = Field(default=False, description="End with a chunk that has no choices but the usage.")
    include_obfuscation: bool | None = None


class Limited(Body):
    """What the routers are to do without."""

    experts_off: dict[str, list[Annotated[int, Field(ge=0)]]] | None = Field(
        default=None, description="By the number of a layer, experts that its router is not to choose."
    )
    top_k_experts: int | None = Field(default=None, ge=1, description="Experts a token, fewer than the model takes.")


class DrawnBody(Limited):
    """What completions and chats share: how tokens are drawn, and when they end."""

    model: str | None = Field(default=None, description="The served model's name; may be left out.")
    n: int | None = Field(default=1, ge=1, le=128, description="Choices for each prompt.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="The same seed, the same answer.")
    stop: str | list[str] | None = Field(default=None, description="Texts at which an answer ends, before them.")
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**63, description="0 or -1: all.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    stop_token_ids: Tokens | None = None
    ignore_eos: bool | None = Field(default=False, description="Go on after the model's own end tokens.")
    return_tokens_as_token_ids: bool | None = Field(
        default=False, description='In log-probabilities tokens are "token_id:7", so that those of one text differ.'
    )
    return_token_ids: bool | None = Field(
        default=False, description="Tell the tokens themselves; in a stream each has a chunk of its own then."
    )
    return_routed_experts: bool | None = Field(
        default=False, description="Tell the experts of every token that passed the model: base64 of a .npy file."
    )
    routed_weights: bool | None = Field(default=False, description="Tell what their outputs were multiplied by too.")
    routed_experts_prompt_start: int | None = Field(
        default=0, ge=0, description="Leave out so many tokens of the prompt."
    )
    replay_routed_experts: str | None = Field(
        default=None, description="Take these experts for the first tokens, as routed_experts told them."
    )
    # Known, and of no effect here.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionBody(DrawnBody):
    EXAMPLE: ClassVar[dict[str, Any]] = {"prompt": "def main(", "max_tokens": 16}

    prompt: Prompts = Field(description="One or many, each a text or token ids.")
    max_tokens: int | None = Field(default=16, ge=0, lt=2**31)
    echo: bool | None = Field(default=False, description="Begin with the prompt; with logprobs, with its own too.")
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    add_special_tokens: bool | None = Field(default=True, description="Begin texts as the tokenizer begins them.")


class ChatBody(DrawnBody):
    EXAMPLE: ClassVar[dict[str, Any]] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    add_generation_prompt: bool | None = Field(default=True, description="Begin an answer after the messages.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="What else the template may read.")


class PathBody(Limited):
    EXAMPLE: ClassVar[dict[str, Any]] = {"tokens": [1, 2, 3]}

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, description="The last one's way is told.")]


class ReplaceBody(Body):
    EXAMPLE: ClassVar[dict[str, Any]] = {"seconds": 30}

    seconds: float | None = Field(default=30, ge=0, le=600, description="That are waited for it at most.")


class TokenizeBody(Body):
    EXAMPLE: ClassVar[dict[str, Any]] = {"prompt": "def main("}

    model: str | None = None
    prompt: str | None = Field(default=None, description="A text; or else messages.")
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = Field(default=True, description="Begin a text as the tokenizer begins it.")
    add_generation_prompt: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeBody(Body):
    EXAMPLE: ClassVar[dict[str, Any]] = {"tokens": [1, 2, 3]}

    model: str | None = None
    tokens: Tokens
