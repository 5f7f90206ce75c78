"""What `backend="auto"` picks and why, and how quick each backend is here.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from handful.experts.layer import Experts
from handful.kernels.extension import DTYPES, levels
from handful.machine import native_error
from handful.routing import Routing

__all__ = ["Selection", "Timed", "choose", "time_backends"]


@dataclass(frozen=True)
class Selection:
    """The backend that "auto" means for a device and a dtype, and in one line why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Timed:
    """One layer's experts, timed: medians in milliseconds by backend, and what "auto" picks for them."""

    use: str
    shape: str
    dtype: str
    milliseconds: dict[str, float]
    picked: str


# What is timed: a use, tokens, and a layer small enough to be made in a moment.
TIMED = (
    ("decoding", 1, {"width": 1024, "hidden": 512, "experts": 32, "top_k": 4}),
    ("prompt", 512, {"width": 1024, "hidden": 512, "experts": 32, "top_k": 4}),
    ("training", 1024, {"width": 256, "hidden": 192, "experts": 32, "top_k": 4}),
)


def choose(device: str = "cpu", dtype: torch.dtype = torch.float32, *, gradients: bool = False) -> Selection:
    """What "auto" means on `device` ("cpu", "cuda") for products in `dtype`, in inference or where `gradients` are
    asked for."""
    if device != "cpu":
        return Selection("grouped", "the native kernels are for CPUs; on CUDA this is grouped_mm")
    other = "grouped" if gradients else "reference"
    if dtype not in DTYPES:
        return Selection(other, f"the native kernels take float32 and bfloat16, not {str(dtype)[6:]}")
    if error := native_error():
        return Selection(other, error)
    return Selection("native", f"one fused operation, products by {_instructions(dtype)}")


def _instructions(dtype: torch.dtype) -> str:
    """What the kernels multiply tiles with here."""
    return levels(torch.ops.handful.isa().split())[str(dtype).removeprefix("torch.")].name


def time_backends(seconds: float = 0.15) -> list[Timed]:
    """Time the backends on three small layers in float32 and bfloat16, about `seconds` for each."""
    backends = [*([] if native_error() else ["native"]), "grouped", "reference"]
    rows = []
    for use, T, shape in TIMED:
        E, K, D, F = shape["experts"], shape["top_k"], shape["width"], shape["hidden"]
        for dtype in DTYPES:
            experts = Experts(E, D, F).to(dtype)
            milliseconds = {}
            for backend in backends:
                experts.backend = backend
                milliseconds[backend] = 1e3 * _median(_step(experts, use, T, K), seconds)
            rows.append(
                Timed(
                    use=use,
                    shape=f"T={T} D={D} F={F} E={E} K={K}",
                    dtype=str(dtype)[6:],
                    milliseconds=milliseconds,
                    picked=choose("cpu", dtype, gradients=use == "training").backend,
                )
            )
    return rows


def _step(experts: Experts, use: str, T: int, K: int) -> Callable[[], None]:
    """One pass, forward and in training backward too, with a routing of its own."""
    generator = torch.Generator().manual_seed(0)
    dtype, width = experts.down.dtype, experts.down.shape[1]
    x_TD = torch.randn(T, width, generator=generator).to(dtype)

    def run() -> None:
        scores_TE = torch.rand(T, experts.count, generator=generator)
        weights_TK, experts_TK = scores_TE.topk(K)
        routing = Routing(scores_TE, scores_TE, experts_TK, weights_TK)
        with torch.set_grad_enabled(use == "training"):
            y_TD = experts(x_TD, routing)
        if use == "training":
            y_TD.backward(torch.ones_like(y_TD))
            experts.zero_grad(set_to_none=True)

    return run


def _median(run: Callable[[], None], seconds: float) -> float:
    run()
    took: list[float] = []
    while sum(took) < seconds or len(took) < 3:
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return statistics.median(took)
