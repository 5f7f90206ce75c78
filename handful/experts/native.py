"""Experts by the C++ kernels, on CPU: one operation, no Python per expert, no copy of a weight.

Floats have a backward pass, quantized weights (handful/quantize.py) a forward pass alone. Experts that are not all
there at once are computed in parts, or from the slots that they lie in, with the same bits.

Legend: T tokens, t a run of them · D model width · E experts · K experts per token · N assignments
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from handful.errors import ConfigError, HandfulError, RoutingError
from handful.experts.linear import Linear
from handful.experts.reference import Fetch
from handful.experts.weights import ExpertWeights, compute_dtype
from handful.kernels.dispatch import is_unmodified, unwatched
from handful.kernels.extension import (
    DTYPES,
    ROUTER_KERNEL_MAX_TOKENS,
    available,
    native_max_tokens,
    translate_error,
)
from handful.machine import native_error
from handful.routing import Routing

__all__ = [
    "native", "native_in_parts", "native_in_slots", "native_rows", "native_rows_with_gradients", "native_sum",
    "needs_gradients", "one_expert", "supports", "uses_native",
]  # fmt: skip


def supports(x: Tensor, weights: ExpertWeights) -> bool:
    """Whether the kernels, where they are there, multiply x and weights: on CPU, in float32 and bfloat16."""
    dtypes = [compute_dtype(x), x.dtype]
    if not weights.bits:
        dtypes += [weights.gate_up.dtype, weights.down.dtype]
    return x.device.type == "cpu" and all(dtype in DTYPES for dtype in dtypes)


def needs_gradients(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> bool:
    """Whether autograd will ask for a gradient of anything that the experts are applied to or made of."""
    inputs = (x_TD, routing.weights_TK, weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)


def check_supports(x_TD: Tensor, weights: ExpertWeights) -> None:
    """HandfulError where the kernels are not there, ConfigError for a dtype or a device that they do not take."""
    if not available():
        raise HandfulError(f"experts backend 'native': {native_error()}")
    if not supports(x_TD, weights):
        raise ConfigError(
            f"experts backend 'native' was given x of {_name(x_TD)} and weights of {_name(weights.gate_up)}: "
            "it takes float32 and bfloat16 on cpu"
        )


def uses_native(backend: str, x_TD: Tensor, weights: ExpertWeights) -> bool:
    """Whether a backend of this name, "auto" among them, is the kernels for x and weights. Errors as `check_supports`
    where "native" was asked for and cannot be."""
    if backend == "native":
        check_supports(x_TD, weights)
    return backend == "native" or (backend == "auto" and available() and supports(x_TD, weights))


def native(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Apply the experts by the kernels. HandfulError where they are not there, ConfigError for a dtype they do not
    take."""
    check_supports(x_TD, weights)
    tokens, weights = _tokens(x_TD, routing), weights.contiguous()
    if weights.bits or not needs_gradients(x_TD, routing, weights):
        return _apply(*tokens, weights)
    y_TD, _ = _call(
        torch.ops.handful.experts_forward, *tokens, *_floats(weights), compute_dtype(x_TD) == torch.bfloat16, False
    )
    return y_TD  # type: ignore[no-any-return]


def one_expert(network: Any, x: Tensor) -> Any:
    """FeedForward.forward with gradients, or of many tokens: one expert that every token chose. Through torch, hidden
    values go to memory and come back for each product, for the activation, and for all their gradients."""
    if not (available() and unwatched((Linear,))):
        return NotImplemented
    gate_up, down = network.gate_up, network.down
    if not (_is_plain(gate_up) and _is_plain(down)) or x.shape[-1] != gate_up.in_features:
        return NotImplemented
    first, second = gate_up.weight, down.weight
    with_gradients = torch.is_grad_enabled() and (x.requires_grad or first.requires_grad or second.requires_grad)
    if not (with_gradients or _are_many(x.shape[:-1].numel(), compute_dtype(x))):
        return NotImplemented
    weights = ExpertWeights(
        first.unsqueeze(0), None, second.unsqueeze(0), None, None, None, network.activation, down.in_features
    ).contiguous()
    alike = torch.is_autocast_enabled(x.device.type) or x.dtype == first.dtype == second.dtype
    if not (alike and supports(x, weights)):
        return NotImplemented
    x_TD, bf16 = x.reshape(-1, x.shape[-1]).contiguous(), compute_dtype(x) == torch.bfloat16
    routing = torch.zeros(len(x_TD), 1, dtype=torch.long), torch.ones(len(x_TD), 1), None
    if with_gradients:
        y_TD, _ = _call(torch.ops.handful.experts_forward, x_TD, *routing, *_floats(weights), bf16, False)
    else:
        y_TD = _apply(x_TD, *routing, weights)
    return y_TD.view(x.shape)


def _are_many(tokens: int, dtype: torch.dtype) -> bool:
    """Whether so many tokens without gradients pass a network more quickly as an expert than through torch: more than
    pass a block as one operation, in float32, and in bfloat16 where no instruction multiplies it."""
    return tokens > ROUTER_KERNEL_MAX_TOKENS and (dtype == torch.float32 or native_max_tokens(dtype) is None)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight and does no more, forwards and backwards."""
    watched = module._backward_hooks or module._backward_pre_hooks
    return is_unmodified(module, Linear) and module.bias is None and not watched


def native_rows_with_gradients(x_ND: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """What `native` gives for rows that each go to one expert with weight 1, in the float32 that it is summed in."""
    tokens, weights = _tokens(x_ND, routing), weights.contiguous()
    bf16 = compute_dtype(x_ND) == torch.bfloat16
    rows_ND, _ = _call(torch.ops.handful.experts_forward, *tokens, *_floats(weights), bf16, True)
    return rows_ND  # type: ignore[no-any-return]


def native_in_slots(x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor, slots: ExpertWeights) -> Tensor:
    """Apply to each token the K experts that lie in its slots, all at once: the bits that `native` gives. Up to
    `gemv_max_tokens` tokens. No gradients."""
    return _apply(x_TD.contiguous(), slots_TK, weights_TK.float().contiguous(), None, slots)


def native_in_parts(x_TD: Tensor, routing: Routing, slots: ExpertWeights, fetch: Fetch) -> Tensor:
    """Apply experts that are not all there at once: the bits that `native` gives. No gradients.

    fetch   is called for runs of tokens, one after another; where experts lie, it says as slots.

    RoutingError for an expert that does not exist.
    """
    step = torch.ops.handful.experts_step(routing.tokens, routing.experts, routing.top_k)
    parts = []
    for t in range(0, max(1, routing.tokens), step):
        some = routing.rows(t, min(t + step, routing.tokens))
        rows_ND = native_rows(x_TD[t : t + step], some, slots, fetch)
        parts.append(native_sum(rows_ND, some, compute_dtype(x_TD)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def native_rows(x_TD: Tensor, routing: Routing, slots: ExpertWeights, fetch: Fetch, tokens: int = 0) -> Tensor:
    """The experts' outputs alone, neither weighted nor summed: a row for each computed assignment, (N, D) float32, by
    expert, earlier tokens first. No gradients.

    tokens   of the whole call that these are a part of, which others compute the rest of: what `native` gives for it
             depends on how many they are. 0: these are all.

    RoutingError for an expert that does not exist.
    """
    count = routing.experts
    x_TD, experts_TK, _, dropped_TK = _tokens(x_TD, routing)
    dtype = compute_dtype(x_TD)
    # An expert's biases are there when it is, and turned to the products' dtype then.
    biases = [slots.gate_up_bias, slots.down_bias]
    turned = biases
    if slots.bits:
        turned = [b if b is None or b.dtype == dtype else torch.empty(b.shape, dtype=dtype) for b in biases]
    to_turn = [(bias, to) for bias, to in zip(biases, turned, strict=True) if bias is not None and bias is not to]
    slots = slots._replace(gate_up_bias=turned[0], down_bias=turned[1])
    kept_N = experts_TK.flatten() if dropped_TK is None else experts_TK[~dropped_TK]
    chosen = sorted(set(kept_N.tolist()))
    for e in chosen:
        if not 0 <= e < count:
            raise RoutingError(f"routing names expert {e}: there are {count}, counted from 0")
    rows_ND = torch.empty(len(kept_N), x_TD.shape[1])
    places_E = np.empty(count, np.int64)
    for ready in fetch(chosen, x_TD):
        places_E.fill(-1)
        for e, slot in ready:
            places_E[e] = slot
            for bias, to in to_turn:
                to[slot] = bias[slot]  # type: ignore[index]
        places, bf16 = torch.from_numpy(places_E), dtype == torch.bfloat16
        _call(torch.ops.handful.experts_rows, rows_ND, x_TD, experts_TK, dropped_TK, places, *slots, bf16, tokens)
    return rows_ND


def native_sum(rows_ND: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """The rows of `native_rows`, weighted and summed in the order of k: (T, D) in a dtype. No gradients."""
    _, experts_TK, weights_TK, dropped_TK = _tokens(rows_ND, routing)
    bf16 = dtype == torch.bfloat16
    y_TD = _call(torch.ops.handful.experts_sum, rows_ND, experts_TK, weights_TK, dropped_TK, routing.experts, bf16)
    return y_TD  # type: ignore[no-any-return]


def _apply(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, dropped_TK: Tensor | None, weights: ExpertWeights
) -> Tensor:
    """Without gradients."""
    dtype = compute_dtype(x_TD)
    tokens, bf16 = (x_TD, experts_TK, weights_TK, dropped_TK), dtype == torch.bfloat16
    if weights.bits:
        y_TD = _call(torch.ops.handful.experts_quantized, *tokens, *weights.with_biases_in(dtype), bf16)
    else:
        y_TD = _call(torch.ops.handful.experts, *tokens, *_floats(weights), bf16)
    return y_TD  # type: ignore[no-any-return]


def _call(operation: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return operation(*arguments)
    except RuntimeError as error:
        raise translate_error(error) from None


def _tokens(x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dropped_TK = None if routing.dropped_TK is None else routing.dropped_TK.contiguous()
    experts_TK, weights_TK = routing.experts_TK.long().contiguous(), routing.weights_TK.float().contiguous()
    return x_TD.contiguous(), experts_TK, weights_TK, dropped_TK


def _floats(weights: ExpertWeights) -> tuple[Any, ...]:
    """What the operations on float weights take."""
    return weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias, weights.activation


def _name(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} on {value.device.type}"
