"""The weights of E experts in one module, and who multiplies them.

Legend: T tokens · D model width · E experts · F an expert's hidden width · G = 2·F gate and up rows (F without a gate)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from handful.config import Activation
from handful.experts.backends import BACKENDS, check_backend
from handful.experts.weights import ExpertWeights, check_fits, first_rows
from handful.machine import warn_if_slow
from handful.routing import Routing

__all__ = ["Experts"]


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
        expert_width: int,
        *,
        activation: Activation = "swiglu",
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend)
        if backend == "auto":
            warn_if_slow()
        self.count = count
        self.activation = activation
        self.backend = backend
        rows = first_rows(expert_width, activation, "expert_width")
        self.gate_up = nn.Parameter(torch.randn(count, rows, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(count, width, expert_width) * expert_width**-0.5)
        self.gate_up_bias = nn.Parameter(torch.zeros(count, rows)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(count, width)) if bias else None

    @property
    def weights(self) -> ExpertWeights:
        """As the backends take them."""
        biases = self.gate_up_bias, self.down_bias
        return ExpertWeights(self.gate_up, None, self.down, None, *biases, self.activation, self.down.shape[-1])

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        weights = self.weights
        check_fits(x_TD, routing, weights.experts, weights.width)
        return BACKENDS[self.backend](x_TD, routing, weights)

    def extra_repr(self) -> str:
        experts, rows, width = self.gate_up.shape
        return f"{experts} experts, width={width}, rows={rows}, activation={self.activation}, backend={self.backend}"
