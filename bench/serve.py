"""What does a server cost beside the bare engine, and how does it do beside llama.cpp's?

    python bench/serve.py MODEL [--quant int4] [--clients 16 64] [--rounds 3] [--llama-server FILE --gguf FILE]

Every client asks twice, one request after the other, for 128 tokens after a prompt of 128 to 1,024 random tokens, as a
stream. In each round all take turns on the same requests:

engine      `handful.engine.Engine` in a process of its own, all requests given at once, without HTTP
handful     `handful serve`
llama.cpp   `llama-server`, of whose model the file is given, with as many slots as there are sequences

Both servers run at most 16 sequences at a time (`--sequences`). Tokens/s is made tokens by the time from the first
request to the last answer; "first" is the time to the first token, "between" the time between two, as clients see it.
The clients are a process of their own, on the same cores. Nothing is found in a prefix cache: no two prompts begin
alike, and every round draws new ones.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timing import keep, show

MADE, VOCAB, AGAIN = 128, 8000, 2

Request = dict[str, Any]


def requests_of(clients: int, seed: int) -> list[list[Request]]:
    """Of each client, one after the other."""
    draw = random.Random(seed)

    def one() -> Request:
        prompt = [draw.randrange(10, VOCAB) for _ in range(draw.randrange(128, 1025))]
        return {"prompt": prompt, "max_tokens": MADE, "temperature": 0, "ignore_eos": True, "stream": True}

    return [[one() for _ in range(AGAIN)] for _ in range(clients)]


# ---------------------------------------------------------------------------------------------------------------------
# The bare engine.


def run_engine(model: Path, quant: str | None, sequences: int, clients: int, seed: int) -> None:
    """Prints tokens and seconds as JSON."""
    import torch

    from handful.engine import Engine
    from handful.engine import Request as Asked
    from handful.families.io import load_decoder
    from handful.sampling import Sampling

    decoder = load_decoder(model, dtype=torch.bfloat16, quantize={"int8": 8, "int4": 4}.get(quant or ""))
    greedy = Sampling(temperature=0)

    def jobs(many: list[list[Request]]) -> list[Asked]:
        order = [one[i] for i in range(AGAIN) for one in many]
        return [Asked(prompt=one["prompt"], max_tokens=MADE, sampling=greedy) for one in order]

    # Random weights repeat themselves, which no peer is asked to make use of.
    Engine(decoder, max_sequences=sequences, speculate=False).run(jobs(requests_of(1, seed + 1)))
    engine = Engine(decoder, max_sequences=sequences, speculate=False)
    asked = jobs(requests_of(clients, seed))
    began = time.perf_counter()
    made = sum(len(job.made) for job in engine.run(asked))
    print(json.dumps({"tokens": made, "seconds": time.perf_counter() - began}))


# ---------------------------------------------------------------------------------------------------------------------
# Servers, and their clients.


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def served(command: list[str], port: int) -> Iterator[str]:
    """The address of a server that is ready."""
    import httpx

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended with status {process.returncode}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def run_clients(url: str, clients: int, seed: int) -> None:
    """Prints as JSON what the clients saw."""
    import httpx

    firsts: list[float] = []
    gaps: list[float] = []
    made = 0

    async def client(http: httpx.AsyncClient, requests: list[Request]) -> None:
        nonlocal made
        for request in requests:
            began = last = time.perf_counter()
            seen = 0
            async with http.stream("POST", f"{url}/v1/completions", json=request) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    choices = json.loads(line[6:]).get("choices")
                    if not choices or (not choices[0].get("text") and choices[0].get("finish_reason")):
                        continue
                    now = time.perf_counter()
                    (gaps if seen else firsts).append(now - last if seen else now - began)
                    last, seen = now, seen + 1
            made += MADE

    async def all_of_them() -> float:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # llama.cpp closes them
        async with httpx.AsyncClient(timeout=None, limits=limits) as http:
            began = time.perf_counter()
            await asyncio.gather(*(client(http, requests) for requests in requests_of(clients, seed)))
            return time.perf_counter() - began

    seconds = asyncio.run(all_of_them())
    found = {"tokens": made, "seconds": seconds, "first": statistics.median(firsts), "between": statistics.median(gaps)}
    print(json.dumps(found))


def asked_of(*arguments: Any) -> dict[str, float]:
    """What this file prints in a process of its own."""
    command = [sys.executable, __file__, "--run", *map(str, arguments)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    seen: dict[tuple[int, str], list[dict[str, float]]] = {}
    for turn in range(arguments.rounds):
        for clients in arguments.clients:
            for name in ["engine", "handful", *(["llama.cpp"] if arguments.llama_server else [])]:
                print(f"\rround {turn + 1}, {clients} clients: {name:<12}", end="", file=sys.stderr, flush=True)
                seed = 1000 * turn + clients
                seen.setdefault((clients, name), []).append(one_run(arguments, name, clients, seed))
    print(file=sys.stderr)
    rows = []
    for clients in arguments.clients:
        here = {name: runs for (count, name), runs in seen.items() if count == clients}
        rates = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in here.items()}
        for name, runs in here.items():
            beside = [own / other for own, other in zip(rates["handful"], rates[name], strict=True)]
            rows.append(
                {
                    "clients": clients,
                    "who": name,
                    "tokens/s": statistics.median(rates[name]),
                    "first, s": median_of(runs, "first"),
                    "between, ms": None if "between" not in runs[0] else 1e3 * (median_of(runs, "between") or 0),
                    "handful serve is": f"{statistics.median(beside):.3f} ×",
                }
            )
    return rows


def median_of(runs: list[dict[str, float]], name: str) -> float | None:
    return statistics.median(run[name] for run in runs) if name in runs[0] else None


def one_run(arguments: argparse.Namespace, name: str, clients: int, seed: int) -> dict[str, float]:
    if name == "engine":
        return asked_of("engine", arguments.model, arguments.quant or "-", arguments.sequences, clients, seed)
    port, sequences = free_port(), arguments.sequences
    if name == "handful":
        quant = [] if arguments.quant is None else ["--quant", arguments.quant]
        command = [sys.executable, "-m", "handful", "serve", str(arguments.model), "--port", str(port), *quant,
                   "--no-speculate"]  # fmt: skip
        command += ["--max-sequences", str(sequences), "--queue", "1000", "--name", "m"]
    else:
        context = sequences * (1024 + MADE + 8)
        command = [str(arguments.llama_server), "-m", str(arguments.gguf), "--port", str(port), "-t", "2"]
        command += ["-c", str(context), "-np", str(sequences), "--no-webui"]
    with served(command, port) as url:
        asked_of("clients", url, 1, seed + 1)  # warm
        return asked_of("clients", url, clients, seed)


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        kind, *rest = sys.argv[2:]
        if kind == "engine":
            run_engine(Path(rest[0]), None if rest[1] == "-" else rest[1], *map(int, rest[2:]))
        else:
            run_clients(rest[0], *map(int, rest[1:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quant", choices=("int8", "int4"))
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--gguf", type=Path, help="for llama-server")
    arguments = parser.parse_args()
    if (arguments.llama_server is None) != (arguments.gguf is None):
        parser.error("--llama-server and --gguf go together")
    rows = measure(arguments)
    show(rows)
    keep("serve", rows, {"model": arguments.model.name, "quant": arguments.quant, "sequences": arguments.sequences})


if __name__ == "__main__":
    main()
