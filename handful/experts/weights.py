"""What experts' weights are, whoever holds them: a module, one that is quantized, slots that a disk fills, a module of
another library. Every backend takes them as they are here.

Legend: E experts · D model width · F an expert's hidden width · G = 2·F gate and up rows (F without a gate)
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from handful.config import GATED, Activation
from handful.errors import ConfigError, RoutingError
from handful.quantize import Packed, unpack
from handful.routing import Routing

__all__ = ["ExpertWeights", "check_fits", "compute_dtype", "first_rows"]


class ExpertWeights(NamedTuple):
    """The weights of E experts, or codes with scales (bits = 0: none).

    gate_up   (E, G, D): gate rows first, then up rows; without a gate, up rows alone. Codes as `Packed` has them.
    down      (E, D, F).
    gate_up_bias (E, G) and down_bias (E, D), or None.
    hidden    F: codes are padded. bits, group: of the codes.
    """

    gate_up: Tensor
    gate_up_scales: Tensor | None
    down: Tensor
    down_scales: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    hidden: int
    bits: int = 0
    group: int = 0

    @staticmethod
    def packed(
        gate_up: Packed, down: Packed, gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str
    ) -> ExpertWeights:
        """Of quantized weights (E, G, D) and (E, D, F) of one format."""
        codes = gate_up.codes, gate_up.scales, down.codes, down.scales
        return ExpertWeights(*codes, gate_up_bias, down_bias, activation, down.inputs, down.bits, down.group)

    @property
    def experts(self) -> int:
        return self.down.shape[0]

    @property
    def width(self) -> int:
        return self.down.shape[1]

    def contiguous(self) -> ExpertWeights:
        """The same, each tensor of it contiguous."""
        found = zip(self._fields[:6], self, strict=False)
        strided: Any = {name: t.contiguous() for name, t in found if isinstance(t, Tensor) and not t.is_contiguous()}
        return self._replace(**strided) if strided else self

    def with_biases_in(self, dtype: torch.dtype) -> ExpertWeights:
        """The same with biases of a dtype: quantized experts are given theirs in that of the products."""
        biases = self.gate_up_bias, self.down_bias
        if all(bias is None or bias.dtype == dtype for bias in biases):
            return self
        gate_up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in biases)
        return self._replace(gate_up_bias=gate_up_bias, down_bias=down_bias)

    def expert(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One expert's gate_up (G, D), down (D, F) and biases in a dtype, unpacked if they are codes."""

        def matrix(stack: Tensor, scales: Tensor | None, inputs: int) -> Tensor:
            if scales is None:
                return stack[index].to(dtype)
            return unpack(Packed(stack[index], scales[index], self.bits, self.group, inputs), dtype)

        def bias(stack: Tensor | None) -> Tensor | None:
            return None if stack is None else stack[index].to(dtype)

        gate_up = matrix(self.gate_up, self.gate_up_scales, self.width)
        return gate_up, matrix(self.down, self.down_scales, self.hidden), bias(self.gate_up_bias), bias(self.down_bias)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products of x are computed in: x's own dtype, or autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def check_fits(x_TD: Tensor, routing: Routing, count: int, width: int) -> None:
    """RoutingError unless x is (tokens, width), and the routing is for as many tokens and for `count` experts."""
    if x_TD.dim() != 2 or x_TD.shape[1] != width:
        raise RoutingError(f"experts were given x of shape {tuple(x_TD.shape)}: it must be (tokens, {width})")
    if routing.experts != count or routing.tokens != len(x_TD):
        raise RoutingError(
            f"routing is for {routing.tokens} tokens and {routing.experts} experts: there are {len(x_TD)} and {count}"
        )


def first_rows(hidden: int, activation: str, name: str = "hidden") -> int:
    """Rows of a network's first matrix: gate and up, or up alone. ConfigError, which calls the width `name`, if there
    is no such network."""
    if hidden < 1:
        raise ConfigError(f"{name} = {hidden}: at least 1")
    if activation not in get_args(Activation):
        raise ConfigError(f"activation = {activation!r}: one of {', '.join(get_args(Activation))}")
    return hidden * (2 if activation in GATED else 1)
