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

__all__ = ["Fetch", "activate", "reference", "reference_rows", "reference_sum"]

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
    rows_ND = reference_rows(x_TD, routing, weights, fetch)
    return reference_sum(rows_ND, routing, compute_dtype(x_TD) if weights.bits else x_TD.dtype)


def reference_rows(x_TD: Tensor, routing: Routing, weights: ExpertWeights, fetch: Fetch = _all_there) -> Tensor:
    """The experts' outputs alone, neither weighted nor summed: a row for each computed assignment, (N, D), by expert,
    earlier tokens first, as `routing.plan` has them."""
    if weights.bits:
        dtype = compute_dtype(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            return _rows(x_TD.to(dtype), routing, weights, fetch)
    return _rows(x_TD, routing, weights, fetch)


def _rows(x_TD: Tensor, routing: Routing, weights: ExpertWeights, fetch: Fetch) -> Tensor:
    chosen_TK = routing.experts_TK
    wrong = chosen_TK[(chosen_TK < 0) | (chosen_TK >= routing.experts)]
    if len(wrong):
        raise RoutingError(f"routing names expert {int(wrong.min())}: there are {routing.experts}, counted from 0")
    kept_TK = routing.computed_TK
    rows: dict[int, Tensor] = {}
    for ready in fetch(chosen_TK[kept_TK].unique().tolist(), x_TD):
        for e, place in ready:
            token_n, _ = (kept_TK & (chosen_TK == e)).nonzero(as_tuple=True)
            gate_up, down, gate_up_bias, down_bias = weights.expert(place, x_TD.dtype)
            h_nG = F.linear(x_TD[token_n], gate_up, gate_up_bias)
            rows[e] = F.linear(activate(h_nG, weights.activation), down, down_bias)
    return torch.cat([rows[e] for e in sorted(rows)]) if rows else x_TD.new_empty(0, x_TD.shape[1])


def reference_sum(rows_ND: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """The rows of `reference_rows`, weighted and summed in the experts' order: (T, D) in a dtype."""
    accumulate = torch.promote_types(rows_ND.dtype, torch.float32)
    plan = routing.plan()
    weights_N = routing.weights_TK.flatten()[plan.order_N]
    y_TD = torch.zeros(routing.tokens, rows_ND.shape[1], dtype=accumulate, device=rows_ND.device)
    counts = plan.counts_E.tolist()
    parts = zip(rows_ND.split(counts), weights_N.split(counts), plan.token_N.split(counts), strict=True)
    for rows_nD, weights_n, token_n in parts:
        if len(token_n) or not len(rows_ND):  # gradients of nothing are zeros, not none
            y_TD = y_TD.index_add(0, token_n, (rows_nD * weights_n.unsqueeze(1)).to(accumulate))
    return y_TD.to(dtype)
