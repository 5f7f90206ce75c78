"""A linear map, that every token is multiplied by."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from handful import kernels
from handful.kernels import with_kernel

__all__ = ["Linear", "linear"]


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
