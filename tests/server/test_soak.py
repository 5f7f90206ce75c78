"""Mixed load for a while, on a server in a process of its own: nothing is lost, and its memory does not grow.

A few seconds as a test; `make soak` does it for ten minutes (HANDFUL_SOAK_SECONDS).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Running, chat_model

from handful.families.io import save

SECONDS = float(os.environ.get("HANDFUL_SOAK_SECONDS", "10"))
CLIENTS = 6
SLACK = 24 << 20  # bytes: of caches that fill, and of what an allocator keeps


def body_of(draw: random.Random) -> dict[str, Any]:
    """A completion: long or short, greedy or drawn, with what may be asked for or without."""
    body: dict[str, Any] = {
        "prompt": [draw.randrange(200) for _ in range(draw.choice([1, 5, 40, 200, 400]))],
        "max_tokens": draw.choice([1, 5, 20, 60]),
        "temperature": draw.choice([0, 1]),
        "ignore_eos": True,
    }
    if draw.random() < 0.3:
        body["prompt"] = [7] * 150 + body["prompt"][:50]  # that many begin with
    extras: list[dict[str, Any]] = [
        {"n": 3}, {"logprobs": 3, "echo": True}, {"return_routed_experts": True, "routed_weights": True},
        {"experts_off": {"0": [1]}}, {"top_k_experts": 1}, {"stop": ["zz"]}, {"seed": 5}, {},
    ]  # fmt: skip
    return body | draw.choice(extras)


def malformed(draw: random.Random) -> bytes:
    return draw.choice([b"{", b'{"prompt": 5}', b"[" * 5000, b'{"prompt": "\xff"}', b"", b'{"prompt": "a", "no": 1}'])


class Client(threading.Thread):
    """Asks until it is told to end; what it saw is counted by kind."""

    def __init__(self, url: str, seed: int, end: threading.Event) -> None:
        super().__init__(daemon=True)
        self.url, self.draw, self.end = url, random.Random(seed), end
        self.seen: dict[str, int] = {}
        self.wrong: list[str] = []

    def run(self) -> None:
        kinds = [self.whole] * 4 + [self.stream] * 3 + [self.chat, self.goes, self.bad, self.half_open, self.looks]
        with httpx.Client(base_url=self.url, timeout=60) as self.http:
            while not self.end.is_set():
                kind = self.draw.choice(kinds)
                try:
                    kind()
                    self.seen[kind.__name__] = self.seen.get(kind.__name__, 0) + 1
                except Exception as error:
                    self.wrong.append(f"{kind.__name__}: {error!r}")

    def whole(self) -> None:
        body = body_of(self.draw)
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert len(found["choices"]) == body.get("n", 1)
        assert found["usage"]["completion_tokens"] <= body["max_tokens"] * body.get("n", 1)

    def stream(self) -> None:
        with self.http.stream("POST", "/v1/completions", json=body_of(self.draw) | {"stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"

    def chat(self) -> None:
        said = [{"role": "user", "content": "the router " * self.draw.randrange(1, 20)}]
        answer = self.http.post("/v1/chat/completions", json={"messages": said, "max_tokens": 10})
        assert answer.status_code == 200, answer.text

    def goes(self) -> None:
        """In the middle of a stream."""
        body = body_of(self.draw) | {"stream": True, "max_tokens": 300}
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())

    def bad(self) -> None:
        kind = {"Content-Type": "application/json"}
        answer = self.http.post("/v1/completions", content=malformed(self.draw), headers=kind)
        assert answer.status_code == 400, answer.text

    def half_open(self) -> None:
        """Half a request, or less."""
        host, port = self.url.removeprefix("http://").split(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as connection:
            whole = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            whole += b'Content-Length: 100\r\n\r\n{"prompt": "a"'
            connection.sendall(whole[: self.draw.randrange(len(whole))])

    def looks(self) -> None:
        for path in ("/metrics", "/health", "/v1/models", "/routing/experts", "/"):
            assert self.http.get(path).status_code == 200


def resident(process: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_mixed_load_does_not_grow(tmp_path: Path) -> None:
    """The median of the last third is that of the third before; and all is idle and still right at the end."""
    save(chat_model(context=1024), tmp_path / "model")
    # Caches fill within the first third.
    running = Running(tmp_path / "model", "--cache-tokens", "4096", "--max-sequences", "4")
    try:
        end = threading.Event()
        asked = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0}
        want = httpx.post(f"{running.url}/v1/completions", json=asked, timeout=60).json()["choices"]
        clients = [Client(running.url, seed, end) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        sizes: list[int] = []
        began = time.monotonic()
        assert running.process._process.pid is not None
        while time.monotonic() - began < SECONDS:
            time.sleep(SECONDS / 200)
            sizes.append(resident(running.process._process.pid))
        end.set()
        for client in clients:
            client.join(60)
            assert not client.is_alive()
        assert [wrong for client in clients for wrong in client.wrong] == []
        counts: dict[str, int] = {}
        for client in clients:
            for name, count in client.seen.items():
                counts[name] = counts.get(name, 0) + count
        assert len(counts) == 7, counts
        with httpx.Client(base_url=running.url, timeout=60) as http:
            idle = time.monotonic() + 20
            while 'handful:num_requests_running{model_name="tiny"} 0.0' not in http.get("/metrics").text:
                assert time.monotonic() < idle
                time.sleep(0.05)
            assert http.post("/v1/completions", json=asked).json()["choices"] == want
            metrics = http.get("/metrics").text
        found = re.search(r"handful:prefix_cache_hits_total\{[^}]*\} (\S+)", metrics)
        assert found is not None
        assert float(found[1]) > 0
        third = len(sizes) // 3
        before, after = statistics.median(sizes[third : 2 * third]), statistics.median(sizes[2 * third :])
        print(f"{sum(counts.values())} requests in {SECONDS:g} s {counts}")
        print(f"{before / 2**20:.1f} MiB, then {after / 2**20:.1f}")
        running.send(signal.SIGTERM)
        assert running.process.wait(30).returncode == 0
        assert after - before < SLACK
    finally:
        running.process.kill()
