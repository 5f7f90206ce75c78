"""The plain loop over experts: obviously right, any dtype, differentiable by autograd. The truth for every other one.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · G = 2·F gate and up
rows (F without a gate) · n tokens of one expert
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from handful.errors import RoutingError
from handful.experts.untraced import untraced
from handful.routing import Routing

if TYPE_CHECKING:
    from handful.experts.layer import Experts

__all__ = ["activate", "reference"]


def activate(h_nG: Tensor, kind: str) -> Tensor:
    """The hidden activation of a feed-forward network: (n, G) -> (n, F).

    Gated kinds read gate and up from the two halves of the last dimension. "swiglu_clamped" is gpt-oss's
    (arXiv:2508.10925): gate at most 7, up within ±7, gate · sigmoid(1.702 · gate) · (up + 1).
    """
    if kind == "relu":
        return h_nG.relu()
    if kind == "gelu":
        return F.gelu(h_nG)
    gate_nF, up_nF = h_nG.chunk(2, dim=-1)
    if kind == "swiglu":
        return F.silu(gate_nF) * up_nF
    if kind == "geglu":
        return F.gelu(gate_nF) * up_nF
    gate_nF, up_nF = gate_nF.clamp(max=7.0), up_nF.clamp(-7.0, 7.0)
    return gate_nF * torch.sigmoid(1.702 * gate_nF) * (up_nF + 1)


@untraced
def reference(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Apply each expert to its tokens, one expert after another; sums are in float32 at least."""
    wrong = routing.experts_TK[(routing.experts_TK < 0) | (routing.experts_TK >= experts.count)]
    if len(wrong):
        raise RoutingError(f"routing names expert {int(wrong[0])}: there are {experts.count}, counted from 0")
    kept_TK = torch.ones_like(routing.experts_TK, dtype=torch.bool)
    if routing.dropped_TK is not None:
        kept_TK = ~routing.dropped_TK
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=accumulate, device=x_TD.device)
    for e in routing.experts_TK[kept_TK].unique().tolist() or [0]:  # one at least: gradients are zeros then, not none
        token_n, slot_n = (kept_TK & (routing.experts_TK == e)).nonzero(as_tuple=True)
        gate_up_bias, down_bias = experts.biases(e)
        h_nG = F.linear(x_TD[token_n], experts.gate_up[e], gate_up_bias)
        out_nD = F.linear(activate(h_nG, experts.activation), experts.down[e], down_bias)
        weight_n1 = routing.weights_TK[token_n, slot_n].unsqueeze(1)
        y_TD = y_TD.index_add(0, token_n, (out_nD * weight_n1).to(accumulate))
    return y_TD.to(x_TD.dtype)
