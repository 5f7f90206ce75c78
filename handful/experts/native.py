"""Experts by our own C++ kernels, on CPU: one operation, no Python per expert, no copy of a weight.

csrc/experts_*.cpp say how; they choose among AVX2, AVX-512 and AMX at run time and use
torch's threads. Products are in float32, or in bfloat16 with float32 sums; the same bits come out for any number of
threads. Quantised weights (handful/quantize.py) have a forward pass only.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · G = 2·F gate and up
rows (F without a gate) · I inputs, O outputs of a linear map · N assignments · S slots
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from handful.config import RouterConfig
from handful.errors import ConfigError, HandfulError, RoutingError
from handful.machine import native_error
from handful.quantize import Packed
from handful.routing import Routing

if TYPE_CHECKING:
    from handful.experts.layer import Experts

__all__ = [
    "OneToken",
    "Slots",
    "attend_many",
    "attend_one",
    "available",
    "experts_in_parts",
    "experts_in_slots",
    "explained",
    "few",
    "levels",
    "likeliest",
    "linear",
    "linears",
    "native",
    "needs_gradients",
    "plain_inference",
    "quantized_experts",
    "rms_norm",
    "route",
    "router_rules",
    "takes",
]

DTYPES = (torch.float32, torch.bfloat16)
FEW = 16  # tokens up to which they read a quantised matrix as a stream (gemv_max_tokens in csrc/levels.cpp)
# Tokens up to which our kernels are quicker than torch for one matrix of floats: where AMX or pairs multiply bfloat16,
# and of others.
AMX, PAIRED, SINGLE = 16, 128, 4
ROUTED = 32  # tokens up to which a router is one operation; for more, torch's product is the quicker
PANEL = 32  # assignments of one expert that the kernels lay side by side (kPanel in csrc/kernels.h)

_available: bool | None = None  # None: nobody has asked yet
_paired = SINGLE  # the number of those that this computer has, for bfloat16


def available() -> bool:
    """Whether the kernels are there: `handful.machine.native_error()` says why not. Loads them at the first call.

    It is a fact about this process: modules ask when they compute, and keep no answer that another computer's
    process would read. Raises ConfigError if HANDFUL_ISA names a level that this computer does not have.
    """
    return _find() if _available is None else _available


class Level(NamedTuple):
    """A level of instructions that kernels are compiled for: its name, and the features that it needs of a CPU."""

    name: str
    needs: frozenset[str]


def levels(features: Iterable[str]) -> dict[str, Level]:
    """Which level a CPU of these features (as in `Machine.isa`) multiplies with: many tokens in "float32", "bfloat16"
    and by "codes" of 8 or 4 bits, and "few tokens". HandfulError where there is none."""
    try:
        lines = torch.ops.handful.levels(" ".join(features)).splitlines()
    except RuntimeError as error:
        raise explained(error) from None
    rows = (line.split(": ") for line in lines)
    return {use: Level(name, frozenset(needs.split())) for use, name, needs in rows}


def few(dtype: torch.dtype) -> int:
    """Tokens up to which the kernels multiply a matrix of floats more quickly than torch."""
    return _paired if dtype == torch.bfloat16 else SINGLE


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products of x are computed in: x's own dtype, or autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels, where they are there, can multiply x and weights: on CPU, in float32 and bfloat16."""
    dtypes = (compute_dtype(x), x.dtype, *(weight.dtype for weight in weights))
    return x.device.type == "cpu" and all(dtype in DTYPES for dtype in dtypes)


def needs_gradients(x_TD: Tensor, routing: Routing, experts: Experts) -> bool:
    """Whether autograd will ask for a gradient of anything that the experts are applied to or made of."""
    inputs = (x_TD, routing.weights_TK, experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias)
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)


def native(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Apply the experts by the kernels. HandfulError where they are not there, or for a dtype they do not take."""
    if not available():
        raise HandfulError(f"experts backend 'native': {native_error()}")
    if not takes(x_TD, experts.gate_up, experts.down):
        raise ConfigError(
            f"experts backend 'native' was given x of {_name(x_TD)} and weights of {_name(experts.gate_up)}: "
            "it takes float32 and bfloat16 on cpu"
        )
    arguments = (
        *_tokens(x_TD, routing),
        experts.gate_up.contiguous(),
        experts.down.contiguous(),
        _whole(experts.gate_up_bias),
        _whole(experts.down_bias),
        experts.activation,
        compute_dtype(x_TD) == torch.bfloat16,
    )
    y_TD: Tensor
    try:
        if needs_gradients(x_TD, routing, experts):
            y_TD, _ = torch.ops.handful.experts_forward(*arguments)
        else:
            y_TD = torch.ops.handful.experts(*arguments)
    except RuntimeError as error:
        raise explained(error) from None
    return y_TD


def quantized_experts(
    x_TD: Tensor,
    routing: Routing,
    gate_up: Packed,
    down: Packed,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Apply experts whose weights are quantised, gate_up (E, G, D) and down (E, D, F) alike; no gradients."""
    try:
        y_TD: Tensor = torch.ops.handful.experts_quantized(
            *_tokens(x_TD, routing),
            gate_up.codes,
            gate_up.scales,
            down.codes,
            down.scales,
            _whole(gate_up_bias),
            _whole(down_bias),
            activation,
            down.inputs,
            down.bits,
            down.group,
            compute_dtype(x_TD) == torch.bfloat16,
        )
    except RuntimeError as error:
        raise explained(error) from None
    return y_TD


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """Weights of S experts, of whichever: gate_up (S, G, D), down (S, D, F), or their codes with scales, and biases
    (S, G) and (S, D). Each matrix is contiguous; from one to the next it may be any distance."""

    gate_up: Tensor
    gate_up_scales: Tensor | None
    down: Tensor
    down_scales: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    hidden: int
    bits: int
    group: int


def experts_in_parts(
    x_TD: Tensor,
    routing: Routing,
    count: int,
    slots: Slots,
    fetch: Callable[[Sequence[int], Tensor], Iterator[list[tuple[int, int]]]],
) -> Tensor:
    """Apply `count` experts that are not all there at once: the bits that `native` and `quantized_experts` give.

    fetch   (experts that were chosen, their tokens' x) -> lists of (expert, slot), which need to be there until the
            next list is asked for; every expert comes once. It is called for runs of tokens, one after another.

    No gradients. RoutingError for an expert that does not exist.
    """
    x_TD, experts_TK, weights_TK, dropped_TK = _tokens(x_TD, routing)
    bf16 = compute_dtype(x_TD) == torch.bfloat16
    step = torch.ops.handful.experts_step(count, experts_TK.shape[1])
    # Quantised experts have their biases in the dtype of the products. Those of an expert are there when it is.
    dtype = torch.bfloat16 if bf16 else torch.float32
    biases = [slots.gate_up_bias, slots.down_bias]
    turned = biases
    if slots.bits:
        turned = [b if b is None or b.dtype == dtype else torch.empty(b.shape, dtype=dtype) for b in biases]
    to_turn = [(bias, to) for bias, to in zip(biases, turned, strict=True) if bias is not None and bias is not to]
    weights = (slots.gate_up, slots.gate_up_scales, slots.down, slots.down_scales, *turned)
    kind = (slots.activation, slots.hidden, slots.bits, slots.group, bf16)
    parts = []
    for t in range(0, max(1, len(x_TD)), step):
        x_tD, experts_tK, weights_tK, dropped_tK = x_TD, experts_TK, weights_TK, dropped_TK
        if len(x_TD) > step:
            x_tD, experts_tK, weights_tK = (value[t : t + step] for value in (x_TD, experts_TK, weights_TK))
            dropped_tK = None if dropped_TK is None else dropped_TK[t : t + step]
        kept_N = experts_tK.flatten() if dropped_tK is None else experts_tK[~dropped_tK]
        chosen = sorted(set(kept_N.tolist()))
        for e in chosen:
            if not 0 <= e < count:
                raise RoutingError(f"routing names expert {e}: there are {count}, counted from 0")
        rows_ND = torch.empty(len(kept_N), x_TD.shape[1])
        places_E = np.empty(count, np.int64)
        try:
            for ready in fetch(chosen, x_tD):
                places_E.fill(-1)
                for e, slot in ready:
                    places_E[e] = slot
                    for bias, to in to_turn:
                        to[slot] = bias[slot]  # type: ignore[index]
                torch.ops.handful.experts_rows(
                    rows_ND, x_tD, experts_tK, dropped_tK, torch.from_numpy(places_E), *weights, *kind
                )
            parts.append(torch.ops.handful.experts_sum(rows_ND, experts_tK, weights_tK, dropped_tK, count, bf16))
        except RuntimeError as error:
            raise explained(error) from None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def experts_in_slots(x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor, slots: Slots) -> Tensor:
    """Apply to each token the K experts that lie in its slots, all at once: the bits that `native` and
    `quantized_experts` give. Up to FEW tokens; biases, if any, in the dtype of the products. No gradients."""
    bf16 = compute_dtype(x_TD) == torch.bfloat16
    given = (x_TD.contiguous(), slots_TK, weights_TK.float().contiguous(), None)
    biases = (slots.gate_up_bias, slots.down_bias)
    y_TD: Tensor
    try:
        if slots.bits:
            y_TD = torch.ops.handful.experts_quantized(
                *given, slots.gate_up, slots.gate_up_scales, slots.down, slots.down_scales, *biases, slots.activation,
                slots.hidden, slots.bits, slots.group, bf16,
            )  # fmt: skip
        else:
            y_TD = torch.ops.handful.experts(*given, slots.gate_up, slots.down, *biases, slots.activation, bf16)
    except RuntimeError as error:
        raise explained(error) from None
    return y_TD


def linear(x_TI: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias for float32 or bfloat16 x (..., I) and weight (O, I): (..., O) in x's dtype; no gradients."""
    return linears(x_TI, [(weight, bias)])[0]


def linears(x_TI: Tensor, maps: Sequence[tuple[Tensor | Packed, Tensor | None]]) -> list[Tensor]:
    """`linear` of one x and several weights with their biases; one operation for those that are of one kind."""
    weights, biases = [weight for weight, _ in maps], [bias for _, bias in maps if bias is not None]
    packed = [weight for weight in weights if isinstance(weight, Packed)]
    kinds = {(w.bits, w.group, w.inputs) if isinstance(w, Packed) else (w.dtype, w.shape[1]) for w in weights}
    if len(kinds) > 1 or len(biases) not in (0, len(maps)):
        return [linear(x_TI, weight, bias) for weight, bias in maps]
    if packed and x_TI.shape[-1] != packed[0].inputs:
        raise ConfigError(f"linear was given x of width {x_TI.shape[-1]}: its weight takes {packed[0].inputs}")
    codes = [w.codes if isinstance(w, Packed) else w.contiguous() for w in weights]
    bits, group = (packed[0].bits, packed[0].group) if packed else (0, 0)
    x_TI, lead = x_TI.reshape(-1, x_TI.shape[-1]).contiguous(), x_TI.shape[:-1]
    try:
        found: list[Tensor] = torch.ops.handful.linears(
            x_TI, codes, [w.scales for w in packed], [bias.contiguous() for bias in biases], bits, group
        )
    except RuntimeError as error:
        raise explained(error) from None
    return [y_TO.view(*lead, y_TO.shape[-1]) for y_TO in found]


def plain_inference(x: Tensor, *weights: Tensor) -> bool:
    """Whether x and weights can go to the kernels that have no gradients: without autograd and autocast, on CPU."""
    if torch.is_grad_enabled() or not x.is_cpu or torch.is_autocast_enabled("cpu") or x.dtype not in DTYPES:
        return False
    return not weights or all(weight.dtype in DTYPES for weight in weights)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of float32 or bfloat16 x (..., D), in x's dtype; no gradients."""
    y: Tensor = torch.ops.handful.rms_norm(x.contiguous(), weight, eps)
    return y


def likeliest(logits_V: Tensor) -> int:
    """The place of the largest logit, the first of equals. In bfloat16 torch takes longer than for the output layer."""
    place: int = torch.ops.handful.argmax.default(logits_V.contiguous())
    return place


def attend_many(
    q_BHSd: Tensor, k_BJPd: Tensor, v_BJPv: Tensor, window: int | None, scale: float, sinks_H: Tensor | None
) -> Tensor:
    """Attention of the last S of P tokens, each to the tokens up to itself, with a window to the last so many of them:
    (B, S, H·v); no gradients."""
    sinks = None if sinks_H is None else sinks_H.float()
    out: Tensor = torch.ops.handful.prefill_attention(q_BHSd, k_BJPd, v_BJPv, sinks, scale, window or 0)
    return out


class OneToken(NamedTuple):
    """What the attention of one new token of each of B sequences is given beside its queries, keys and values.

    norms     weights of the norms of queries and keys, None: there are none. whole_norm: over all heads, not in each.
    rope      cos and sin of the new tokens' positions, (caches, r/2).
    held      keys and values (b, J, C, d) of the caches that the sequences lie in, in order, for b sequences each;
              lengths: how many tokens each cache holds.
    """

    norms: tuple[Tensor, Tensor] | None
    eps: float
    whole_norm: bool
    rope: tuple[Tensor, Tensor]
    adjacent: bool
    held: Sequence[tuple[Tensor, ...]]
    lengths: Sequence[int]
    window: int | None
    scale: float
    sinks_H: Tensor | None

    def arguments(self) -> tuple[Any, ...]:
        """As the operations take them."""
        return (
            *(self.norms or (None, None)), self.eps, self.whole_norm, *self.rope, self.adjacent,
            [keys for keys, _ in self.held], [values for _, values in self.held], self.lengths, self.window or 0,
            self.scale, self.sinks_H,
        )  # fmt: skip


def attend_one(q_BX: Tensor, k_BX: Tensor, v_BX: Tensor, given: OneToken) -> Tensor:
    """One more token of each of B sequences: QK-norm, RoPE, its place in a cache and attention, as one operation; no
    gradients.

    q_BX, k_BX, v_BX   as the projections make them, (B, H·d) and (B, J·d).
    """
    out: Tensor = torch.ops.handful.decode_attention(q_BX, k_BX, v_BX, *given.arguments())
    return out


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    balance_bias_E: Tensor | None,
    chosen_TK: Tensor | None,
    config: RouterConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A router's logits and scores (T, E), chosen experts and weights (T, K), as one operation without gradients.

    chosen_TK   int64: the experts to take whatever the scores. RoutingError for one that does not exist.
    """
    balance_bias_E = None if balance_bias_E is None else balance_bias_E.float()
    try:
        found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.handful.route(
            x_TD.contiguous(), weight_ED.contiguous(), bias_E, balance_bias_E, chosen_TK, *router_rules(config)
        )
    except RuntimeError as error:
        raise explained(error) from None
    return found


def router_rules(config: RouterConfig) -> tuple[bool, int, int, bool, int, bool, float]:
    """What a router's operation is told of its config, in its order."""
    return (
        config.score == "sigmoid", config.groups, config.top_groups, config.group_score == "top2", config.top_k,
        config.normalize, config.scale,
    )  # fmt: skip


def _tokens(x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dropped_TK = None if routing.dropped_TK is None else routing.dropped_TK.contiguous()
    return (
        x_TD.contiguous(),
        routing.experts_TK.long().contiguous(),
        routing.weights_TK.float().contiguous(),
        dropped_TK,
    )


def _whole(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _name(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} on {value.device.type}"


def explained(error: RuntimeError) -> Exception:
    """The kernels' own complaint, in one line and without its place in the source, as an error of ours."""
    line = re.sub(r"^\w+, [\w./]+:\d+, ", "", str(error).splitlines()[0])
    return RoutingError(line) if line.startswith(("routing names", "choice names")) else HandfulError(line)


# ---------------------------------------------------------------------------------------------------------------------
# What torch must know of the operation: its gradients, and its shapes for torch.compile.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.bf16 = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, grad_y: Tensor | None, grad_kept: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 10
    *tensors, kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    for_parameters = any(needs[4:8])
    x, weights, gate_up, down, gate_up_bias, down_bias = torch.ops.handful.experts_backward(
        grad_y.contiguous(), *tensors, kept, ctx.activation, ctx.bf16, needs[0], for_parameters
    )

    def of(grad: Tensor, index: int) -> Tensor | None:
        return grad.to(tensors[index].dtype) if needs[index] else None

    return (
        of(x, 0),
        None,
        of(weights, 2),
        None,
        of(gate_up, 4),
        of(down, 5),
        of(gate_up_bias, 6),
        of(down_bias, 7),
        None,
        None,
    )


def _fake_experts(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16 if others[-1] else torch.float32)


def _fake_forward(
    x: Tensor, experts: Tensor, weights: Tensor, dropped: Tensor | None, gate_up: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    assignments, (count, rows, _) = experts.numel(), gate_up.shape
    # Each expert may leave its last panel unfilled, as long as there are assignments enough.
    panels = assignments // PANEL + torch.sym_min(assignments, count)
    y = _fake_experts(x, *others)
    return y, y.new_empty((panels, rows, PANEL))


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    dropped: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    kept: Tensor,
    activation: str,
    bf16: bool,
    for_x: bool,
    for_parameters: bool,
) -> tuple[Tensor, ...]:
    def like(value: Tensor, wanted: bool) -> Tensor:
        return torch.empty_like(value) if wanted else value.new_empty((0,) * value.dim())

    def bias_like(bias: Tensor | None) -> Tensor:
        shape = bias.shape if bias is not None and for_parameters else (0, 0)
        return x.new_empty(shape, dtype=torch.float32)

    return (
        like(x, for_x),
        torch.empty_like(weights),
        like(gate_up, for_parameters),
        like(down, for_parameters),
        bias_like(gate_up_bias),
        bias_like(down_bias),
    )


def _fake_linears(x: Tensor, weights: Sequence[Tensor], *others: Any) -> list[Tensor]:
    return [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]


def _fake_route(
    x: Tensor, weight: Tensor, bias: Tensor | None, balance_bias: Tensor | None, chosen: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (tokens, _), experts, top_k = x.shape, weight.shape[0], others[4]
    scores = x.new_empty((tokens, experts), dtype=torch.float32)
    weights = x.new_empty((tokens, top_k), dtype=torch.float32)
    return scores, torch.empty_like(scores), weights.new_empty(weights.shape, dtype=torch.int64), weights


def _fake_moe_layer(
    x: Tensor, norm: Tensor, norm_eps: float, router: Tensor, bias: Tensor | None, balance_bias: Tensor | None,
    chosen: Tensor | None, dropped: Tensor | None, *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x_TD = x.reshape(-1, x.shape[-1])
    return torch.empty_like(x), *_fake_route(x_TD, router, bias, balance_bias, chosen, *others)


def _fake_attend_many(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1] * v.shape[3]))


def _fake_like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _find() -> bool:
    global _available
    if native_error() is None:
        _register()
    _available = native_error() is None
    return _available


def _register() -> None:
    global _paired
    isa = set(torch.ops.handful.isa().split())
    if isa >= {"avx512_vnni", "avx512_bf16"}:
        _paired = AMX if "amx_bf16" in isa else PAIRED
    torch.library.register_fake("handful::experts", _fake_experts)
    torch.library.register_fake("handful::experts_forward", _fake_forward)
    torch.library.register_fake("handful::experts_backward", _fake_backward)
    torch.library.register_fake("handful::experts_quantized", _fake_experts)
    torch.library.register_fake("handful::linears", _fake_linears)
    torch.library.register_fake("handful::rms_norm", _fake_like_first)
    torch.library.register_fake("handful::decode_attention", _fake_like_first)
    torch.library.register_fake("handful::prefill_attention", _fake_attend_many)
    torch.library.register_fake("handful::route", _fake_route)
    torch.library.register_fake("handful::attend_layer", _fake_like_first)
    torch.library.register_fake("handful::moe_layer", _fake_moe_layer)
    torch.library.register_fake("handful::feed_forward_layer", _fake_like_first)
    torch.library.register_autograd("handful::experts_forward", _backward, setup_context=_setup)


# Known before anything is traced, by a module that comes out of a pickle too. A wrong HANDFUL_ISA is told to who asks
# next.
with contextlib.suppress(ConfigError):
    available()
