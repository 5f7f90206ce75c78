"""The description is true: schemathesis makes requests of it, right and wrong, and every answer is as described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import Served, chat_model, serving

from handful.server.pages import is_page

OPERATIONS = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"), ("GET", "/v1/models"), ("GET", "/v1/models/{model}"), ("GET", "/health"),
    ("GET", "/ready"), ("GET", "/metrics"), ("GET", "/routing/model"), ("GET", "/routing/experts"),
    ("POST", "/routing/path"), ("GET", "/ranks"), ("POST", "/ranks/replace"),
]  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(chat_model(context=32), api_key="k", max_output=24, max_batch=8) as found:
        yield found


@pytest.fixture(scope="module")
def schema(served: Served) -> Any:
    return schemathesis.openapi.from_dict(served.http.get("/openapi.json").json())


def test_every_route_is_described(served: Served, schema: Any) -> None:
    described = {
        (method.upper(), path)
        for path, item in schema.raw_schema["paths"].items()
        for method in item
        if method in ("get", "post")
    }
    assert described == set(OPERATIONS)
    routes = {
        (next(iter((route.methods or set()) - {"HEAD"})), route.path.replace(":path", ""))
        for route in served.server._routes()
    }
    routes = {(method, path) for method, path in routes if not is_page(path)}  # no API
    assert routes == {*OPERATIONS, ("GET", "/openapi.json")}


RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*one, RIGHT) for one in OPERATIONS] + [(*one, WRONG) for one in OPERATIONS if one[0] == "POST"],
)
def test_answers_are_as_described(served: Served, schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    operation = schema[path][method]
    examples = 30 if method == "POST" else 3

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        headers = {"Authorization": "Bearer k"}
        answer = case.call(base_url=served.url, headers=headers, timeout=30)
        # A token may be none of the model's, a model another one: that no schema says. All that it does say is enough.
        case.validate_response(answer, headers=headers, excluded_checks=[positive_data_acceptance])
        if mode == RIGHT and answer.status_code == 400:
            assert "Input should be" not in answer.json()["error"]["message"]
        if mode == WRONG:
            assert 400 <= answer.status_code < 500

    check()
