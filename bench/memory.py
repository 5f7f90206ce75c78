"""How quick is a model in less memory than it needs, and who should stay in memory?

    python bench/memory.py --run RUN [--documents 24] [--prompt 64] [--tokens 64]
    python bench/memory.py --model FOLDER [--run RUN] [--shares 100 50 25] [--prompt 64] [--tokens 64] [--quantize 4]
                           [--rounds 3] [--llama-bench FILE --gguf FILE]

--run     a run of `handful train` (or any model with its tokenizer): the routings of texts of Python's standard library
          are recorded, prompts at once and then token by token, and every policy is simulated on them, beside the best
          that could be done by one who knows the future, and by one who knows it for a token alone. "all" counts every
          use, "decode" those of tokens read one by one. It also counts how often the router of the next layer, given
          this layer's input, names the experts that are then chosen.
--model   a checkpoint folder: its experts are packed there (once), then decoded with a budget that holds 100, 50 and
          25 % of them, with and without reading ahead by turns, ROUNDS times: the medians are shown. "forecast" is
          `handful plan`'s with the hits and guesses of the same run, "beforehand" with the hit rate that it takes where
          none is known; both from rates measured before each round. The same tokens are read every time, and outputs
          must be the same, bit for bit. With --run the model chooses as that one did in its first text (it must have as
          many experts, and as many layers or more): random weights choose alike for every token, which is not what
          trained ones do.
          With --llama-bench it decodes the same shape from a GGUF file, mapped, in a memory control group that is
          granted the same bytes for weights and LLAMA beside them (as root; the file leaves the system's cache first).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import publish, show
from torch import Tensor

import handful
from handful import memory
from handful.ceilings import ceilings
from handful.experts.cache import NOTHING, POLICIES, Call, Key, NextUse, belady, play, simulate
from handful.experts.store import Store
from handful.model import Decoder
from handful.moe import Router
from handful.plan import plan
from handful.positions import KVCache
from handful.routing import Routing

LLAMA = 200_000_000  # bytes that llama.cpp is granted beside the weights: its cache, its working memory and itself


def texts(model: Decoder, documents: int, length: int) -> list[list[int]]:
    """Beginnings of files of the standard library, as tokens."""
    assert model.tokenizer is not None, "the model has no tokenizer"
    found: list[list[int]] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::3]:
        tokens = model.tokenizer.encode(path.read_text(encoding="utf-8")[: 8 * length])
        if len(tokens) >= length and len(found) < documents:
            found.append(tokens[:length])
    return found


@dataclass
class Trace:
    """What was routed in texts: for each call of the model the layers' routings, and what was guessed of each layer by
    its router from the input of the layer before (None of the first)."""

    starts: list[bool] = field(default_factory=list)  # whether a call is a prompt
    routings: list[list[Routing]] = field(default_factory=list)
    guesses: list[list[Routing | None]] = field(default_factory=list)

    def calls(self) -> list[Call]:
        """What each layer needs, call by call."""
        return [
            Call(index, routing.tokens, Counter(routing.experts_TK.flatten().tolist()))
            for call in self.routings
            for index, routing in enumerate(call)
        ]

    def decoding(self) -> list[bool]:
        """Whether each of `calls` is of a single token after a prompt."""
        return [not start for start, call in zip(self.starts, self.routings, strict=True) for _ in call]

    def right(self) -> float:
        """Of the experts of single tokens, those that were guessed: from 0 to 1."""
        found = wanted = 0
        for start, routings, guesses in zip(self.starts, self.routings, self.guesses, strict=True):
            for routing, guess in zip(routings, guesses, strict=True):
                if guess is not None and not start:
                    chosen = set(routing.experts_TK.flatten().tolist())
                    found += len(chosen & set(guess.experts_TK.flatten().tolist()))
                    wanted += len(chosen)
        return found / wanted


@torch.inference_mode()
def record(run: str, documents: int, prompt: int, tokens: int) -> Trace:
    """Read texts with a trained model, each a prompt at once and then token by token."""
    model = handful.load(run)
    assert isinstance(model, Decoder)
    trace = Trace()
    inputs: list[Tensor] = []

    def keep(layer: torch.nn.Module, given: tuple[Tensor, ...], got: tuple[Tensor, Routing]) -> None:
        inputs.append(given[0].reshape(-1, given[0].shape[-1]))

    layers = model.moe_layers
    assert layers, "a dense model has no experts"
    for layer in layers:
        layer.register_forward_hook(keep)
    for i, text in enumerate(texts(model, documents, prompt + tokens)):
        cache = KVCache(model.config, 1, len(text), dtype=model.embed.weight.dtype)
        for step in [text[:prompt], *([token] for token in text[prompt:])]:
            inputs.clear()
            _, routings = model(torch.tensor([step]), cache)
            trace.starts.append(len(step) > 1)
            trace.routings.append(routings)
            before = zip(layers[1:], inputs, strict=False)
            trace.guesses.append([None, *(layer.router(x_TD) for layer, x_TD in before)])
        print(f"\rrecorded {i + 1} of {documents} texts", end="", file=sys.stderr)
    print(file=sys.stderr)
    return trace


class ATokenAhead(NextUse):
    """`next-use` by one who knows what every layer needs when it comes next, and no more of what is to come."""

    def __init__(self, layers: int, experts: int, calls: Sequence[Call]) -> None:
        super().__init__(layers, experts)
        self._calls, self._now = calls, -1

    def call(self, call: Call) -> None:
        super().call(call)
        self._now += 1

    def evict(self, pinned: Container[Key] = NOTHING) -> Key | None:
        if self._due is None:
            layers = len(self._layers)
            due = 1 + self.due()
            for i, call in enumerate(self._calls[self._now + 1 : self._now + 1 + layers]):
                due[call.layer, list(call.counts)] = i / layers
            self._due = due
        return super().evict(pinned)


def policies(trace: Trace, run: str, documents: int, prompt: int, tokens: int) -> None:
    layers, experts, top_k = len(trace.routings[0]), trace.routings[0][0].experts, trace.routings[0][0].top_k
    calls, decoding, right = trace.calls(), trace.decoding(), trace.right()
    total = layers * experts
    rows: list[dict[str, Any]] = []
    for share in (10, 25, 50, 75):
        capacity = max(top_k, total * share // 100)
        row: dict[str, Any] = {"% of experts in memory": f"{share}"}
        cases = {name: partial(simulate, name, calls) for name in POLICIES}
        cases["a token ahead"] = partial(play, ATokenAhead(layers, experts, calls), calls)
        cases["best"] = partial(belady, calls)
        for name, case in cases.items():
            found = case(capacity=capacity)
            hits = [hit for call in found for hit in call]
            decoded = [hit for call, one in zip(found, decoding, strict=True) if one for hit in call]
            row[f"{name}, all"] = 100 * sum(hits) / len(hits)
            row[f"{name}, decode"] = 100 * sum(decoded) / len(decoded)
        rows.append(row)
    print(f"{layers} layers of {experts} experts, {top_k} a token; "
          f"{documents} texts, prompts of {prompt} tokens, then {tokens} one by one: hit rates in %")  # fmt: skip
    notes = {"run": Path(run).name, "documents": documents, "prompt": prompt, "tokens": tokens, "guessed_right": right}
    publish("memory-policies", rows, notes)
    print(f"the next layer's router guesses {100 * right:.0f} % of its experts from this layer's input")


def llama_rate(binary: Path, gguf: Path, limit: int, tokens: int) -> float | None:
    """Tokens/s that llama.cpp decodes in a process group of at most `limit` bytes; None if it ends without a rate."""
    old = Path("/sys/fs/cgroup/memory")
    base, name = (old, "memory.limit_in_bytes") if old.exists() else (old.parent, "memory.max")
    group = base / f"handful-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(limit))
        with gguf.open("rb") as file:  # what is cached already would be counted as another's
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        threads = str(len(os.sched_getaffinity(0)))
        # Weights laid out anew would be a copy that no map gives back.
        command = [str(binary), "-m", str(gguf), "--load-mode", "mmap", "--repack", "0", "-t", threads, "-ngl", "0",
                   "-p", "0", "-n", str(tokens), "-r", "1"]  # fmt: skip
        done = subprocess.run(
            ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command, "-o", "json"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        return float(json.loads(done.stdout)[0]["avg_ts"]) if done.returncode == 0 else None
    finally:
        group.rmdir()


@torch.inference_mode()
def speed(
    folder: str,
    trace: Trace | None,
    shares: list[int],
    prompt: int,
    tokens: int,
    quantize: int | None,
    rounds: int,
    llama: tuple[Path, Path] | None,
) -> None:
    rows: list[dict[str, Any]] = []
    dtype = {None: "bfloat16", 8: "int8", 4: "int4"}[quantize]
    model, store = memory.load(folder, 1 << 50, quantize=quantize)
    layout, held = store.layout, memory.resident_bytes(model)
    store.close()
    beside = Path(folder).parent
    right: list[Tensor] = []
    for share in shares:
        granted = held + layout.records * share // 100 * layout.record_bytes
        ways = (True, False) if share < 100 else (False,)
        found: dict[bool, list[dict[str, Any]]] = {way: [] for way in ways}
        for turn in range(rounds):
            machine = ceilings(beside, fresh=True)
            for read_ahead in ways if turn % 2 == 0 else ways[::-1]:
                model, store = memory.load(folder, granted, quantize=quantize, read_ahead=read_ahead)
                assert isinstance(model, Decoder)
                assert model.config.router is not None
                with store:
                    if trace is not None:
                        replay(model, store, trace)
                    outputs, read, took = decode(model, store, prompt, tokens)
                    stats = store.stats()
                right = right or outputs
                assert all(a.equal(b) for a, b in zip(outputs, right, strict=True)), "a budget changed the output"
                planned = plan(model.config, machine, dtype=dtype, memory=granted, context=prompt + tokens)
                assert planned.decode is not None
                needed, ahead = stats.total("hits") + stats.total("misses"), stats.total("ahead")
                seconds = planned.decode.seconds(stats.hit_rate, guessed=stats.guesses / needed, right=ahead / needed)
                assert seconds is not None
                can, unknown = 1 / seconds, planned.decode_tokens_per_second()
                disk = machine.disk_bytes_per_second or 0.0
                found[read_ahead].append({
                    "weights, GB": granted / 1e9, "hits %": 100 * stats.hit_rate, "tokens/s": 1 / took,
                    "forecast": can, "forecast ÷ measured": can * took, "beforehand": unknown,
                    "waiting %": 100 * stats.total("wait_seconds") / (took * tokens),
                    "read, MB a token": stats.total("bytes_read") / 1e6 / tokens,
                    "guesses right %": 100 * ahead / stats.guesses if stats.guesses else None, "prompt, s": read,
                    "memory, GB/s": machine.read_bytes_per_second / 1e9, "disk, GB/s": disk / 1e9,
                })  # fmt: skip
        for read_ahead in ways:
            each = found[read_ahead]
            row: dict[str, Any] = {"experts in memory": f"{share} %", "read ahead": "yes" if read_ahead else ""}
            for name in each[0]:
                row[name] = None if each[0][name] is None else statistics.median(one[name] for one in each)
            row |= {"÷ without": None, "from": None, "to": None}
            if read_ahead:
                pairs = [one["tokens/s"] / other["tokens/s"] for one, other in zip(each, found[False], strict=True)]
                row |= {"÷ without": statistics.median(pairs), "from": min(pairs), "to": max(pairs)}
            row["llama.cpp, mapped"] = None
            if llama and not read_ahead:
                row["llama.cpp, mapped"] = llama_rate(*llama, granted + LLAMA, tokens)
            rows.append(row)
            show(rows[-1:])
    print(f"{layout.format}, an expert {layout.record_bytes / 1e6:.2f} MB")
    notes = {"format": layout.format, "prompt": prompt, "tokens": tokens,
             "routings": "random" if trace is None else "of a run"}  # fmt: skip
    kind = "" if trace is None else "-routed"
    publish(f"memory-{layout.format.replace('/', '-')}{kind}", rows, notes)


def decode(model: Decoder, store: Store, prompt: int, tokens: int) -> tuple[list[Tensor], float, float]:
    """Logits of a prompt and of tokens one by one; the prompt's seconds, and those of a token after it."""
    draw = torch.Generator().manual_seed(0)
    given = torch.randint(model.config.vocab, (1, prompt + tokens), generator=draw)
    cache = KVCache(model.config, 1, prompt + tokens, dtype=model.embed.weight.dtype)
    began = time.perf_counter()
    outputs = [model(given[:, :prompt], cache)[0]]
    read = time.perf_counter() - began
    store.reset()
    began = time.perf_counter()
    outputs += [model(token, cache)[0] for token in given[:, prompt:].split(1, dim=1)]
    return outputs, read, (time.perf_counter() - began) / tokens


def replay(model: Decoder, store: Store, trace: Trace) -> None:
    """Let a model choose what the texts of a trace chose, call by call, and guess as it was guessed there."""

    def follow(index: int, router: Router) -> None:
        now = 0

        def choose(*_: Any, **options: Any) -> Routing:
            nonlocal now
            now += 1
            return trace.routings[now - 1][index]

        def guess(x_TD: Tensor) -> Routing:
            guessed = trace.guesses[now][index]
            assert guessed is not None, "nobody guesses for the first layer"
            return guessed

        router.forward = choose  # type: ignore[method-assign]
        store.guess_with(index, guess)

    for index, layer in enumerate(model.moe_layers):
        follow(index, layer.router)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--run")
    parser.add_argument("--shares", type=int, nargs="+", default=[100, 50, 25])
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quantize", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--gguf", type=Path)
    asked = parser.parse_args()
    trace = record(asked.run, asked.documents, asked.prompt, asked.tokens) if asked.run else None
    if trace is not None and not asked.model:
        policies(trace, asked.run, asked.documents, asked.prompt, asked.tokens)
    if asked.model:
        speed(asked.model, trace, asked.shares, asked.prompt, asked.tokens, asked.quantize, asked.rounds,
              (asked.llama_bench, asked.gguf) if asked.llama_bench else None)  # fmt: skip


if __name__ == "__main__":
    main()
