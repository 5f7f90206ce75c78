"""How long is a served model without a rank that is killed?

    python bench/outage.py MODEL [--ranks 4] [--rounds 5] [--memory 2GB]

`handful serve --ranks` answers a stream of a long answer, of which every token's time is taken, and one rank after the
other is killed with SIGKILL. Of each kill:

pause    the longest time between two tokens of the stream around it
masked   until the last token that was made without some experts; 0: none was
whole    until all experts were to be had again, from the others: full service, but for one rank's cores
back     until the rank, started again, had its experts again

All in seconds. No request may fail.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from timing import keep, show

PROMPT = list(range(5, 60))
SETTLED = 120.0


class Stream(threading.Thread):
    """An answer after the other, until told to end: when each token came, and which were made without experts."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.times: list[float] = []
        self.degraded: list[float] = []
        self.errors: list[str] = []
        self.ending = False
        self.start()

    def run(self) -> None:
        body = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True, "return_token_ids": True}
        while not self.ending:
            try:
                with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as answer:
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            self.take(json.loads(line[6:]))
            except httpx.HTTPError as error:
                self.errors.append(repr(error))

    def take(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if "error" in event:
            self.errors.append(str(event["error"]))
            return
        self.times.append(now)
        if "degraded" in event:
            self.degraded.append(now)


def served(arguments: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A server, and where it is."""
    command = [sys.executable, "-m", "handful", "serve", *arguments, "--port", "0", "--json", "--no-measure"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = ""
    while not found.rstrip().endswith("}"):
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        found += line
    return process, json.loads(found)["url"]


def settled(url: str, ranks: int) -> dict[str, Any]:
    end = time.monotonic() + SETTLED
    while True:
        state: dict[str, Any] = httpx.get(f"{url}/ranks", timeout=30).json()
        if state["settled"] and len(state["ranks"]) == ranks and not state["gone"]:
            return state
        if time.monotonic() > end:
            raise SystemExit(f"the ranks did not settle: {state}")
        time.sleep(0.05)


def killed(url: str, ranks: int, index: int) -> dict[str, Any]:
    state = settled(url, ranks)
    time.sleep(2)
    stream = Stream(url)
    time.sleep(2)
    before = len(state["outages"]), max(0, len(stream.times) - 1)
    pid = next(rank["pid"] for rank in state["ranks"] if rank["rank"] == index)
    at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    time.sleep(3)
    while len(httpx.get(f"{url}/ranks", timeout=30).json()["outages"]) <= before[0]:
        time.sleep(0.05)
    outage = settled(url, ranks)["outages"][-1]
    stream.ending = True
    stream.join(60)
    if stream.errors:
        raise SystemExit(f"requests failed: {stream.errors}")
    around = [now for now in stream.times if at - 0.5 < now < at + 10]
    return {
        "rank": index,
        "pause": max(b - a for a, b in itertools.pairwise(around)),
        "masked": max((now - at for now in stream.degraded), default=0.0),
        "missing": outage["missing"],
        "whole": outage["whole_seconds"],
        "back": outage["back_seconds"],
        "tokens": len(stream.times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory")
    given = parser.parse_args()
    more = ["--memory", given.memory] if given.memory else []
    process, url = served([given.model, "--ranks", str(given.ranks), *more])
    try:
        rows = [killed(url, given.ranks, number % given.ranks) for number in range(given.rounds)]
    finally:
        process.terminate()
        process.wait(30)
    show(rows)
    for name in ("pause", "masked", "whole", "back"):
        values = [row[name] for row in rows]
        print(f"{name:>7}: median {statistics.median(values):.2f} s, most {max(values):.2f} s")
    keep("outage", rows, {"model": Path(given.model).name, "ranks": given.ranks})


if __name__ == "__main__":
    main()
