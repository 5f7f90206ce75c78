"""Attention: how a token looks at the ones before it. Positions, what is kept of the past, and two kinds of it.

    rope_table    the angles by which RoPE turns positions; rope_frequency: how quickly, stretched where a config asks
                  for it
    KVCache       what decoding one more token needs of the past; KVCaches: of several sequences at once
    Span          where a forward pass's tokens stand; every layer is given the same one
    Attention     grouped-query attention, with optional biases, QK-norm, sliding window and sinks
    LatentAttention  multi-head latent attention (DeepSeek-V2): the cache holds one low-rank latent a token

Legend: B batch · S new tokens · P all tokens, cached ones and new · D width · H heads · J key-value heads ·
d head width · r the part of a head that RoPE turns · n the part without position · v value width · c latent width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handful.config import ModelConfig, RopeScaling
from handful.errors import ConfigError
from handful.experts import Linear
from handful.experts.at_once import Operation, attend_layer, is_bare, maps_of, norm_of
from handful.experts.layer import multiply_all
from handful.experts.native import DTYPES, attend_many, attend_one, available, plain_inference, rms_norm

TURNED = 64  # positions whose cos and sin are made at a time in decoding

__all__ = [
    "Attention",
    "KVCache",
    "KVCaches",
    "LatentAttention",
    "RMSNorm",
    "Span",
    "attend_at_once",
    "make_attention",
    "rope_frequency",
    "rope_table",
    "rotate",
]


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the weight's dtype: under autocast the input is bfloat16 and the weight float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)
        self.has_native = available()

    def forward(self, x: Tensor) -> Tensor:
        if self.has_native and plain_inference(x, self.weight):
            return rms_norm(x, self.weight, self.eps or 0.0)
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps).to(x.dtype)

    def norm_for_kernels(self) -> tuple[Tensor, float] | None:
        """Weight and epsilon, if our kernels are to norm x in plain inference."""
        weight = self._parameters.get("weight")
        if weight is None or not self.has_native or weight.dtype not in DTYPES:
            return None
        return weight, self.eps or 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Positions.


def rope_frequency(config: ModelConfig, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
    """By how much each pair of a head turns from one position to the next, (r/2,) float32 in radians, and what cos and
    sin are multiplied by."""
    r = config.rotary_dim
    exponent = torch.arange(0, r, 2, device=device, dtype=torch.float32) / r
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequency, 1.0
    return _stretched(config.rope_scaling, config.rope_theta, frequency)


def rope_table(turns: tuple[Tensor, float], positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (..., 1, r/2) float32, of the angles by which RoPE turns positions (...), for the frequency and
    the factor of `rope_frequency`."""
    frequency, factor = turns
    angle = positions.float()[..., None, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def _stretched(scaling: RopeScaling, theta: float, frequency: Tensor) -> tuple[Tensor, float]:
    """RoPE's frequencies (r/2,) as a scaling changes them, and what cos and sin are multiplied by."""
    slowed = frequency / scaling.factor
    if scaling.kind == "linear":
        return slowed, 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_context * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / max(high - low, 1e-6)).clamp(0, 1)
        return kept * frequency + (1 - kept) * slowed, 1.0
    half = len(frequency)
    # Where a dimension turns `beta` times within the original context.
    low, high = (
        half * math.log(scaling.original_context / (2 * math.pi * beta)) / math.log(theta)
        for beta in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = high - low if high != low else 0.001
    blend = ((torch.arange(half, device=frequency.device, dtype=torch.float32) - low) / width).clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None and scaling.mscale and scaling.mscale_all_dim:
        factor = yarn_factor(scaling.factor, scaling.mscale) / yarn_factor(scaling.factor, scaling.mscale_all_dim)
    elif factor is None:
        factor = yarn_factor(scaling.factor, 1.0)
    return blend * slowed + (1 - blend) * frequency, factor


def yarn_factor(factor: float, mscale: float) -> float:
    """What attention is sharpened by when its context is `factor` times longer (YaRN)."""
    return 0.1 * mscale * math.log(factor) + 1.0


def rotate(x_BSHd: Tensor, rope: tuple[Tensor, Tensor], adjacent: bool = False) -> Tensor:
    """Turn pairs of each head's leading r dimensions (RoPE, arXiv:2104.09864): (i, i + r/2), or (2i, 2i + 1).

    Adjacent pairs come out as two halves. Queries and keys do so alike, and a score is a sum over dimensions in any
    order.
    """
    cos, sin = (t.to(x_BSHd.dtype) for t in rope)
    half = cos.shape[-1]
    turned, rest = x_BSHd.split([2 * half, x_BSHd.shape[-1] - 2 * half], dim=-1)
    first, second = turned.unflatten(-1, (half, 2)).unbind(-1) if adjacent else turned.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The past.


class KVCache:
    """Keys and values of past tokens, for every layer: what decoding one more token needs.

    Room for `capacity` tokens is taken at once. `length` is how many are held; all sequences of the batch are as long,
    the shorter ones by padding in front (`padding_B`, which the decoder's first call sets).
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if config.mla is None:
            shapes = [(batch, config.n_kv_heads, capacity, config.d_head)] * 2
        else:
            shapes = [(batch, 1, capacity, config.mla.kv_rank + config.mla.rope_dim)]
        # Of every layer: keys and values, or latents.
        self.held = [
            tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes) for _ in range(config.layers)
        ]
        self.turns = rope_frequency(config, device)
        self.length = 0
        self.padding_B: Tensor | None = None
        self._turned: tuple[int, Sequence[Tensor], Sequence[Tensor]] | None = None

    @property
    def capacity(self) -> int:
        return self.held[0][0].shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.held[0][0].dtype

    def span(self, config: ModelConfig, new: int) -> Span:
        """The span of `new` tokens after the held ones. ConfigError if they do not fit."""
        if self.length + new > self.capacity:
            raise ConfigError(f"cache holds {self.length} tokens of at most {self.capacity}: {new} more do not fit")
        if new == 1 and self.padding_B is None and not torch.compiler.is_compiling():
            return Span(self.next_turn(), self, dict.fromkeys(_windows(config)))
        return Span.of(config, new, self, self.padding_B, self.turns[0].device)

    def next_turn(self) -> tuple[Tensor, Tensor]:
        """`rope_table` of the next position alone. Of a run of positions it is made at once: alone it would take longer
        than a small layer's attention."""
        first = self.length // TURNED * TURNED
        if self._turned is None or self._turned[0] != first:
            with torch.inference_mode(False), torch.no_grad():  # for a cache that goes on under autograd
                cos, sin = rope_table(self.turns, torch.arange(first, first + TURNED, device=self.turns[0].device))
            self._turned = first, cos.split(1), sin.split(1)
        _, cosines, sines = self._turned
        return cosines[self.length - first], sines[self.length - first]

    def advance(self, new: int) -> None:
        """Hold `new` tokens more: every layer has appended them."""
        self.length += new

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Store what a layer has made of the new tokens, each (B, J, S, d), after the `length` held ones; returns all
        of the layer's, (B, J, P, d)."""
        end = self.length + new[0].shape[2]
        for held, made in zip(self.held[layer], new, strict=True):
            held[:, :, self.length : end] = made
        return tuple(held[:, :, :end] for held in self.held[layer])


class KVCaches:
    """The caches of several sequences, of batch 1 each, whose new tokens lie one after the other in a batch of one.

    So sequences of any lengths, some read and some decoded, pass the layers together: every matrix sees all their
    tokens, and attention alone looks at each sequence for itself.
    """

    def __init__(self, caches: Sequence[KVCache], new: Sequence[int]) -> None:
        """new: how many tokens of each sequence there are."""
        self.caches, self.new = caches, new

    def span(self, config: ModelConfig, new: int) -> Span:
        assert new == sum(self.new)
        one_each = all(n == 1 for n in self.new) and all(cache.padding_B is None for cache in self.caches)
        if one_each and not torch.compiler.is_compiling():
            cosines, sines = zip(*(cache.next_turn() for cache in self.caches), strict=True)
            rope, masks = (torch.cat(cosines), torch.cat(sines)), dict.fromkeys(_windows(config))
            return Span(rope, None, {}, tuple((i, i + 1, Span(rope, c, masks)) for i, c in enumerate(self.caches)))
        turns = self.caches[0].turns
        places = [c.length + i for c, n in zip(self.caches, self.new, strict=True) for i in range(n)]
        at_T = torch.tensor(places, device=turns[0].device)
        rope = rope_table(turns, at_T)
        parts, start = [], 0
        for cache, n, at_S in zip(self.caches, self.new, at_T.split(list(self.new)), strict=True):
            parts.append((start, start + n, Span(rope, cache, _masks(config, cache.length, at_S, None))))
            start += n
        return Span(rope, None, {}, tuple(parts))

    def advance(self, new: int) -> None:
        for cache, n in zip(self.caches, self.new, strict=True):
            cache.advance(n)


# ---------------------------------------------------------------------------------------------------------------------
# Where the new tokens stand.


@dataclass(frozen=True, eq=False)
class Span:
    """What the attention of every layer is given beside its input.

    rope     cos and sin of the new tokens' positions.
    cache    where keys and values of past tokens are, and new ones go. None: there is no past.
    masks    for every window (None: no window) what new tokens may look at: bool, (S, P) or (B, 1, S, P), True where
             they may. No mask where none is needed but the causal one, or, for a single new token, none at all.
    parts    of several sequences in a batch of one: (first token, end, the sequence's own span). Its rope, cache and
             masks are this one's then.
    """

    rope: tuple[Tensor, Tensor]
    cache: KVCache | None
    masks: dict[int | None, Tensor | None]
    parts: tuple[tuple[int, int, Span], ...] = ()

    @staticmethod
    def of(
        config: ModelConfig, new: int, cache: KVCache | None, padding_B: Tensor | None, device: torch.device
    ) -> Span:
        """The span of `new` tokens after the cached ones."""
        past = 0 if cache is None else cache.length
        turns = rope_frequency(config, device) if cache is None else cache.turns
        at_S = torch.arange(past, past + new, device=device)
        positions = at_S if padding_B is None else (at_S - padding_B[:, None]).clamp_min(0)
        return Span(rope_table(turns, positions), cache, _masks(config, past, at_S, padding_B))

    @cached_property
    def decodes(self) -> bool:
        """Every sequence has one new token and a cache, and none is padded."""
        spans = [(end - start, part) for start, end, part in self.parts] or [(self.rope[0].shape[-3], self)]
        return all(
            new == 1 and span.cache is not None and span.cache.padding_B is None and span.cache.dtype in DTYPES
            for new, span in spans
        )

    @cached_property
    def caches(self) -> list[KVCache]:
        """Of all sequences, in order."""
        return [cache for cache in (self.cache, *(part.cache for _, _, part in self.parts)) if cache is not None]

    def over(self, look: Callable[..., Tensor], *new: Tensor) -> Tensor:
        """look(span, ...) of each sequence's part of tensors (B, S, ...): (B, S, ...)."""
        if not self.parts:
            return look(self, *new)
        return torch.cat([look(part, *(t[:, start:end] for t in new)) for start, end, part in self.parts], dim=1)


def _masks(config: ModelConfig, past: int, at_S: Tensor, padding_B: Tensor | None) -> dict[int | None, Tensor | None]:
    return {window: _mask(past, at_S, window, padding_B) for window in _windows(config)}


def _windows(config: ModelConfig) -> set[int | None]:
    return {config.window} | ({None} if config.full_layers else set())


def _mask(past: int, at_S: Tensor, window: int | None, padding_B: Tensor | None) -> Tensor | None:
    total = past + len(at_S)
    # For one token, attention cuts what is out of its window off.
    if padding_B is None and (len(at_S) == 1 or (past == 0 and (window is None or window >= total))):
        return None
    at_P = torch.arange(total, device=at_S.device)
    behind_SP = at_S[:, None] - at_P
    mask = behind_SP >= 0
    if window is not None:
        mask = mask & (behind_SP < window)
    if padding_B is None:
        return mask
    # Padding sees itself: with nothing at all to look at its numbers would be NaN.
    mask = mask & (at_P >= padding_B[:, None, None]) | (behind_SP == 0)
    return mask.unsqueeze(1)


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
        self.heads, self.kv_heads, self.head_dim, self.inner = H, J, d, H * d
        self.window = config.window_of(layer)
        self.scale = d**-0.5 if config.attention_scale is None else config.attention_scale
        self.qk_norm = config.qk_norm
        self.eps = config.norm_eps
        self.has_native = available()
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
        B, S, _ = x_BSD.shape
        q, k, v = multiply_all(x_BSD, self.q, self.k, self.v)
        if span.decodes and self.has_native and plain_inference(q) and self._norms()[0]:
            return self.o(self._one_more(q, k, v, span))  # type: ignore[no-any-return]
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSHd, k_BSJd = q.view(B, S, self.heads, self.head_dim), k.view(B, S, self.kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q_BSHd, k_BSJd = self.q_norm(q_BSHd), self.k_norm(k_BSJd)
        q_BSHd, k_BSJd = rotate(q_BSHd, span.rope, self.adjacent), rotate(k_BSJd, span.rope, self.adjacent)
        v_BSJd = v.view(B, S, self.kv_heads, self.head_dim)
        out: Tensor = self.o(span.over(self._look, q_BSHd, k_BSJd, v_BSJd))
        return out

    def _one_more(self, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
        """What is below, for one new token of each sequence, by our kernels: through torch it is some thirty calls."""
        out_TX = attend_one(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), self._norms()[1], self.eps, self.qk_norm == "full",
            span.rope, self.adjacent, [cache.held[self.layer] for cache in span.caches],
            [cache.length for cache in span.caches], self.window, self.scale, self.sinks,
        )  # fmt: skip
        return out_TX.view(q.shape)

    def _norms(self) -> tuple[bool, tuple[Tensor, Tensor] | None]:
        """Whether our kernels can stand for the norms of queries and keys, and their weights, if there are norms."""
        if self.qk_norm == "none":
            return True, None
        q_norm, k_norm = norm_of(self._modules["q_norm"]), norm_of(self._modules["k_norm"])
        return (False, None) if q_norm is None or k_norm is None else (True, (q_norm[0], k_norm[0]))

    def at_once(self, norm: nn.Module | None, x_BSD: Tensor, span: Span, residual_scale: float) -> Operation | None:
        """What `attend_at_once` says, where the modules in it allow it."""
        modules, D = self._modules, x_BSD.shape[-1]
        given = (modules.get("q"), D), (modules.get("k"), D), (modules.get("v"), D), (modules.get("o"), self.inner)
        maps = maps_of(given, x_BSD.shape[:-1].numel(), x_BSD.dtype)
        before, (can, norms) = norm_of(norm), self._norms()
        if maps is None or before is None or not can or len({bias is None for bias in maps.biases[:3]}) > 1:
            return None
        return attend_layer(
            before, maps, norms, self.eps, self.qk_norm == "full", span.rope, self.adjacent,
            [cache.held[self.layer] for cache in span.caches], [cache.length for cache in span.caches],
            self.window, self.scale, self.sinks, residual_scale,
        )  # fmt: skip

    def _look(self, span: Span, q_BSHd: Tensor, k_BSJd: Tensor, v_BSJd: Tensor) -> Tensor:
        B, S = q_BSHd.shape[:2]
        k_BJPd, v_BJPd = k_BSJd.transpose(1, 2), v_BSJd.transpose(1, 2)
        if span.cache is not None:
            k_BJPd, v_BJPd = span.cache.append(self.layer, k_BJPd, v_BJPd)
        mask = span.masks[self.window]
        if S == 1 and self.window is not None and k_BJPd.shape[2] > self.window:
            # One token looks at the end of the cache alone, whatever its length.
            k_BJPd, v_BJPd = k_BJPd[:, :, -self.window :], v_BJPd[:, :, -self.window :]
            mask = None if mask is None else mask[..., -self.window :]
        # A mask of two dimensions says no more than causality and the window.
        plain = self.has_native and plain_inference(q_BSHd) and q_BSHd.dtype == k_BJPd.dtype
        if plain and S > 1 and (mask is None or mask.dim() == 2):
            return attend_many(q_BSHd.transpose(1, 2), k_BJPd, v_BJPd, self.window, self.scale, self.sinks)
        out_BHSd = attend(q_BSHd.transpose(1, 2), k_BJPd, v_BJPd, mask, self.scale, self.sinks)
        return out_BHSd.transpose(1, 2).reshape(B, S, -1)


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
        out: Tensor = self.o(span.over(self._look, qn_BSHn, qr_BSHr, held_BS))
        return out

    def _look(self, span: Span, qn_BSHn: Tensor, qr_BSHr: Tensor, held_BS: Tensor) -> Tensor:
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


def attend_at_once(
    attention: nn.Module | None, norm: nn.Module | None, x_BSD: Tensor, span: Span, residual_scale: float
) -> Operation | None:
    """x + residual_scale · attention(norm(x), span) as one operation with the same bits, for one new token of each
    sequence and any x like this one, that `nobody_looks` at; None where the modules must be called."""
    if not is_bare(attention, Attention) or not attention.has_native or not span.decodes:
        return None
    return attention.at_once(norm, x_BSD, span, residual_scale)


def make_attention(config: ModelConfig, layer: int) -> Attention | LatentAttention:
    """The attention that the config asks for."""
    return Attention(config, layer) if config.mla is None else LatentAttention(config, layer)
