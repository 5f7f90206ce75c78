"""Servers for tests: a small model behind HTTP in a thread of this process, and what clients send."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh
import httpx
import torch
from builders import moe
from public_tokenizers import byte_level, settings

from handful.model import Decoder
from handful.server.app import Server
from handful.server.run import http_server, listen, url_of
from handful.server.settings import ServerSettings
from handful.text import Tokenizer

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
CHATML = (
    "{% for m in messages %}{% if m.role == 'tyrant' %}{{ raise_exception('no tyrants') }}{% endif %}"
    "{% if loops is defined %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if breaks is defined %}{{ 1 // 0 }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template: str = CHATML) -> Tokenizer:
    inner = byte_level(SPECIALS, before=["<s>"])
    config = settings("<s>", "<|im_end|>", chat_template=template)
    files = {"tokenizer.json": inner.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return Tokenizer(inner, "<|im_end|>", files=files)


def chat_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    """A model whose every token has a text, and of which no answer ends by itself too soon."""
    torch.manual_seed(0)
    own = tokenizer()
    model = Decoder(moe(**({"vocab": own.vocab_size, "context": 128, "tied": False} | changes))).to(dtype).eval()
    model.tokenizer = own
    return model


class Served:
    """A server that answers, its address, and a client that has its key."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.url = server, url
        key = server.settings.api_key
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=60)

    def post(self, path: str, status: Any = 200, **body: Any) -> Any:
        """A body as JSON, and the answer as JSON."""
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream, as JSON but for the last, which must be [DONE]; comments are left out."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            text = "".join(answer.iter_text())
        assert text.endswith("\n\n")
        found = [event for event in text.removesuffix("\n\n").split("\n\n") if not event.startswith(":")]
        assert all(event.startswith("data: ") for event in found)
        *events, last = [event.removeprefix("data: ") for event in found]
        assert last == "[DONE]"
        return [json.loads(event) for event in events]

    def metrics(self) -> dict[tuple[str, str], float]:
        """Samples by name and the one label that is not the model's name, "" for none."""
        from prometheus_client.parser import text_string_to_metric_families

        found = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                labels = [value for name, value in sample.labels.items() if name != "model_name"]
                found[sample.name, "".join(labels)] = sample.value
        return found

    def slow(self, seconds: float) -> None:
        """From now on the engine waits before every step."""
        engine = self.server.worker.engine
        step = engine.step

        def waiting() -> Any:
            time.sleep(seconds)
            return step()

        engine.step = waiting  # type: ignore[method-assign]

    def idle(self, seconds: float = 10) -> None:
        """Wait until nothing is open, running or waiting."""
        end = time.monotonic() + seconds
        while self.server.worker.open or self.server.requests or self.server.worker.engine.busy:
            assert time.monotonic() < end, "requests are left"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(
    model: Decoder, *, max_sequences: int = 16, cache_tokens: int | None = None, **options: Any
) -> Iterator[Served]:
    """A server on a free port of this computer. options: of `ServerSettings`, the server's `store` and `speculate`, and
    `buffer`."""
    own = {name: options.pop(name, None) for name in ("store", "speculate")}
    buffer = options.pop("buffer", None)
    chosen = ServerSettings(**{"name": "tiny", "port": 0, **options})
    server = Server(model, chosen, max_sequences=max_sequences, cache_tokens=cache_tokens, **own)
    with listen(chosen.host, chosen.port) as sock:
        if buffer is not None:  # of each connection, in bytes
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        http = http_server(server)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        served = Served(server, url_of(sock))
        try:
            yield served
            served.idle()
        finally:
            http.should_exit = True
            served.http.close()
            thread.join(10)
            server.close()
            assert not thread.is_alive()
            assert not server.worker.alive


class Running:
    """`handful serve` in a process of its own, on a free port."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        code = "import sys; from handful.cli import main; sys.argv = ['handful', *sys.argv[1:]]; main()"
        arguments = ["serve", str(folder), "--name", "tiny", "--port", str(port), *options]
        self.process = fresh.Process("-c", code, *arguments)
        end = time.monotonic() + 60
        while not (found := re.search(r"serving tiny at (\S+)", self.said())):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end
            time.sleep(0.02)
        self.url = found[1]

    def said(self) -> str:
        return Path(self.process._said[1]).read_text("utf-8") if Path(self.process._said[1]).exists() else ""

    def send(self, number: int) -> None:
        assert self.process._process.pid is not None
        os.kill(self.process._process.pid, number)

    def stream(self, tokens: int) -> tuple[threading.Thread, list[str], threading.Event]:
        """A stream that is being read in a thread: its lines, and an event when it has begun."""
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            body = {"prompt": [1], "max_tokens": tokens, "stream": True, "ignore_eos": True}
            try:
                with httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=60) as answer:
                    for line in answer.iter_lines():
                        lines.append(line)
                        begun.set()
            except httpx.HTTPError as error:
                lines.append(f"broken: {type(error).__name__}")

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        assert begun.wait(20)
        return thread, lines, begun
