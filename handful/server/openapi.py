"""The OpenAPI description of the server: requests from `schema.py`, answers and errors by hand."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from handful import __version__
from handful.server.schema import Body, ChatBody, CompletionBody, DetokenizeBody, PathBody, ReplaceBody, TokenizeBody

__all__ = ["describe"]

BODIES: tuple[type[Body], ...] = (ChatBody, CompletionBody, DetokenizeBody, PathBody, ReplaceBody, TokenizeBody)
RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}
REFUSED = {
    "400": "A field is wrong or not supported; `param` names it.",
    "403": "Asked by a name that the server does not answer to.",
    "408": "The body did not come.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "Too much to do.",
    "500": "The model failed.",
    "503": "About to end.",
}


def _object(required: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": required | more}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXT, NUMBER, INTEGER, BOOLEAN = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"type": "boolean"}
FINISH = {"enum": ["stop", "length", None]}
USAGE = _object(
    {"prompt_tokens": INTEGER, "completion_tokens": INTEGER, "total_tokens": INTEGER},
    prompt_tokens_details=_object({"cached_tokens": INTEGER}),
)
# What a choice has beside its text, where it was asked for; of routing base64 of .npy files.
BESIDE = {"token_ids": _list(INTEGER), "routed_experts": TEXT, "routed_weights": TEXT}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


COLUMNS = _object(
    {
        "tokens": _list(TEXT),
        "token_logprobs": _list(_or_null(NUMBER)),
        "top_logprobs": _list(_or_null({"type": "object", "additionalProperties": NUMBER})),
        "text_offset": _list(INTEGER),
    }
)
SEEN = {"token": TEXT, "logprob": NUMBER, "bytes": _or_null(_list(INTEGER))}
ROWS = _object({"content": _list(_object({**SEEN, "top_logprobs": _list(_object(SEEN))}))})
HEAD = {"id": TEXT, "object": TEXT, "created": INTEGER, "model": TEXT}
MODEL = _object({"id": TEXT, "object": TEXT, "created": INTEGER, "owned_by": TEXT}, max_model_len=INTEGER)

# What experts an answer was made without, of which no rank was there.
DEGRADED = _object(
    {
        "layers": {"type": "object", "additionalProperties": _list(INTEGER)},
        "experts": INTEGER,
        "of": INTEGER,
        "loss": _or_null(_object({"without": NUMBER, "whole": NUMBER, "more": NUMBER, "tokens": INTEGER})),
    }
)

ERROR = _object({"message": TEXT, "type": TEXT, "param": _or_null(TEXT), "code": _or_null(TEXT)})

SCHEMAS: dict[str, Any] = {
    "Error": _object({"error": ERROR}),
    "Completion": _object(
        {
            **HEAD,
            "choices": _list(
                _object(
                    {"index": INTEGER, "text": TEXT, "logprobs": _or_null(COLUMNS), "finish_reason": FINISH},
                    prompt_token_ids=_list(INTEGER),
                    **BESIDE,
                )
            ),
            "usage": USAGE,
        },
        degraded=DEGRADED,
    ),
    "ChatCompletion": _object(
        {
            **HEAD,
            "choices": _list(
                _object(
                    {
                        "index": INTEGER,
                        "message": _object({"role": TEXT, "content": TEXT}),
                        "logprobs": _or_null(ROWS),
                        "finish_reason": FINISH,
                    },
                    **BESIDE,
                )
            ),
            "usage": USAGE,
        },
        prompt_token_ids=_list(INTEGER),
        degraded=DEGRADED,
    ),
    "Model": MODEL,
    "Models": _object({"object": TEXT, "data": _list(MODEL)}),
    "Tokens": _object(
        {"count": INTEGER, "max_model_len": INTEGER, "tokens": _list(INTEGER)}, token_strs=_or_null(_list(TEXT))
    ),
    "Text": _object({"prompt": TEXT}),
    "TokenizerInfo": _object({"tokenizer_class": TEXT, "eos_token": TEXT}),
    "Status": _object({"status": TEXT}),
    "Inside": _object(
        {
            "model": TEXT,
            "context": INTEGER,
            "chat": BOOLEAN,
            "layers": INTEGER,
            "moe_layers": _list(INTEGER),
            "experts": INTEGER,
            "top_k": INTEGER,
            "shared": BOOLEAN,
            "score": _or_null(TEXT),
            "parameters": _object({"total": INTEGER, "active": INTEGER}),
            "bytes": _object({"total": INTEGER, "token": INTEGER}),
            "memory": _or_null(_object({"slots": INTEGER, "experts": INTEGER})),
        }
    ),
    "Experts": _object(
        {
            "layers": {
                "type": "object",
                "additionalProperties": _object(
                    {"load": _list(NUMBER), "assignments": NUMBER, "places": _or_null(TEXT)}
                ),
            }
        }
    ),
    "Ranks": _object({"ranks": _list({"type": "object"})}, degraded=_or_null(DEGRADED)),
    "Replaced": _object({"moved": INTEGER, "begun": BOOLEAN, "settled": BOOLEAN}),
    "Path": _object(
        {
            "token": INTEGER,
            "layers": _list(
                _object(
                    {
                        "layer": INTEGER,
                        "scores": _list(NUMBER),
                        "experts": _list(INTEGER),
                        "weights": _list(NUMBER),
                    }
                )
            ),
            "next": _list(_object({"token": INTEGER, "text": _or_null(TEXT), "probability": NUMBER})),
        }
    ),
}  # fmt: skip


def describe() -> dict[str, Any]:
    """The whole document."""
    _, own = models_json_schema([(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Handful",
            "version": __version__,
            "description": "A mixture-of-experts language model behind OpenAI's API.",
        },
        "paths": {
            "/v1/completions": _post("Go on from prompts.", CompletionBody, "Completion", streams=True),
            "/v1/chat/completions": _post("Answer a conversation.", ChatBody, "ChatCompletion", streams=True),
            "/tokenize": _post("The tokens of a text, or of messages.", TokenizeBody, "Tokens"),
            "/detokenize": _post("The text of tokens.", DetokenizeBody, "Text"),
            "/tokenizer_info": _get("What the model's tokenizer says of itself.", "TokenizerInfo", ("400",)),
            "/routing/model": _get("The model's layers, experts, parameters and bytes.", "Inside"),
            "/routing/experts": _get("The load of every expert, and where it is under a budget.", "Experts"),
            "/routing/path": _post("The way of the last of some tokens through all layers.", PathBody, "Path"),
            "/ranks": _get("Who has which experts, who is gone, and what was lost.", "Ranks"),
            "/ranks/replace": _post("Place the experts anew, by their load of late.", ReplaceBody, "Replaced"),
            "/v1/models": _get("The served model, in a list.", "Models"),
            "/v1/models/{model}": {
                **_get("The served model.", "Model", ("404",)),
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": TEXT}],
            },
            "/health": _get("Whether the engine runs.", "Status", ("503",), guarded=False),
            "/ready": _get("Whether requests are taken.", "Status", ("503",), guarded=False),
            "/metrics": {
                "get": {
                    "summary": "What Prometheus reads.",
                    "responses": {
                        "200": {
                            "description": "Metrics.",
                            "content": {"text/plain": {"schema": TEXT}},
                        },
                        **_errors(("401", "403", "429")),
                    },
                }
            },
        },
        "components": {
            "schemas": {**own["$defs"], **SCHEMAS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _post(summary: str, body: type[Body], answer: str, streams: bool = False) -> dict[str, Any]:
    content = {"application/json": _ref(answer)}
    if streams:
        content["text/event-stream"] = {"schema": TEXT}
    ok = {"description": "The answer.", "content": content}
    return {
        "post": {
            "summary": summary,
            "requestBody": {
                "required": True,
                "content": {"application/json": {**_ref(body.__name__), "example": body.EXAMPLE}},
            },
            "responses": {"200": ok, **_errors(("401", "404", *REFUSED))},
        }
    }  # fmt: skip


def _get(summary: str, answer: str, errors: tuple[str, ...] = (), *, guarded: bool = True) -> dict[str, Any]:
    ok = {"description": "The answer.", "content": {"application/json": _ref(answer)}}
    also = ("401", "403", "429") if guarded else ()
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": ok, **_errors((*errors, *also))}}
    if not guarded:
        operation["security"] = []
    return {"get": operation}


def _errors(statuses: tuple[str, ...]) -> dict[str, Any]:
    more = {"401": "A key is needed.", "404": "No such model."}
    return {
        status: {
            "description": {**REFUSED, **more}[status],
            "content": {"application/json": _ref("Error")},
            **({"headers": RETRY} if status in ("429", "503") else {}),
        }
        for status in sorted(set(statuses))
    }


def _ref(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}
