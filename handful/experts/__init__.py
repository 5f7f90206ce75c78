"""Who multiplies: everything here maps (x_TD, routing) -> y_TD, chosen experts applied, weighted and summed.

weights     what experts' weights are, whoever holds them.
reference   the plain loop: any dtype, float64 too. It is the truth that every other one is tested against.
grouped     torch only, quick on CPU and CUDA.
native      our C++ kernels for CPUs (csrc/); quantized weights too.
backends    these by name, and "auto" among them; selection: what it picks, and how quick each is here.
layer       experts in a module; quantized: with weights in 8 or 4 bits; offload: with weights on disk.
parallel    experts of which each rank holds some: tokens travel.
linear, dense   what every token is multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from handful.experts.backends import BACKENDS
from handful.experts.dense import FeedForward
from handful.experts.layer import Experts
from handful.experts.linear import Linear
from handful.experts.reference import activate
from handful.routing import Routing

__all__ = ["BACKENDS", "Experts", "FeedForward", "Linear", "activate", "begin"]


def begin(experts: nn.Module, x_TD: Tensor, routing: Routing) -> Callable[[], Tensor]:
    """What gives `experts(x_TD, routing)`. Tokens of experts that are elsewhere (those have a `begin`) are under way
    until it is asked for; where somebody watches the module, it is called at once."""
    sends = getattr(experts, "begin", None)
    if sends is None or experts._forward_hooks or experts._forward_pre_hooks:
        y_TD: Tensor = experts(x_TD, routing)
        return lambda: y_TD
    found: Callable[[], Tensor] = sends(x_TD, routing)
    return found
