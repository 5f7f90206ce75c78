"""The cases by which experts backends are proved: sizes, corners and values, drawn from a seed.

Where few numbers make a result, terms could cancel until only rounding is left: such cases are drawn positive, where
nothing cancels. Where an activation has a kink (relu, the clamps), its inputs are drawn from a grid that every
precision holds exactly, so that no rounding decides a slope. So any seed will do.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · G = 2·F (F without a
gate)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor

from handful.config import GATED, Activation
from handful.quantize import Packed, pack, unpack

__all__ = ["ACTIVATIONS", "F64", "FORMATS", "Case", "Drawn", "Format", "draw", "draw_cases", "place", "roundings"]

F64 = torch.float64
ACTIVATIONS: Sequence[Activation] = get_args(Activation)
KINKED = {"relu", "swiglu_clamped"}
FEW = 32  # numbers, below which a sum of them can cancel by chance


def roundings(count: int) -> float:
    """What `count` roundings to bfloat16 in a row come to, all of them at their worst: 2^-9 each."""
    return count * 2.0**-9


@dataclass(frozen=True)
class Format:
    """The precision of a backend, and how far it may be off: ‖out − ref‖ / ‖ref‖. docs/verify.md gives the reasons."""

    dtype: torch.dtype
    output: float
    gradient: float | None = None
    autocast: bool = False
    bits: int = 0
    group: int = 0


FORMATS = {
    "float64": Format(F64, 1e-12, 1e-12),
    "float32": Format(torch.float32, 1e-5, 1e-5),
    "bfloat16": Format(torch.bfloat16, roundings(6), roundings(10)),
    "autocast": Format(torch.float32, roundings(9), roundings(14), autocast=True),
    "int8/32": Format(torch.float32, 1.5e-2, bits=8, group=32),
    "int8/128": Format(torch.float32, 1.5e-2, bits=8, group=128),
    "int4/32": Format(torch.float32, 1.5e-2, bits=4, group=32),
    "int4/128": Format(torch.float32, 1.5e-2, bits=4, group=128),
}


@dataclass(frozen=True)
class Case:
    """A layer and its input. Its values follow from `seed`.

    load     even; skewed: the first experts are favoured; one: nearly every token goes to the last K experts; idle:
             half of the experts get nothing.
    drop     the share of assignments that are dropped.
    memory   plain; shifted: one element into a buffer; transposed: the last two dimensions; gaps: between rows, and
             the output's gradient is one number for all, as y.sum() gives it.
    """

    tokens: int
    experts: int
    top_k: int
    width: int
    hidden: int
    activation: Activation = "swiglu"
    bias: bool = False
    load: str = "even"
    drop: float = 0.0
    memory: str = "plain"
    seed: int = 0

    def __str__(self) -> str:
        sizes = f"T={self.tokens} E={self.experts} K={self.top_k} D={self.width} F={self.hidden}"
        drop = f" {self.drop:.0%} dropped" if self.drop else ""
        bias = " bias" if self.bias else ""
        return f"{sizes} {self.activation}{bias} {self.load} load{drop} {self.memory} memory seed={self.seed}"


# T, E, K, D, F: single ones, odd ones, multiples of 16, 32 and 64 and their neighbours, few and many tokens.
SIZES = [
    (40, 8, 2, 64, 32), (1, 8, 2, 33, 17), (0, 4, 2, 16, 16), (300, 8, 2, 48, 80), (3, 16, 4, 100, 64), (1, 1, 1, 1, 1),
    (41, 7, 3, 5, 11), (2, 8, 8, 64, 64), (8, 4, 2, 128, 128), (37, 5, 5, 3, 1), (300, 3, 1, 1, 3), (5, 64, 8, 32, 16),
    (33, 1, 1, 17, 33), (4, 4, 1, 192, 96), (6, 32, 2, 65, 63), (7, 3, 2, 31, 129), (1, 16, 16, 16, 48),
    (257, 16, 4, 96, 64), (300, 64, 2, 33, 32), (40, 6, 2, 520, 264), (1, 8, 2, 512, 384), (16, 2, 2, 256, 16),
    (64, 4, 1, 15, 256), (129, 9, 9, 100, 7),
]  # fmt: skip
LOADS = ("even", "skewed", "one", "idle")
MEMORY = ("plain", "shifted", "transposed", "gaps")


def draw_cases(seed: int, count: int) -> Iterator[Case]:
    """The corners, then sizes at random; activations, biases and memory take turns from a random start."""
    chance = random.Random(f"handful {seed}")
    turn = chance.randrange(40)
    for i in range(count):
        if i < len(SIZES):
            T, E, K, D, F = SIZES[i]
        else:
            T = chance.choice([1, 2, 3, 4, 5, 6, 7, 8, chance.randint(9, 64), chance.randint(65, 300)])
            E = chance.choice([1, 2, chance.randint(3, 16), chance.randint(17, 64)])
            K = chance.choice([1, min(2, E), min(4, E), chance.randint(1, min(E, 9))])
            D, F = (chance.choice([chance.randint(1, 40), 16 * chance.randint(1, 12), 100, 33]) for _ in range(2))
        yield Case(
            T, E, K, D, F,
            activation=ACTIVATIONS[(turn + i) % 5],
            bias=(turn + i) % 2 == 1,
            load=chance.choice([load for load in LOADS if load != "idle" or E >= 2 * K]),
            drop=chance.choice([0.0, 0.0, 0.0, 0.3, 1.0] if i else [0.0]),
            memory=MEMORY[(turn + i) // 2 % 4],
            seed=chance.randrange(1 << 31),
        )  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A case's values, in float64 but already rounded to what the backend is given; `packed` are those of weights."""

    case: Case
    x_dtype: torch.dtype
    dtype: torch.dtype
    values: dict[str, Tensor]
    experts_TK: Tensor
    dropped_TK: Tensor | None
    packed: dict[str, Packed] = field(default_factory=dict)

    def dtype_of(self, name: str) -> torch.dtype:
        if name == "weights":  # routers weigh in float32 at least
            return torch.promote_types(self.dtype, torch.float32)
        return self.x_dtype if name == "x" or self.packed else self.dtype  # biases of packed weights come in x's


def draw(case: Case, name: str) -> Drawn:
    """The values of a case, for the format of that name."""
    kind = FORMATS[name]
    gen = torch.Generator().manual_seed(case.seed)
    T, E, K, D, F = case.tokens, case.experts, case.top_k, case.width, case.hidden
    G = F * (2 if case.activation in GATED else 1)

    taste_TE = torch.rand(T, E, generator=gen, dtype=F64)
    if case.load == "skewed":
        taste_TE = taste_TE.pow(torch.arange(1, E + 1))
    elif case.load == "one":
        favoured_T1 = torch.rand(T, 1, generator=gen) < 0.95
        taste_TE = taste_TE + favoured_T1 * (torch.arange(E) >= E - K)
    elif case.load == "idle":
        taste_TE[:, ::2] -= 1
    experts_TK = taste_TE.topk(K).indices
    dropped_TK = torch.rand(T, K, generator=gen) < case.drop if case.drop else None
    kept = T * K if dropped_TK is None else int((~dropped_TK).sum())
    positive = min(kept, T * D) < FEW

    def plain(*shape: int, scale: float = 1.0) -> Tensor:
        if positive:
            return (torch.rand(shape, generator=gen, dtype=F64) + 0.5) * scale**2
        return torch.randn(shape, generator=gen, dtype=F64) * scale

    def grid(*shape: int) -> Tensor:
        low, high = (1, 2) if positive else (-1, 1)
        return torch.randint(low, high + 1, shape, generator=gen).to(F64)

    values = {"weights": torch.rand(T, K, generator=gen, dtype=F64) + 0.1, "up": plain(T, D)}
    if case.memory == "gaps":
        values["up"] = plain(1, 1).expand(T, D).clone()
    values["down"] = plain(E, D, F, scale=F**-0.5)
    if case.activation in KINKED:
        # Whole numbers times a power of two: hidden values of about 4, or from 1/2 to 4 where all are positive. A bias
        # is an odd number of halves of it: no hidden value is at a kink, and all have at most 8 bits.
        unit = 2.0 ** (-math.ceil(math.log2(D)) if positive else round(math.log2(6 * D**-0.5)))
        values["x"], values["gate_up"] = grid(T, D), grid(E, G, D) * unit
        gate_up_bias = (grid(E, G) + 0.5) * unit
    else:
        values["x"], values["gate_up"] = plain(T, D), plain(E, G, D, scale=D**-0.5)
        gate_up_bias = plain(E, G)
    if case.bias:
        values["gate_up_bias"], values["down_bias"] = gate_up_bias, plain(E, D)

    narrow = kind.autocast or kind.bits  # x may come in bfloat16 while parameters are float32
    x_dtype = torch.bfloat16 if narrow and case.seed % 2 else kind.dtype
    packed: dict[str, Packed] = {}
    if kind.bits:
        for weight in ("gate_up", "down"):
            new = pack(values[weight].float(), kind.bits, kind.group)
            values[weight] = unpack(new, F64)
            if case.memory == "shifted":
                new = replace(new, codes=place(new.codes, "shifted"), scales=place(new.scales, "shifted"))
            packed[weight] = new
    drawn = Drawn(case, x_dtype, kind.dtype, values, experts_TK, dropped_TK, packed)
    up_dtype = torch.bfloat16 if kind.autocast else kind.dtype
    for given, value in values.items():
        if given not in packed:
            values[given] = value.to(up_dtype if given == "up" else drawn.dtype_of(given)).to(F64)
    if dropped_TK is not None:  # what they weigh must not matter
        values["weights"] = values["weights"].masked_fill(dropped_TK, math.nan)
    return drawn


def place(value: Tensor, memory: str) -> Tensor:
    """A copy that lies in memory as a case asks for it."""
    *lead, last = value.shape
    if memory == "shifted":
        out = value.new_empty(value.numel() + 1)[1:].view(value.shape)
    elif memory == "transposed" and lead:
        out = value.new_empty(*lead[:-1], last, lead[-1]).mT
    elif memory in ("gaps", "transposed"):
        out = value.new_empty(*lead, 2 * last + 1)[..., 1 : last + 1]
    else:
        out = torch.empty_like(value, memory_format=torch.contiguous_format)
    return out.copy_(value)
