"""What is refused: with its status, in OpenAI's shape, naming the field; and nothing of a refused batch is run."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from serving import Served, chat_model, serving

import handful.server.app
import handful.server.requests
from handful.errors import CheckpointError, ConfigError
from handful.model import Decoder
from handful.server.settings import ServerSettings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED = [{"role": "user", "content": "the cat"}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model() -> Decoder:
    return chat_model()


@pytest.fixture(scope="module")
def served(model: Decoder) -> Iterator[Served]:
    with serving(model, max_body=50_000, max_batch=8, max_output=100) as found:
        yield found


def error(answer: httpx.Response, status: int, param: str | None = None) -> str:
    """What an error says; it has OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (found,) = answer.json().values()
    assert found.keys() == {"message", "type", "param", "code"}
    assert found["param"] == param
    assert (status in (429, 503)) == ("retry-after" in answer.headers)
    message: str = found["message"]
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Fields.


@pytest.mark.parametrize(
    ("path", "changes", "param", "says"),
    [
        (COMPLETIONS, {"max_tokens": "5"}, "max_tokens", "max_tokens = '5': Input should be a valid integer"),
        (COMPLETIONS, {"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        (COMPLETIONS, {"max_tokens": 101}, "max_tokens", "max_tokens: 101: at most 100"),
        (COMPLETIONS, {"temperature": "hot"}, "temperature", "valid number"),
        (COMPLETIONS, {"temperature": -1}, "temperature", "greater than or equal to 0"),
        (COMPLETIONS, {"top_p": 0}, "top_p", "greater than 0"),
        (COMPLETIONS, {"n": 0}, "n", "greater than or equal to 1"),
        (COMPLETIONS, {"n": True}, "n", "valid integer"),
        (COMPLETIONS, {"n": 9}, "prompt", "1 × n 9 choices: at most 8 a request"),
        (COMPLETIONS, {"seed": 2**63}, "seed", "less than"),
        (COMPLETIONS, {"seed": 1.5}, "seed", "valid integer"),
        (COMPLETIONS, {"stop": 5}, "stop", "stop = 5: Input should be a valid string or Input should be a valid list"),
        (COMPLETIONS, {"stop": [""]}, "stop", "a list of texts that are not empty"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs", "less than or equal to 20"),
        (COMPLETIONS, {"logprobs": True}, "logprobs", "valid integer"),
        (COMPLETIONS, {"prompt": None}, "prompt", "a text, a list of token ids"),
        (COMPLETIONS, {"prompt": []}, "prompt", "a text, a list of token ids"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt", "a text, a list of token ids"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "a text, a list of token ids"),
        (COMPLETIONS, {"prompt": [1, -1]}, "prompt", "a text, a list of token ids"),
        (COMPLETIONS, {"prompt": [True]}, "prompt", "a text, a list of token ids"),
        (COMPLETIONS, {"prompt": [10**30]}, "prompt", "a token is outside the vocabulary"),
        (COMPLETIONS, {"prompt": [1] * 128}, "prompt", "128 tokens; the model's context is 128, so at most 127"),
        (COMPLETIONS, {"prompt": ["a"] * 9}, "prompt", "9 × n 1 choices: at most 8 a request"),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options", "only with stream = true"),
        (COMPLETIONS, {"suffix": "x"}, "suffix", "suffix: is not supported"),
        (COMPLETIONS, {"best_of": 2}, "best_of", "is not supported"),
        (COMPLETIONS, {"logit_bias": {"1": 5}}, "logit_bias", "is not supported"),
        (COMPLETIONS, {"presence_penalty": 0.5}, "presence_penalty", "is not supported"),
        (COMPLETIONS, {"nonsense": 1}, "nonsense", "nonsense: no such field"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools", "tools: is not supported"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        (CHAT, {"messages": []}, "messages", "at least 1 item"),
        (CHAT, {"messages": "hi"}, "messages", "valid list"),
        (CHAT, {"messages": [{"content": "hi"}]}, "messages", "Field required"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages", "valid string"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "Input should be"),
        (CHAT, {"messages": [{"role": "tyrant", "content": "x"}]}, "messages", "refuses them: no tyrants"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs = true"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (CHAT, {"max_completion_tokens": 101}, "max_completion_tokens", "101: at most 100"),
        (CHAT, {"stream": "yes"}, "stream", "valid boolean"),
        ("/tokenize", {"prompt": None}, "prompt", "give a prompt or messages"),
        ("/tokenize", {"messages": ASKED}, "prompt", "give a prompt or messages"),
        ("/detokenize", {"tokens": [5000]}, "tokens", "outside the vocabulary"),
        ("/detokenize", {"tokens": ["1"]}, "tokens", "valid integer"),
    ],
)  # fmt: skip
def test_fields(served: Served, path: str, changes: dict[str, Any], param: str, says: str) -> None:
    body: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": "the"},
        CHAT: {"messages": ASKED},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {},
    }
    message = error(served.http.post(path, json=body[path] | changes), 400, param)
    assert says in message


def test_what_asks_for_nothing_is_taken(served: Served) -> None:
    neutral: dict[str, Any] = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": None, "functions": None,
        "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "metadata": {"a": "b"}, "store": False,
        "stop": None, "temperature": None, "max_tokens": 1, "n": None, "stream": None, "stream_options": None,
    }  # fmt: skip
    assert served.post(CHAT, messages=ASKED, **neutral)["usage"]["completion_tokens"] == 1


def test_models_and_paths(served: Served) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "the"}), (CHAT, {"messages": ASKED}), ("/tokenize", {"prompt": "x"})):
        answer = served.http.post(path, json={**body, "model": "gpt-5"})
        assert "'gpt-5': this server has 'tiny'" in error(answer, 404, "model")
        assert answer.json()["error"]["code"] == "model_not_found"
    assert "/v2" in error(served.http.get("/v2"), 404)
    wrong = served.http.get(COMPLETIONS)
    error(wrong, 405)
    assert wrong.headers["allow"] == "POST"


# ---------------------------------------------------------------------------------------------------------------------
# Bodies.

NESTED = b'{"prompt":' + b"[" * 20_000 + b"]" * 20_000 + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"3", b'"text"', b'{"prompt":"\xff"}', b"\xff\xfe{\x00", b'{"prompt":"\\ud800"}',
        b'{"prompt":"a","temperature":NaN}', b'{"prompt":"a","temperature":Infinity}', b"\x00" * 100, NESTED,
        b'{"prompt":"a","metadata":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", b'{"prompt":"a"} {"prompt":"b"}',
        b'{"prompt":"a","max_tokens":' + b"9" * 5000 + b"}", b'{"prompt":"a","temperature":1e999}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_malformed_bodies(served: Served, path: str, body: bytes) -> None:
    answer = served.http.post(path, content=body, headers=JSON)
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 600  # what was sent is not sent back
    assert answer.json()["error"]["message"]


def test_huge_bodies(served: Served) -> None:
    """By what a client says, and by what it sends; what is left of it is not taken for the next request."""
    body = b'{"prompt":"' + b"a" * 60_000 + b'"}'
    assert "at most 50,000 bytes" in error(served.http.post(COMPLETIONS, content=body, headers=JSON), 413)

    def pieces() -> Iterator[bytes]:
        yield from (body[i : i + 1000] for i in range(0, len(body), 1000))

    error(served.http.post(COMPLETIONS, content=pieces(), headers=JSON), 413)
    assert served.post(COMPLETIONS, prompt="the", max_tokens=1)


def test_other_types_of_content(served: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error(served.http.post(COMPLETIONS, content=b'{"prompt":"a"}', headers={"Content-Type": kind}), 415)
    right = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert served.http.post(COMPLETIONS, content=b'{"prompt":"a"}', headers=right).status_code == 200


def exchange(served: Served, sent: bytes, wait: float = 5) -> bytes:
    """What comes back on a connection of one's own until the server closes it."""
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=wait) as connection:
        connection.sendall(sent)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
    return found


def test_clients_that_do_not_finish(model: Decoder) -> None:
    """Half a body, half a head, nothing at all: none holds the server for longer than its patience."""
    with serving(model, patience=0.3) as served:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert b" 408 " in exchange(served, head + b'Content-Length: 100\r\n\r\n{"prompt"').partition(b"\r\n")[0]
        assert exchange(served, head) == b""
        assert exchange(served, b"") == b""
        assert exchange(served, b"\x00\xff nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as gone:
            gone.sendall(head + b'Content-Length: 100\r\n\r\n{"prompt"')
        assert served.post(COMPLETIONS, prompt="the", max_tokens=1)


# ---------------------------------------------------------------------------------------------------------------------
# Batches and queues.


def held(served: Served) -> threading.Event:
    """The engine waits before its next step, until this is set."""
    engine, go = served.server.worker.engine, threading.Event()
    step = engine.step

    def waiting() -> Any:
        go.wait(20)
        return step()

    engine.step = waiting  # type: ignore[method-assign]
    return go


def test_a_batch_is_taken_whole_or_not_at_all(model: Decoder) -> None:
    with serving(model, max_sequences=2, queue=3, max_batch=8) as served:
        before = served.metrics()["handful:prompt_tokens_total", ""]
        wrong = served.http.post(COMPLETIONS, json={"prompt": [[1, 2], [3], [9999]], "max_tokens": 2})
        error(wrong, 400, "prompt")
        assert "6 requests" not in error(served.http.post(COMPLETIONS, json={"prompt": ["a"] * 6}), 429)
        assert served.server.worker.open == 0
        assert served.metrics()["handful:prompt_tokens_total", ""] == before
        assert len(served.post(COMPLETIONS, prompt=["a"] * 5, max_tokens=2)["choices"]) == 5


def test_a_full_queue(model: Decoder) -> None:
    with serving(model, max_sequences=1, queue=2) as served:
        go = held(served)
        found: list[Any] = []
        threads = [
            threading.Thread(target=lambda: found.append(served.post(COMPLETIONS, prompt="the", max_tokens=2)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: served.server.worker.open == 3)
        refused = served.http.post(COMPLETIONS, json={"prompt": "the"})
        assert "3 requests are running or waiting, of at most 3" in error(refused, 429)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        for path in ("/health", "/ready", "/metrics"):
            assert served.http.get(path).status_code == 200  # nobody waits for the engine but who asked it
        go.set()
        for thread in threads:
            thread.join()
        assert len(found) == 3


def test_many_open_requests(model: Decoder) -> None:
    with serving(model, max_requests=1) as served:
        go = held(served)
        thread = threading.Thread(target=served.post, args=(COMPLETIONS,), kwargs={"prompt": "the", "max_tokens": 1})
        thread.start()
        until(lambda: served.server.requests == 1)
        assert "1 requests are open, of at most 1" in error(served.http.post(COMPLETIONS, json={"prompt": "a"}), 429)
        assert served.http.get("/health").status_code == 200
        go.set()
        thread.join()


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------------------
# Who may ask.


def test_keys(model: Decoder) -> None:
    with serving(model, api_key="secret-1") as served:
        assert served.post(COMPLETIONS, prompt="the", max_tokens=1)
        for given in (None, "", "Bearer", "Bearer secret-2", "Bearer secret-1x", "Basic secret-1", "Bearer \xff"):
            headers = [] if given is None else [(b"Authorization", given.encode("latin-1"))]
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                answer = httpx.get(served.url + path, headers=headers)
                error(answer, 401)
                assert answer.headers["www-authenticate"] == "Bearer"
        error(httpx.post(served.url + COMPLETIONS, content=b"{" * 10), 401)  # before its body is looked at
        for path in ("/health", "/ready"):
            assert httpx.get(served.url + path).status_code == 200
        # With a key it may have any name.
        assert served.http.get("/v1/models", headers={"Host": "models.example"}).status_code == 200


def test_names_of_a_server_for_its_own_computer(model: Decoder, served: Served) -> None:
    """A page whose name was made to mean 127.0.0.1 gets nothing from its visitor's own server."""
    for host in ("localhost", "localhost:1234", "127.0.0.1", "[::1]:8000", "me.localhost"):
        assert served.http.get("/v1/models", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "localhost.evil.example"):
        assert "this server is for its own computer" in error(
            served.http.get("/v1/models", headers={"Host": host}), 403
        )
    with serving(model, no_auth=True) as open_to_all:
        assert open_to_all.http.get("/v1/models", headers={"Host": "models.example"}).status_code == 200


def test_pages_may_ask_only_if_they_were_named(model: Decoder, served: Served) -> None:
    page, other = "https://page.example", "https://other.example"
    asks = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert "access-control-allow-origin" not in served.http.get("/v1/models", headers=asks).headers
    assert served.http.options(COMPLETIONS, headers=asks).status_code == 405
    with serving(model, origins=(page,), api_key="k") as found:
        assert found.http.get("/v1/models", headers=asks).headers["access-control-allow-origin"] == page
        assert "access-control-allow-origin" not in found.http.get("/v1/models", headers={"Origin": other}).headers
        allowed = httpx.options(found.url + COMPLETIONS, headers=asks)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, page)
        denied = httpx.get(found.url + "/v1/models", headers=asks)
        assert (denied.status_code, denied.headers["access-control-allow-origin"]) == (401, page)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"host": "0.0.0.0"}, "host = '0.0.0.0': others can reach it; give a key by --api-key"),
        ({"host": "models.example"}, "host = 'models.example': others can reach it"),
        ({"api_key": ""}, "api_key: ASCII characters, at least one"),
        ({"api_key": "a", "no_auth": True}, "no_auth: with an api_key there is nothing to leave open"),
        ({"queue": -1}, "queue = -1: at least 0"),
        ({"max_batch": 0}, "max_batch = 0: at least 1"),
        ({"port": 70000}, "port = 70000: from 0 to 65535"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        ServerSettings(**({"name": "x"} | changes))
    assert str(wrong.value).startswith(says)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert ServerSettings(name="x", host=host).api_key is None
    assert ServerSettings(name="x", host="0.0.0.0", api_key="k").api_key == "k"


# ---------------------------------------------------------------------------------------------------------------------
# What fails.


def test_templates_that_raise_or_do_not_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handful.server.requests, "TEMPLATE_SECONDS", 0.3)
    found: list[httpx.Response] = []

    def ask() -> None:
        body = {"messages": ASKED, "chat_template_kwargs": {"loops": True}}
        found.append(served.http.post(CHAT, json=body))

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive():
        began = time.monotonic()
        assert served.http.get("/health").status_code == 200
        assert time.monotonic() - began < 0.25  # the event loop does not wait for it
    assert "chat template: it did not end within 0.3 seconds" in error(found[0], 500)
    broken = served.http.post(CHAT, json={"messages": ASKED, "chat_template_kwargs": {"breaks": True}})
    assert "chat template: integer division" in error(broken, 500)
    assert served.post(CHAT, messages=ASKED, max_tokens=1)


class Refusing:
    """An embedding that fails for one token, as experts on a disk that is gone do."""

    def __init__(self, layer: Any, failure: Exception) -> None:
        self.failure, self.forward = failure, layer.forward
        layer.forward = self

    def __call__(self, tokens_BS: Any) -> Any:
        if 250 in tokens_BS.flatten().tolist():
            raise self.failure
        return self.forward(tokens_BS)


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (CheckpointError("/data/secret/experts.pack: cannot be read: No such device"), "experts.pack: cannot be read"),
        (RuntimeError("/root/x went wrong"), "the model failed: RuntimeError"),
    ],
)
def test_a_request_that_fails_alone(failure: Exception, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    """500 for it, at once or in its stream; the others go on; and no path of the server is told."""
    model = chat_model()
    with serving(model) as served:
        want = served.post(COMPLETIONS, prompt=[5, 6], max_tokens=40, temperature=0)["choices"]
        Refusing(model.embed, failure)
        found: list[Any] = []
        other = threading.Thread(
            target=lambda: found.append(
                served.post(COMPLETIONS, prompt=[5, 6], max_tokens=40, temperature=0)["choices"]
            )
        )
        other.start()
        for body in ({"prompt": [1, 250]}, {"prompt": [[5], [1, 250]], "n": 2}, {"prompt": [1, 250], "stream": True}):
            message = error(served.http.post(COMPLETIONS, json=body), 500)
            assert says in message
            assert "/data" not in message
            assert "/root" not in message
        other.join()
        assert found == [want]
        assert served.metrics()["handful:request_success_total", "error"] == 4
    with serving(model, max_sequences=1) as served:  # begun, and broken off: by an event, for the status was sent
        *events, last = served.events(COMPLETIONS, prompt=[[5], [1, 250]], max_tokens=3)
        assert [event["choices"][0]["index"] for event in events] == [0] * len(events)
        assert says in last["error"]["message"]
        assert last["error"]["code"] == "model_failed"
    assert ("Traceback" in capfd.readouterr().err) == isinstance(failure, RuntimeError)


def test_a_mistake_of_ours(served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(handful.server.app, "of_completion", lambda *_: 1 // 0)
    assert (
        error(served.http.post(COMPLETIONS, json={"prompt": "a"}), 500)
        == "a mistake of the server's, which its log tells"
    )
    said = ""

    def told() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "ZeroDivisionError" in said

    until(told)


def test_an_engine_that_has_stopped(model: Decoder, capfd: pytest.CaptureFixture[str]) -> None:
    """By a mistake of ours: who waits is told, and who watches sees it."""
    with serving(model) as served:

        def broken() -> Any:
            raise AssertionError("a mistake")

        served.server.worker.engine.step = broken  # type: ignore[method-assign]
        error(served.http.post(COMPLETIONS, json={"prompt": "a"}), 500)
        until(lambda: not served.server.worker.alive)
        for path in ("/health", "/ready"):
            error(served.http.get(path), 503)
        assert "the engine has stopped" in error(served.http.post(COMPLETIONS, json={"prompt": "a"}), 503)
        served.server.worker._open = 0
        served.server.worker.engine._waiting.clear()
    assert "AssertionError: a mistake" in capfd.readouterr().err
