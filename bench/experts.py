"""How close do the native experts come to what memory and multipliers allow?

    python bench/experts.py [--repeats 5] [--only decode "native int4" ...]

One MoE layer's experts alone: no router, no attention. The ceilings are measured in the same rounds as everything else:
how fast memory is read, and torch's best dense products.

decode    1, 4 and 8 tokens of OLMoE's shape, D=2048 F=1024 E=64 K=8. Weights come from memory and not from a cache: in
          a round a case reads a gigabyte, walking through the experts of as many layers as that takes.
prefill   512 tokens of the same shape, and of Mixtral's, D=4096 F=14336 E=8 K=2. Every round has another random
          routing: loads differ from call to call, as they do in a model.

native, grouped    ours; int4/32 is 4 bits with a scale for each 32 weights.
transformers X     its OlmoeExperts on the same weights with that experts implementation. batched_mm copies an expert's
                   weights for each assignment, so it is there for decoding alone.
torch X            one plain product with as many weights as one decoded token uses, by torch's own kernels: no experts,
                   no activation. Its int4 has a zero point beside each scale.

MB are the weights, scales included, of the experts that a call uses, each once. "of ceiling" is the share of the best
ceiling: in decoding of memory's, in prefill of the products', in whatever dtype. "off" is how far the output lies from
grouped bf16's. `--only` keeps the cases whose names, such as "decode T=1 native int4/32", have one of the given parts.
Up to 8 GB of memory are used.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timing import keep, rounds, show
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from handful.experts import Experts
from handful.experts.quantized import QuantizedExperts
from handful.machine import native_error
from handful.routing import Routing

ROUND_BYTES = 1e9  # read by a decoding case in a round, so that no cache holds the weights until they are used again
PACKINGS = {"int8/32": (8, 32), "int8/128": (8, 128), "int4/32": (4, 32), "int4/128": (4, 128)}  # bits, group
PRODUCTS = [(1024, 2048, 2048), (2048, 4096, 4096), (512, 4096, 14336)]  # rows, inputs, outputs
NATIVE = "native bf16"
SAME = "grouped bf16"  # what "off" compares with


@dataclass(frozen=True)
class Shape:
    D: int
    F: int
    E: int
    K: int

    @property
    def expert_weights(self) -> int:
        return 3 * self.D * self.F


OLMOE = Shape(D=2048, F=1024, E=64, K=8)
MIXTRAL = Shape(D=4096, F=14336, E=8, K=2)

Call = Callable[[], object]
M = TypeVar("M", bound=nn.Module)
Walk = list[tuple[int, Tensor]]  # which layer, and its experts_TK, for one call after another


@dataclass(frozen=True, kw_only=True)
class Case:
    """`calls` one after another and round again, `per_round` of them in each round. bytes and flops are one call's."""

    calls: Sequence[Call]
    per_round: int = 1
    bytes: float = 0
    flops: float = 0
    first: list[object] = field(default_factory=list)  # what the very first call returned

    def runner(self) -> Callable[[], None]:
        endless = itertools.cycle(self.calls)

        def run() -> None:
            for call in itertools.islice(endless, self.per_round):
                out = call()
                if not self.first:
                    self.first.append(out)

        return run


# ---------------------------------------------------------------------------------------------------------------------
# Weights.


def bf16_experts(shape: Shape) -> Experts:
    with torch.device("meta"):
        experts = Experts(shape.E, shape.D, shape.F)
    experts = experts.to(torch.bfloat16).to_empty(device="cpu")
    for weight in (experts.gate_up, experts.down):
        # Gigabytes of random numbers would take long: every expert has the same ones, turned by another angle.
        one = (torch.randn(weight.shape[1:]) * weight.shape[2] ** -0.5).to(weight.dtype)
        for e in range(shape.E):
            weight[e] = one.roll(e, 0)
    return experts


class Layers:
    """A shape's layers in every format, made when first asked for: one, or `fill`, as many as fill a decoding round."""

    def __init__(self, shape: Shape, fill: bool) -> None:
        self.shape = shape
        self.fill = fill
        self._bf16: list[Experts] = []
        self._packed: dict[str, list[QuantizedExperts]] = {}

    def bf16(self) -> list[Experts]:
        if not self._bf16:
            self._bf16 = self._repeated(bf16_experts(self.shape))
        return self._bf16

    def packed(self, form: str) -> list[QuantizedExperts]:
        if form not in self._packed:
            self._packed[form] = self._repeated(QuantizedExperts.pack(on(self.bf16()[0], "native"), *PACKINGS[form]))
        return self._packed[form]

    def _repeated(self, one: M) -> list[M]:
        count = math.ceil(ROUND_BYTES / bytes_of(one)) if self.fill else 1
        return [one, *(copy.deepcopy(one) for _ in range(count - 1))]


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))


def on(experts: Experts, backend: str) -> Experts:
    """The same weights, multiplied by another backend."""
    other = copy.copy(experts)
    other.backend = backend
    return other


def theirs(experts: Experts, implementation: str) -> nn.Module:
    """The same weights in transformers' module."""
    count, width, hidden = experts.down.shape
    config = OlmoeConfig(hidden_size=width, intermediate_size=hidden, num_experts=count)
    config._experts_implementation = implementation
    with torch.device("meta"):
        other = OlmoeExperts(config)
    other.gate_up_proj, other.down_proj = experts.gate_up, experts.down
    return other


# ---------------------------------------------------------------------------------------------------------------------
# Routings. Each walk begins with the same one, whatever the number of layers: "off" compares first outputs.


def disjoint(shape: Shape, layers: int) -> Walk:
    """One token a call: every expert of every layer is used once before any is used again."""
    seeded = torch.Generator().manual_seed(0)
    order_lE = [torch.randperm(shape.E, generator=seeded) for _ in range(layers)]
    starts = range(0, shape.E, shape.K)
    return [(layer, order_lE[layer][None, i : i + shape.K]) for i in starts for layer in range(layers)]


def at_random(shape: Shape, T: int, layers: int, calls: int) -> Walk:
    seeded = torch.Generator().manual_seed(0)
    return [
        (i % layers, torch.rand(T, shape.E, generator=seeded).topk(shape.K).indices)
        for i in range(math.ceil(calls / layers) * layers)
    ]


def our_call(module: nn.Module, x_TD: Tensor, experts_TK: Tensor, shape: Shape) -> Call:
    weights_TK = torch.rand(experts_TK.shape, generator=torch.Generator().manual_seed(1))
    scores_TE = torch.zeros(len(x_TD), shape.E)
    # A routing that was used remembers its plan, so each call has a new one, as in a model.
    return lambda: module(x_TD, Routing(scores_TE, scores_TE, experts_TK, weights_TK))


def their_call(module: nn.Module, x_TD: Tensor, experts_TK: Tensor, shape: Shape) -> Call:
    weights_TK = torch.rand(experts_TK.shape, generator=torch.Generator().manual_seed(1)).to(x_TD.dtype)
    return lambda: module(x_TD, experts_TK, weights_TK)


# ---------------------------------------------------------------------------------------------------------------------
# Cases, by name; each is made when it is known that it is wanted.


def read_ceiling() -> dict[str, Case]:
    buffer = torch.ones(1 << 30, dtype=torch.uint8)  # written before it is read: untouched pages are one page of zeros
    return {"read 1 GiB": Case(calls=[lambda: torch.ops.handful.read_bandwidth(buffer, 1)], bytes=buffer.nbytes)}


def product_ceilings() -> dict[str, Case]:
    found = {}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for rows, inputs, outputs in PRODUCTS:
            x, w = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
            call = functools.partial(F.linear, x, w)
            found[f"product {name} {rows}×{inputs}×{outputs}"] = Case(calls=[call], flops=2 * rows * w.numel())
    return found


def experts_case(kind: str, form: str, T: int, layers: Layers) -> Case:
    shape = layers.shape
    modules: Sequence[nn.Module]
    if form != "bf16":
        modules = layers.packed(form)
    elif kind.startswith("transformers"):
        modules = [theirs(experts, kind.split()[1]) for experts in layers.bf16()]
    else:
        modules = [on(experts, kind) for experts in layers.bf16()]
    walk = disjoint(shape, len(modules)) if T == 1 else at_random(shape, T, len(modules), 8)
    used = sum(len(experts_TK.unique()) for _, experts_TK in walk) / len(walk)
    size = used * bytes_of(modules[0]) / shape.E
    x_TD = torch.randn(T, shape.D, generator=torch.Generator().manual_seed(T)).bfloat16()
    call = their_call if kind.startswith("transformers") else our_call
    return Case(
        calls=[call(modules[layer], x_TD, experts_TK, shape) for layer, experts_TK in walk],
        per_round=math.ceil(ROUND_BYTES / size) if layers.fill else 1,
        bytes=size,
        flops=2 * shape.expert_weights * T * shape.K,
    )


def matrices(weight_EOI: Tensor, shape: Shape) -> list[Tensor]:
    """All experts' rows in a few plain matrices, each with as many weights as one token's experts have."""
    rows = shape.K * shape.expert_weights // shape.D
    return [matrix for matrix in weight_EOI.flatten(0, 1).split(rows) if len(matrix) == rows]


def linear_case(layers: Layers) -> Case:
    x = torch.randn(1, layers.shape.D).bfloat16()
    found = [matrix for experts in layers.bf16() for matrix in matrices(experts.gate_up, layers.shape)]
    calls = [functools.partial(F.linear, x, matrix) for matrix in found]
    return plain(calls, found[0].nbytes)


def int4_case(form: str, layers: Layers) -> Case:
    """Every byte is two of torch's int4 codes, so our codes serve; the scales are its own."""
    x = torch.randn(1, layers.shape.D).bfloat16()
    group = PACKINGS[form][1]
    calls = []
    for experts in layers.packed(form):
        for codes in matrices(experts.gate_up.codes, layers.shape):
            scales = torch.rand(layers.shape.D // group, len(codes), 2).bfloat16()  # and zero points
            call = functools.partial(torch.ops.aten._weight_int4pack_mm_for_cpu, x, codes, group, scales)
            calls.append(call)
    return plain(calls, codes.nbytes + scales.nbytes)


def plain(calls: Sequence[Call], size: int) -> Case:
    return Case(calls=calls, per_round=math.ceil(ROUND_BYTES / size), bytes=size)


def makers(T: int, layers: Layers) -> dict[str, Callable[[], Case]]:
    kinds = [("native", form) for form in ("bf16", *PACKINGS)]
    kinds += [("grouped", "bf16"), ("transformers eager", "bf16"), ("transformers grouped_mm", "bf16")]
    if T <= 8:
        kinds.append(("transformers batched_mm", "bf16"))
    found: dict[str, Callable[[], Case]]
    found = {f"{kind} {form}": functools.partial(experts_case, kind, form, T, layers) for kind, form in kinds}
    if T == 1:
        found["torch linear bf16"] = functools.partial(linear_case, layers)
        for form in ("int4/32", "int4/128"):
            found[f"torch {form}"] = functools.partial(int4_case, form, layers)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Sections: what is measured in common rounds.


def section(
    title: str, tokens: Sequence[int], layers: Layers, only: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """Measure, print and return the rows of the cases that are wanted; none if there are none."""
    wanted = {
        (T, name): make
        for T in tokens
        for name, make in makers(T, layers).items()
        if not only or any(part in f"{title} T={T} {name}" for part in only)
    }
    if not wanted:
        return []
    found = read_ceiling() if layers.fill else product_ceilings()
    limits: dict[tuple[int | None, str], Case] = {(None, name): case for name, case in found.items()}
    cases = limits | {key: make() for key, make in wanted.items()}
    labels = {(T, name): f"{title} T={T} {name}" if T else f"{title} {name}" for T, name in cases}
    times = rounds({labels[key]: case.runner() for key, case in cases.items()}, repeats)
    ms = {
        key: {which: value / case.per_round for which, value in times[labels[key]].items()}
        for key, case in cases.items()
    }
    # Decoding is held against what memory allows, prefill against what the multipliers do.
    unit = "GB/s" if layers.fill else "GFLOP/s"
    amount = {key: case.bytes if layers.fill else case.flops for key, case in cases.items()}
    rate = {key: amount[key] / 1e6 / ms[key]["median"] for key in cases}
    best = max(rate[key] for key in limits)
    rows: list[dict[str, Any]] = []
    for (T, name), case in cases.items():
        mine, native = ms[T, name], ms.get((T, NATIVE))
        rows.append(
            {
                "section": title,
                "T": T,
                "case": name,
                "ms": mine["median"],
                "min": mine["min"],
                "max": mine["max"],
                "MB": case.bytes / 1e6 or None,
                unit: rate[T, name],
                "of ceiling": rate[T, name] / best,
                f"÷ {NATIVE}": mine["median"] / native["median"] if native else None,
                "off %": off(cases, T, case),
            }
        )
    show(rows)
    print(flush=True)
    return rows


def off(cases: Mapping[tuple[int | None, str], Case], T: int | None, case: Case) -> float | None:
    """How far a case's first output lies from `grouped`'s, in per cent; None: nothing to compare."""
    like = cases.get((T, SAME))
    if like is None:
        return None
    a, b = case.first[0], like.first[0]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:  # torch's plain products
        return None
    return float(100 * (a.float() - b.float()).norm() / b.float().norm())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="parts of case names to keep")
    asked = parser.parse_args()
    error = native_error()
    if error is not None:
        sys.exit(f"no native experts to measure: {error}")
    torch.manual_seed(0)
    rows = section("decode", (1, 4, 8), Layers(OLMOE, fill=True), asked.only, asked.repeats)
    rows += section("prefill olmoe", (512,), Layers(OLMOE, fill=False), asked.only, asked.repeats)
    rows += section("prefill mixtral", (512,), Layers(MIXTRAL, fill=False), asked.only, asked.repeats)
    if not rows:
        sys.exit(f"--only {' '.join(asked.only)}: no case has such a name")
    keep("experts", rows, {"repeats": asked.repeats, "only": asked.only})


if __name__ == "__main__":
    main()
