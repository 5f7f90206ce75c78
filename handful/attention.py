"""Attention: how a token looks at the ones before it, and two kinds of it.

    Attention        grouped-query attention, with optional biases, QK-norm, sliding window and sinks
    LatentAttention  multi-head latent attention (DeepSeek-V2): the cache holds one low-rank latent a token

Legend: B batch · S new tokens · P all tokens, cached ones and new · D width · H heads · J key-value heads ·
d head width · r the part of a head that RoPE turns · n the part without position · v value width · c latent width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handful import kernels
from handful.config import ModelConfig
from handful.experts import Linear
from handful.kernels import with_kernel
from handful.kv_rows import unpack_rows
from handful.positions import Span, rotate, yarn_factor

__all__ = ["Attention", "LatentAttention", "RMSNorm", "attend", "make_attention"]


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the weight's dtype: under autocast the input is bfloat16 and the weight float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    @with_kernel(kernels.rms_norm)
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps).to(x.dtype)


def attend(
    q_BHSd: Tensor, k_BJPd: Tensor, v_BJPv: Tensor, mask: Tensor | None, scale: float, sinks_H: Tensor | None = None
) -> Tensor:
    """softmax(scale · q · k) · v over what the mask allows, or without one over all tokens up to the query's.

    sinks_H   a score per head that takes part in the softmax and gives no value.

    Returns (B, H, S, v).
    """
    B, H, S, _ = q_BHSd.shape
    J, P = k_BJPd.shape[1:3]
    if sinks_H is None:
        return F.scaled_dot_product_attention(
            q_BHSd, k_BJPd, v_BJPv, attn_mask=mask, is_causal=mask is None and S > 1, scale=scale, enable_gqa=H != J
        )
    if mask is None and S > 1:
        mask = torch.ones(S, P, dtype=torch.bool, device=q_BHSd.device).tril()
    scores = scale * (q_BHSd.reshape(B, J, H // J * S, -1) @ k_BJPd.transpose(2, 3)).view(B, H, S, P)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    sinks = sinks_H.to(scores.dtype).view(1, H, 1, 1).expand(B, H, S, 1)
    share = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1].to(v_BJPv.dtype)
    return (share.view(B, J, H // J * S, P) @ v_BJPv).view(B, H, S, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Two kinds.


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE: x_BSD -> (B, S, D)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        H, J, d, D = config.heads, config.n_kv_heads, config.d_head, config.width
        self.layer = layer
        self.heads, self.head_dim, self.inner = H, d, H * d
        self.window = config.window_of(layer)
        self.scale = d**-0.5 if config.attention_scale is None else config.attention_scale
        self.qk_norm = config.qk_norm
        self.eps = config.norm_eps
        self.adjacent = config.rope_adjacent
        self.q = Linear(D, H * d, bias=config.qkv_bias)
        self.k = Linear(D, J * d, bias=config.qkv_bias)
        self.v = Linear(D, J * d, bias=config.qkv_bias)
        self.o = Linear(H * d, D, bias=config.o_bias)
        self.sinks = nn.Parameter(torch.zeros(H)) if config.sinks else None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm(H * d if full else d, eps=config.norm_eps)
            self.k_norm = RMSNorm(J * d if full else d, eps=config.norm_eps)

    def forward(self, x_BSD: Tensor, span: Span) -> Tensor:
        q, k, v = self.q(x_BSD), self.k(x_BSD), self.v(x_BSD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSHd, k_BSJd, v_BSJd = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q_BSHd, k_BSJd = self.q_norm(q_BSHd), self.k_norm(k_BSJd)
        out: Tensor = self.o(self.attend(q_BSHd, k_BSJd, v_BSJd, span))
        return out

    @with_kernel(kernels.decode_attention)
    def attend(self, q_BSHd: Tensor, k_BSJd: Tensor, v_BSJd: Tensor, span: Span) -> Tensor:
        """What the heads find: (B, S, H·d)."""
        q_BSHd, k_BSJd = rotate(q_BSHd, span.rope, self.adjacent), rotate(k_BSJd, span.rope, self.adjacent)
        return span.per_sequence(self._attend_sequence, q_BSHd, k_BSJd, v_BSJd)

    def _attend_sequence(self, span: Span, q_BSHd: Tensor, k_BSJd: Tensor, v_BSJd: Tensor) -> Tensor:
        k_BJPd, v_BJPd = k_BSJd.transpose(1, 2), v_BSJd.transpose(1, 2)
        if span.cache is not None:
            k_BJPd, v_BJPd = span.cache.append(self.layer, k_BJPd, v_BJPd)
        mask, S = span.masks[self.window], q_BSHd.shape[1]
        if S == 1 and self.window is not None and k_BJPd.shape[2] > self.window:
            # One token looks at the end of the cache alone, whatever its length.
            k_BJPd, v_BJPd = k_BJPd[:, :, -self.window :], v_BJPd[:, :, -self.window :]
            mask = None if mask is None else mask[..., -self.window :]
        return self._attend_masked(q_BSHd.transpose(1, 2), k_BJPd, v_BJPd, mask)

    @with_kernel(kernels.prefill_attention)
    def _attend_masked(self, q_BHSd: Tensor, k_BJPd: Tensor, v_BJPd: Tensor, mask: Tensor | None) -> Tensor:
        if k_BJPd.dtype == torch.int8:
            k_BJPd, v_BJPd = (unpack_rows(rows, self.head_dim, q_BHSd.dtype) for rows in (k_BJPd, v_BJPd))
        return attend(q_BHSd, k_BJPd, v_BJPd, mask, self.scale, self.sinks).transpose(1, 2).flatten(2)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): x_BSD -> (B, S, D).

    A token's keys and values for all heads come from one latent of width kv_rank; beside it stands one key with
    position, shared by the heads. Reading a prompt, the latents are expanded to keys and values. Decoding, the
    expansion is folded into query and output, and attention runs on the latents as they lie in the cache.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        mla = config.mla
        assert mla is not None
        H, D = config.heads, config.width
        self.layer, self.heads, self.mla = layer, H, mla
        self.adjacent = config.rope_adjacent
        self.scale = (mla.nope_dim + mla.rope_dim) ** -0.5
        if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
            self.scale *= yarn_factor(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
        query = H * (mla.nope_dim + mla.rope_dim)
        # The published models keep these two norms at 1e-6, whatever the others have.
        if mla.q_rank is None:
            self.q = Linear(D, query, bias=False)
        else:
            self.q_down = Linear(D, mla.q_rank, bias=False)
            self.q_norm = RMSNorm(mla.q_rank, eps=1e-6)
            self.q_up = Linear(mla.q_rank, query, bias=False)
        self.kv_down = Linear(D, mla.kv_rank + mla.rope_dim, bias=False)
        self.kv_norm = RMSNorm(mla.kv_rank, eps=1e-6)
        # A parameter and no linear map: decoding uses it as two matrices for each head.
        self.kv_up = nn.Parameter(torch.empty(H * (mla.nope_dim + mla.v_dim), mla.kv_rank))
        self.o = Linear(H * mla.v_dim, D, bias=False)

    def forward(self, x_BSD: Tensor, span: Span) -> Tensor:
        B, S, _ = x_BSD.shape
        m = self.mla
        q = self.q(x_BSD) if m.q_rank is None else self.q_up(self.q_norm(self.q_down(x_BSD)))
        qn_BSHn, qr_BSHr = q.view(B, S, self.heads, -1).split([m.nope_dim, m.rope_dim], dim=-1)
        qr_BSHr = rotate(qr_BSHr, span.rope, self.adjacent)
        latent_BSc, kr_BSr = self.kv_down(x_BSD).split([m.kv_rank, m.rope_dim], dim=-1)
        kr_BSr = rotate(kr_BSr.unsqueeze(2), span.rope, self.adjacent).squeeze(2)
        held_BS = torch.cat([self.kv_norm(latent_BSc), kr_BSr], dim=-1)
        out: Tensor = self.o(span.per_sequence(self._attend_sequence, qn_BSHn, qr_BSHr, held_BS))
        return out

    def _attend_sequence(self, span: Span, qn_BSHn: Tensor, qr_BSHr: Tensor, held_BS: Tensor) -> Tensor:
        m, (B, S) = self.mla, held_BS.shape[:2]
        held_B1P = held_BS.unsqueeze(1)
        if span.cache is not None:
            (held_B1P,) = span.cache.append(self.layer, held_B1P)
        up_Hc = self.kv_up.view(self.heads, m.nope_dim + m.v_dim, m.kv_rank)
        mask = span.masks[None]
        if S == 1 and span.cache is not None:
            up_Hnc, up_Hvc = up_Hc.to(held_BS.dtype).split([m.nope_dim, m.v_dim], dim=1)
            q_BHSc = torch.cat([torch.einsum("bshn,hnc->bhsc", qn_BSHn, up_Hnc), qr_BSHr.transpose(1, 2)], dim=-1)
            latent_BHSc = attend(q_BHSc, held_B1P, held_B1P[..., : m.kv_rank], mask, self.scale)
            out_BSHv = torch.einsum("bhsc,hvc->bshv", latent_BHSc, up_Hvc)
        else:
            latent_B1Pc, kr_B1Pr = held_B1P.split([m.kv_rank, m.rope_dim], dim=-1)
            kv_BHP = F.linear(latent_B1Pc.squeeze(1), self.kv_up).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            kn_BHPn, v_BHPv = kv_BHP.split([m.nope_dim, m.v_dim], dim=-1)
            k_BHPd = torch.cat([kn_BHPn, kr_B1Pr.expand(-1, self.heads, -1, -1)], dim=-1)
            q_BHSd = torch.cat([qn_BSHn, qr_BSHr], dim=-1).transpose(1, 2)
            out_BSHv = attend(q_BHSd, k_BHPd, v_BHPv, mask, self.scale).transpose(1, 2)
        return out_BSHv.reshape(B, S, -1)


def make_attention(config: ModelConfig, layer: int) -> Attention | LatentAttention:
    """The attention that the config asks for."""
    return Attention(config, layer) if config.mla is None else LatentAttention(config, layer)
