"""Blocks as two operations, and all of a decoding step as one: the bits of the modules one after another, and whoever
hooks into one is seen.

Legend: B batch · S tokens · T tokens of all sequences · V vocabulary
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn.modules.module import register_module_forward_hook

from handful import fused, fused_step, memory
from handful.attention import Attention, RMSNorm
from handful.block import Block
from handful.config import ModelConfig, RopeScaling, RouterConfig
from handful.errors import HandfulError, RoutingError
from handful.experts import Experts, FeedForward, Linear
from handful.experts.quantize_model import quantize_model
from handful.experts.quantized import PackedWeight, QuantizedExperts, QuantizedLinear
from handful.experts.weights import ExpertWeights
from handful.kernels.extension import ROUTER_KERNEL_MAX_TOKENS, available
from handful.kernels.operations import DecodeAttention, RouterRules, largest
from handful.machine import native_error
from handful.model import Decoder
from handful.moe import MoE, Router
from handful.positions import KVCache, KVCaches, Span, rope_table
from handful.routing import Choice, Routing
from handful.sampling import Sampling, sample

pytestmark = pytest.mark.skipif(not available(), reason=f"no kernels: {native_error()}")

ROUTER = RouterConfig(experts=4, top_k=2)
SMALL = ModelConfig(
    vocab=13, width=40, layers=2, heads=4, kv_heads=2, ffn=10, qk_norm="head", rope_theta=100.0, context=200,
    expert_width=24, router=ROUTER,
)  # fmt: skip
SHARED = replace(SMALL, shared_width=12, shared_gate=True, tied=False)
FORMS = ["float32", "bfloat16", "int8", "int4"]
HALVES = ["attend_layer", "moe_layer"] * 2  # of two layers


def decoder(config: ModelConfig, form: str = "float32") -> Decoder:
    """No weight is left at its special start (norms at 1, biases, sinks and balance at 0)."""
    model = Decoder(config).eval()
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if t.dim() == 1 or "bias" in name:
                t.add_(0.3 * torch.randn_like(t))
    if form != "float32":
        model.bfloat16()
    if form.startswith("int"):
        quantize_model(model, bits=int(form[3:]))
    return model


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that stood for modules, by name."""
    return _spied(monkeypatch)


def _spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    real = fused.Operation.run

    def spy(self: fused.Operation, x: Tensor) -> Any:
        names.append(str(self.call).removeprefix("handful.").removesuffix(".default"))
        return real(self, x)

    monkeypatch.setattr(fused.Operation, "run", spy)
    return names


@contextmanager
def looked_at() -> Iterator[None]:
    """Every module is called: somebody looks at all of them."""
    handle = register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def caches_of(model: Decoder, lengths: Sequence[int]) -> list[KVCache]:
    """Of sequences that have been read, each of its own tokens."""
    caches = []
    for n in lengths:
        cache = KVCache(model.config, 1, n + 8, dtype=model.embed.weight.dtype)
        model(torch.arange(n)[None] % 13, cache)
        caches.append(cache)
    return caches


def step(model: Decoder, caches: Sequence[KVCache], **more: Any) -> tuple[Tensor, list[Routing]]:
    """One more token of each sequence."""
    new = torch.arange(len(caches))[None] + 3
    found: tuple[Tensor, list[Routing]] = model(new, KVCaches(caches, [1] * len(caches)), **more)
    return found


def same(got: tuple[Tensor, list[Routing]], want: tuple[Tensor, list[Routing]]) -> None:
    assert got[0].equal(want[0])
    for a, b in zip(got[1], want[1], strict=True):
        for name in ("logits_TE", "scores_TE", "experts_TK", "weights_TK"):
            assert getattr(a, name).equal(getattr(b, name)), name
        assert a.dropped_TK is b.dropped_TK


ROUTERS = st.sampled_from(
    [
        ROUTER,
        replace(ROUTER, score="sigmoid", normalize=True, balance_bias=True, scale=2.5),
        replace(ROUTER, experts=8, groups=4, top_groups=2, group_score="top2", score="sigmoid", balance_bias=True),
        replace(ROUTER, logits_bias=True),
    ]
)
CONFIGS = st.fixed_dictionaries(
    {
        "qk_norm": st.sampled_from(["none", "head", "full"]),
        "qkv_bias": st.booleans(),
        "o_bias": st.booleans(),
        "sinks": st.booleans(),
        "window": st.sampled_from([None, 3]),
        "residual_scale": st.sampled_from([1.0, 0.3]),
        "rope_adjacent": st.booleans(),
        "embedding_scale": st.sampled_from([1.0, 6.3]),
        "logits_scale": st.sampled_from([1.0, 1.7]),
        "tied": st.booleans(),
    }
)
FEEDS = st.one_of(
    st.fixed_dictionaries(
        {
            "router": ROUTERS,
            "expert_bias": st.booleans(),
            "shared_width": st.sampled_from([0, 12]),
            "activation": st.sampled_from(["swiglu", "geglu", "relu", "gelu"]),
        }
    ),
    st.fixed_dictionaries({"activation": st.sampled_from(["swiglu", "geglu", "relu", "gelu"]), "router": st.none()}),
)


@settings(max_examples=120, deadline=None)
@given(CONFIGS, FEEDS, st.booleans(), st.sampled_from(FORMS), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_the_same_bits(fields: dict[str, Any], feed: dict[str, Any], gate: bool, form: str, lengths: list[int]) -> None:
    gate = gate and feed.get("shared_width", 0) > 0
    config = replace(SMALL, expert_width=24 if feed["router"] else 0, **fields, **feed, shared_gate=gate)
    model = decoder(config, form)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        names = _spied(patch)
        caches, others = caches_of(model, lengths), caches_of(model, lengths)
        names.clear()
        halves = ["attend_layer", "moe_layer" if config.router else "feed_forward_layer"] * config.layers
        for allowed in ([halves, ["decoder_step"]], [["decoder_step"]]):  # a prompt of one token is a step too
            got = step(model, caches)
            assert names in allowed
            names.clear()
            with looked_at():
                want = step(model, others)
            assert names == []
            same(got, want)
        for cache, other in zip(caches, others, strict=True):
            for held, kept in zip(cache.keys_values, other.keys_values, strict=True):
                assert all(a.equal(b) for a, b in zip(held, kept, strict=True))


def test_a_batch_and_gpt_oss_s_activation(done: list[str]) -> None:
    """A cache of several sequences; clamped experts are one operation, a clamped dense network is not."""
    model = decoder(replace(SMALL, activation="swiglu_clamped", router=None, expert_width=0))
    mixture = decoder(replace(SMALL, activation="swiglu_clamped", expert_bias=True))
    batch_BS = torch.randint(13, (3, 5))
    with torch.inference_mode():
        for net in (model, mixture):
            cache, other = (KVCache(net.config, 3, 5) for _ in range(2))
            for part_BS in batch_BS.split([3, 1, 1], dim=1):
                got = net(part_BS, cache)
                with looked_at():
                    same(got, net(part_BS, other))
    # Nine tokens read at once are few enough; of the mixture the second step is one operation.
    assert done == ["attend_layer"] * 4 + ["moe_layer"] * 2 + HALVES + ["decoder_step"]


def test_replayed_experts(done: list[str]) -> None:
    model = decoder(SHARED)
    with torch.inference_mode():
        read = [1, 4]
        _, routings = step(model, caches_of(model, read))
        turned = [Choice((r.experts_TK + 1) % 4, torch.tensor([[True, False], [False, False]])) for r in routings]
        done.clear()
        got = step(model, caches_of(model, read), routing=turned)
        assert done[-4:] == ["attend_layer", "moe_layer"] * 2
        with looked_at():
            same(got, step(model, caches_of(model, read), routing=turned))
        assert got[1][0].experts_TK.equal(turned[0].experts_TK)
        for wrong, line in (
            (torch.tensor([[0, 1], [1, 4]]), "^choice names expert 4: there are 4, counted from 0$"),
            (torch.tensor([[0, 1], [-1, 2]]), "^choice names expert -1: there are 4, counted from 0$"),
            (torch.tensor([[0, 1]]), r"^choice.experts_TK has shape \(1, 2\): it must be \(2, 2\), or"),
        ):
            with pytest.raises(RoutingError, match=line):
                step(model, caches_of(model, read), routing=[Choice(wrong)] * 2)
        with pytest.raises(RoutingError, match="dropped_TK"):
            step(model, caches_of(model, read), routing=[Choice(turned[0].experts_TK, torch.ones(1, 2).bool())] * 2)


# ---------------------------------------------------------------------------------------------------------------------
# Whoever looks is seen.


def called(model: Decoder) -> list[str]:
    """The names of the modules that a forward pass calls."""
    silent = (nn.ModuleList, PackedWeight, Decoder)
    return [name for name, module in model.named_modules() if not isinstance(module, silent)]


@pytest.mark.parametrize("form", ["float32", "int4"])
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward", "subclass"])
def test_every_module_that_somebody_looks_at_is_called(kind: str, form: str, done: list[str]) -> None:
    model, seen = decoder(SHARED, form), []
    with torch.inference_mode():
        (cache,) = caches_of(model, [2])
        want = step(model, [cache])
        names = called(model)
        assert {"layers.0.attn.q_norm", "layers.1.ffn.router", "layers.1.ffn.shared.down"} <= {*names}
        for name in names:
            module: Any = model.get_submodule(name)
            real, plain = module.forward, type(module)

            def note(*args: Any, real: Any = real, **more: Any) -> Any:
                seen.append(1)
                return real(*args, **more)

            if kind == "hook":
                handle = module.register_forward_hook(lambda *_: seen.append(1))
            elif kind == "pre-hook":
                handle = module.register_forward_pre_hook(lambda *_: seen.append(1))
            elif kind == "forward":
                module.forward = note
            else:
                forward = {"forward": lambda _, *args, note=note, **more: note(*args, **more)}
                module.__class__ = type("Sub", (plain,), forward)
            seen.clear()
            cache.length -= 1
            got = step(model, [cache])
            if kind.endswith("hook"):
                handle.remove()
            elif kind == "forward":
                del module.forward
            else:
                module.__class__ = plain
            assert seen == [1], name
            same(got, want)
        done.clear()
        cache.length -= 1
        same(step(model, [cache]), want)
        assert done == ["decoder_step"]  # as it was planned before


CLASSES = {
    Attention: 2, Block: 2, Experts: 2, FeedForward: 2, Linear: 12, MoE: 2, RMSNorm: 9, Router: 2, nn.Embedding: 1,
    nn.Linear: 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("form", ["float32", "int4"])
def test_a_forward_that_is_replaced_on_its_class(
    kind: type[nn.Module], form: str, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called as often as the class stands in the model, whatever it copied of the old one; then it is undone."""
    kinds = {Experts: QuantizedExperts, Linear: QuantizedLinear, nn.Linear: QuantizedLinear}
    kind, count = kinds.get(kind, kind) if form == "int4" else kind, CLASSES[kind]
    model, seen = decoder(SHARED, form), []
    with torch.inference_mode():
        (cache,) = caches_of(model, [2])
        want = step(model, [cache])
        real = kind.forward

        @functools.wraps(real)
        def noted(self: nn.Module, *args: Any, **more: Any) -> Any:
            seen.append(1)
            return real(self, *args, **more)

        for forward in (noted, lambda self, *args, **more: noted(self, *args, **more)):
            monkeypatch.setattr(kind, "forward", forward)
            seen.clear()
            cache.length -= 1
            same(step(model, [cache]), want)
            assert len(seen) == sum(type(module) is kind for module in model.modules()) >= count
        monkeypatch.undo()
        names = _spied(monkeypatch)
        cache.length -= 1
        same(step(model, [cache]), want)
        assert names == ["decoder_step"]  # as it was planned before


def test_a_forward_that_was_replaced_before_it_was_ever_asked_for() -> None:
    """Also by a program that replaces it before anything that decodes is imported."""
    code = """
import functools, torch
from handful.attention import Attention
real, seen = Attention.forward, []
Attention.forward = functools.wraps(real)(lambda *args: seen.append(1) or real(*args))
from handful.config import ModelConfig
from handful.model import Decoder
from handful.positions import KVCache
config = ModelConfig(vocab=13, width=8, layers=2, heads=2, ffn=8)
with torch.inference_mode():
    Decoder(config).eval()(torch.tensor([[1]]), KVCache(config, 1, 4))
print(len(seen))
"""
    assert fresh.python("-c", code).stdout == "2\n"


def test_calls_that_are_watched_as_a_whole(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As tracers do it: by another nn.Module.__call__."""
    model, seen = decoder(SHARED), []
    call = nn.Module.__call__
    with torch.inference_mode():
        (cache,) = caches_of(model, [2])
        want = step(model, [cache])

        def watched(self: nn.Module, *args: Any, **more: Any) -> Any:
            seen.append(self)
            return call(self, *args, **more)

        monkeypatch.setattr(nn.Module, "__call__", watched)
        done.clear()
        cache.length -= 1
        same(step(model, [cache]), want)
    assert done == []
    assert set(map(id, seen)) == {id(model.get_submodule(name)) for name in called(model)} | {id(model)}


def exchanged(model: Decoder) -> Iterator[str]:
    """Changes of a model between two steps, each of which must be seen in the next."""
    layer: Any = model.layers[1]
    maps = [layer.attn.q, layer.attn.o, layer.attn.k_norm, layer.attn_norm, layer.ffn_norm, layer.ffn.router]
    ends: list[Any] = [model.embed, model.norm, model.head]
    for module in (*maps, layer.ffn.shared.gate_up, layer.ffn.shared_gate, *ends):
        module.weight = nn.Parameter(1.5 * module.weight.flip(0))
        yield type(module).__name__
    layer.ffn.experts.down = nn.Parameter(2 * layer.ffn.experts.down)
    yield "down"
    layer.attn.v.weight.data = 2 * layer.attn.v.weight.data
    yield "data"
    layer.ffn.router.balance_bias = 9 * torch.randn(4)
    yield "balance bias"
    layer.residual_scale = 0.7
    yield "residual scale"
    model.config = replace(model.config, embedding_scale=3.0)
    yield "the embedding's scale"
    model.config = replace(model.config, logits_scale=0.4)
    yield "the logits' scale"
    model.embed.max_norm = 0.5
    yield "an embedding that shrinks its rows"
    model.embed = nn.Embedding(13, 40)
    yield "another embedding"
    layer.attn.k = decoder(SHARED).layers[0].attn.k  # type: ignore[union-attr]
    yield "a linear map"
    layer.ffn.experts = decoder(SHARED).layers[0].ffn.experts  # type: ignore[union-attr]
    yield "experts"
    layer.attn.q = Linear(40, 40)
    yield "a bias that keys have not"
    layer.ffn.shared.activation = "geglu"
    yield "an activation that the experts have not"
    layer.ffn.shared = layer.ffn.shared_gate = None
    yield "no shared experts"
    layer.attn.q = QuantizedLinear.pack(layer.attn.q)
    yield "a map of another kind"
    quantize_model(layer.ffn, bits=8)
    yield "quantized experts"
    quantize_model(model)
    yield "a quantized model"
    model.head.bias = torch.arange(13.0)  # type: ignore[union-attr]
    yield "logits with a bias"
    model.head = None
    yield "logits by the embedding"


def test_what_is_exchanged_between_two_steps_is_used() -> None:
    torch.manual_seed(3)
    model = decoder(replace(SHARED, router=replace(ROUTER, balance_bias=True)))
    with torch.inference_mode(False), torch.no_grad():
        (cache,) = caches_of(model, [2])
        before = step(model, [cache])[0]
        for what in exchanged(model):
            cache.length -= 1
            got = step(model, [cache])
            assert not got[0].equal(before), what
            cache.length -= 1
            with looked_at():
                same(got, step(model, [cache]))
            before = got[0]


def test_another_dtype_between_two_steps(done: list[str]) -> None:
    model = decoder(SMALL)
    with torch.no_grad():
        step(model, caches_of(model, [2]))
        model.bfloat16()
        caches, others = caches_of(model, [2]), caches_of(model, [2])
        done.clear()
        got = step(model, caches)
        assert len(done) == 4
        with looked_at():
            same(got, step(model, others))
        # Weights of two dtypes, which torch does not multiply either.
        model.layers[0].attn.o.float()  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="dtype"):
            step(model, caches)


def test_a_plan_is_of_one_dtype_number_of_tokens_and_cache(done: list[str]) -> None:
    model = decoder(SMALL)
    with torch.inference_mode():
        for lengths, first in (([3], HALVES), ([2, 5], HALVES), ([3], ["decoder_step"])):
            caches, others = caches_of(model, lengths), caches_of(model, lengths)
            done.clear()
            for expected in (first, ["decoder_step"]):
                got = step(model, caches)
                assert done == expected
                with looked_at():
                    same(got, step(model, others))
                done.clear()
        step(model, caches)
        model.bfloat16()
        cache, other = (KVCache(SMALL, 1, 9, dtype=torch.int8) for _ in range(2))
        done.clear()
        for token in (3, 4):
            got = model(torch.tensor([[token]]), cache)
            with looked_at():
                same(got, model(torch.tensor([[token]]), other))
        assert done == [*HALVES, "decoder_step"]
        doubles = KVCache(SMALL, 1, 9, dtype=torch.float64)  # that no operation takes
        done.clear()
        with pytest.raises(RuntimeError, match="dtype"):
            model(torch.tensor([[3]]), doubles)
        assert "decoder_step" not in done


@pytest.mark.parametrize("form", ["float32", "int4"])
def test_a_plan_keeps_no_weight_and_no_model_alive(form: str) -> None:
    model = decoder(SHARED, form)
    with torch.inference_mode():
        (cache,) = caches_of(model, [2])
        for _ in range(2):
            step(model, [cache])
    assert fused._plans_of(model)
    layer: Any = model.layers[1]
    experts = [weakref.ref(t) for t in (*layer.ffn.experts.parameters(), *layer.ffn.experts.buffers())]
    layer.ffn.experts = None
    gc.collect()
    assert experts
    assert all(ref() is None for ref in experts)
    whole, weight = weakref.ref(model), weakref.ref(model.layers[0].attn_norm.weight)  # type: ignore[union-attr]
    del model, layer
    gc.collect()
    assert whole() is None
    assert weight() is None


@pytest.mark.parametrize("name", fused.METHODS)
def test_a_method_of_the_decoder_s_own(name: str, done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance's, a subclass's, one exchanged on the class, before the first step and later: it is called."""
    seen = []

    def noted(real: Any) -> Any:
        @functools.wraps(real)
        def called(*args: Any, **more: Any) -> Any:
            seen.append(1)
            return real(*args, **more)

        return called

    with torch.inference_mode():
        for late in (False, True):
            model = decoder(SMALL)
            (cache,) = caches_of(model, [2])
            with looked_at():
                want = step(model, [cache])
            cache.length -= 1
            for where in ("instance", "subclass", "class"):
                if late:
                    step(model, [cache])
                    cache.length -= 1
                if where == "instance":
                    setattr(model, name, noted(getattr(model, name)))
                elif where == "subclass":
                    model.__class__ = type("Other", (Decoder,), {name: noted(getattr(Decoder, name))})
                else:
                    monkeypatch.setattr(Decoder, name, noted(getattr(Decoder, name)))
                for _ in range(2):
                    seen.clear()
                    same(step(model, [cache]), want)
                    cache.length -= 1
                    assert seen == [1], (where, late)
                if where == "instance":
                    delattr(model, name)
                model.__class__ = Decoder
                monkeypatch.undo()
        for _ in range(2):
            names = _spied(monkeypatch)
            same(step(model, [cache]), want)
            cache.length -= 1
            monkeypatch.undo()
        assert names == ["decoder_step"]


def test_copies_and_pickles_have_no_plans() -> None:
    model = decoder(SMALL, "int4")
    with torch.inference_mode():
        (cache,) = caches_of(model, [2])
        want = step(model, [cache])
        cache.length -= 1
        same(step(model, [cache]), want)
        assert fused._plans_of(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not fused._plans_of(other)
            for _ in range(2):
                cache.length -= 1
                same(step(other, [cache]), want)
            assert fused._plans_of(other)


def test_what_leads_back_to_a_model_does_not_keep_it() -> None:
    model = decoder(SMALL)
    model.watcher = [model]  # type: ignore[assignment]
    with torch.inference_mode():
        (cache,) = caches_of(model, [2])
        for _ in range(2):
            step(model, [cache])
    assert fused._plans_of(model)
    whole = weakref.ref(model)
    del model
    gc.collect()
    assert whole() is None


def test_a_token_that_is_none() -> None:
    """The vocabulary's end is told in a line, and the cache is as it was."""
    model = decoder(SMALL)
    with torch.inference_mode():
        (cache,) = caches_of(model, [2])
        step(model, [cache])
        kept = [held.clone() for layer in cache.keys_values for held in layer]
        with pytest.raises(HandfulError, match=r"^token 13: there are 13, counted from 0$"):
            model(torch.tensor([[13]]), cache)
        assert cache.length == 3
        assert all(a.equal(b) for a, b in zip(kept, (h for layer in cache.keys_values for h in layer), strict=True))


def test_a_bias_in_another_dtype_is_turned_in_every_step(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no module's own tensor, so that no plan could find it again: that is found out once."""
    made = []
    monkeypatch.setattr(fused, "Plan", lambda *given: made.append(fused_step.Plan(*given)) or made[-1])  # type: ignore[func-returns-value]
    model = decoder(replace(SMALL, qkv_bias=True), "int4")
    for layer in model.layers:
        layer.attn.q.bias = layer.attn.q.bias.float()  # type: ignore[union-attr]
    with torch.inference_mode():
        (cache,), (other,) = caches_of(model, [2]), caches_of(model, [2])
        done.clear()
        for _ in range(2):
            got = step(model, [cache])
            with looked_at():
                same(got, step(model, [other]))
            model.layers[0].attn.q.bias.neg_()  # type: ignore[union-attr, operator]
    assert done == HALVES * 2
    assert [plan.usable for plan in made] == [False]


def test_when_modules_are_called(done: list[str]) -> None:
    """Gradients, autocast, float64, prompts, padding; for the feed-forward half: training, capacity, other backends."""
    model = decoder(SMALL)
    with torch.no_grad():
        (cache,) = caches_of(model, [2])
    done.clear()
    logits, _ = step(model, [cache])  # gradients are on
    logits.sum().backward()
    cache = KVCache(SMALL, 1, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[1, 2]]), cache)
        model(torch.tensor([[1]]), cache)
    assert done == []
    with torch.inference_mode():
        model(torch.tensor([[1, 2]]), KVCache(SMALL, 1, 20))
        assert done == ["moe_layer"] * 2  # few tokens, but a prompt
        done.clear()
        model(torch.ones(1, ROUTER_KERNEL_MAX_TOKENS + 1, dtype=torch.long), KVCache(SMALL, 1, 50))
        assert done == []
        padded = KVCache(SMALL, 2, 20)
        model(torch.tensor([[1, 2, 3]] * 2), padded, padding_B=torch.tensor([0, 1]))
        done.clear()
        model(torch.tensor([[1]] * 2), padded)
        assert done == ["moe_layer"] * 2
        attention = ["attend_layer"] * 2
        model.layers[0].ffn.router.train()  # type: ignore[union-attr]
        caches = caches_of(model, [2] * 3)
        done.clear()
        step(model, caches)
        assert done == ["attend_layer", "attend_layer", "moe_layer"]
        for config, backend in (
            (replace(SMALL, router=replace(ROUTER, eval_capacity_factor=2.0)), "auto"),
            (SMALL, "grouped"),
            (SMALL, "reference"),
        ):
            other = Decoder(config, backend=backend).eval()
            caches = caches_of(other, [2])
            done.clear()
            step(other, caches)
            assert done == attention
        done.clear()
        double = decoder(SMALL).double()
        step(double, caches_of(double, [2]))
        assert done == []
        many = caches_of(model.eval(), [1] * 5)  # more than float32 streams
        done.clear()
        step(model, many)
        assert done == ["moe_layer"] * 2


@pytest.mark.filterwarnings("ignore")  # the tracer's own
def test_a_compiled_model_gives_the_same() -> None:
    model = decoder(SHARED)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        for net, cache in ((model, KVCache(SHARED, 1, 9)), (compiled, KVCache(SHARED, 1, 9))):
            parts = [net(torch.tensor([[token]]), cache)[0] for token in (1, 5, 2)]
            if net is model:
                want = parts
        for a, b in zip(parts, want, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# The operations themselves.


def given_to(model: Decoder, caches: Sequence[KVCache]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The operations of a model's first layer and their arguments."""
    x_1TD = torch.randn(1, len(caches), model.config.width, dtype=model.embed.weight.dtype)
    with torch.inference_mode():
        span: Span = KVCaches(caches, [1] * len(caches)).span(model.config, len(caches))
        block: Any = model.layers[0]
        attend, feed = (
            fused.attention_half(block, x_1TD, len(caches), span),
            fused.feed_half(block, x_1TD, len(caches), span, None),
        )
    assert attend is not None
    assert feed is not None
    return {str(o.call): (o.call, (x_1TD, *o.operands)) for o in (attend, feed.operation)}


def test_a_step_is_planned_once_with_offloaded_experts_too(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each half is looked at once in a step, and what is planned is run."""
    looked: list[str] = []
    for name in ("attention_half", "feed_half"):
        real = getattr(fused, name)

        def half(block: Any, *given: Any, name: str = name, real: Any = real) -> Any:
            looked.append(name)
            return real(block, *given)

        monkeypatch.setattr(fused, name, half)
    model = decoder(SHARED)
    memory.pack(model, tmp_path / "experts.pack")
    with torch.inference_mode():
        (cache,) = caches_of(model, [2])
        looked.clear()
        want = step(model, [cache])
        assert looked == ["attention_half", "feed_half"] * 2
        with memory.attach(model, tmp_path / "experts.pack", 10**9):
            cache.length -= 1
            looked.clear()
            done.clear()
            same(step(model, [cache]), want)
    assert looked == ["attention_half", "feed_half"] * 2
    assert done == ["attend_layer"] * 2


def test_operands_are_named_as_in_the_schemas() -> None:
    """What is passed by its place stands in the place of its name."""
    ops = torch.ops.handful

    def names(operation: Any) -> list[str]:
        return [argument.name for argument in operation._schema.arguments]

    norm, experts = fused.NormOperands._fields, ExpertWeights._fields
    assert names(ops.attend_layer.default) == ["x", *fused.ATTENTION]
    assert names(ops.decode_attention.default) == ["q", "k", "v", *DecodeAttention._fields]
    rules = *RouterRules._fields[:-1], "route_scale"
    mixture = *norm, *fused.RouterOperands._fields, *rules, *experts, *fused.SharedExperts._fields, "residual_scale"
    assert names(ops.moe_layer.default) == ["x", *mixture]
    router = "x", "weight", "bias", "balance_bias", "chosen", *RouterRules._fields
    assert names(ops.route.default) == [*router]
    dense = *norm, *fused.FeedForwardWeights._fields, "residual_scale"
    assert names(ops.feed_forward_layer.default) == ["x", *dense]
    tokens = ["x", "experts", "weights", "dropped"]
    assert names(ops.experts_quantized.default) == [*tokens, *experts, "bf16"]
    assert names(ops.experts_rows.default) == ["rows", "x", "experts", "dropped", "places", *experts, "bf16", "tokens"]
    floats = [name for name in experts if not name.endswith(("scales", "hidden", "bits", "group"))]
    assert names(ops.experts.default) == [*tokens, *floats, "bf16"]
    assert names(ops.experts_forward.default) == [*tokens, *floats, "bf16", "whole"]


@pytest.mark.parametrize("form", ["float32", "int4"])
@pytest.mark.parametrize("config", [SHARED, replace(SMALL, router=None, expert_width=0)], ids=["shared", "dense"])
def test_what_torch_is_told(config: ModelConfig, form: str) -> None:
    model = decoder(config, form)
    with torch.no_grad():
        operations = given_to(model, caches_of(model, [2, 3]))
    for operation, arguments in operations.values():
        opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


def test_operations_refuse_what_does_not_fit() -> None:
    model = decoder(SHARED, "int4")
    with torch.no_grad():
        (attend, to_attend), (mix, to_mix) = given_to(model, caches_of(model, [2])).values()
    names = [a.name for a in attend._schema.arguments], [a.name for a in mix._schema.arguments]

    def refused(operation: Any, given: tuple[Any, ...], names: list[str], name: str, value: Any, line: str) -> None:
        at = names.index(name)
        assert at > 0 or name == "x"
        with pytest.raises(RuntimeError, match=line):
            operation(*given[:at], value, *given[at + 1 :])

    weights, scales = to_attend[names[0].index("weights")], to_attend[names[0].index("scales")]
    for name, value, line in (
        ("x", torch.zeros(1, 1, 0), "x has no width"),
        ("x", torch.zeros(1, 1, 39), "weight does not fit"),
        ("x", torch.zeros(1, 1, 40, dtype=torch.float64), "x is neither"),
        ("norm", torch.ones(41), "weight does not fit"),
        ("weights", weights[:3], "not of q, k, v and o"),
        ("scales", scales[:3], "not of q, k, v and o"),
        ("weights", [*weights[:3], weights[3][:-1]], "weight"),
        ("weights", [weights[1], *weights[1:]], "scales has shape"),
        ("biases", [torch.ones(40)], "not of all weights"),
        ("o_bias", torch.ones(41), "weight_bias has shape"),
        ("cos", torch.ones(2, 5), "cos and sin are not float32"),
        ("sin", torch.ones(5, dtype=torch.bfloat16), "cos and sin are not float32"),
        ("lengths", [99], "length is not from 0"),
    ):
        refused(attend, to_attend, names[0], name, value, line)
    shared = to_mix[names[1].index("shared")]
    for name, value, line in (
        ("router", torch.ones(4, 41), "weight has shape"),
        ("gate_up_scales", None, "codes have no scales"),
        ("down_scales", None, "codes have no scales"),
        ("shared", shared[:1], "not gate_up and down"),
        ("shared", [shared[1], shared[0]], "weight"),
        ("dropped", torch.ones(1, 3).bool(), "dropped is not"),
        ("activation", "silu", "activation = 'silu'"),
        ("top_k", 5, "top_k"),
    ):
        refused(mix, to_mix, names[1], name, value, line)


def test_a_step_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, operation = decoder(SHARED, "int4"), torch.ops.handful.decoder_step.default
    given: list[Any] = []
    real = fused.Operation.run

    def spy(self: fused.Operation, x: Tensor) -> Any:
        if self.call is operation:
            given.append((x, *self.operands))
        return real(self, x)

    monkeypatch.setattr(fused.Operation, "run", spy)
    with torch.inference_mode():
        (cache,) = caches_of(model, [2])
        for _ in range(2):
            step(model, [cache])
    names, right = [argument.name for argument in operation._schema.arguments], given[0]
    opcheck(operation, right, test_utils="test_schema")
    tensors, numbers = (right[names.index(name)] for name in ("tensors", "numbers"))
    for name, value, line in (
        ("tokens", torch.tensor([[1.0]]), "tokens are not contiguous and of type int64"),
        ("tokens", torch.tensor([[13]]), "token 13: there are 13, counted from 0"),
        ("tokens", torch.tensor([[-1]]), "token -1: there are 13, counted from 0"),
        ("tensors", [tensors[1], *tensors[1:]], "embedding is not a matrix"),
        ("numbers", numbers.float(), "not a contiguous vector of type float64"),
        ("numbers", numbers[:-1], "operands end too early"),
        ("numbers", torch.cat([numbers, numbers[-1:]]), "operands are left over"),
        ("numbers", torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), "not of the same caches"),
        ("tensors", tensors[:-1], "operands lack a tensor"),
        ("tensors", [*tensors, tensors[0]], "operands are left over"),
        ("keys", right[names.index("keys")][:1], "not of the same caches"),
        ("values", right[names.index("values")][:1], "not of the same caches"),
        ("lengths", [2], "not of the same caches"),
        ("lengths", [2, 99], "length is not from 0"),
    ):
        at = names.index(name)
        with pytest.raises(RuntimeError, match=line):
            operation(*right[:at], value, *right[at + 1 :])


def test_weights_that_are_views() -> None:
    model = decoder(SMALL)
    layer: Any = model.layers[0]
    with torch.no_grad():
        for module in (layer.attn.q, layer.attn.o, layer.ffn.router):
            module.weight = nn.Parameter(module.weight.T.contiguous().T)
        layer.ffn.experts.down = nn.Parameter(layer.ffn.experts.down.transpose(1, 2).contiguous().transpose(1, 2))
        got = step(model, caches_of(model, [2]))
        with looked_at():
            same(got, step(model, caches_of(model, [2])))


def test_an_error_of_an_operation_is_one_line() -> None:
    model = decoder(SMALL)
    model.layers[0].attn_norm.weight = nn.Parameter(torch.ones(7))  # type: ignore[union-attr]
    with torch.no_grad(), pytest.raises(HandfulError, match=r"^weight does not fit$"):
        step(model, [KVCache(SMALL, 1, 4)])


# ---------------------------------------------------------------------------------------------------------------------
# What a step needs beside its layers.


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling(kind="yarn", factor=4.0, original_context=16)], ids=["plain", "yarn"]
)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_one_position_s_turn(fraction: float, scaling: RopeScaling | None) -> None:
    """cos and sin as they are made of one position alone, at any place; positions may jump."""
    config = replace(SMALL, head_dim=24, rotary_fraction=fraction, rope_scaling=scaling, context=5000, window=3)
    caches = [KVCache(config, 1, 5000) for _ in range(3)]
    for at in (0, 1, 63, 64, 65, 130, 7, 127, 4096, 4999):
        for i, cache in enumerate(caches):
            cache.length = cache.first = max(0, at - 40 * i)
        span = caches[0].span(config, 1)
        together = KVCaches(caches, [1] * 3).span(config, 3)
        want = rope_table(caches[0].rope_frequencies, torch.tensor([cache.length for cache in caches]))
        for part, all_of_them, right in zip(span.rope, together.rope, want, strict=True):
            assert part.equal(right[:1])
            assert all_of_them.equal(right)
        assert span.masks == together.parts[2][2].masks == {3: None}
        assert span.decodes
        assert together.decodes


def test_a_cache_goes_on_under_autograd() -> None:
    """What it keeps of positions must not be of inference mode alone."""
    model = decoder(SMALL)
    with torch.inference_mode():
        first = KVCache(SMALL, 1, 9).next_rope
    cache = KVCache(SMALL, 1, 9)
    with torch.inference_mode():
        cache.next_rope()
    assert first is not None
    logits, _ = model(torch.tensor([[1]]), cache)
    logits.sum().backward()
    assert model.layers[0].attn.q.weight.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_argmax_token(dtype: torch.dtype) -> None:
    """Where torch's argmax is: the first of equals, a NaN before all numbers."""
    for n in (1, 2, 15, 16, 17, 1023, 1024, 1025, 5000):
        plain_V = torch.randn(n).to(dtype)
        equal_V, spoilt_V, infinite_V = torch.full_like(plain_V, -torch.inf), plain_V.clone(), plain_V.clone()
        spoilt_V[n // 3 :: 7] = torch.nan
        infinite_V[n // 2 :: 5] = torch.inf
        zeros_V = torch.zeros_like(plain_V)
        zeros_V[0] = -0.0
        for logits_V in (plain_V, -plain_V.abs(), equal_V, spoilt_V, infinite_V, zeros_V, plain_V.repeat(2)[::2]):
            place, value = largest(logits_V)
            assert place == int(logits_V.argmax())
            assert torch.tensor(value).equal(logits_V[place].float()) or math.isnan(value)
            assert math.isnan(value) == bool(logits_V.isnan().any())
            with torch.inference_mode():
                assert sample(logits_V, Sampling(temperature=0)) == int(logits_V.argmax())
    with pytest.raises(RuntimeError, match="not a contiguous vector"):
        largest(torch.zeros(0, dtype=dtype))


def test_norms_say_what_they_are_of() -> None:
    norm = RMSNorm(4, eps=1e-3)
    weight, eps = fused.norm_operands(norm) or (None, None)
    assert weight is norm.weight
    assert eps == 1e-3
    assert fused.norm_operands(norm.double()) is None
    assert fused.norm_operands(nn.RMSNorm(4)) is None
