"""What every token is multiplied by: a linear map, and a dense feed-forward network, which shared experts are too."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from handful import kernels
from handful.config import Activation
from handful.experts.reference import activate
from handful.experts.weights import first_rows
from handful.kernels import with_kernel

__all__ = ["FeedForward", "Linear", "linear"]


@with_kernel(kernels.linear)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias."""
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear that leaves few tokens in inference to our kernels."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class FeedForward(nn.Module):
    """One dense feed-forward network: (..., D) -> (..., D). Also what shared experts are."""

    def __init__(self, width: int, hidden: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = Linear(width, first_rows(hidden, activation), bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(activate(self.gate_up(x), self.activation))
        return out
