"""Many at once, each as if it were alone; clients that go away, or are slow, cost nobody anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from serving import Served, chat_model, serving

from handful.engine import Engine
from handful.generate import token_request
from handful.model import Decoder
from handful.sampling import Sampling

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def model() -> Decoder:
    """In float64, so that no rounding decides between two tokens."""
    return chat_model(torch.float64)


@pytest.fixture(scope="module")
def served(model: Decoder) -> Iterator[Served]:
    with serving(model) as found:
        yield found


def test_two_hundred_at_once_each_as_alone(model: Decoder, served: Served) -> None:
    """Greedy and seeded, whole and streamed; none is lost."""
    draw = random.Random(1)
    asked = []
    for number in range(200):
        body: dict[str, Any] = {
            "prompt": [draw.randrange(200) for _ in range(draw.choice([1, 3, 20, 40]))],
            "max_tokens": draw.choice([1, 4, 8]),
            "temperature": draw.choice([0, 1]),
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
            "ignore_eos": True,
            "stream": number % 2 == 0,
        }
        asked.append(body | ({"seed": number} if body["temperature"] else {}))

    async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> list[str]:
        answer = await client.post(COMPLETIONS, json=body)
        assert answer.status_code == 200, answer.text
        if not body["stream"]:
            return list(answer.json()["choices"][0]["logprobs"]["tokens"])
        *events, done = [event.removeprefix("data: ") for event in answer.text.strip().split("\n\n")]
        assert done == "[DONE]"
        return [token for event in events for token in json.loads(event)["choices"][0]["logprobs"]["tokens"]]

    async def ask_all() -> list[list[str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, timeout=100, limits=limits) as client:
            return await asyncio.gather(*(ask(client, body) for body in asked))

    before = served.metrics()
    found = asyncio.run(ask_all())
    for body, tokens in zip(asked, found, strict=True):
        sampling = Sampling(temperature=body["temperature"], top_p=1, seed=body.get("seed"))
        request = token_request(model, body["prompt"], max_tokens=body["max_tokens"], sampling=sampling)
        (job,) = Engine(model).run([request.__class__(**{**vars(request), "stop_tokens": ()})])
        assert tokens == [f"token_id:{token}" for token in job.made]
    after = served.metrics()
    assert after["handful:request_success_total", "length"] - before["handful:request_success_total", "length"] == 200
    made = sum(body["max_tokens"] for body in asked)
    name = "handful:generation_tokens_total", ""
    assert after[name] - before[name] == made


# ---------------------------------------------------------------------------------------------------------------------
# Clients that go away.


def connected(served: Served, body: dict[str, Any], path: str = COMPLETIONS) -> socket.socket:
    """A connection on which a request was sent."""
    sent = json.dumps(body).encode()
    found = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=10)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n"
    )
    found.sendall(head.encode() + b"\r\n" + sent)
    return found


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["waiting", "reading", "decoding", "last"])
def test_a_client_that_goes_is_cancelled(stage: str, stream: bool) -> None:
    """Wherever its request is; the others go on as alone."""
    model = chat_model(context=4096)
    body = {"prompt": [1] * 1500, "max_tokens": 2000, "temperature": 0, "stream": stream, "ignore_eos": True}
    if stage == "last":
        body |= {"prompt": [1], "max_tokens": 1}
    with serving(model, max_sequences=2 if stage != "waiting" else 1) as served:
        engine = served.server.worker.engine
        engine.chunk = 200
        want = served.post(COMPLETIONS, prompt=[5, 6], max_tokens=30, temperature=0)["choices"]
        first = connected(served, body | {"prompt": [2]}) if stage == "waiting" else None
        gone = connected(served, body)
        if stage in ("reading", "decoding"):
            end = time.monotonic() + 10
            while not any(job.made if stage == "decoding" else job._read for job in engine._running):
                assert time.monotonic() < end
                time.sleep(0.001)
        gone.close()
        if first is not None:
            time.sleep(0.05)
            first.close()
        served.idle()
        assert served.metrics()["handful:generation_tokens_total", ""] < 1900
        assert served.post(COMPLETIONS, prompt=[5, 6], max_tokens=30, temperature=0)["choices"] == want
        if stage != "last":
            aborted = served.metrics()["handful:request_success_total", "abort"]
            assert aborted == (2 if stage == "waiting" else 1)


def rest_of(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            found += part
    return found


def test_readers_that_do_not_read(model: Decoder) -> None:
    """Their answers are made and kept, nobody else waits for them, and after a while they are given up."""
    model = chat_model(context=4096)
    with serving(model, patience=1.5, max_sequences=4, buffer=4096) as served:
        body = {"prompt": [1], "max_tokens": 400, "stream": True, "ignore_eos": True, "n": 2, "logprobs": 20}
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
        sent = json.dumps(body).encode()
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(sent)}\r\n\r\n".encode()
            + sent
        )
        began = time.monotonic()
        for _ in range(5):
            assert served.post(COMPLETIONS, prompt="the", max_tokens=3)
        assert time.monotonic() - began < 3
        while served.server.worker.open:
            assert time.monotonic() - began < 10
            time.sleep(0.01)
        assert served.server.requests == 1  # what was made waits for who does not take it
        served.idle()
        assert b"[DONE]" not in rest_of(slow)
        slow.close()
