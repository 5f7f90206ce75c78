"""The plain loop over experts: obviously right, any dtype, differentiable by autograd. The truth for every other one.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · G = 2·F gate and up
rows (F without a gate) · n tokens of one expert
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from handful.errors import RoutingError
from handful.experts.no_compile import no_compile
from handful.experts.weights import ExpertWeights, compute_dtype
from handful.routing import Routing

__all__ = ["Fetch", "activate", "reference"]

# (experts that were chosen, their tokens' x) -> lists of (expert, where it lies in the weights), which need to be there
# until the next list is asked for; every expert comes once.
Fetch = Callable[[Sequence[int], Tensor], Iterable[list[tuple[int, int]]]]


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


def _all_there(chosen: Sequence[int], x_TD: Tensor) -> Iterable[list[tuple[int, int]]]:
    yield [(e, e) for e in chosen or [0]]  # one at least: gradients are zeros then, not none


@no_compile
def reference(x_TD: Tensor, routing: Routing, weights: ExpertWeights, fetch: Fetch = _all_there) -> Tensor:
    """Apply each expert to its tokens, one expert after another; sums are in float32 at least, in the experts' order.

    Quantized weights are unpacked to what products are computed in, autocast's dtype under autocast.

    fetch   where the weights are not those of all experts, or not all there at once.
    """
    if weights.bits:
        dtype = compute_dtype(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            return _loop(x_TD.to(dtype), routing, weights, fetch)
    return _loop(x_TD, routing, weights, fetch)


def _loop(x_TD: Tensor, routing: Routing, weights: ExpertWeights, fetch: Fetch) -> Tensor:
    experts = routing.experts
    wrong = routing.experts_TK[(routing.experts_TK < 0) | (routing.experts_TK >= experts)]
    if len(wrong):
        raise RoutingError(f"routing names expert {int(wrong.min())}: there are {experts}, counted from 0")
    kept_TK = torch.ones_like(routing.experts_TK, dtype=torch.bool)
    if routing.dropped_TK is not None:
        kept_TK = ~routing.dropped_TK
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    chosen = routing.experts_TK[kept_TK].unique().tolist()
    outputs: dict[int, tuple[Tensor, Tensor]] = {}
    for ready in fetch(chosen, x_TD):
        for e, place in ready:
            token_n, slot_n = (kept_TK & (routing.experts_TK == e)).nonzero(as_tuple=True)
            gate_up, down, gate_up_bias, down_bias = weights.expert(place, x_TD.dtype)
            h_nG = F.linear(x_TD[token_n], gate_up, gate_up_bias)
            out_nD = F.linear(activate(h_nG, weights.activation), down, down_bias)
            weight_n1 = routing.weights_TK[token_n, slot_n].unsqueeze(1)
            outputs[e] = token_n, (out_nD * weight_n1).to(accumulate)
    y_TD = torch.zeros(x_TD.shape, dtype=accumulate, device=x_TD.device)
    for e in sorted(outputs):
        y_TD = y_TD.index_add(0, *outputs[e])
    return y_TD.to(x_TD.dtype)
