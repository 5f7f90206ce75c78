"""How do speed and memory grow with context, sequences, experts and layers, and where does the line bend?

    python bench/growth.py [--axes context experts] [--repeats 3] [--kv-cache-dtype int8] [--dtype float32]
                           [--level avx2]

Random weights of one small shape, of which one axis grows at a time. Every point is a process of its own, whose peak
memory is its own too; inside it decoding and reading a prompt take turns. A step decodes one token of every sequence at
the end of its context, which is filled with random keys and values; a prompt's chunk is read at the same place.

What else the machine does can only take time away. So every point is measured in rounds with all others, and the least
of its rounds' medians counts, if another round comes within 10 % of it. Where none does, that point alone is measured
again, three times at most; one that even then stands alone is marked "disturbed", and no line is laid through it.

A straight line is laid through the seconds of a pass against the axis, by least squares of relative errors. What is
farthest off it, and where the slope changes most, is said of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import keep, show

from handful.config import ModelConfig, RouterConfig
from handful.kernels.extension import available, levels
from handful.machine import machine
from handful.model import Decoder
from handful.positions import KVCache, KVCaches, cache_dtype

CHUNK = 512  # tokens of a prompt that are read at once; of several sequences 64 each
LEAST = 0.02  # seconds that a case is repeated for, within a round
ROUNDS, MORE = 2, 3  # of every point, and of one whose rounds do not agree
AGREE = 0.1  # by how much of the least its next may be above it
WHENS = ("decode", "prefill")


POINT = {"context": 1024, "sequences": 1, "experts": 32, "layers": 4}
AXES = {
    "context": (1024, 2048, 4096, 8192, 16384, 32768),
    "sequences": (1, 2, 4, 8, 16, 32, 64),
    "experts": (8, 16, 32, 64, 128, 256),
    "layers": (2, 4, 8, 12, 16),
}


def shape(experts: int, layers: int, context: int) -> ModelConfig:
    """4 experts of a token, whatever their number; keys and values of 2 heads of 128 for 8 of queries."""
    router = RouterConfig(experts=experts, top_k=4)
    return ModelConfig(
        vocab=4096, width=512, layers=layers, heads=8, kv_heads=2, head_dim=128, ffn=0, router=router,
        expert_width=512, qk_norm="head", context=context + CHUNK,
    )  # fmt: skip


def seconds(case: Callable[[], object]) -> float:
    """Of a call, among as many as LEAST takes."""
    count, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < LEAST:
        case()
        count += 1
    return took / count


@torch.inference_mode()
def measure(point: dict[str, int], dtype: str, kv_cache_dtype: str, repeats: int) -> dict[str, float]:
    """Median seconds of a step of decoding and of reading a chunk, and bytes."""
    context, sequences = point["context"], point["sequences"]
    torch.manual_seed(0)
    config, wide = shape(point["experts"], point["layers"], context), getattr(torch, dtype)
    model = Decoder(config).to(wide).eval()
    each = CHUNK if sequences == 1 else CHUNK // 8
    held = cache_dtype(kv_cache_dtype, config, wide)
    caches = [KVCache(config, 1, context + each, dtype=held) for _ in range(sequences)]
    for layer in range(config.layers):
        rows = torch.randn(1, config.n_kv_heads, context, config.d_head, dtype=wide)
        caches[0].append(layer, rows, rows)
    for cache in caches:
        cache.begin(caches[0].beginning(context), context)

    def passed(new: int) -> Callable[[], object]:
        # Others each time: those that choose the same experts would find them in the processor's cache.
        batches = itertools.cycle(torch.randint(config.vocab, (64, 1, new * sequences)))

        def case() -> None:
            model.hidden_states(next(batches), caches[0] if sequences == 1 else KVCaches(caches, [new] * sequences))
            for cache in caches:
                cache.length = context

        return case

    forget_peak()
    cases = {"decode": passed(1), "prefill": passed(each)}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            took = seconds(case)
            if turn:
                taken[name].append(took)
    return {
        **{name: statistics.median(all_of_them) for name, all_of_them in taken.items()},
        "prompt": each * sequences,
        "cache": sum(cache.nbytes for cache in caches),
        "weights": sum(p.nbytes for p in model.parameters()),
        "peak": peak_bytes(),
    }


def agrees(tries: Sequence[dict[str, float]]) -> bool:
    """Whether the least of each time is met by another try."""
    least_two = [sorted(one[when] for one in tries)[:2] for when in WHENS]
    return all(len(two) == 2 and two[1] <= (1 + AGREE) * two[0] for two in least_two)


def measure_axis(
    values: Sequence[int], measure_one: Callable[[int], dict[str, float]]
) -> Iterator[list[dict[str, Any]]]:
    """Each value's least times, and whether they stand alone: after every round from the first that may be the last."""
    tries: dict[int, list[dict[str, float]]] = {value: [] for value in values}
    for turn in range(ROUNDS + MORE):
        asked = [value for value in values if turn < ROUNDS or not agrees(tries[value])]
        for value in asked:
            tries[value].append(measure_one(value))
        if asked and turn + 1 >= ROUNDS:
            yield [
                {**tried[0], **{when: min(one[when] for one in tried) for when in WHENS}, "rounds": len(tried),
                 "disturbed": not agrees(tried)}
                for tried in tries.values()
            ]  # fmt: skip


def forget_peak() -> None:
    """Let the process's peak of memory begin again, here: building a model takes more than running it."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """a and b of y = a + b · x, by least squares of the relative errors."""
    weights = [1 / y**2 for y in ys]
    total = sum(weights)
    x_mean = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    y_mean = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    above = sum(w * (x - x_mean) * (y - y_mean) for w, x, y in zip(weights, xs, ys, strict=True))
    b = above / sum(w * (x - x_mean) ** 2 for w, x in zip(weights, xs, strict=True))
    return y_mean - b * x_mean, b


def straightness(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """How far values are off their line: the point that is farthest, and where the slope changes most and by what."""
    a, b = line(xs, ys)
    off = [y / (a + b * x) - 1 for x, y in zip(xs, ys, strict=True)]
    farthest = max(range(len(xs)), key=lambda i: abs(off[i]))
    slopes = [(ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i]) for i in range(len(xs) - 1)]
    # A change counts by what it makes of the next value.
    bends = [(slopes[i] - slopes[i - 1]) * (xs[i + 1] - xs[i]) / ys[i + 1] for i in range(1, len(slopes))]
    bend = max(range(len(bends)), key=lambda i: abs(bends[i]))
    return {
        "at rest": a, "slope": b, "off": off[farthest], "off at": xs[farthest], "bend": bends[bend],
        "bend at": xs[bend + 1],
    }  # fmt: skip


def said(axis: str, when: str, found: dict[str, float]) -> str:
    """A sentence of `straightness`, in milliseconds."""
    text = (
        f"{when}: {1e3 * found['at rest']:.3f} ms + {1e6 * found['slope']:.3f} µs × {axis}; farthest off the line "
        f"{found['off']:+.0%} at {found['off at']:,.0f}"
    )
    steeper = "steeper" if found["bend"] > 0 else "flatter"
    return f"{text}; {steeper} from {found['bend at']:,.0f} on by {abs(found['bend']):.0%} of the next value"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--kv-cache-dtype", default="auto", choices=["auto", "int8"])
    parser.add_argument("--repeats", type=int, default=3, help="passes of a round, of which the median is taken")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--level", help="the instructions that Handful keeps to, as HANDFUL_ISA names them")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.level:
        os.environ["HANDFUL_ISA"] = asked.level  # of the points' processes, and of what is said of this machine
    if asked.point:
        print(json.dumps(measure(json.loads(asked.point), asked.dtype, asked.kv_cache_dtype, asked.repeats)))
        return
    level = {use: one.name for use, one in levels(machine().isa).items()} if available() else None
    notes = {"dtype": asked.dtype, "kv_cache_dtype": asked.kv_cache_dtype, "levels": level}
    for name in asked.axes:

        def measure_one(value: int, name: str = name) -> dict[str, float]:
            print(f"\r{name} {value:<20}", end="", file=sys.stderr, flush=True)
            point = json.dumps({**POINT, name: value})
            given = [
                "--point", point, "--dtype", asked.dtype, "--kv-cache-dtype", asked.kv_cache_dtype,
                "--repeats", str(asked.repeats), "--threads", str(asked.threads),
            ]  # fmt: skip
            done = subprocess.run([sys.executable, __file__, *given], stdout=subprocess.PIPE, check=True)
            return {name: value, **json.loads(done.stdout)}

        other = (os.environ.get("HANDFUL_ISA"), asked.dtype, asked.kv_cache_dtype)
        parts = [part for part in other if part not in (None, "bfloat16", "auto")]
        for found in measure_axis(AXES[name], measure_one):
            print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
            show([_row(name, one) for one in found])
            lines = {}
            straight = [one for one in found if not one["disturbed"]]
            for when in WHENS if len(straight) > 2 else ():
                lines[when] = straightness([one[name] for one in straight], [one[when] for one in straight])
                print(said(name, when, lines[when]))
            keep("-".join(["growth", name, *parts]), found, {**notes, "lines": lines})
        print(flush=True)


def _row(axis: str, one: dict[str, Any]) -> dict[str, Any]:
    sequences = one.get("sequences", POINT["sequences"])
    return {
        axis: f"{one[axis]:,}",
        "step ms": 1e3 * one["decode"],
        "decode tokens/s": sequences / one["decode"],
        "chunk ms": 1e3 * one["prefill"],
        "prefill tokens/s": one["prompt"] / one["prefill"],
        "cache MB": one["cache"] / 1e6,
        "weights MB": one["weights"] / 1e6,
        "peak MB": one["peak"] / 1e6,
        "rounds": f"{one['rounds']}, disturbed" if one["disturbed"] else str(one["rounds"]),
    }


if __name__ == "__main__":
    main()
