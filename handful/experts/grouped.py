"""Experts as a few large matrix products, in torch alone: on CPU a padded batch plus a loop for what overflows it, on
CUDA `torch.nn.functional.grouped_mm`.

On a CPU neither plain way is good: one product per expert is slow for small experts (in bfloat16, 64 experts of width
128 take 4-5 times a dense product of the same work), and one batch padded to the busiest expert wastes work when the
load is uneven. So rows are laid out as a batch in which every expert has `depth` places, and what does not fit follows,
expert by expert, for a loop of ordinary products:

    expert 0: ■ ■ ■ □      depth = 4, □ a row of zeros
    expert 1: ■ ■ ■ ■  ─►  tail: ■ ■
    expert 2: ■ □ □ □

`depth` is chosen to make the whole cheapest: 0 is the plain loop (decoding), the largest count the plain batch.

Legend: T tokens · D model width · E experts · K experts per token · N assignments · F an expert's hidden width ·
G = 2·F (F without a gate) · R rows of the layout, the last one always zero
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from handful.errors import RoutingError
from handful.experts.no_compile import no_compile
from handful.experts.reference import activate, reference
from handful.experts.weights import ExpertWeights, compute_dtype
from handful.routing import Routing

__all__ = ["Own", "grouped"]

# What the tail costs, counted in rows of the batch: a start for each expert in it, and a factor on each row, larger in
# bfloat16, where small products run at a fraction of the batch's rate. `bench/grouped.py` holds the choice against both
# plain ways.
TAIL_START = 16
TAIL_ROW = {torch.bfloat16: 3.0, torch.float16: 3.0}

ONE_BY_ONE = 16  # assignments that are computed each for itself when no gradient is asked for


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Where each assignment stands among the R rows.

    token_R    the token whose vector fills a row; T for a row of zeros.
    slot_R     the assignment (position in the flattened T·K) of a row; T·K for none.
    expert_R   the expert of a row; E for a row of zeros, which gets no bias.
    row_TK     the row of an assignment; R - 1 (the zero row) if it was dropped.
    depth      places per expert in the batch; the batch is rows 0 to E·depth.
    tail       (expert, first row, end row) of what follows the batch.
    offsets_E  where each expert's rows end, as int32, when all rows are sorted in the tail: CUDA's form.
    """

    token_R: Tensor
    slot_R: Tensor
    expert_R: Tensor
    row_TK: Tensor
    depth: int
    tail: tuple[tuple[int, int, int], ...]
    offsets_E: Tensor | None = None


def row_grid(counts_E: Tensor, dtype: torch.dtype) -> int:
    """What row counts are rounded up to on a CPU: an eighth of an expert's mean load in low precision, otherwise 1.

    The library compiles a low-precision product for each new shape, which takes far longer than running it; loads
    differ in every step, so unrounded they would hardly ever meet a product that is compiled already.
    """
    if dtype not in TAIL_ROW:
        return 1
    eighth = int(counts_E.sum()) // (8 * len(counts_E))
    return 1 << max(0, eighth.bit_length() - 1)


def choose_depth(counts_E: Tensor, dtype: torch.dtype, grid: int) -> int:
    """Places per expert in the batch that make the whole cheapest, by a count of rows."""
    depth_c = torch.cat([counts_E.new_zeros(1), _round_up(counts_E, grid).unique()])
    above_cE = _round_up((counts_E - depth_c.unsqueeze(1)).clamp_min(0), grid)
    tail_c = (TAIL_START * (above_cE > 0) + TAIL_ROW.get(dtype, 1.0) * above_cE).sum(1)
    return int(depth_c[(depth_c * len(counts_E) + tail_c).argmin()])


def _round_up(counts: Tensor, grid: int) -> Tensor:
    return (counts + grid - 1) // grid * grid


def lay_out(routing: Routing, dtype: torch.dtype, depth: int | None = None) -> RowLayout:
    """Give every computed assignment its row on a CPU; `depth` None: the cheapest."""
    plan = routing.plan()
    grid = row_grid(plan.counts_E, dtype)
    if depth is None:
        depth = choose_depth(plan.counts_E, dtype, grid)
    experts = routing.experts
    above_E = _round_up((plan.counts_E - depth).clamp_min(0), grid)
    end_E = experts * depth + above_E.cumsum(0)
    start_E = end_E - above_E
    tail = [(e, start, end) for e, (start, end) in enumerate(zip(start_E.tolist(), end_E.tolist(), strict=True))]
    experts_N = routing.experts_TK.flatten()[plan.order_N]
    rank_N = torch.arange(len(experts_N), device=experts_N.device) - (plan.offsets_E - plan.counts_E)[experts_N]
    row_N = torch.where(rank_N < depth, experts_N * depth + rank_N, start_E[experts_N] + rank_N - depth)
    return _fill(routing, row_N, experts_N, tail[-1][2] + 1, depth, tuple(run for run in tail if run[1] < run[2]))


def lay_out_sorted(routing: Routing) -> RowLayout:
    """Give every computed assignment its row for `grouped_mm`: sorted by expert, nothing read back from the device."""
    plan = routing.plan()
    experts_N = routing.experts_TK.flatten()[plan.order_N]
    row_N = torch.arange(len(experts_N), device=experts_N.device)
    return _fill(routing, row_N, experts_N, len(experts_N) + 1, 0, (), plan.offsets_E.to(torch.int32))


def _fill(
    routing: Routing,
    row_N: Tensor,
    experts_N: Tensor,
    rows: int,
    depth: int,
    tail: tuple[tuple[int, int, int], ...],
    offsets_E: Tensor | None = None,
) -> RowLayout:
    plan = routing.plan()
    T, K = routing.experts_TK.shape

    def spread(fill: int, size: int, index_N: Tensor, values_N: Tensor) -> Tensor:
        return torch.full((size,), fill, device=row_N.device).index_copy_(0, index_N, values_N)

    return RowLayout(
        token_R=spread(T, rows, row_N, plan.token_N),
        slot_R=spread(T * K, rows, row_N, plan.order_N),
        expert_R=spread(routing.experts, rows, row_N, experts_N),
        row_TK=spread(rows - 1, T * K, plan.order_N, row_N).view(T, K),
        depth=depth,
        tail=tail,
        offsets_E=offsets_E,
    )


def has_kernel(weights: ExpertWeights, device: str, dtype: torch.dtype) -> bool:
    """Whether CUDA's grouped_mm takes these experts: no float64, and rows that start at multiples of 16 bytes."""
    _, rows, width = weights.gate_up.shape
    aligned = all(n * dtype.itemsize % 16 == 0 for n in (rows, width, weights.hidden))
    return device == "cuda" and dtype != torch.float64 and aligned


def with_zero_row(x_TD: Tensor) -> Tensor:
    return F.pad(x_TD, (0, 0, 0, 1))


class Dispatch(Function):
    """Copy tokens to their rows; backward sums a token's rows, in float32."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, layout: RowLayout) -> Tensor:
        ctx.layout = layout
        return with_zero_row(x_TD).index_select(0, layout.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return F.embedding_bag(ctx.layout.row_TK, grad_RD.contiguous(), mode="sum"), None


class Combine(Function):
    """Sum a token's rows, in float32; backward copies the token's gradient to its rows. Dispatch, turned round."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, layout: RowLayout) -> Tensor:
        ctx.layout = layout
        return F.embedding_bag(layout.row_TK, out_RD, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return with_zero_row(grad_TD).index_select(0, ctx.layout.token_R), None


class Product(Function):
    """Multiply every row by its own expert's matrix: out[r] = a[r] @ w[expert of r]ᵀ. The last row stays zero.

    `turned`: the matrices are stored as (E, i, o); their gradient comes out as they lie.
    """

    @staticmethod
    def forward(ctx: Any, a_Ri: Tensor, w_E: Tensor, layout: RowLayout, turned: bool) -> Tensor:
        ctx.save_for_backward(a_Ri, w_E)
        ctx.layout, ctx.turned = layout, turned
        return rows_times(a_Ri, w_E if turned else w_E.mT, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Ro: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a_Ri, w_E = ctx.saved_tensors
        grad_a = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_a = rows_times(grad_Ro, w_E.mT if ctx.turned else w_E, ctx.layout)
        if ctx.needs_input_grad[1]:
            left, right = (a_Ri, grad_Ro) if ctx.turned else (grad_Ro, a_Ri)
            grad_w = outer(left, right, w_E, ctx.layout)
        return grad_a, grad_w, None, None


def rows_times(a_Ri: Tensor, w_Eio: Tensor, layout: RowLayout) -> Tensor:
    E, i, o = w_Eio.shape
    if layout.offsets_E is not None:
        return with_zero_row(F.grouped_mm(a_Ri[:-1].contiguous(), w_Eio, offs=layout.offsets_E))
    out_Ro = a_Ri.new_empty(len(a_Ri), o)
    batch = E * layout.depth
    if batch:
        torch.bmm(a_Ri[:batch].view(E, -1, i), w_Eio, out=out_Ro[:batch].view(E, -1, o))
    for e, first, end in layout.tail:
        torch.mm(a_Ri[first:end], w_Eio[e], out=out_Ro[first:end])
    out_Ro[-1] = 0
    return out_Ro


def outer(grad_Ro: Tensor, a_Ri: Tensor, like_Eoi: Tensor, layout: RowLayout) -> Tensor:
    """Each expert's weight gradient: the sum over its rows of grad ⊗ a."""
    E, o, i = like_Eoi.shape
    if layout.offsets_E is not None:
        out_Eoi = F.grouped_mm(grad_Ro[:-1].contiguous().mT, a_Ri[:-1].contiguous(), offs=layout.offsets_E)
        # What a kernel leaves where a sum has no terms is not documented: an idle expert's gradient is zero.
        idle_E = torch.diff(layout.offsets_E, prepend=layout.offsets_E.new_zeros(1)) == 0
        return out_Eoi.masked_fill(idle_E[:, None, None], 0)
    batch = E * layout.depth
    if batch:
        out_Eoi = torch.bmm(grad_Ro[:batch].view(E, -1, o).mT, a_Ri[:batch].view(E, -1, i))
    else:
        out_Eoi = torch.zeros_like(like_Eoi)
    for e, first, end in layout.tail:
        out_Eoi[e].addmm_(grad_Ro[first:end].mT, a_Ri[first:end])
    return out_Eoi


def one_by_one(x_TD: Tensor, routing: Routing, weights: ExpertWeights, dtype: torch.dtype) -> Tensor:
    """Decoding: every assignment straight from its expert's weights; for so few, a layout would cost more than they."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.promote_types(dtype, torch.float32))
    dropped_TK = None if routing.dropped_TK is None else routing.dropped_TK.tolist()
    for t, chosen_K in enumerate(routing.experts_TK.tolist()):
        x_1D = x_TD[t : t + 1].to(dtype)
        for k, e in enumerate(chosen_K):
            if not 0 <= e < weights.experts:
                raise RoutingError(f"routing names expert {e}: there are {weights.experts}, counted from 0")
            if dropped_TK is not None and dropped_TK[t][k]:
                continue
            gate_up, down, gate_up_bias, down_bias = weights.expert(e, dtype)
            h_1G = F.linear(x_1D, gate_up, gate_up_bias)
            out_1D = F.linear(activate(h_1G, weights.activation), down, down_bias)
            y_TD[t] += out_1D[0] * routing.weights_TK[t, k]
    return y_TD.to(dtype)


class Own(NamedTuple):
    """What a module of another library computes itself.

    gate     (R, G) -> (R, F), between the products.
    norm     (R, D) -> (R, D), of the second product before it is weighted; None: there is none.
    turned   its matrices are stored as (E, D, G) and (E, F, D): the weights are views of them.
    """

    gate: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor] | None
    turned: bool


# A traced graph cannot know the layout, which depends on the load.
@no_compile
def grouped(x_TD: Tensor, routing: Routing, weights: ExpertWeights, own: Own | None = None) -> Tensor:
    """Apply the experts: all rows of all experts in two products each way; quantized ones are for the plain loop."""
    if weights.bits:
        return reference(x_TD, routing, weights)
    dtype, device = compute_dtype(x_TD), x_TD.device.type
    few = device == "cpu" and not torch.is_grad_enabled() and routing.experts_TK.numel() <= ONE_BY_ONE
    if few and own is None:
        return one_by_one(x_TD, routing, weights, dtype)
    if has_kernel(weights, device, dtype):
        layout = lay_out_sorted(routing)
    else:
        # A batch reads all weights. Where less than half of them are needed, as in decoding, a loop is quicker.
        alone = own is not None and int((routing.plan().counts_E > 0).sum()) < weights.experts / 2
        layout = lay_out(routing, dtype, 0) if alone else lay_out(routing, dtype)
    weight_R = F.pad(routing.weights_TK.flatten(), (0, 1)).index_select(0, layout.slot_R).unsqueeze(1).to(dtype)
    turned = own is not None and own.turned

    def product(a_Ri: Tensor, w_Eoi: Tensor, bias_Eo: Tensor | None, share_R: Tensor | None = None) -> Tensor:
        w_E = w_Eoi.to(dtype)
        out_Ro: Tensor = Product.apply(a_Ri, w_E.mT if turned else w_E, layout, turned)  # type: ignore[no-untyped-call]
        if bias_Eo is None:
            return out_Ro
        bias_Ro = with_zero_row(bias_Eo.to(dtype)).index_select(0, layout.expert_R)
        return out_Ro + (bias_Ro if share_R is None else bias_Ro * share_R)

    with torch.autocast(device, enabled=False):
        x_RD = Dispatch.apply(x_TD.to(dtype), layout)  # type: ignore[no-untyped-call]
        h_RG = product(x_RD, weights.gate_up, weights.gate_up_bias)
        if own is None:
            # The weight goes on the F hidden values and not on the D outputs: in fine-grained experts F is the smaller.
            # It is zero for rows that stand for nothing.
            a_RF = activate(h_RG, weights.activation) * weight_R
            out_RD = product(a_RF, weights.down, weights.down_bias, weight_R)
        else:
            out_RD = product(own.gate(h_RG).to(dtype), weights.down, weights.down_bias)
            out_RD = (out_RD if own.norm is None else own.norm(out_RD)).to(dtype) * weight_R
        y_TD: Tensor = Combine.apply(out_RD, layout)  # type: ignore[no-untyped-call]
    return y_TD
