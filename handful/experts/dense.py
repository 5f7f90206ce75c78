"""A dense feed-forward network, which every token passes through; shared experts are one too."""

from __future__ import annotations

from torch import Tensor, nn

from handful.config import Activation
from handful.experts.linear import Linear
from handful.experts.native import one_expert
from handful.experts.reference import activate
from handful.experts.weights import first_rows
from handful.kernels import with_kernel

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """One dense feed-forward network: (..., D) -> (..., D). Also what shared experts are."""

    def __init__(self, width: int, hidden: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = Linear(width, first_rows(hidden, activation), bias=False)
        self.down = Linear(hidden, width, bias=False)

    @with_kernel(one_expert)
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(activate(self.gate_up(x), self.activation))
        return out
