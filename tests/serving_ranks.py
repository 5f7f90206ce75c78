"""Servers for tests whose experts are on ranks: real processes, and what they say of themselves."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from serving import Running

COMPLETIONS = "/v1/completions"


class Ranks(Running):
    """`handful serve --ranks` in processes of its own."""

    def __init__(self, folder: Path, *options: str, ranks: int = 3) -> None:
        super().__init__(folder, "--ranks", str(ranks), *options)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def state(self) -> Any:
        return self.http.get("/ranks").json()

    def pid(self, index: int) -> int:
        return next(int(rank["pid"]) for rank in self.state()["ranks"] if rank["rank"] == index)

    def post(self, **body: Any) -> Any:
        answer = self.http.post(COMPLETIONS, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def until(self, holds: Callable[[Any], Any], seconds: float = 40) -> Any:
        """The first state of which something holds."""
        end = time.monotonic() + seconds
        while not holds(state := self.state()):
            assert time.monotonic() < end, (state, self.said())
            time.sleep(0.02)
        return state

    def end(self) -> None:
        self.http.close()
        self.send(signal.SIGTERM)
        ended = self.process.wait(30)
        assert ended.returncode == 0, ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr


@contextlib.contextmanager
def running(folder: Path, *options: str, ranks: int = 3) -> Iterator[Ranks]:
    found = Ranks(folder, *options, ranks=ranks)
    try:
        yield found
    finally:
        found.end()


def asked(number: int, **changes: Any) -> dict[str, Any]:
    prompt = [(number * 7 + i) % 200 for i in range(3 + number % 4 * 20)]
    return {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1, **changes}


def whole(state: Any) -> bool:
    return state["settled"] and not state["gone"] and all(rank["linked"] for rank in state["ranks"])


def children(pid: int | None) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdecimal() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
