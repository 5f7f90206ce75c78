"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from handful.errors import ConfigError, HandfulError, RoutingError

__all__ = ["ApiError", "busy", "invalid", "of_engine"]

RETRY = {"Retry-After": "1"}
FIELDS = {"replay": "replay_routed_experts"}  # what the engine calls otherwise


class ApiError(Exception):
    """An answer that is an error: its HTTP status, and what is said."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str) -> ApiError:
    """A field that is wrong, 400."""
    return ApiError(400, message if param is None else f"{param}: {message}", param=param)


def busy(message: str, status: int = 429) -> ApiError:
    """To be asked again a little later: 429 of one that has too much to do, 503 of one that is about to end."""
    kind, code = ("rate_limit_error", "rate_limit_exceeded") if status == 429 else ("server_error", "unavailable")
    return ApiError(status, message, kind=kind, code=code, headers=RETRY)


def of_engine(error: BaseException) -> ApiError:
    """What a request failed by. A wrong request is its sender's; all else is the server's, of whose folders nothing is
    told."""
    if isinstance(error, ConfigError | RoutingError):
        field, _, rest = str(error).partition(": ")
        param = field.partition(" = ")[0].partition(",")[0]
        return ApiError(400, str(error), param=FIELDS.get(param, param) if rest and param.isidentifier() else None)
    what = str(error) if isinstance(error, HandfulError) else type(error).__name__
    what = re.sub(r"(?<!\S)/\S*/", "", what)
    return ApiError(500, f"the model failed: {what}", kind="server_error", code="model_failed")
