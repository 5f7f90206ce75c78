"""Instruction levels of the kernels, and which of them a run of the tests went through."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

import torch

from handful.kernels.extension import available

# Levels of HANDFUL_ISA, each with a feature that tells of it.
FEATURES = {
    "avx2": "avx2", "avx_vnni": "avx_vnni", "avx512f": "avx512", "avx512": "avx512_vnni", "amx": "amx_bf16",
}  # fmt: skip
# Of the kernels; others meet them in passing.
FILES = {"test_native.py", "test_decode_kernels.py", "test_fused.py", "test_levels.py", "test_offload.py"}


def here() -> list[str]:
    """The levels of this computer, lowest first, within HANDFUL_ISA."""
    isa = torch.ops.handful.isa().split() if available() else []
    return [level for level, feature in FEATURES.items() if feature in isa]


def summary(ran: Iterable[str]) -> list[str]:
    """A line for each level: how many tests of the kernels passed at it, or why none did."""
    counts = Counter(ran)
    return [
        f"{level:8} {counts[level]:4} tests of the kernels passed" if counts[level] else f"{level:8} {_why(level)}"
        for level in ("none", *FEATURES)
    ]


def _why(level: str) -> str:
    if level in here():
        return "not asked for in this run"
    if forced := os.environ.get("HANDFUL_ISA"):
        return f"switched off by HANDFUL_ISA = {forced!r}"
    if level == "none":
        return "not in this run; make test-torch"
    return "cannot run here" + {
        "avx2": "; make emulate emulates it",
    }.get(level, "; make sanitize emulates it")
