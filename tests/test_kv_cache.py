"""The KV cache: layers with a window hold it and little more, whatever the context, to the bits of a cache that holds
all.

Legend: B batch · S tokens · J key-value heads
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from builders import moe, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handful import positions
from handful.config import ModelConfig
from handful.errors import ConfigError
from handful.kernels.extension import available
from handful.model import Decoder
from handful.positions import WINDOW_LEFT, WINDOW_ROOM, KVCache, KVCaches, window_room
from handful.presets import PRESETS

LONG = moe(context=4096, layers=3, window=40, full_layers=(1,), heads=4, kv_heads=2)


def decoder(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config).to(dtype).eval()


@contextmanager
def rooms(room: int | None, left: int = 8) -> Iterator[None]:
    """Layers with a window have room for so many tokens beyond it; None: for all."""
    with pytest.MonkeyPatch.context() as patch:
        if room is None:
            patch.setattr(positions, "window_room", lambda _, capacity: capacity)
        else:
            patch.setattr(positions, "WINDOW_ROOM", room)
            patch.setattr(positions, "WINDOW_LEFT", left)
        yield


def read(model: Decoder, cache: KVCache, batch_BS: Tensor, parts: Sequence[int], **options: Tensor) -> Tensor:
    """Logits of tokens that are read in parts."""
    found = []
    with torch.inference_mode():
        for part in batch_BS.split([*parts], dim=1):
            found.append(model(part, cache, **options)[0])
            options = {}
    return torch.cat(found, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# How much it holds.


MISTRAL = ModelConfig(vocab=32000, width=4096, layers=32, heads=32, kv_heads=8, ffn=14336, window=4096, context=32768)


@pytest.mark.parametrize("config", [PRESETS["gpt-oss"].model, MISTRAL], ids=["gpt-oss", "Mistral 7B"])
def test_a_window_s_layers_do_not_grow_with_the_context(config: ModelConfig) -> None:
    assert config.window is not None
    for context in (config.window, config.window + WINDOW_ROOM + 1, 131_072):
        cache = KVCache(config, 1, context, dtype=torch.bfloat16, device="meta")
        for layer, (keys, values) in enumerate(cache.keys_values):
            full = config.window_of(layer) is None
            want = context if full else min(context, config.window + WINDOW_ROOM)
            assert keys.shape == values.shape == (1, config.n_kv_heads, want, config.d_head)


def test_it_takes_no_more_while_tokens_come() -> None:
    """Chunks that are larger than the room, chunks, and single tokens: after each no more than at first is taken."""
    model, cache = decoder(LONG), KVCache(LONG, 1, 4000)
    least = cache.nbytes
    assert [keys.shape[2] for keys, _ in cache.keys_values] == [40 + WINDOW_ROOM, 4000, 40 + WINDOW_ROOM]
    for new in (1500, 512, 512, 300, *[1] * 900):
        read(model, cache, tokens(1, new), [new])
        assert cache.nbytes == least
        assert min(cache.length, 40 + WINDOW_LEFT // 2) <= cache.held(0) <= 40 + WINDOW_ROOM
        assert cache.held(1) == cache.length
    with pytest.raises(ConfigError, match=r"^cache holds 3724 tokens of at most 4000: 277 more do not fit$"):
        cache.span(LONG, 277)


def test_room_of_a_window() -> None:
    assert window_room(None, 7) == window_room(9, 7) == 7
    assert window_room(100, 5000) == 100 + WINDOW_ROOM


# ---------------------------------------------------------------------------------------------------------------------
# The bits of a cache that holds all.


@pytest.mark.skipif(not available(), reason="the bits are the kernels'")
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 250), st.integers(260, 500), st.lists(st.integers(1, 300), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([(), (0,), (2,)]), st.booleans(),
    st.integers(1, 2),
)  # fmt: skip
def test_bits_are_those_of_a_cache_that_holds_all(
    window: int, room: int, parts: list[int], dtype: torch.dtype, full: tuple[int, ...], sinks: bool, batch: int
) -> None:
    config = moe(context=4096, layers=3, window=window, full_layers=full, sinks=sinks, heads=4, kv_heads=2)
    model, parts = decoder(config, dtype), [700, *parts, *[1] * 40]
    batch_BS = tokens(batch, sum(parts))
    with rooms(None):
        whole = KVCache(config, batch, sum(parts), dtype=dtype)
    want = read(model, whole, batch_BS, parts)
    assert whole.first == 0
    with rooms(room, left=120):
        cache = KVCache(config, batch, sum(parts), dtype=dtype)
        got = read(model, cache, batch_BS, parts)
    assert cache.first > 0
    assert got.equal(want)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(9, 30), st.lists(st.integers(1, 25), min_size=1, max_size=6), st.booleans())
def test_through_torch_it_is_the_same_but_for_rounding(window: int, room: int, parts: list[int], padded: bool) -> None:
    config = moe(context=4096, layers=3, window=window, full_layers=(1,), heads=4, kv_heads=2)
    model, parts = decoder(config, torch.float64), [60, *parts, *[1] * 40]
    batch_BS = tokens(2, sum(parts))
    options = {"padding_B": torch.tensor([0, 30])} if padded else {}
    with rooms(None):
        whole = KVCache(config, 2, sum(parts), dtype=torch.float64)
    want = read(model, whole, batch_BS, parts, **options)
    with rooms(room), pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions, "WINDOW_GRID", 1)
        cache = KVCache(config, 2, sum(parts), dtype=torch.float64)
        got = read(model, cache, batch_BS, parts, **options)
    assert cache.first > 0
    assert (got - want)[:, 30:].abs().max() < 1e-12


def test_sequences_side_by_side_slide_each_for_itself() -> None:
    model = decoder(LONG)
    lengths, caches, alone = (900, 40, 1700), [], []
    batches = [tokens(1, n + 12) for n in lengths]
    for batch, n in zip(batches, lengths, strict=True):
        first, second = (KVCache(LONG, 1, 2000) for _ in range(2))
        alone.append(read(model, first, batch, [n, *[1] * 12])[0, n:])
        read(model, second, batch[:, :n], [n])
        caches.append(second)
    with torch.inference_mode():
        for step in range(12):
            new = torch.cat([b[:, n + step : n + step + 1] for b, n in zip(batches, lengths, strict=True)], dim=1)
            got, _ = model(new, KVCaches(caches, [1] * 3))
            for i in range(3):
                assert (got[0, i] - alone[i][step]).abs().max() < 1e-5


def test_a_pass_that_failed_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens made the oldest ones go; what they look at is still there."""
    model, batch = decoder(LONG), tokens(1, 1300)
    want = read(model, KVCache(LONG, 1, 4000), batch, [800, 500])
    cache = KVCache(LONG, 1, 4000)
    read(model, cache, batch[:, :800], [800])
    with monkeypatch.context() as patch:
        patch.setattr(model.layers[2], "forward", None)
        with pytest.raises(TypeError):
            read(model, cache, batch[:, 800:], [500])
    assert (cache.length, cache.first > 0) == (800, True)
    assert read(model, cache, batch[:, 800:], [500]).equal(want[:, 800:])


@pytest.mark.parametrize("begun", [1500, 1400])
def test_another_cache_begins_with_what_it_holds(begun: int) -> None:
    model, batch = decoder(LONG), tokens(1, 1600)
    cache, other = KVCache(LONG, 1, 4000), KVCache(LONG, 1, 1601)
    want = read(model, cache, batch, [begun, 1600 - begun])[:, begun:]
    kept = cache.beginning(1500).copy()
    assert 0 < kept.least <= begun
    assert [keys.shape[2] for keys, _ in kept.keys_values] == [1500 - kept.first, 1500, 1500 - kept.first]
    other.begin(kept, begun)
    assert read(model, other, batch[:, begun:], [1600 - begun]).equal(want)
    with pytest.raises(AssertionError):
        other.begin(kept, kept.least - 1)
