"""Who multiplies: everything here maps (x_TD, routing) -> y_TD, chosen experts applied, weighted and summed.

weights     what experts' weights are, whoever holds them.
reference   the plain loop: any dtype, float64 too. It is the truth that every other one is tested against.
grouped     torch only, quick on CPU and CUDA.
native      our C++ kernels for CPUs (csrc/); quantized weights too.
backends    these by name, and "auto" among them; selection: what it picks, and how quick each is here.
layer       experts in a module; quantized: with weights in 8 or 4 bits; offload: with weights on disk.
dense       what every token is multiplied by.
"""

from __future__ import annotations

from handful.experts.backends import BACKENDS
from handful.experts.dense import FeedForward, Linear
from handful.experts.layer import Experts
from handful.experts.reference import activate

__all__ = ["BACKENDS", "Experts", "FeedForward", "Linear", "activate"]
