"""Who multiplies, by name: each maps (x_TD, routing, weights) -> y_TD.

Legend: T tokens · D model width
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from handful.errors import ConfigError
from handful.experts.grouped import grouped
from handful.experts.native import native, needs_gradients, supports
from handful.experts.reference import reference
from handful.experts.weights import ExpertWeights
from handful.kernels.extension import available
from handful.routing import Routing

__all__ = ["BACKENDS", "check_backend"]

Backend = Callable[[Tensor, Routing, ExpertWeights], Tensor]


def auto(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """`native` for what its kernels take. Of all else `grouped` what needs gradients or is not on a CPU, and on a CPU
    `reference`, which is as quick there, and has the bits that offloaded experts have (handful/experts/offload.py)."""
    if available() and supports(x_TD, weights):
        return native(x_TD, routing, weights)
    elsewhere = needs_gradients(x_TD, routing, weights) or not x_TD.is_cpu
    return (grouped if elsewhere else reference)(x_TD, routing, weights)


BACKENDS: dict[str, Backend] = {"auto": auto, "native": native, "grouped": grouped, "reference": reference}


def check_backend(name: str) -> None:
    """ConfigError for a name that no backend has."""
    if name not in BACKENDS:
        raise ConfigError(f"experts backend {name!r}: one of {', '.join(BACKENDS)}")
