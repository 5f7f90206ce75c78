"""The weights of E experts, and the choice of who multiplies them.

Legend: T tokens · D model width · E experts · F an expert's hidden width · G = 2·F gate and up rows (F without a gate)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handful.config import GATED, Activation
from handful.errors import ConfigError, RoutingError
from handful.experts.at_once import (
    ACTIVATIONS,
    ExpertsWeights,
    Maps,
    Operation,
    feed_forward_layer,
    is_bare,
    kernel_map,
    maps_of,
    nobody_looks,
    norm_of,
)
from handful.experts.grouped import grouped
from handful.experts.native import (
    DTYPES,
    available,
    few,
    linear,
    linears,
    native,
    needs_gradients,
    plain_inference,
    takes,
)
from handful.experts.reference import activate, reference
from handful.machine import warn_if_slow
from handful.routing import Routing

__all__ = ["BACKENDS", "Experts", "FeedForward", "Linear", "feed_at_once", "multiply", "multiply_all"]


def auto(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """`native` for what its kernels take. Of all else `grouped` what needs gradients or is not on a CPU, and on a CPU
    `reference`, which is as quick there, and has the bits that stored experts have (handful/experts/stored.py)."""
    if available() and takes(x_TD, experts.gate_up, experts.down):
        return native(x_TD, routing, experts)
    elsewhere = needs_gradients(x_TD, routing, experts) or not x_TD.is_cpu
    return (grouped if elsewhere else reference)(x_TD, routing, experts)


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
        if backend == "auto":
            warn_if_slow()
        self.count = count
        self.activation = activation
        self.backend = backend
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

    def weights_for_kernels(self, inputs: int, dtype: torch.dtype) -> ExpertsWeights | None:
        """The weights, if one operation is to apply them to few tokens of `inputs` numbers in plain inference."""
        gate_up, down = self._parameters.get("gate_up"), self._parameters.get("down")
        if gate_up is None or down is None or not available() or self.backend not in ("auto", "native"):
            return None
        if gate_up.dtype not in DTYPES or down.dtype not in DTYPES or gate_up.shape[0::2] != (self.count, inputs):
            return None
        biases = self.gate_up_bias, self.down_bias
        return ExpertsWeights(gate_up, None, down, None, *biases, self.activation, down.shape[-1], 0, 0)

    def extra_repr(self) -> str:
        experts, rows, width = self.gate_up.shape
        return f"{experts} experts, width={width}, rows={rows}, activation={self.activation}, backend={self.backend}"


def for_ours(weight: Tensor, tokens: int, dtype: torch.dtype) -> bool:
    """Whether our kernels are to multiply so many tokens by a float weight in plain inference: few of them, which read
    a weight as fast as memory gives it. With more, torch's products are as good."""
    return available() and weight.dtype == dtype and tokens <= few(dtype)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias."""
    ours = for_ours(weight, x.shape[:-1].numel(), x.dtype) and plain_inference(x)
    return linear(x, weight, bias) if ours else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear that leaves few tokens in inference to our kernels."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight, self.bias)

    def for_kernels(self, tokens: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias, if our kernels are to multiply so many tokens by them in plain inference."""
        held = self._parameters  # self.weight takes ten times as long
        weight = held.get("weight")
        if weight is None or "bias" not in held or not for_ours(weight, tokens, dtype):
            return None
        return weight, held["bias"]


def multiply_all(x: Tensor, *maps: nn.Module) -> list[Tensor]:
    """Outputs of several linear maps of the same x: by one operation if all of them are for our kernels."""
    given = []
    alone = nobody_looks(x)
    for m in maps:
        operands = kernel_map(m, x.shape[:-1].numel(), x.shape[-1], x.dtype) if alone else None
        if operands is None:
            return [m(x) for m in maps]
        given.append(operands)
    return linears(x, given)


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

    def maps_for_kernels(self, tokens: int, inputs: int, dtype: torch.dtype) -> Maps | None:
        """The weights of gate_up and down, if one operation is to stand for the network."""
        modules = self._modules
        first = kernel_map(modules.get("gate_up"), tokens, inputs, dtype)
        if first is None or self.activation not in ACTIVATIONS:
            return None
        hidden = first[0].shape[0] // (2 if self.activation in GATED else 1)
        maps = maps_of([(modules.get("gate_up"), inputs), (modules.get("down"), hidden)], tokens, dtype)
        return None if maps is None or any(bias is not None for bias in maps.biases) else maps


def feed_at_once(ffn: nn.Module | None, norm: nn.Module | None, x: Tensor, residual_scale: float) -> Operation | None:
    """x + residual_scale · ffn(norm(x)) as one operation with the same bits, for any x like this one, that
    `nobody_looks` at; None where the modules must be called."""
    if not is_bare(ffn, FeedForward):
        return None
    maps, before = ffn.maps_for_kernels(x.shape[:-1].numel(), x.shape[-1], x.dtype), norm_of(norm)
    if maps is None or before is None:
        return None
    return feed_forward_layer(before, maps, ffn.activation, residual_scale)
