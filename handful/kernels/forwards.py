"""What the extension computes of the modules' forwards: the kernels that `with_kernel` names.

Each is given what the forward is given, the module first, and gives what it would give, or NotImplemented: for what is
not on a CPU, needs gradients, or is of a kind that the kernel does not know.

Legend: as in `handful.attention` and `handful.moe`
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from handful.kernels import operations
from handful.kernels.extension import DTYPES, ROUTER_KERNEL_MAX_TOKENS, available, inference_only, prefers_native
from handful.kernels.operations import DecodeAttention
from handful.routing import Limits, Piecewise, Routing, Told

__all__ = [
    "CACHED",
    "decode_attention",
    "decode_operands",
    "largest",
    "linear",
    "prefill_attention",
    "rms_norm",
    "route",
    "softmax_loss",
]

CACHED = frozenset({*DTYPES, torch.int8})  # what keys and values may be held in


def rms_norm(norm: nn.RMSNorm, x: Tensor) -> Any:
    """RMSNorm.forward."""
    weight = norm.weight
    if not available() or weight.dtype not in DTYPES or not inference_only(x):
        return NotImplemented
    return operations.rms_norm(x, weight, norm.eps or 0.0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """x · weightᵀ + bias of few tokens."""
    if not prefers_native(weight, x.shape[:-1].numel(), x.dtype) or not inference_only(x):
        return NotImplemented
    return operations.linear(x, weight, bias)


def largest(logits_V: Tensor) -> Any:
    """The largest logit and its place."""
    return operations.largest(logits_V) if available() and inference_only(logits_V) else NotImplemented


def softmax_loss(logits_cV: Tensor, targets_c: Tensor, gradient: bool) -> Any:
    """The loss of a chunk, and its gradient in the logits' place whether or not it is asked for."""
    if not available() or logits_cV.dtype != torch.float32 or not inference_only(logits_cV):
        return NotImplemented
    return operations.softmax_loss(logits_cV, targets_c.contiguous())


def routes(router: Any, x: Tensor, tokens: int) -> bool:
    """Whether one operation is to route so many tokens: few of them in inference, each for itself."""
    if not available() or router.training or tokens > ROUTER_KERNEL_MAX_TOKENS or not router.config.independent:
        return False
    weight = router._parameters.get("weight")  # router.weight takes ten times as long
    return weight is not None and inference_only(x, weight)


def route(
    router: Any,
    x_TD: Tensor,
    sequence: int | None = None,
    *,
    choice: Told | None = None,
    real_T: Tensor | None = None,
) -> Any:
    """Router.forward."""
    if real_T is not None or isinstance(choice, Piecewise) or not routes(router, x_TD, len(x_TD)):
        return NotImplemented
    config, tokens = router.config, len(x_TD)
    if isinstance(choice, Limits):
        top_k, off_TE = router.within(choice, tokens, x_TD.device)
        own = operations.route(x_TD, router.weight, router.bias, router.balance_bias, None, config)
        chosen_TK, dropped_TK = router.best(own[1], top_k, off_TE), None  # of the operation's own scores
    else:
        chosen_TK, dropped_TK = router.forced_experts(choice, tokens, x_TD.device)
    if chosen_TK is not None and chosen_TK.shape[1] != config.top_k:
        config = replace(config, top_k=chosen_TK.shape[1])
    made = operations.route(x_TD, router.weight, router.bias, router.balance_bias, chosen_TK, config)
    return Routing(*made, dropped_TK)


def decode_operands(attention: Any, span: Any, q_norm: Tensor | None, k_norm: Tensor | None) -> DecodeAttention | None:
    """What one operation is given of one new token of each sequence; None where it cannot stand for them."""
    if not span.decodes or not available():
        return None
    caches = span.caches
    (cos, sin), keys_values = span.rope, [cache.keys_values[attention.layer] for cache in caches]
    if any(keys.dtype not in CACHED for keys, _ in keys_values):
        return None
    return DecodeAttention(
        q_norm, k_norm, attention.eps, attention.qk_norm == "full", cos, sin, attention.adjacent,
        [keys for keys, _ in keys_values], [values for _, values in keys_values],
        [cache.held(attention.layer) for cache in caches], attention.window or 0, attention.scale, attention.sinks,
    )  # fmt: skip


def decode_attention(attention: Any, q_BSHd: Tensor, k_BSJd: Tensor, v_BSJd: Tensor, span: Any) -> Any:
    """Attention's heads for one new token of each sequence: through torch they are some thirty calls."""
    operands = decode_operands(attention, span, None, None) if inference_only(q_BSHd) else None
    if operands is None:
        return NotImplemented
    B, S = q_BSHd.shape[:2]
    q_TX, k_TX, v_TX = (t.flatten(2).flatten(0, 1) for t in (q_BSHd, k_BSJd, v_BSJd))
    return operations.decode_attention(q_TX, k_TX, v_TX, operands).view(B, S, -1)


def prefill_attention(attention: Any, q_BHSd: Tensor, k_BJPd: Tensor, v_BJPd: Tensor, mask: Tensor | None) -> Any:
    """One sequence's attention: a mask of two dimensions says no more than causality and the window."""
    alike = available() and inference_only(q_BHSd) and k_BJPd.dtype in (q_BHSd.dtype, torch.int8)
    if not alike or q_BHSd.shape[2] == 1 or (mask is not None and mask.dim() != 2):
        return NotImplemented
    return operations.prefill_attention(q_BHSd, k_BJPd, v_BJPd, attention.window, attention.scale, attention.sinks)
