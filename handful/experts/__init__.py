"""Who multiplies: everything here maps (x_TD, routing) -> y_TD, chosen experts applied, weighted and summed.

reference   the plain loop: any dtype, float64 too. It is the truth that every other one is tested against.
grouped     torch only, quick on CPU and CUDA.
native      our C++ kernels for CPUs (csrc/); quantised weights too (`quantized`).
choice      what "auto" picks, and how quick each is here.
"""

from __future__ import annotations

from handful.experts.layer import BACKENDS, Experts, FeedForward, Linear
from handful.experts.reference import activate

__all__ = ["BACKENDS", "Experts", "FeedForward", "Linear", "activate"]
