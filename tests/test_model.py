"""The decoder against a plain rewrite of attention, its cache against the full pass, causality, counts and names.

Legend: B batch · S tokens · D width · H heads · J key-value heads · d head width · V vocabulary
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handful.balance import z_loss
from handful.config import ModelConfig, RouterConfig
from handful.cost import cost
from handful.errors import ConfigError
from handful.experts import FeedForward
from handful.model import Decoder
from handful.moe import MoE, NotCausalWarning
from handful.positions import KVCache, Span
from handful.presets import PRESETS, small_model

F64 = torch.float64

SMALL = ModelConfig(
    vocab=13,
    width=8,
    layers=2,
    heads=4,
    kv_heads=2,
    router=RouterConfig(experts=4, top_k=2),
    expert_width=6,
    qk_norm="head",
    rope_theta=100.0,
    context=32,
)


def decoder(config: ModelConfig, **kwargs: Any) -> Decoder:
    """In float64 and evaluation mode, and no weight left at its special start (norms at 1, biases at 0)."""
    with warnings.catch_warnings(action="ignore", category=NotCausalWarning):
        model = Decoder(config, **kwargs).to(F64).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(B: int, S: int, vocab: int = 13) -> Tensor:
    return torch.randint(vocab, (B, S))


def close(got: Tensor, want: Tensor, rel: float = 1e-12) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().norm()) <= rel * float(want.detach().norm())


# ---------------------------------------------------------------------------------------------------------------------
# The KV cache.


def test_a_cache_that_is_full_refuses_and_stays_as_it_was() -> None:
    model, cache = decoder(SMALL), KVCache(SMALL, 1, 4, dtype=F64)
    model(tokens(1, 3), cache)
    held = cache.keys_values[0][0].clone()
    with pytest.raises(ConfigError, match=r"^cache holds 3 tokens of at most 4: 2 more do not fit$"):
        model(tokens(1, 2), cache)
    assert cache.length == 3
    assert cache.keys_values[0][0].equal(held)
    model(tokens(1, 1), cache)
    with pytest.raises(ConfigError, match="1 more do not fit"):
        model(tokens(1, 1), cache)


def test_cache_under_autocast_and_in_bfloat16() -> None:
    batch = tokens(2, 6)
    model = Decoder(replace(SMALL, qk_norm="none")).eval()
    with torch.autocast("cpu", torch.bfloat16):
        want, _ = model(batch)
        cache = KVCache(SMALL, 2, 6)
        got = torch.cat([model(part, cache)[0] for part in batch.split([3, 1, 2], dim=1)], dim=1)
    assert got.dtype == torch.bfloat16
    close(got.double(), want.double(), rel=2e-2)
    model.to(torch.bfloat16)
    want, _ = model(batch)
    cache = KVCache(SMALL, 2, 6, dtype=torch.bfloat16)
    close(torch.cat([model(p, cache)[0] for p in batch.split(2, dim=1)], dim=1).double(), want.double(), rel=2e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Causality: tokens 0..5 stay, the others change; do the logits of 0..5?


def moved(config: ModelConfig, training: bool = False) -> tuple[float, float]:
    """How far the logits of the first six tokens moved, and of the rest, relative to their size."""
    model = decoder(config).train(training)
    before = tokens(1, 16, config.vocab)
    after = before.clone()
    after[:, 6:] = (after[:, 6:] + 1 + tokens(1, 10, config.vocab - 1)) % config.vocab  # each one another
    old, new = (model(t)[0].detach() for t in (before, after))
    distance = (new - old).norm(dim=-1)[0] / old.norm(dim=-1)[0]
    return float(distance[:6].max()), float(distance[6:].max())


CAUSAL = [name for name, p in PRESETS.items() if p.router.choice == "token" and p.router.drop_order == "token"]


def test_gshard_alone_of_the_presets_is_not_causal() -> None:
    assert set(PRESETS) - set(CAUSAL) == {"gshard"}


@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_do_not_change_earlier_logits(name: str) -> None:
    config = small_model(29, PRESETS[name], experts=16, width=16, expert_width=8, shared_width=8 * PRESETS[name].shared)
    assert config.router is not None
    quiet = replace(config, router=replace(config.router, jitter=0.0))  # its noise is another at each call
    for training in (False, True):
        earlier, later = moved(quiet, training)
        assert earlier < 1e-12
        assert later > 0.01


@pytest.mark.parametrize("training", [False, True])
def test_capacity_in_token_order_is_causal_even_when_it_drops(training: bool) -> None:
    router = RouterConfig(experts=4, top_k=2, capacity_factor=0.5, eval_capacity_factor=0.5)
    config = replace(SMALL, router=router)
    _, routings = decoder(config)(tokens(1, 16))
    for routing in routings:
        assert routing.dropped_TK is not None
        assert routing.dropped_TK.any()
    for seed in range(5):
        torch.manual_seed(seed)
        earlier, later = moved(config, training)
        assert earlier < 1e-12
        assert later > 0.01


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(experts=4, top_k=2, choice="expert"),
        RouterConfig(experts=4, top_k=2, capacity_factor=0.5, eval_capacity_factor=0.5, drop_order="choice"),
    ],
    ids=["expert choice", "first choices first"],
)
def test_what_is_not_causal_does_change_earlier_logits(router: RouterConfig) -> None:
    with pytest.warns(NotCausalWarning):
        Decoder(replace(SMALL, router=router))
    furthest = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        furthest = max(furthest, moved(replace(SMALL, router=router))[0])
    assert furthest > 0.01


def test_sequences_of_a_batch_do_not_meet() -> None:
    model, batch = decoder(SMALL), tokens(3, 6)
    close(model(batch)[0][1:2], model(batch[1:2])[0])


# ---------------------------------------------------------------------------------------------------------------------
# The stack.


@pytest.mark.parametrize(
    ("dense_first", "moe_every", "moe"),
    [(0, 1, [0, 1, 2, 3]), (1, 1, [1, 2, 3]), (0, 2, [1, 3]), (2, 2, [3]), (3, 1, [3])],
)
def test_placement(dense_first: int, moe_every: int, moe: Sequence[int]) -> None:
    config = replace(SMALL, layers=4, ffn=10, dense_first=dense_first, moe_every=moe_every)
    model = decoder(config)
    kinds = [type(block.ffn) for block in model.layers]
    assert kinds == [MoE if i in moe else FeedForward for i in range(4)]
    _, routings = model(tokens(2, 5))
    assert len(routings) == len(model.moe_layers) == len(moe)
    assert model.moe_layers == [model.layers[i].ffn for i in moe]


def test_routings_are_in_the_order_of_their_layers() -> None:
    model = decoder(replace(SMALL, layers=3))
    seen: list[Tensor] = []
    for moe in model.moe_layers:
        moe.router.register_forward_hook(lambda module, inputs, routing: seen.append(routing.logits_TE))
    _, routings = model(tokens(2, 5))
    for routing, logits_TE in zip(routings, seen, strict=True):
        assert routing.logits_TE is logits_TE
        assert routing.tokens == 10


def test_a_block_adds_to_the_stream() -> None:
    """x + attention(norm x), and then + feed-forward(norm of that); a final norm and the output embedding."""
    config = replace(SMALL, layers=1, ffn=10, router=None, expert_width=0)
    model, batch = decoder(config), tokens(2, 5)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_eps) * weight

    block: Any = model.layers[0]
    span = Span.of(config, 5, None, None, torch.device("cpu"))
    x_BSD = model.embed.weight[batch]
    x_BSD = x_BSD + block.attn(norm(x_BSD, block.attn_norm.weight), span)
    x_BSD = x_BSD + block.ffn(norm(x_BSD, block.ffn_norm.weight))
    logits_BSV, routings = model(batch)
    close(logits_BSV, norm(x_BSD, model.norm.weight) @ model.embed.weight.T)
    assert routings == []


def test_tied_and_untied_output() -> None:
    tied, untied = decoder(SMALL), decoder(replace(SMALL, tied=False))
    assert tied.head is None
    assert untied.head is not None
    assert untied.head.weight.shape == tied.embed.weight.shape
    untied.load_state_dict({**tied.state_dict(), "head.weight": tied.embed.weight})
    batch = tokens(2, 5)
    close(untied(batch)[0], tied(batch)[0])
    with torch.no_grad():
        untied.head.weight.mul_(3)
    close(untied(batch)[0], 3 * tied(batch)[0])


def test_state_dict_names() -> None:
    config = ModelConfig(
        vocab=13,
        width=8,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn=10,
        router=RouterConfig(experts=4, top_k=2, logits_bias=True, balance_bias=True, noisy_top_k=True),
        expert_width=6,
        shared_width=5,
        shared_gate=True,
        dense_first=1,
        expert_bias=True,
        qk_norm="head",
        qkv_bias=True,
        o_bias=True,
        tied=False,
    )
    attention = {
        "attn_norm.weight": (8,),
        "attn.q.weight": (8, 8),
        "attn.q.bias": (8,),
        "attn.k.weight": (4, 8),
        "attn.k.bias": (4,),
        "attn.v.weight": (4, 8),
        "attn.v.bias": (4,),
        "attn.o.weight": (8, 8),
        "attn.o.bias": (8,),
        "attn.q_norm.weight": (2,),
        "attn.k_norm.weight": (2,),
        "ffn_norm.weight": (8,),
    }
    dense = {"ffn.gate_up.weight": (20, 8), "ffn.down.weight": (8, 10)}
    moe = {
        "ffn.router.weight": (4, 8),
        "ffn.router.bias": (4,),
        "ffn.router.noise_weight": (4, 8),
        "ffn.router.balance_bias": (4,),
        "ffn.experts.gate_up": (4, 12, 8),
        "ffn.experts.down": (4, 8, 6),
        "ffn.experts.gate_up_bias": (4, 12),
        "ffn.experts.down_bias": (4, 8),
        "ffn.shared.gate_up.weight": (10, 8),
        "ffn.shared.down.weight": (8, 5),
        "ffn.shared_gate.weight": (1, 8),
    }
    want = {"embed.weight": (13, 8), "norm.weight": (8,), "head.weight": (13, 8)}
    for layer, parts in enumerate(({**attention, **dense}, {**attention, **moe})):
        want |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    assert {name: tuple(t.shape) for name, t in Decoder(config).state_dict().items()} == want


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Decoders of every part that can be run."""
    flag, size = st.booleans(), st.integers(1, 9)
    experts, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    common: dict[str, Any] = {
        "vocab": draw(size),
        "width": draw(size),
        "layers": layers,
        "heads": draw(st.sampled_from([2, 4])),
        "kv_heads": draw(st.sampled_from([1, 2])),
        "head_dim": draw(st.sampled_from([2, 6])),
        "ffn": draw(size),
        "activation": draw(st.sampled_from(["swiglu", "geglu", "relu", "gelu", "swiglu_clamped"])),
        "qk_norm": draw(st.sampled_from(["none", "head", "full"])),
        "qkv_bias": draw(flag),
        "o_bias": draw(flag),
        "tied": draw(flag),
    }
    if not draw(flag):
        return ModelConfig(**common)
    router = RouterConfig(
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        balance_bias=draw(flag),
        logits_bias=draw(flag),
        noisy_top_k=draw(flag),
    )
    shared = draw(st.integers(0, 4))
    return ModelConfig(
        **common,
        router=router,
        expert_width=draw(size),
        expert_bias=draw(flag),
        shared_width=shared,
        shared_gate=bool(shared) and draw(flag),
        dense_first=draw(st.integers(0, layers - 1)),
    )


@settings(max_examples=50)
@given(configs())
def test_what_is_held_is_what_cost_counts(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    assert sum(t.numel() for t in state.values()) == cost(config).total


def test_start_is_scaled_by_fan_in_and_depth() -> None:
    router = RouterConfig(experts=8, top_k=2)
    config = replace(SMALL, width=64, head_dim=16, expert_width=96, layers=8, qkv_bias=True, router=router)
    state = Decoder(config).state_dict()
    for name, fan_in, shrink in (
        ("embed.weight", 64, 1),
        ("layers.3.attn.q.weight", 64, 1),
        ("layers.3.attn.o.weight", 64, 4),  # √(2 · 8 layers)
        ("layers.3.ffn.router.weight", 64, 1),
        ("layers.3.ffn.experts.gate_up", 64, 1),
        ("layers.3.ffn.experts.down", 96, 4),
    ):
        value = state[name]
        assert float(value.std()) == pytest.approx(fan_in**-0.5 / shrink, rel=4 / math.sqrt(2 * value.numel())), name
        assert abs(float(value.mean())) < 4 * float(value.std()) / math.sqrt(value.numel())
    assert state["layers.3.attn.q.bias"].count_nonzero() == 0
    assert state["layers.3.attn_norm.weight"].eq(1).all()
    assert not state["layers.3.ffn.experts.down"][0].equal(state["layers.3.ffn.experts.down"][1])


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to run it.


@pytest.mark.parametrize("backend", ["grouped", "reference"])
def test_activation_checkpointing_gives_the_same_gradients(backend: str) -> None:
    """To the bit, router noise and losses of the routings included."""
    noisy = replace(SMALL, ffn=6, dense_first=1, router=RouterConfig(experts=4, top_k=2, jitter=0.2, noisy_top_k=True))
    model, batch = decoder(noisy, backend=backend).train(), tokens(2, 7)
    gradients = []
    for checkpointed in (False, True):
        model.activation_checkpoint = checkpointed
        model.zero_grad()
        torch.manual_seed(5)
        logits_BSV, routings = model(batch)
        (logits_BSV.logsumexp(-1).mean() + torch.stack([z_loss(r) for r in routings]).mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() == dict(model.named_parameters()).keys()
    for name in plain:
        assert plain[name].equal(again[name]), name


def test_checkpointing_is_for_training_alone() -> None:
    model, batch = decoder(SMALL), tokens(1, 4)
    model.activation_checkpoint = True
    cache = KVCache(SMALL, 1, 4, dtype=F64)
    close(model(batch, cache)[0], model(batch)[0])
    close(model.train()(batch)[0], model.eval()(batch)[0])


@pytest.mark.parametrize("name", ["64x2", "deepseek-v3", "switch"])
def test_backends_agree(name: str) -> None:
    config = small_model(29, PRESETS[name], experts=16, width=16, expert_width=8, shared_width=8 * PRESETS[name].shared)
    grouped, reference = decoder(config, backend="grouped"), decoder(config, backend="reference")
    reference.load_state_dict(grouped.state_dict())
    batch = tokens(2, 12, 29)
    close(grouped(batch)[0], reference(batch)[0])


# Where a graph is cut, torch itself looks at activations' .grad, and warns itself of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compile_gives_the_same() -> None:
    """What the tracer captures around the experts, whose layout it cannot know, in logits, routing and gradients."""
    config = replace(SMALL, layers=1, router=RouterConfig(experts=4, top_k=2, score="sigmoid", balance_bias=True))
    model, batch = decoder(config).train(), tokens(2, 6)
    compiled = torch.compile(model, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        with warnings.catch_warnings(action="ignore"):  # the tracer's own
            logits_BSV, routings = run(batch)
        (logits_BSV.square().mean() + z_loss(routings[0])).backward()
        results.append((logits_BSV, routings, {name: p.grad for name, p in model.named_parameters()}))
    (logits, routings, gradients), (logits_c, routings_c, gradients_c) = results
    close(logits_c, logits)
    assert routings_c[0].experts_TK.equal(routings[0].experts_TK)
    for name, gradient in gradients.items():
        assert gradient is not None
        assert gradients_c[name] is not None
        close(gradients_c[name], gradient, rel=1e-11)  # type: ignore[arg-type]
