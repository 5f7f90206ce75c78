"""What decoding does by our kernels, beside the same through torch: norms, linear maps, routers, one token's attention.

Legend: B batch · S tokens · H heads · J key-value heads · d head width
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import fresh
import pytest
import torch
from builders import SHAPES, SMALL, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from handful import fused
from handful.attention import RMSNorm
from handful.config import ModelConfig, RouterConfig
from handful.errors import ConfigError, HandfulError, RoutingError
from handful.experts import Linear
from handful.experts.quantized import QuantizedLinear
from handful.kernels import operations
from handful.kernels.extension import NATIVE_MAX_TOKENS_PAIRS, ROUTER_KERNEL_MAX_TOKENS, available, native_max_tokens
from handful.kernels.operations import linear, rms_norm, route
from handful.machine import native_error
from handful.model import Decoder
from handful.moe import Router
from handful.positions import KVCache, KVCaches
from handful.routing import Choice, Routing

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
    names: list[str] = []
    for name in ("decode_attention", "rms_norm"):
        real = getattr(operations, name)

        def call(*args: Any, name: str = name, real: Any = real) -> Any:
            names.append(name)
            return real(*args)

        monkeypatch.setattr(operations, name, call)
    run = fused.Operation.run

    def spy(self: fused.Operation, x: Tensor) -> Any:
        names.append(str(self.call).removeprefix("handful.").removesuffix(".default"))
        return run(self, x)

    monkeypatch.setattr(fused.Operation, "run", spy)
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
    steps = 0 if config.mla is not None else 9 - read + (read == 1)  # the first is planned from two operations a layer
    assert calls.count("attend_layer") == (config.layers if steps else 0)
    assert calls.count("decoder_step") == max(0, steps - 1)
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
    assert not {"decode_attention", "attend_layer", "decoder_step"} & {*calls}


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
@pytest.mark.parametrize("whole", [False, True])
def test_norms_in_attention_have_the_bits_of_norms_before_it(whole: bool, dtype: torch.dtype) -> None:
    """Normed queries and keys are rounded to their dtype, as the operation of a norm alone rounds them."""
    B, H, J, d, length = 3, 6, 2, 22, 4
    q, k, v = (torch.randn(B, heads * d).to(dtype) for heads in (H, J, J))
    norms = [torch.randn(heads * d if whole else d).to(dtype) for heads in (H, J)]
    cos, sin = torch.randn(2, 1, d // 2).unbind()
    for cached in (torch.float32, torch.bfloat16):
        held = torch.randn(2, B, J, length + 2, d).to(cached)

        def attend(q: Tensor, k: Tensor, *weights: Tensor | None, held: Tensor = held) -> tuple[Tensor, Tensor]:
            held = held.clone()
            keys, values = held
            rest = (1e-5, whole, cos, sin, False, [keys], [values], [length], 0, 0.3, None)
            return torch.ops.handful.decode_attention(q, k, v, *weights, *rest), held

        normed = [rms_norm(x.view(B, -1, len(w)), w, 1e-5).view(B, -1) for x, w in zip((q, k), norms, strict=True)]
        for a, b in zip(attend(q, k, *norms), attend(*normed, None, None), strict=True):
            assert a.equal(b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_of_a_linear_map(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def note(x: Tensor, *rest: Any) -> Tensor:
        taken.append(x.numel() // x.shape[-1])
        return linear(x, *rest)

    monkeypatch.setattr(operations, "linear", note)
    module = Linear(40, 23).to(dtype)
    most = native_max_tokens(dtype)
    for count in (1, 4, 129) if most is None else (1, most, most + 1):
        x = torch.randn(1, count, 40).to(dtype)
        with torch.no_grad():
            want = x.double() @ module.weight.double().T + module.bias.double()
            assert apart(module(x), want) < (1e-6 if dtype == torch.float32 else 1e-2)
        module(x)  # with gradients: torch's own
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(1, 40))
    assert taken == ([1, 4, 129] if most is None else [1, most])


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, NATIVE_MAX_TOKENS_PAIRS + 1])
def test_several_linear_maps_at_once(tokens: int, bias: bool, bits: int | None) -> None:
    """The same bits as one after the other, of 4,000 rows and of 3, in one operation."""
    floats = [Linear(72, rows, bias=bias).bfloat16() for rows in (4000, 3, 40)]
    maps: Sequence[Any] = floats if bits is None else [QuantizedLinear.pack(m, bits) for m in floats]
    x = torch.randn(1, tokens, 72).bfloat16()
    with torch.inference_mode():
        want = [m(x) for m in maps]
        given = [fused.linear_operand(m, tokens, 72, x.dtype) for m in maps]
        # Floats of many tokens are for torch.
        most = native_max_tokens(torch.bfloat16)
        many = bits is None and most is not None and tokens > most
        assert [operand is None for operand in given] == [many] * 3
        together = fused.linear_operands([(m, 72) for m in maps], 1, x.dtype)
        assert together is not None
        weights, scales, biases, *kind = together
        own = [b for b in biases if b is not None]
        for a, b in zip(torch.ops.handful.linears(x[0], weights, scales, own, *kind), want, strict=True):
            assert a.equal(b[0]) or many


def test_linear_maps_that_do_not_fit() -> None:
    x = torch.randn(1, 8)
    with pytest.raises(RuntimeError, match="no weight"):
        torch.ops.handful.linears(x, [], [], [], 0, 0)
    with pytest.raises(HandfulError, match="weight"):
        linear(x, torch.randn(4, 7))
    packed = QuantizedLinear.pack(Linear(7, 4)).packed.value
    with pytest.raises(ConfigError, match="x of width 8: its weight takes 7"):
        linear(x, packed)


def test_what_torch_is_told_of_the_operations() -> None:
    """Shapes and dtypes without data, as torch.compile asks for them."""
    x, weight, packed = torch.randn(2, 64), torch.randn(4, 64), QuantizedLinear.pack(Linear(64, 3)).packed.value
    ops, checks = torch.ops.handful, ("test_schema", "test_faketensor")
    opcheck(ops.linears, (x, [weight, weight[:1]], [], [], 0, 0), test_utils=checks)
    opcheck(ops.linears, (x, [packed.codes], [packed.scales], [torch.randn(3)], 4, 32), test_utils=checks)
    for chosen in (None, torch.tensor([[0, 1], [3, 2]])):
        router = (x.bfloat16(), weight, None, torch.randn(4), chosen, True, 2, 1, True, 2, True, 1.0)
        opcheck(ops.route, router, test_utils=checks)


ROUTERS = st.fixed_dictionaries(
    {
        "score": st.sampled_from(["softmax", "sigmoid"]),
        "normalize": st.booleans(),
        "logits_bias": st.booleans(),
        "balance_bias": st.booleans(),
        "scale": st.sampled_from([1.0, 2.5]),
    }
)
GROUPS = st.sampled_from([(1, 1, "max"), (4, 2, "max"), (4, 3, "top2"), (2, 1, "top2")])


def router_of(config: RouterConfig, width: int, dtype: torch.dtype) -> Router:
    router = Router(width, config).to(dtype).eval()
    with torch.no_grad():
        for held in (router.bias, router.balance_bias):
            if held is not None:
                held.normal_(0, 0.3)
    return router


def through_torch(router: Router, x_TD: Tensor, choice: Routing | None = None) -> Routing:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("handful.kernels.forwards.available", lambda: False)
        routing: Routing = router(x_TD, choice=choice)
        return routing


@given(
    ROUTERS, GROUPS, st.integers(1, 40), st.integers(1, 300), st.integers(1, 5), st.integers(1, 4),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**30),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_a_router_of_few_tokens(
    fields: dict[str, Any], groups: tuple[int, int, Any], tokens: int, width: int, size: int, top_k: int,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    """One operation, beside the same through torch: the same experts, and numbers as near as float32 is."""
    torch.manual_seed(seed)
    count, limit, score = groups
    size = max(size, 2 if score == "top2" else 1)
    top_k = min(top_k, limit * size)
    config = RouterConfig(
        experts=count * size, top_k=top_k, groups=count, top_groups=limit, group_score=score, **fields
    )
    router, x_TD = router_of(config, width, dtype), torch.randn(tokens, width).to(dtype)
    with torch.inference_mode():
        want, got = through_torch(router, x_TD), router(x_TD)
    assert got.experts_TK.equal(want.experts_TK)
    assert got.dropped_TK is None
    for name in ("logits_TE", "scores_TE", "weights_TK"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == b.dtype == torch.float32
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 3e-6 * max(1.0, float(b.abs().max())), name
    with torch.inference_mode():
        again = router(x_TD, choice=got)
        turned = replace(got, experts_TK=(got.experts_TK + 1) % config.experts)
        other, as_torch = router(x_TD, choice=turned), through_torch(router, x_TD, turned)
    assert again.weights_TK.equal(got.weights_TK)
    assert again.scores_TE.equal(got.scores_TE)
    assert other.experts_TK.equal(turned.experts_TK)
    assert torch.allclose(other.weights_TK, as_torch.weights_TK, rtol=1e-5, atol=1e-7)


def test_which_routers_go_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, autograd, many tokens, float64, and tokens that compete: all by the plain maths."""
    taken: list[int] = []

    def spy(x_TD: Tensor, *others: Any) -> Any:
        taken.append(len(x_TD))
        return route(x_TD, *others)

    monkeypatch.setattr(operations, "route", spy)
    plain = RouterConfig(experts=4, top_k=2)
    router, x_TD = Router(8, plain), torch.randn(3, 8)
    router(x_TD)
    router.eval()(x_TD)  # gradients are asked for
    with torch.inference_mode():
        router(torch.randn(ROUTER_KERNEL_MAX_TOKENS + 1, 8))
        router.train()(x_TD)
        router.eval().double()(x_TD.double())
        with torch.autocast("cpu", torch.bfloat16):
            router.float()(x_TD)
        Router(8, replace(plain, eval_capacity_factor=1.0)).eval()(x_TD)
        Router(8, replace(plain, sequence_capacity=2)).eval()(x_TD)
        assert taken == []
        router(x_TD)
        router(torch.randn(ROUTER_KERNEL_MAX_TOKENS, 8))
        router(torch.empty(0, 8))
    assert taken == [3, ROUTER_KERNEL_MAX_TOKENS, 0]


def test_equal_scores_and_scores_that_are_none() -> None:
    """The first of equals is taken; a NaN is above all, as to torch, and is seen in what follows."""
    router = router_of(RouterConfig(experts=6, top_k=3), 4, torch.float32)
    with torch.no_grad():
        router.weight.zero_()
        found = router(torch.randn(2, 4))
        assert found.experts_TK.tolist() == [[0, 1, 2]] * 2
        assert found.weights_TK.allclose(torch.full((2, 3), 1 / 3))
        spoilt = router(torch.tensor([[1.0, float("nan"), 0, 0], [1.0, 0, 0, 0]]))
    assert spoilt.weights_TK[0].isnan().all()
    assert not spoilt.weights_TK[1].isnan().any()
    assert sorted(spoilt.experts_TK[0].tolist()) == sorted(set(spoilt.experts_TK[0].tolist()))


def test_a_router_s_parameters_as_they_may_lie() -> None:
    """A weight that is a view, and a balance bias in the model's dtype."""
    router = router_of(RouterConfig(experts=6, top_k=2, balance_bias=True), 8, torch.bfloat16)
    x_TD = torch.randn(3, 8).bfloat16()
    with torch.inference_mode():
        router.weight = torch.nn.Parameter(torch.randn(8, 6).bfloat16().T, requires_grad=False)
        router.balance_bias = torch.randn(6).bfloat16()
        want, got = through_torch(router, x_TD), router(x_TD)
    assert got.experts_TK.equal(want.experts_TK)
    assert got.weights_TK.allclose(want.weights_TK, atol=1e-6)


def test_a_router_refuses_experts_that_do_not_exist() -> None:
    config = RouterConfig(experts=4, top_k=2)
    router, x_TD = Router(8, config).eval(), torch.randn(1, 8)
    with torch.inference_mode():
        chosen = torch.tensor([[0, 4]])
        with pytest.raises(RoutingError, match=r"^choice names expert 4: there are 4, counted from 0$"):
            router(x_TD, choice=Choice(chosen))
        with pytest.raises(RoutingError, match="choice names expert 4: there are 4"):
            route(x_TD, router.weight, None, None, chosen, config)
        with pytest.raises(RoutingError, match=r"shape \(1, 3\): it must be \(1, 2\), or of fewer experts"):
            router(x_TD, choice=Choice(torch.tensor([[0, 1, 2]])))


CHILD = """
import torch
from handful.positions import KVCache
from handful.config import ModelConfig
from handful.kernels.operations import rms_norm
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
    child = fresh.python("-c", CHILD, env=environment)
    if "does not have" in child.stderr or "HANDFUL_ISA" in child.stderr:
        pytest.skip(f"this computer has no {level}")
    assert child.returncode == 0, child.stderr
