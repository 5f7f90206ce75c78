"""The weights of E experts, and the choice of who multiplies them.

Legend: T tokens · D model width · E experts · F an expert's hidden width · G = 2·F gate and up rows (F without a gate)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from handful.config import GATED, Activation
from handful.errors import ConfigError, RoutingError
from handful.experts.grouped import grouped
from handful.experts.native import available, few, linear, linears, native, plain_inference, takes
from handful.experts.reference import activate, reference
from handful.routing import Routing

__all__ = ["BACKENDS", "Experts", "FeedForward", "Linear", "multiply", "multiply_all"]


def auto(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """`native` for what its kernels take, `grouped` for everything else."""
    taken = experts.has_native and takes(x_TD, experts.gate_up, experts.down)
    return (native if taken else grouped)(x_TD, routing, experts)


BACKENDS: dict[str, Callable[[Tensor, Routing, Experts], Tensor]] = {
    "auto": auto,
    "native": native,
    "grouped": grouped,
    "reference": reference,
}


def _first_rows(hidden: int, activation: str) -> int:
    """Rows of a network's first matrix: gate and up, or up alone. ConfigError if there is no such network."""
    if hidden < 1:
        raise ConfigError(f"hidden = {hidden}: at least 1")
    if activation not in get_args(Activation):
        raise ConfigError(f"activation = {activation!r}: one of {', '.join(get_args(Activation))}")
    return hidden * (2 if activation in GATED else 1)


def check_fits(x_TD: Tensor, routing: Routing, count: int, width: int) -> None:
    """RoutingError unless x is (tokens, width), and the routing is for as many tokens and for `count` experts."""
    if x_TD.dim() != 2 or x_TD.shape[1] != width:
        raise RoutingError(f"experts were given x of shape {tuple(x_TD.shape)}: it must be (tokens, {width})")
    if routing.experts != count or routing.tokens != len(x_TD):
        raise RoutingError(
            f"routing is for {routing.tokens} tokens and {routing.experts} experts: there are {len(x_TD)} and {count}"
        )


class Experts(nn.Module):
    """E feed-forward networks, held together: (x_TD, routing) -> y_TD.

    gate_up   (E, G, D): gate rows first, then up rows; without a gate, up rows alone.
    down      (E, D, F).
    gate_up_bias (E, G) and down_bias (E, D), with `bias=True`.
    """

    def __init__(
        self,
        count: int,
        width: int,
        hidden: int,
        *,
        activation: Activation = "swiglu",
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ConfigError(f"experts backend {backend!r}: one of {', '.join(BACKENDS)}")
        self.count = count
        self.activation = activation
        self.backend = backend
        self.has_native = available()
        rows = _first_rows(hidden, activation)
        self.gate_up = nn.Parameter(torch.randn(count, rows, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(count, width, hidden) * hidden**-0.5)
        self.gate_up_bias = nn.Parameter(torch.zeros(count, rows)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(count, width)) if bias else None

    def biases(self, expert: int) -> tuple[Tensor | None, Tensor | None]:
        """One expert's biases, or None for each where there are none."""
        if self.gate_up_bias is None or self.down_bias is None:
            return None, None
        return self.gate_up_bias[expert], self.down_bias[expert]

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_fits(x_TD, routing, self.count, self.gate_up.shape[2])
        return BACKENDS[self.backend](x_TD, routing, self)

    def extra_repr(self) -> str:
        experts, rows, width = self.gate_up.shape
        return f"{experts} experts, width={width}, rows={rows}, activation={self.activation}, backend={self.backend}"


def streams(x: Tensor, weight: Tensor, has_native: bool) -> bool:
    """Whether our kernels are to multiply x by a float weight: few tokens in inference, which read a weight as fast as
    memory gives it. With more, torch's products are as good."""
    if not has_native or x.dtype != weight.dtype or not plain_inference(x):
        return False
    return x.numel() <= few(x.dtype) * x.shape[-1]


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, has_native: bool) -> Tensor:
    """x · weightᵀ + bias."""
    return linear(x, weight, bias) if streams(x, weight, has_native) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear that leaves few tokens in inference to our kernels."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.has_native = available()

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight, self.bias, self.has_native)

    def for_kernels(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias, if our kernels are to multiply x by them."""
        return (self.weight, self.bias) if streams(x, self.weight, self.has_native) else None


def multiply_all(x: Tensor, *maps: nn.Module) -> list[Tensor]:
    """Outputs of several linear maps of the same x: by one operation if all of them are for our kernels."""
    given = []
    for m in maps:
        operands = m.for_kernels(x) if _is_bare(m) else None
        if operands is None:
            return [m(x) for m in maps]
        given.append(operands)
    return linears(x, given)


def _is_bare(module: nn.Module) -> TypeGuard[Linear]:
    """Whether calling it does what its class says and no more: no subclass, no hook, no forward of its own."""
    own = module.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or _has_any_global_hook()
    return "for_kernels" in type(module).__dict__ and "forward" not in own and not hooked


class FeedForward(nn.Module):
    """One dense feed-forward network: (..., D) -> (..., D). Also what shared experts are."""

    def __init__(self, width: int, hidden: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = Linear(width, _first_rows(hidden, activation), bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(activate(self.gate_up(x), self.activation))
        return out
