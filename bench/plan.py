"""How close does the forecast of `handful plan` come, and which shares of the ceilings do its parts reach?

    python bench/plan.py [--formats bfloat16 int8 int4] [--repeats 5] [--shares]

By default a model of 4 layers in OLMoE's shape, but narrower, with random weights. In every round, and for every
format, the computer is measured, the model is planned, decodes one sequence greedily, and reads a prompt of 512 tokens;
medians over the rounds are shown, and what the forecast is made of. `--shares` takes the parts that
`forecast.EFFICIENCY` has beside the experts (those are `bench/experts.py`'s): matrices and attention, with one token
and with a prompt of 512, by the rates of memory and of a product measured in the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import publish, rounds, show
from torch import Tensor

from handful.attention import Attention
from handful.ceilings import Ceilings, measure_overhead
from handful.config import ModelConfig, RouterConfig
from handful.engine import CHUNK, Engine, Request
from handful.experts.quantize_model import quantize_model
from handful.forecast import FORMATS
from handful.machine import machine, measure
from handful.model import Decoder
from handful.plan import plan
from handful.positions import KVCache
from handful.sampling import Sampling

SHAPE = ModelConfig(
    vocab=16384,
    width=1024,
    layers=4,
    heads=16,
    router=RouterConfig(experts=32, top_k=4, normalize=False),
    expert_width=512,
    qk_norm="full",
    context=1024,
    tied=False,
)
DECODED, READ = 48, 64  # tokens


def made(dtype: str) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SHAPE).to(torch.float32 if dtype == "float32" else torch.bfloat16).eval()
    if FORMATS[dtype]:
        quantize_model(model, FORMATS[dtype])
    return model


def step_seconds(model: Decoder, prompt: int, tokens: int) -> list[float]:
    """The seconds of every step of one request; the first ones read its prompt."""
    engine = Engine(model, speculate=False)
    given = torch.randint(SHAPE.vocab, (prompt,)).tolist()
    engine.submit(Request(prompt=given, max_tokens=tokens, sampling=Sampling(temperature=0.0)))
    found = []
    while engine.busy:
        began = time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - began)
    return found


def computer() -> Ceilings:
    """The ceilings of this moment; whatever memory and disk are free."""
    found, rates = machine(), measure()
    return Ceilings(
        cpu=found.cpu,
        threads=found.threads,
        native_error=found.native_error,
        memory_bytes=1 << 50,
        disk_free_bytes=1 << 50,
        disk_bytes_per_second=None,
        overhead=measure_overhead(),
        measured_at=time.time(),
        **vars(rates),
    )


def forecasts(formats: list[str], repeats: int) -> list[dict[str, Any]]:
    """A row for each format and use: medians over rounds, in each of which the ceilings are measured before a run."""
    models = {dtype: made(dtype) for dtype in formats}
    seen: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for dtype, model in models.items():
            here = computer()
            decoding = statistics.median(step_seconds(model, READ, DECODED)[4:])
            reading = step_seconds(model, CHUNK, 1)[0]
            decode = plan(SHAPE, here, dtype=dtype, context=READ + DECODED // 2).decode
            prefill = plan(SHAPE, here, dtype=dtype, context=CHUNK).prefill
            for use, step, took in (("decode", decode, decoding), ("prefill", prefill, reading)):
                assert step is not None, "the native kernels are not there"
                rate = step.rate(hit_rate=1.0)
                assert rate is not None
                measured = step.tokens / took
                parts = {name: 1e3 * getattr(step, name) for name in ("resident", "experts", "attention", "overhead")}
                values = {"forecast tokens/s": rate, "measured tokens/s": measured}
                values["forecast ÷ measured"] = rate / measured
                seen.setdefault((use, dtype), []).append({**values, "ms": 1e3 * took, **parts})
    return [
        {"use": use, "format": dtype, **{name: statistics.median(row[name] for row in rows) for name in rows[0]}}
        for (use, dtype), rows in seen.items()
    ]


def shares(formats: list[str], repeats: int) -> list[dict[str, Any]]:
    """Rates of attention and its matrices in layers of width 2048, as shares of the ceilings of the same rounds."""
    past = 8192
    shape = ModelConfig(vocab=64, width=2048, layers=6, heads=16, ffn=64, context=past)
    buffer = torch.ones(1 << 30, dtype=torch.uint8)
    rows = []
    for dtype in formats:
        wide = torch.float32 if dtype == "float32" else torch.bfloat16
        model = Decoder(shape).to(wide).eval()
        if FORMATS[dtype]:
            quantize_model(model, FORMATS[dtype])
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        matrices = [matrix for layer in layers for matrix in (layer.q, layer.k, layer.v, layer.o)]
        one, many = torch.randn(1, 1, 2048).to(wide), torch.randn(1, CHUNK, 2048).to(wide)
        short, long = KVCache(shape, 1, past, dtype=wide), KVCache(shape, 1, past, dtype=wide)
        for t in (t for held in long.keys_values for t in held):
            t.normal_()
        long.length = past - 1
        x, w = torch.randn(1024, 2048).to(wide), torch.randn(2048, 2048).to(wide)
        spans = {"one": short.span(shape, 1), "all": long.span(shape, 1), "prompt": short.span(shape, CHUNK)}

        def attend(name: str, x_BSD: Tensor, layers: Any = layers, spans: Any = spans) -> None:
            for layer in layers:
                layer(x_BSD, spans[name])

        def multiply(x_BSD: Tensor, matrices: Any = matrices) -> None:
            for matrix in matrices:
                matrix(x_BSD)

        cases: dict[str, Callable[[], object]] = {
            "read": lambda: torch.ops.handful.read_bandwidth(buffer, 1),
            "product": partial(F.linear, x, w),
            "matrices": partial(multiply, one),
            "matrices_product": partial(multiply, many),
            "one": partial(attend, "one", one),
            "all": partial(attend, "all", one),
            "prompt": partial(attend, "prompt", many),
        }
        took = {name: 1e-3 * found["median"] for name, found in rounds(cases, repeats).items()}
        read, product = buffer.nbytes / took["read"], 2 * 1024 * 2048 * 2048 / took["product"]
        size = sum(t.nbytes for layer in layers for t in (*layer.parameters(), *layer.buffers()))
        flops = 2 * 4 * shape.layers * 2048 * 2048 * CHUNK
        scores = 4 * shape.layers * 2048 * CHUNK * (CHUNK + 1) / 2
        cached = sum(t.nbytes for held in long.keys_values for t in held)
        rows.append({
            "format": dtype, "matrices": size / took["matrices"] / read,
            "attention": cached / (took["all"] - took["one"]) / read,
            "matrices_product": flops / took["matrices_product"] / product,
            "attention_product": scores / (took["prompt"] - took["matrices_product"]) / product,
            "read GB/s": read / 1e9, "product GFLOP/s": product / 1e9,
        })  # fmt: skip
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["bfloat16", "int8", "int4"], choices=list(FORMATS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shares", action="store_true")
    asked = parser.parse_args()
    if asked.shares:
        show(shares(asked.formats, asked.repeats))
        return
    publish("plan", forecasts(asked.formats, asked.repeats), {"repeats": asked.repeats})


if __name__ == "__main__":
    main()
