"""Where tokens stand, and what is kept of those before them.

    rope_table    the angles by which RoPE turns positions; rope_frequencies: how quickly, stretched where a config asks
                  for it
    KVCache       what decoding one more token needs of the past; KVCaches: of several sequences at once; Held: what
                  another cache may begin with
    Span          where a forward pass's tokens stand; every layer is given the same one

Legend: B batch · S new tokens · P all tokens that a layer holds, cached ones and new · H heads · J key-value heads ·
d head width · r the part of a head that RoPE turns
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from handful.config import ModelConfig, RopeScaling
from handful.cost import cache_row_bytes, check_cache_dtype
from handful.errors import ConfigError
from handful.kv_rows import pack_rows

__all__ = [
    "Held", "KVCache", "KVCaches", "Span", "cache_dtype", "rope_frequencies", "rope_table", "rotate", "window_room",
    "yarn_factor",
]  # fmt: skip

ROPE_RUN = 64  # positions whose cos and sin are made at a time in decoding
# Tokens that a layer has room for beyond its window, and how many of these at most are left when it slides: so many may
# be taken back, or left out by a prompt that begins alike.
WINDOW_ROOM, WINDOW_LEFT = 768, 256
# A layer's first token is at a multiple of it: from there on prefill's kernel adds keys up (kRows in csrc/kernels.h).
WINDOW_GRID = 96

# ---------------------------------------------------------------------------------------------------------------------
# Positions.


def rope_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
    """By how much each pair of a head turns from one position to the next, (r/2,) float32 in radians, and what cos and
    sin are multiplied by."""
    r = config.rotary_dim
    exponent = torch.arange(0, r, 2, device=device, dtype=torch.float32) / r
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequency, 1.0
    return _stretched(config.rope_scaling, config.rope_theta, frequency)


def rope_table(frequencies: tuple[Tensor, float], positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (..., 1, r/2) float32, of the angles by which RoPE turns positions (...), for the frequency and
    the factor of `rope_frequencies`."""
    frequency, factor = frequencies
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


def window_room(window: int | None, capacity: int) -> int:
    """Tokens that a layer's keys and values have room for, in a cache of so many."""
    return capacity if window is None else min(capacity, window + WINDOW_ROOM)


def cache_dtype(name: str, config: ModelConfig, weights: torch.dtype) -> torch.dtype:
    """What keys and values are held in: "auto", as the weights, or "int8" (`kv_rows`). ConfigError for another name,
    and for int8 with latent attention."""
    check_cache_dtype(name, latent=config.mla is not None)
    return torch.int8 if name == "int8" else weights


@dataclass(frozen=True, eq=False)
class Held:
    """What a cache holds of a sequence, for another of the same config that begins alike.

    first   the first token that layers with a window hold; the others hold all.
    least   with how many tokens one may begin at least: these layers lack what the next token looks at before.
    """

    keys_values: Sequence[tuple[Tensor, ...]]
    first: int
    least: int

    def copy(self) -> Held:
        keys_values = [tuple(held.clone() for held in layer) for layer in self.keys_values]
        return Held(keys_values, self.first, self.least)


class KVCache:
    """Keys and values of past tokens, for every layer: what decoding one more token needs.

    Room for `capacity` tokens is taken at once, in a layer with a window for no more than `window_room`: there the
    oldest tokens make room for new ones when it is full. `length` is how many tokens were read; all sequences of the
    batch are as long, the shorter ones by padding in front (`padding_B`, which the decoder's first call sets).

    dtype   float32, bfloat16 …; int8: of rows in 8 bits (`kv_rows`). ConfigError for these with latent attention.
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
            width = cache_row_bytes(config.d_head) if dtype == torch.int8 else config.d_head
            heads, widths = config.n_kv_heads, [width, width]
        else:
            cache_dtype("int8" if dtype == torch.int8 else "auto", config, dtype)
            heads, widths = 1, [config.mla.kv_rank + config.mla.rope_dim]
        self.capacity = capacity
        self.window = config.window
        self.windowed = [config.window_of(layer) is not None for layer in range(config.layers)]
        self._window_room = window_room(config.window, capacity)
        rooms = [self._window_room if windowed else capacity for windowed in self.windowed]
        # Of every layer: keys and values, or latents.
        self.keys_values = [
            tuple(torch.zeros(batch, heads, room, width, dtype=dtype, device=device) for width in widths)
            for room in rooms
        ]
        self.rope_frequencies = rope_frequencies(config, device)
        self.length = 0
        self.first = 0  # the first token that layers with a window hold
        self.padding_B: Tensor | None = None
        self._rope_run: tuple[int, Sequence[Tensor], Sequence[Tensor]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.keys_values[0][0].dtype

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for layer in self.keys_values for held in layer)

    def span(self, config: ModelConfig, new: int) -> Span:
        """The span of `new` tokens after the held ones. ConfigError if they do not fit."""
        self.make_room(new)
        if new == 1 and self.padding_B is None and not torch.compiler.is_compiling():
            return Span(self.next_rope(), self, dict.fromkeys(_windows(config)))
        return Span.of(config, new, self, self.padding_B, self.rope_frequencies[0].device)

    def make_room(self, new: int) -> None:
        """Let every layer have room for `new` tokens more. ConfigError if they do not fit."""
        if self.length + new > self.capacity:
            raise ConfigError(f"cache holds {self.length} tokens of at most {self.capacity}: {new} more do not fit")
        if self.window is not None and self.length - self.first + new > self._window_room:
            self._slide(new)

    def _slide(self, new: int) -> None:
        """Let the oldest tokens go from layers with a window. Where `new` are more than these have room for, the room
        grows, until `advance` takes it back."""
        assert self.window is not None
        oldest = self.length - self.window + 1 - (WINDOW_LEFT if new else WINDOW_ROOM - 1)
        first = max(self.first, -(-oldest // WINDOW_GRID) * WINDOW_GRID)
        kept, gone = self.length - first, first - self.first
        room = max(self._window_room, kept + new)
        for layer, windowed in enumerate(self.windowed):
            if windowed:
                self.keys_values[layer] = tuple(_moved(held, gone, kept, room) for held in self.keys_values[layer])
        self.first = first

    def next_rope(self) -> tuple[Tensor, Tensor]:
        """`rope_table` of the next position alone. Of a run of positions it is made at once: alone it would take longer
        than a small layer's attention."""
        first = self.length // ROPE_RUN * ROPE_RUN
        if self._rope_run is None or self._rope_run[0] != first:
            with torch.inference_mode(False), torch.no_grad():  # for a cache that goes on under autograd
                run = torch.arange(first, first + ROPE_RUN, device=self.rope_frequencies[0].device)
                cos, sin = rope_table(self.rope_frequencies, run)
            self._rope_run = first, cos.split(1), sin.split(1)
        _, cosines, sines = self._rope_run
        return cosines[self.length - first], sines[self.length - first]

    def advance(self, new: int) -> None:
        """Hold `new` tokens more: every layer has appended them."""
        self.length += new
        if self.length - self.first > self._window_room and self.window is not None:
            self._slide(0)

    def ahead(self, tokens: int) -> KVCache:
        """This cache as it will be with so many tokens more: keys and values are the same ones."""
        if tokens == 0:
            return self
        later = copy(self)
        later.length += tokens
        return later

    @property
    def slides(self) -> bool:
        """Layers with a window have no room for all tokens."""
        return self.window is not None and self._window_room < self.capacity

    def held(self, layer: int) -> int:
        """Tokens that a layer holds: the latest of `length`."""
        return self.length - self.first if self.windowed[layer] else self.length

    def beginning(self, length: int) -> Held:
        """What it holds of its first `length` tokens, not copied."""
        ends = [length - self.first if windowed else length for windowed in self.windowed]
        keys_values = [
            tuple(held[:, :, : max(0, end)] for held in layer)
            for layer, end in zip(self.keys_values, ends, strict=True)
        ]
        return Held(keys_values, self.first, self.least)

    @property
    def least(self) -> int:
        """With how many of its tokens another cache may begin at least (`Held`)."""
        return 0 if self.window is None or not self.first else self.first + self.window - 1

    def begin(self, other: Held, length: int) -> None:
        """Hold the first `length` tokens of what another cache held, as if they had been read."""
        assert other.least <= length
        self.length, self.first = length, other.first
        for layer, (own, others) in enumerate(zip(self.keys_values, other.keys_values, strict=True)):
            end = self.held(layer)
            for held, given in zip(own, others, strict=True):
                held[:, :, :end] = given[:, :, :end]

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Store what a layer has made of the new tokens, each (B, J, S, d), after the held ones; returns all of the
        layer's, (B, J, P, d), or of int8 the rows of all."""
        start = self.held(layer)
        end = start + new[0].shape[2]
        for held, made in zip(self.keys_values[layer], new, strict=True):
            held[:, :, start:end] = pack_rows(made) if held.dtype == torch.int8 else made
        return tuple(held[:, :, :end] for held in self.keys_values[layer])


def _moved(held: Tensor, gone: int, kept: int, room: int) -> Tensor:
    """Tokens `gone` up to `gone + kept` of (B, J, room, d) at the front; in another tensor, if the room is another."""
    if held.shape[2] == room:
        held[:, :, :kept] = held[:, :, gone : gone + kept].clone()
        return held
    with torch.inference_mode(held.is_inference()):
        moved = held.new_zeros(*held.shape[:2], room, held.shape[3])
    moved[:, :, :kept] = held[:, :, gone : gone + kept]
    return moved


class KVCaches:
    """The caches of several sequences, of batch 1 each, whose new tokens lie one after the other in a batch of one.

    So sequences of any lengths, some read and some decoded, pass the layers together: every matrix sees all their
    tokens, and attention alone looks at each sequence for itself.
    """

    def __init__(self, caches: Sequence[KVCache], new: Sequence[int], *, singly: bool = False) -> None:
        """new: how many tokens of each sequence there are. singly: each of them attends as a sequence of one new token,
        after those before it: as if they had passed one by one, and to the bits of that where kernels compute."""
        self.caches, self.new, self.singly = caches, new, singly

    def span(self, config: ModelConfig, new: int) -> Span:
        assert new == sum(self.new)
        for cache, n in zip(self.caches, self.new, strict=True):
            cache.make_room(n)
        one_each = self.singly or all(n == 1 for n in self.new)
        unpadded = all(cache.padding_B is None for cache in self.caches)
        if one_each and unpadded and not torch.compiler.is_compiling():
            caches = [c.ahead(i) for c, n in zip(self.caches, self.new, strict=True) for i in range(n)]
            cosines, sines = zip(*(cache.next_rope() for cache in caches), strict=True)
            rope, masks = (torch.cat(cosines), torch.cat(sines)), dict.fromkeys(_windows(config))
            return Span(rope, None, {}, tuple((i, i + 1, Span(rope, c, masks)) for i, c in enumerate(caches)))
        frequencies = self.caches[0].rope_frequencies
        places = [c.length + i for c, n in zip(self.caches, self.new, strict=True) for i in range(n)]
        at_T = torch.tensor(places, device=frequencies[0].device)
        rope = rope_table(frequencies, at_T)
        parts, start = [], 0
        for cache, n, at_S in zip(self.caches, self.new, at_T.split(list(self.new)), strict=True):
            parts.append((start, start + n, Span(rope, cache, _masks(config, cache, at_S, None))))
            start += n
        return Span(rope, None, {}, tuple(parts))

    def advance(self, new: int) -> None:
        """Each cache holds its own new tokens."""
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
    real_BS  False for new tokens that are padding; None: there are none.
    """

    rope: tuple[Tensor, Tensor]
    cache: KVCache | None
    masks: dict[int | None, Tensor | None]
    parts: tuple[tuple[int, int, Span], ...] = ()
    real_BS: Tensor | None = None

    @staticmethod
    def of(
        config: ModelConfig, new: int, cache: KVCache | None, padding_B: Tensor | None, device: torch.device
    ) -> Span:
        """The span of `new` tokens after the cached ones."""
        past = 0 if cache is None else cache.length
        frequencies = rope_frequencies(config, device) if cache is None else cache.rope_frequencies
        at_S = torch.arange(past, past + new, device=device)
        positions = at_S if padding_B is None else (at_S - padding_B[:, None]).clamp_min(0)
        real_BS = None if padding_B is None or bool((padding_B <= past).all()) else at_S >= padding_B[:, None]
        return Span(rope_table(frequencies, positions), cache, _masks(config, cache, at_S, padding_B), real_BS=real_BS)

    @cached_property
    def decodes(self) -> bool:
        """Every sequence has one new token and a cache, and none is padded."""
        spans = [(end - start, part) for start, end, part in self.parts] or [(self.rope[0].shape[-3], self)]
        return all(new == 1 and span.cache is not None and span.cache.padding_B is None for new, span in spans)

    @cached_property
    def caches(self) -> list[KVCache]:
        """Of all sequences, in order."""
        return [cache for cache in (self.cache, *(part.cache for _, _, part in self.parts)) if cache is not None]

    def per_sequence(self, attend: Callable[..., Tensor], *new: Tensor) -> Tensor:
        """attend(span, ...) of each sequence's part of tensors (B, S, ...): (B, S, ...)."""
        if not self.parts:
            return attend(self, *new)
        return torch.cat([attend(part, *(t[:, start:end] for t in new)) for start, end, part in self.parts], dim=1)


def _masks(
    config: ModelConfig, cache: KVCache | None, at_S: Tensor, padding_B: Tensor | None
) -> dict[int | None, Tensor | None]:
    past, first = (0, 0) if cache is None else (cache.length, cache.first)
    return {window: _mask(0 if window is None else first, past, at_S, window, padding_B) for window in _windows(config)}


def _windows(config: ModelConfig) -> set[int | None]:
    return {config.window} | ({None} if config.full_layers else set())


def _mask(first: int, past: int, at_S: Tensor, window: int | None, padding_B: Tensor | None) -> Tensor | None:
    """Of the keys from `first` on."""
    total = past + len(at_S)
    # For one token, attention cuts what is out of its window off.
    if padding_B is None and (len(at_S) == 1 or (past == 0 and (window is None or window >= total))):
        return None
    at_P = torch.arange(first, total, device=at_S.device)
    behind_SP = at_S[:, None] - at_P
    mask = behind_SP >= 0
    if window is not None:
        mask = mask & (behind_SP < window)
    if padding_B is None:
        return mask
    # Padding sees itself: with nothing at all to look at its numbers would be NaN.
    mask = mask & (at_P >= padding_B[:, None, None]) | (behind_SP == 0)
    return mask.unsqueeze(1)
