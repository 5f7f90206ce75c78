"""Keys and values in 8 bits: rows to the bit, attention on them beside float64, and engines that keep them.

Legend: B batch · H heads · J key-value heads · S new tokens · P all tokens · d head width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from builders import LATENT, SMALL, dense, moe, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handful.attention import attend
from handful.config import ModelConfig
from handful.cost import cache_row_bytes
from handful.engine import Engine, Request
from handful.errors import ConfigError
from handful.kernels.extension import available
from handful.kv_rows import pack_rows, unpack_rows
from handful.machine import native_error
from handful.model import Decoder
from handful.positions import WINDOW_ROOM, KVCache
from handful.sampling import Sampling

ops = torch.ops.handful
kernels = pytest.mark.skipif(not available(), reason=f"no kernels: {native_error()}")
F64, BF16 = torch.float64, torch.bfloat16
DTYPES = [torch.float32, BF16]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield torch.set_num_threads
    torch.set_num_threads(1)


def distance(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


def numbers(rows: Tensor, width: int) -> Tensor:
    return unpack_rows(rows, width, F64)


# ---------------------------------------------------------------------------------------------------------------------
# Rows.


def test_a_row_by_hand() -> None:
    """Two groups: scales of 2 / 127 and 127 / 127, the codes, and nothing after them."""
    x = torch.zeros(34)
    x[0], x[1], x[2], x[32], x[33] = 2.0, -1.0, 0.009, 127.0, -3.0
    row = pack_rows(x)
    assert row.dtype == torch.int8
    assert cache_row_bytes(34) == len(row) == 2 * 2 + 34
    scales = row[:4].view(BF16)
    assert scales.tolist() == [torch.tensor(2 / 127).bfloat16().item(), 1.0]
    assert row[4:8].tolist() == [127, -64, 1, 0]
    assert row[36:].tolist() == [127, -3]
    found = unpack_rows(row, 34, torch.float32)
    assert found[32:].tolist() == [127, -3]
    assert found[:3].tolist() == pytest.approx([2, -1.008, 0.01575], rel=3e-3)
    assert cache_row_bytes(1) == 4
    assert cache_row_bytes(128) == 136


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.floats(-30, 30), st.sampled_from([torch.float32, BF16, F64]))
def test_rows_are_off_by_half_a_step_at_most(width: int, exponent: float, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2, width, dtype=F64) * 2**exponent).to(dtype)
    x[0, 0] = 0
    found = numbers(pack_rows(x), width)
    for first in range(0, width, 32):
        own = x[..., first : first + 32].double()
        # The scale is rounded by 1/256 at most, which its codes follow; the largest is left a half more.
        step = own.abs().amax(-1, keepdim=True) / 127
        assert ((found[..., first : first + 32] - own).abs() <= 0.51 * step * (1 + 1 / 256)).all()


def test_what_is_not_finite_spoils_its_group_alone() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(2, 100)
        want = numbers(pack_rows(x), 100)
        x[1, 40] = bad
        found = numbers(pack_rows(x), 100)
        assert found[1, 32:64].isnan().all()
        found[1, 32:64] = want[1, 32:64]
        assert found.equal(want)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. B, H, J, d, tokens held before, window.

DECODED = {
    "one of everything": (1, 1, 1, 2, 0, 0),
    "a head for each": (1, 3, 3, 64, 200, 0),
    "groups": (2, 8, 2, 128, 300, 0),
    "seven together": (1, 14, 2, 80, 129, 0),
    "odd widths": (2, 6, 2, 50, 40, 0),
    "a window": (1, 4, 2, 32, 400, 70),
    "splits": (1, 4, 1, 48, 2500, 0),
    "a window of splits": (1, 5, 1, 16, 2500, 2100),
}


@kernels
@pytest.mark.parametrize("held", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODED)
def test_one_token_beside_float64(name: str, dtype: torch.dtype, held: str, threads: Callable[[int], None]) -> None:
    B, H, J, d, length, window = DECODED[name]
    q, k, v = ((2 * torch.randn(B, heads * d)).to(dtype) for heads in (H, J, J))
    cos, sin = torch.ones(1, d // 2), torch.zeros(1, d // 2)
    past = [2 * torch.randn(B, J, length + 3, d) for _ in range(2)]
    for sinks_H in (None, 3 * torch.randn(H)):
        keys, values = ((pack_rows(t) if held == "int8" else t.to(getattr(torch, held))).contiguous() for t in past)
        operands = (q, k, v, None, None, 1e-5, False, cos, sin, False, [keys], [values], [length], window, 0.2, sinks_H)
        got = ops.decode_attention(*operands)
        # The new token's place, as torch packs it.
        for cache, new in ((keys, k), (values, v)):
            new_BJd = new.view(B, J, d).float()
            assert cache[:, :, length].equal(pack_rows(new_BJd) if held == "int8" else new_BJd.to(cache.dtype))
        first = max(0, length + 1 - window) if window else 0
        k_BJPd, v_BJPd = (
            (numbers(t, d) if held == "int8" else t.double())[:, :, first : length + 1].repeat_interleave(H // J, 1)
            for t in (keys, values)
        )
        sinks = None if sinks_H is None else sinks_H.double()
        want = attend(q.double().view(B, H, 1, d), k_BJPd, v_BJPd, None, 0.2, sinks).flatten(1)
        assert got.dtype == dtype
        assert distance(got, want) < (4e-3 if dtype == BF16 else 2e-6)
        if held == "int8" and length:  # beside attention to what was rounded
            exact = [
                torch.cat([t[:, :, :length], new.view(B, J, 1, d).float()], 2)
                for t, new in zip(past, (k, v), strict=True)
            ]
            k_BJPd, v_BJPd = (t[:, :, first:].double().repeat_interleave(H // J, 1) for t in exact)
            assert distance(got, attend(q.double().view(B, H, 1, d), k_BJPd, v_BJPd, None, 0.2, sinks).flatten(1)) < 0.1
        threads(3)
        assert ops.decode_attention(*operands).equal(got)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_s_bits_alone_and_beside_others(dtype: torch.dtype) -> None:
    J, d, lengths = 2, 40, [0, 7, 1500, 130]
    q, k, v = (torch.randn(4, heads * d).to(dtype) for heads in (6, J, J))
    cos, sin = torch.randn(2, 4, d // 2).unbind()
    caches = [[pack_rows(torch.randn(1, J, 1600, d)) for _ in range(2)] for _ in lengths]

    def decoded(some: slice) -> Tensor:
        own = [[t.clone() for t in pair] for pair in caches[some]]
        found: Tensor = ops.decode_attention(
            q[some], k[some], v[some], None, None, 1e-5, False, cos[some].contiguous(), sin[some].contiguous(), False,
            [keys for keys, _ in own], [values for _, values in own], lengths[some], 0, 0.2, None,
        )  # fmt: skip
        return found

    together = decoded(slice(0, 4))
    for i in range(4):
        assert decoded(slice(i, i + 1)).equal(together[i : i + 1])


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1, 5, 5, 8, 0), (2, 6, 2, 130, 330, 48, 0), (1, 4, 4, 150, 500, 66, 90)])
def test_many_tokens_beside_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, H, J, S, P, d, window = shape
    q_BHSd = (2 * torch.randn(B, S, H, d)).to(dtype).transpose(1, 2)
    rows = [pack_rows(torch.randn(B, J, P + 3, d))[:, :, :P] for _ in range(2)]
    behind_SP = torch.arange(P - S, P)[:, None] - torch.arange(P)
    mask = (behind_SP >= 0) & (behind_SP < (window or P))
    for sinks_H in (None, torch.randn(H)):
        k, v = (numbers(t, d).repeat_interleave(H // J, 1) for t in rows)
        want = attend(q_BHSd.double(), k, v, mask, 0.3, None if sinks_H is None else sinks_H.double())
        got = ops.prefill_attention(q_BHSd, *rows, sinks_H, 0.3, window)
        assert got.dtype == dtype
        assert distance(got, want.transpose(1, 2).flatten(2)) < (6e-3 if dtype == BF16 else 2e-6)
        ends = [P - S + S // 3, P]
        chunks = [
            ops.prefill_attention(chunk, *(t[:, :, :end] for t in rows), sinks_H, 0.3, window)
            for chunk, end in zip(q_BHSd.split([S // 3, S - S // 3], dim=2), ends, strict=True)
        ]
        assert torch.cat(chunks, dim=1).equal(got)


@kernels
def test_kernels_refuse_rows_that_do_not_fit() -> None:
    q, rows = torch.randn(1, 2, 3, 8), pack_rows(torch.randn(1, 2, 5, 8))
    for k, v, line in (
        (rows[..., :-2], rows, "k is not of codes of 8 numbers"), (rows, torch.randn(1, 2, 5, 8), "of one dtype"),
        (rows, rows[:, :, :4], "v is not of as many"), (rows.view(torch.uint8), rows, "k is neither"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=line):
            ops.prefill_attention(q, k, v, None, 1.0, 0)
    one, turn = torch.randn(1, 16), torch.ones(1, 4)
    for keys, values, line in (
        (rows[..., :-2].contiguous(), rows, "keys are not contiguous"), (rows, torch.randn(1, 2, 5, 8), "one dtype"),
        (rows, rows.transpose(2, 3), "values are not contiguous"), (rows.view(torch.uint8), rows, "keys is neither"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=line):
            ops.decode_attention(
                one, one, one, None, None, 1e-5, False, turn, turn, False, [keys], [values], [2], 0, 1.0, None
            )


# ---------------------------------------------------------------------------------------------------------------------
# Models.

SHAPES: dict[str, ModelConfig] = {
    "moe": moe(width=64, context=2048, layers=2, heads=4, kv_heads=2),
    "window, sinks": moe(width=64, context=4096, layers=3, window=70, full_layers=(1,), sinks=True),
    "dense": dense(width=48, heads=3, context=2048),
}


def decoder(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config).to(dtype).eval()


def read(model: Decoder, cache: KVCache, batch_BS: Tensor, parts: list[int], **options: Any) -> Tensor:
    found = []
    with torch.inference_mode():
        for part in batch_BS.split(parts, dim=1):
            found.append(model(part, cache, **options)[0])
            options = {}
    return torch.cat(found, dim=1)


class Rounded(KVCache):
    """A cache of floats that are rounded as rows in 8 bits round them: what attention is to see."""

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        return super().append(layer, *(unpack_rows(pack_rows(t), t.shape[-1], t.dtype) for t in new))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_sees_the_rounded_numbers(name: str, padded: bool) -> None:
    """In float64, through torch."""
    model, batch = decoder(SHAPES[name], F64), tokens(2, 140)
    parts, options = [100, 15, *[1] * 25], {"padding_B": torch.tensor([0, 9])} if padded else {}
    got = read(model, KVCache(model.config, 2, 140, dtype=torch.int8), batch, parts, **options)
    want = read(model, Rounded(model.config, 2, 140, dtype=F64), batch, parts, **options)
    exact = read(model, KVCache(model.config, 2, 140, dtype=F64), batch, parts, **options)
    assert (got - want)[:, 9:].abs().max() < 1e-12
    assert 1e-6 < distance(got[:, 9:], exact[:, 9:]) < 1e-1  # a token may fall to other experts


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_through_the_kernels(name: str, dtype: torch.dtype) -> None:
    model, batch = decoder(SHAPES[name], dtype), tokens(2, 140)
    parts = [100, 15, *[1] * 25]
    cache = KVCache(model.config, 2, 140, dtype=torch.int8)
    got = read(model, cache, batch, parts)
    want = read(model.double(), KVCache(model.config, 2, 140, dtype=torch.int8), batch, parts)
    assert cache.dtype == torch.int8
    # A number between two codes may fall to either, and a token to other experts.
    assert distance(got, want) < (1e-1 if dtype == BF16 else 2e-2)


def test_it_takes_little_more_than_half_of_bfloat16() -> None:
    config = moe(width=256, heads=4, kv_heads=2, head_dim=128, context=1000)
    held = {dtype: KVCache(config, 1, 1000, dtype=dtype).nbytes for dtype in (BF16, torch.int8)}
    assert held[torch.int8] / held[BF16] == 136 / 256


def test_latent_attention_is_refused() -> None:
    line = r"^kv_cache_dtype = 'int8': not with latent attention, whose cache is small as it is$"
    with pytest.raises(ConfigError, match=line):
        KVCache(LATENT, 1, 4, dtype=torch.int8)
    with pytest.raises(ConfigError, match=line):
        Engine(decoder(LATENT), kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match=r"^kv_cache_dtype = 'fp8': auto or int8$"):
        Engine(decoder(SMALL), kv_cache_dtype="fp8")


# ---------------------------------------------------------------------------------------------------------------------
# Engines.


def seen(engine: Engine, request: Request) -> list[Any]:
    job = engine.submit(request)
    found: list[Any] = []
    while job.finish is None:
        found += [(delta.token, delta.logprobs) for delta in engine.step() if delta.job is job]
    return found


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_prompts_that_begin_alike_get_the_bits_of_the_run_without_it(name: str, dtype: torch.dtype) -> None:
    model = decoder(SHAPES[name], dtype)
    text = tokens(1, 1100)[0].tolist()

    def request(end: int, *more: int) -> Request:
        return Request(prompt=[*text[:end], *more], max_tokens=9, sampling=Sampling(temperature=0), logprobs=3)

    asked = request(1000, 3, 1, 4, *text[:200])
    want = seen(Engine(model, kv_cache_dtype="int8"), asked)
    exact = seen(Engine(model), asked)
    engine = Engine(model, kv_cache_dtype="int8")
    engine.run([request(1100)])
    assert seen(engine, asked) == want != exact
    assert engine.stats().prefix_hits == 1000


@pytest.mark.parametrize("name", SHAPES)
def test_requests_beside_each_other_get_what_each_gets_alone(name: str) -> None:
    """In float64: no number falls to another code by rounding."""
    model = decoder(SHAPES[name], F64)
    requests = [
        Request(prompt=tokens(1, n)[0].tolist(), max_tokens=12, sampling=Sampling(temperature=0)) for n in (40, 3, 90)
    ]
    together = Engine(model, kv_cache_dtype="int8", chunk=30).run(requests)
    for job in together:
        (alone,) = Engine(model, kv_cache_dtype="int8").run([job.request])
        assert job.made == alone.made


def test_windows_hold_no_more_rows() -> None:
    config = SHAPES["window, sinks"]
    model, cache = decoder(config), KVCache(config, 1, 3000, dtype=torch.int8)
    read(model, cache, tokens(1, 2500), [1200, 900, 400])
    assert cache.keys_values[0][0].shape == (1, 2, 70 + WINDOW_ROOM, cache_row_bytes(32))
    assert cache.first > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    model, batch = decoder(SHAPES["window, sinks"]), tokens(2, 1100)
    want = read(model, KVCache(model.config, 2, 1200, dtype=torch.int8), batch, [1000, 60, *[1] * 40])
    cache = KVCache(model.config, 2, 1200, dtype=torch.int8, device="cuda")
    got = read(model.cuda(), cache, batch.cuda(), [1000, 60, *[1] * 40])
    assert distance(got.cpu(), want) < 1e-2
