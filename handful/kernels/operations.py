"""The extension's operations on tensors, typed. None of them has gradients.

Those of experts are called in `experts/native.py`, those of a block's halves in `fused.py`. Where an operation takes
many things, they come as NamedTuples whose fields have the schema's names in the schema's order, which a test holds
them to: nothing is passed by its place alone.

Legend: T tokens, c of a chunk · B sequences · I inputs, O outputs of a linear map · E experts · K experts per token ·
H heads · J key-value heads · d head width · P all tokens, cached ones and new · V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from handful.config import RouterConfig
from handful.errors import ConfigError
from handful.kernels.extension import translate_error
from handful.quantize import Packed

__all__ = [
    "DecodeAttention",
    "RouterRules",
    "decode_attention",
    "largest",
    "linear",
    "prefill_attention",
    "rms_norm",
    "route",
    "softmax_loss",
]


# ---------------------------------------------------------------------------------------------------------------------
# Linear maps and norms.


def linear(x_TI: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias for float32 or bfloat16 x (..., I) and weight (O, I): (..., O) in x's dtype."""
    scales, bits, group = [], 0, 0
    if isinstance(weight, Packed):
        if x_TI.shape[-1] != weight.inputs:
            raise ConfigError(f"linear was given x of width {x_TI.shape[-1]}: its weight takes {weight.inputs}")
        scales, bits, group = [weight.scales], weight.bits, weight.group
    codes = weight.codes if isinstance(weight, Packed) else weight.contiguous()
    biases = [] if bias is None else [bias.contiguous()]
    rows_TI = x_TI.reshape(-1, x_TI.shape[-1]).contiguous()
    try:
        (y_TO,) = torch.ops.handful.linears(rows_TI, [codes], scales, biases, bits, group)
    except RuntimeError as error:
        raise translate_error(error) from None
    return y_TO.view(*x_TI.shape[:-1], y_TO.shape[-1])  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of float32 or bfloat16 x (..., D), in x's dtype."""
    y: Tensor = torch.ops.handful.rms_norm(x.contiguous(), weight, eps)
    return y


def largest(logits_V: Tensor) -> tuple[int, float]:
    """The place of the largest logit, the first of equals, and it. In bfloat16 torch takes longer than for the output
    layer."""
    found: tuple[int, float] = torch.ops.handful.largest.default(logits_V.contiguous())
    return found


def softmax_loss(logits_cV: Tensor, targets_c: Tensor) -> float:
    """The sum over tokens of -log softmax(logits)[target], in nats; the logits become its gradient. HandfulError for a
    target outside the vocabulary."""
    try:
        loss: float = torch.ops.handful.softmax_loss.default(logits_cV, targets_c)
    except RuntimeError as error:
        raise translate_error(error) from None
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# Routers.


class RouterRules(NamedTuple):
    """What a router's operation is told of its config."""

    sigmoids: bool
    groups: int
    top_groups: int
    two_best: bool
    top_k: int
    normalize: bool
    scale: float

    @staticmethod
    def of(config: RouterConfig) -> RouterRules:
        return RouterRules(
            config.score == "sigmoid", config.groups, config.top_groups, config.group_score == "top2", config.top_k,
            config.normalize, config.scale,
        )  # fmt: skip


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    balance_bias_E: Tensor | None,
    chosen_TK: Tensor | None,
    config: RouterConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A router's logits and scores (T, E), chosen experts and weights (T, K).

    chosen_TK   int64: the experts to take whatever the scores. RoutingError for one that does not exist.
    """
    balance_bias_E = None if balance_bias_E is None else balance_bias_E.float()
    try:
        found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.handful.route(
            x_TD.contiguous(), weight_ED.contiguous(), bias_E, balance_bias_E, chosen_TK, *RouterRules.of(config)
        )
    except RuntimeError as error:
        raise translate_error(error) from None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Attention.


class DecodeAttention(NamedTuple):
    """What the attention of one new token of each of B sequences is given beside its queries, keys and values.

    q_norm, k_norm  weights of the norms of queries and keys; None: there are none. whole_norm: over all heads, not in
                    each.
    cos, sin        of the new tokens' positions, (caches, r/2).
    keys, values    (b, J, C, d) of the caches that the sequences lie in, in order, for b sequences each, or rows in
                    8 bits (`kv_rows`); lengths: how many tokens each cache holds.
    window          to how many tokens each looks, itself included; 0: to all.
    sinks           a score per head that takes part in the softmax and gives no value; None: there is none.
    """

    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    whole_norm: bool
    cos: Tensor
    sin: Tensor
    adjacent: bool
    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[int]
    window: int
    scale: float
    sinks: Tensor | None


def decode_attention(q_BX: Tensor, k_BX: Tensor, v_BX: Tensor, operands: DecodeAttention) -> Tensor:
    """One more token of each of B sequences: QK-norm, RoPE, its place in a cache and attention, as one operation.

    q_BX, k_BX, v_BX   as the projections make them, (B, H·d) and (B, J·d).
    """
    out: Tensor = torch.ops.handful.decode_attention(q_BX, k_BX, v_BX, *operands)
    return out


def prefill_attention(
    q_BHSd: Tensor, k_BJPd: Tensor, v_BJPv: Tensor, window: int | None, scale: float, sinks_H: Tensor | None
) -> Tensor:
    """Attention of the last S of P tokens, each to the tokens up to itself, with a window to the last so many of them:
    (B, S, H·v). Keys and values may be rows in 8 bits (`kv_rows`)."""
    sinks = None if sinks_H is None else sinks_H.float()
    out: Tensor = torch.ops.handful.prefill_attention(q_BHSd, k_BJPd, v_BJPv, sinks, scale, window or 0)
    return out
