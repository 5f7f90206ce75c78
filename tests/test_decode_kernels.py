"""What decoding does by our kernels, beside the same through torch: norms, linear maps, one token's attention.

Legend: B batch · S tokens · H heads · J key-value heads · d head width
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import SHAPES, SMALL, tokens
from torch import Tensor

from handful.attention import KVCache, KVCaches, RMSNorm
from handful.config import ModelConfig, RouterConfig
from handful.experts import Linear
from handful.experts.native import available, linear, rms_norm
from handful.machine import native_error
from handful.model import Decoder
from handful.moe import Router

pytestmark = pytest.mark.skipif(not available(), reason=f"no kernels: {native_error()}")

# Latent attention has no kernel of its own; its norms and linear maps have.
CASES = {**SHAPES, "odd heads": replace(SMALL, head_dim=10, rotary_fraction=0.6), "wide": replace(SMALL, head_dim=72)}


def decoder(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    model = Decoder(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def apart(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


def decoded(model: Decoder, batch_BS: Tensor, read: int) -> Tensor:
    """Logits, the first `read` tokens at once and the others one by one."""
    B, S = batch_BS.shape
    cache = KVCache(model.config, B, S, dtype=model.embed.weight.dtype)
    parts = [model(part, cache)[0] for part in batch_BS.split([read] + [1] * (S - read), dim=1)]
    return torch.cat(parts, dim=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that attention was given to."""
    from handful import attention

    names: list[str] = []
    for name in ("attend_one", "rms_norm"):
        real = getattr(attention, name)

        def call(*args: Any, name: str = name, real: Any = real) -> Any:
            names.append(name)
            return real(*args)

        monkeypatch.setattr(attention, name, call)
    return names


@pytest.mark.parametrize("read", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_decoding_equals_the_whole_pass(name: str, read: int, calls: list[str]) -> None:
    config = CASES[name]
    model, batch = decoder(config, torch.float32), tokens(2, 9)
    want = model.double()(batch)[0].detach()  # through torch
    assert calls == []
    model.float()
    with torch.inference_mode():
        assert apart(decoded(model, batch, read), want) < 3e-6
    assert calls.count("attend_one") == (0 if config.mla is not None else (9 - read + (read == 1)) * config.layers)
    assert "rms_norm" in calls
    with torch.inference_mode():
        got = decoded(model.bfloat16(), batch, read)
    assert got.dtype == torch.bfloat16
    assert apart(got, want) < 5e-2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from(sorted(CASES)))
def test_several_sequences_at_once(lengths: list[int], name: str) -> None:
    model = decoder(CASES[name], torch.float32)
    with torch.inference_mode():
        batches = [tokens(1, n + 2) for n in lengths]
        caches = [KVCache(model.config, 1, n + 2) for n in lengths]
        for batch, cache, n in zip(batches, caches, lengths, strict=True):
            model(batch[:, :n], cache)
        for step in range(2):
            new = torch.cat([b[:, n + step : n + step + 1] for b, n in zip(batches, lengths, strict=True)], dim=1)
            got, _ = model(new, KVCaches(caches, [1] * len(caches)))
            for i, (batch, n) in enumerate(zip(batches, lengths, strict=True)):
                want, _ = model(batch[:, : n + step + 1])
                assert apart(got[0, i], want[0, -1]) < 3e-6


def test_padded_and_recorded_sequences_go_through_torch(calls: list[str]) -> None:
    model, batch = decoder(SMALL, torch.float32), tokens(2, 6)
    with torch.inference_mode():
        cache = KVCache(SMALL, 2, 6)
        model(batch[:, :5], cache, padding_B=torch.tensor([0, 2]))
        model(batch[:, 5:], cache)
    cache = KVCache(SMALL, 2, 6)
    model(batch[:, :5], cache)
    model(batch[:, 5:], cache)  # gradients are on
    assert "attend_one" not in calls


@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from(["f32 f32", "bf16 bf16", "bf16 f32", "f32 bf16"]))
@settings(max_examples=60, deadline=None)
def test_rms_norm(rows: int, width: int, kinds: str) -> None:
    of = {"f32": torch.float32, "bf16": torch.bfloat16}
    kind, weight_kind = (of[name] for name in kinds.split())
    x, weight = torch.randn(rows, width).to(kind), torch.randn(width).to(weight_kind)
    want = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    got = rms_norm(x, weight, 1e-5)
    assert got.dtype == kind
    assert apart(got, want) < (5e-7 if kind == torch.float32 else 3e-3)
    norm = RMSNorm(width, eps=1e-5)
    norm.weight.data = weight
    with torch.inference_mode():
        assert norm(x[None])[0].equal(got)
    norm(x.clone().requires_grad_()).sum().backward()  # with gradients, torch's own


def test_rms_norm_of_nothing_and_of_what_does_not_fit() -> None:
    assert rms_norm(torch.ones(0, 4), torch.ones(4), 1e-5).shape == (0, 4)
    with pytest.raises(RuntimeError, match="weight does not fit"):
        rms_norm(torch.ones(2, 4), torch.ones(5), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_of_a_linear_map(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from handful.experts import layer

    taken: list[int] = []

    def note(x: Tensor, *rest: Any) -> Tensor:
        taken.append(x.numel() // x.shape[-1])
        return linear(x, *rest)

    monkeypatch.setattr(layer, "linear", note)
    module = Linear(40, 23).to(dtype)
    for count in (1, 8, 9):
        x = torch.randn(1, count, 40).to(dtype)
        with torch.no_grad():
            want = x.double() @ module.weight.double().T + module.bias.double()
            assert apart(module(x), want) < (1e-6 if dtype == torch.float32 else 1e-2)
        module(x)  # with gradients: torch's own
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 40))
    assert taken == [1, 8]


def test_a_router_s_wide_weight_follows_its_weight() -> None:
    router = Router(16, RouterConfig(experts=4, top_k=2)).bfloat16()
    x_TD = torch.randn(3, 16).bfloat16()

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = router(x_TD).logits_TE
            assert found.equal(torch.nn.functional.linear(x_TD.float(), router.weight.float()))
        return found

    first = logits()
    assert logits().equal(first)
    with torch.no_grad():
        router.weight.mul_(2)
    assert not logits().equal(first)
    router.load_state_dict({"weight": torch.randn(4, 16)})
    logits()
    router.load_state_dict({"weight": torch.randn(4, 16).bfloat16()}, assign=True)
    logits()
    router.double().bfloat16()
    logits()


CHILD = """
import torch
from handful.attention import KVCache
from handful.config import ModelConfig
from handful.experts.native import rms_norm
from handful.model import Decoder
torch.manual_seed(0)
config = ModelConfig(vocab=13, width=40, layers=1, heads=6, kv_heads=2, head_dim=22, ffn=30, qk_norm="head", window=5,
                     sinks=True, context=32)
model, batch = Decoder(config).eval(), torch.randint(13, (3, 12))
want = model.double()(batch)[0].detach()
for dtype, bound in ((torch.float32, 3e-6), (torch.bfloat16, 5e-2)):
    model.to(dtype)
    with torch.inference_mode():
        cache = KVCache(config, 3, 12, dtype=dtype)
        got = torch.cat([model(part, cache)[0] for part in batch.split(1, dim=1)], dim=1)
    assert float((got.double() - want).norm() / want.norm()) < bound, dtype
print(torch.ops.handful.isa())
"""


@pytest.mark.parametrize("level", ["avx2", "avx512f", "avx512"])
def test_every_level(level: str) -> None:
    environment = {**os.environ, "HANDFUL_ISA": level}
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=environment)
    if "does not have" in child.stderr or "HANDFUL_ISA" in child.stderr:
        pytest.skip(f"this computer has no {level}")
    assert child.returncode == 0, child.stderr
