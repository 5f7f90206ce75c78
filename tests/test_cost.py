"""Costs equal published counts to the digit, hand-worked cases, what torch counts, and brute force."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from handful.config import EncoderDecoderConfig, MLAConfig, ModelConfig, RouterConfig
from handful.cost import Cost, Parts, cost, matrix_flops, ranks_per_token
from handful.count import count
from handful.encoder_decoder import EncoderDecoder
from handful.errors import CheckpointError, ConfigError
from handful.experts.quantize_model import quantize_model
from handful.families.pricing import count_from_hf
from handful.model import Decoder
from handful.presets import PRESETS

MODELS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "models.json").read_text())
INCOMPLETE = "google/switch-large-128"  # a record of its experts alone
CONFIGS = {entry["name"]: count_from_hf(entry["config"]) for entry in MODELS if entry["name"] != INCOMPLETE}

# Every part is there, and no two of its sizes are equal.
SMALL = ModelConfig(
    vocab=11,
    width=8,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=4,
    ffn=13,
    router=RouterConfig(experts=5, top_k=2, balance_bias=True, logits_bias=True),
    expert_width=3,
    shared_width=7,
    shared_gate=True,
    dense_first=1,
    expert_bias=True,
    qk_norm="head",
    qkv_bias=True,
    o_bias=True,
    sinks=True,
    tied=False,
    context=9,
)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters.


EXACT = [entry for entry in MODELS if "exact" in entry]


@pytest.mark.parametrize("entry", EXACT, ids=[entry["name"] for entry in EXACT])
def test_published_counts_to_the_digit(entry: dict[str, Any]) -> None:
    price = cost(CONFIGS[entry["name"]])
    found = {
        "total": price.total,
        "active_incl_all_embeddings": price.active,
        "active_excl_input_embedding": price.active_parameters.excl_input_embedding,
        "total_excl_embeddings": price.total_parameters.excl_embeddings,
        "active_excl_embeddings": price.active_parameters.excl_embeddings,
    }
    # Some records count the MoE layers alone; those of DeepSeek-V4 without the balance biases, which 3 layers lack.
    total, active = moe_parts(price.total_parameters.parts), moe_parts(price.active_parameters.parts)
    found |= {"routed_and_shared_experts_plus_router": total, "active_experts_plus_router": active}
    biases = (entry["config"].get("num_hidden_layers", 0) - 3) * entry["config"].get("n_routed_experts", 0)
    found |= {"moe_ffn_only": total - biases, "active_moe_ffn_only": active - biases}
    assert {name: found[name] for name in entry["exact"]} == entry["exact"]


def moe_parts(parts: Parts) -> int:
    return parts.routers + parts.routed_experts + parts.shared_experts


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 31.6, 3.2),
        ("deepseek-ai/DeepSeek-V4-Flash", 284, 13),
        ("ai21labs/Jamba-v0.1", 52, 12),
        ("microsoft/Phi-3.5-MoE-instruct", 42, 6.6),
    ],
)
def test_published_round_numbers(name: str, total: float, active: float) -> None:
    """Active counts are published without the input embedding, and rounded in any direction."""
    price = cost(CONFIGS[name])
    assert price.total / 1e9 == pytest.approx(total, rel=0.01)
    assert price.active_parameters.excl_input_embedding / 1e9 == pytest.approx(active, rel=0.025)


def test_switch_large_with_the_shape_of_t5_large() -> None:
    """Its record has the experts alone, and is refused by the first field that is missing; the model has 26 billion."""
    values = next(entry["config"] for entry in MODELS if entry["name"] == INCOMPLETE)
    with pytest.raises(CheckpointError, match=r"^config\.json: vocab_size is missing$"):
        count_from_hf(values)
    base = next(entry["config"] for entry in MODELS if entry["name"] == "google/switch-base-8")
    large = {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "num_layers": 24, "num_decoder_layers": 24}
    sparse = {"num_sparse_encoder_layers": 12, "num_sparse_decoder_layers": 12}
    assert round(cost(count_from_hf({**base, **values, **large, **sparse})).total / 1e9) == 26


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("mixtral", "mistralai/Mixtral-8x7B-v0.1"),
        ("olmoe", "allenai/OLMoE-1B-7B-0924"),
        ("qwen3", "Qwen/Qwen3-30B-A3B"),
        ("deepseek-moe", "deepseek-ai/deepseek-moe-16b-base"),
        ("deepseek-v3", "deepseek-ai/DeepSeek-V3"),
        ("gpt-oss", "openai/gpt-oss-20b"),
    ],
)
def test_presets_are_the_published_models(preset: str, name: str) -> None:
    assert PRESETS[preset].model == CONFIGS[name]


def test_parts_by_hand() -> None:
    parts = cost(SMALL).total_parameters.parts
    attention = 8 * 24 + 2 * (8 * 8) + 24 * 8 + (24 + 8 + 8) + 8 + 6  # q, k and v, o, their biases, o's bias, sinks
    expert = 3 * 8 * 3 + (2 * 3 + 8)  # gate, up, down, and their biases
    assert dataclasses.asdict(parts) == {
        "embeddings": 11 * 8,
        "attention": 3 * attention,
        "state_space": 0,
        "streams": 0,
        "routers": 2 * (5 * 8 + 5 + 5),  # map, its bias, the balance bias
        "routed_experts": 2 * 5 * expert,
        "shared_experts": 2 * (3 * 8 * 7 + 8),  # with its gate
        "dense_ffn": 3 * 8 * 13,
        "norms": 3 * (2 * 8 + 2 * 4) + 8,
        "head": 11 * 8,
    }
    active = cost(SMALL).active_parameters.parts
    assert active == dataclasses.replace(parts, routed_experts=2 * 2 * expert)


def test_a_tied_table_is_input_and_output() -> None:
    untied, tied = cost(SMALL), cost(dataclasses.replace(SMALL, tied=True))
    table = 11 * 8
    assert tied.total == untied.total - table
    assert tied.total_parameters.excl_input_embedding == tied.total == untied.total_parameters.excl_input_embedding
    assert tied.total_parameters.excl_embeddings == untied.total_parameters.excl_embeddings == untied.total - 2 * table


def test_noise_of_noisy_top_k_is_a_second_matrix_for_training_alone() -> None:
    assert SMALL.router is not None
    noisy = dataclasses.replace(SMALL, router=dataclasses.replace(SMALL.router, noisy_top_k=True))
    assert cost(noisy).total - cost(SMALL).total == 2 * 5 * 8
    assert cost(noisy).flops.training - cost(SMALL).flops.training == 3 * 2 * (2 * 5 * 8)
    assert cost(noisy).flops.prefill == cost(SMALL).flops.prefill
    assert cost(noisy).flops.decode == cost(SMALL).flops.decode


@st.composite
def runnable_configs(draw: st.DrawFn) -> ModelConfig:
    """Small configs that the decoder runs."""
    routed = draw(st.booleans())
    experts = draw(st.integers(1, 5))
    layers = draw(st.integers(1, 3))
    flag = st.booleans()
    latent = draw(flag)
    attention: dict[str, Any] = {
        "head_dim": draw(st.sampled_from([2, 6])),
        "qk_norm": draw(st.sampled_from(["none", "head", "full"])),
        "qkv_bias": draw(flag),
        "o_bias": draw(flag),
        "sinks": draw(flag),
    }
    if latent:
        sizes = st.integers(1, 5)
        q_rank = draw(st.none() | sizes)
        mla = MLAConfig(q_rank=q_rank, kv_rank=draw(sizes), nope_dim=draw(sizes), rope_dim=2, v_dim=draw(sizes))
        attention = {"mla": mla}
    return ModelConfig(
        vocab=draw(st.integers(1, 9)),
        width=draw(st.integers(1, 7)),
        layers=layers,
        heads=draw(st.sampled_from([2, 4])),
        kv_heads=draw(st.sampled_from([1, 2])),
        ffn=draw(st.integers(1, 9)),
        router=RouterConfig(
            experts=experts,
            top_k=draw(st.integers(1, experts)),
            balance_bias=draw(flag),
            logits_bias=draw(flag),
            noisy_top_k=draw(flag),
        )
        if routed
        else None,
        expert_width=draw(st.integers(1, 5)) if routed else 0,
        shared_width=(shared := draw(st.integers(0, 5)) if routed else 0),
        shared_gate=shared > 0 and draw(flag),
        dense_first=draw(st.integers(0, layers - 1)),
        activation=draw(st.sampled_from(["swiglu", "geglu", "relu", "gelu", "swiglu_clamped"])),
        expert_bias=draw(flag),
        tied=draw(flag),
        **attention,
    )


@settings(max_examples=60, deadline=None)
@given(runnable_configs())
def test_total_is_what_the_decoder_holds(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = Decoder(config).state_dict()
    assert cost(config).total == sum(tensor.numel() for tensor in state.values())


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs.


@settings(max_examples=25, deadline=None)
@given(runnable_configs(), st.integers(1, 6))
def test_prefill_is_what_torch_counts(config: ModelConfig, tokens: int) -> None:
    model = Decoder(config, backend="reference").eval()
    # With gradients on, all of it goes through torch, which counts.
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long))
    # Attention is one operation or, for latents and sinks, batched products.
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in counts.items() if "attention" not in str(op) and "bmm" not in str(op))
    assert matrix_flops(count(config), "prefill") * tokens == matrices
    # The first token attends to itself, the second to two, ...: a score and a weighted value, 2 FLOPs for each number.
    per_head = 4 * config.d_head
    if config.mla is not None:
        per_head = 2 * (config.mla.nope_dim + config.mla.rope_dim + config.mla.v_dim)
    attended = config.layers * config.heads * per_head * sum(range(1, tokens + 1))
    assert cost(config, context=tokens).flops.prefill * tokens == matrices + attended


def test_attention_by_hand() -> None:
    # A head of width 4 attends to n tokens: n scores and n weighted values, 4 multiply-adds each.
    bare = cost(SMALL, context=1).flops
    one_more_token = 2 * 2 * 4 * 6 * 3  # FLOPs x (score, value) x head width x heads x layers
    at_nine = cost(SMALL, context=9).flops
    assert at_nine.decode - bare.decode == 8 * one_more_token
    assert at_nine.prefill - bare.prefill == 4 * one_more_token  # the mean position of nine is the fifth
    assert at_nine.training == 3 * at_nine.prefill


@pytest.mark.parametrize(
    ("window", "full", "context"), [(3, (), 8), (3, (1,), 8), (8, (0,), 8), (99, (), 8), (1, (), 5)]
)
def test_windows_by_brute_force(window: int, full: tuple[int, ...], context: int) -> None:
    config = dataclasses.replace(SMALL, window=window, full_layers=full)
    price, matrices = cost(config, context=context), matrix_flops(count(config), "prefill")
    one = 2 * 2 * 4 * 6  # FLOPs x (score, value) x head width x heads
    seen = [[t if layer in full else min(t, window) for t in range(1, context + 1)] for layer in range(3)]
    assert price.flops.prefill == matrices + sum(one * sum(layer) // context for layer in seen)
    assert price.flops.decode == matrices + sum(one * layer[-1] for layer in seen)
    assert price.bytes.cache == sum(2 * 2 * 4 * 2 * layer[-1] for layer in seen)  # bytes x (key, value) x width x heads
    assert price.bytes.cache_per_token == 3 * 2 * 2 * 4 * 2


SWITCH = EncoderDecoderConfig(
    vocab=11, width=6, encoder_layers=2, decoder_layers=3, heads=2, head_dim=4, ffn=7, buckets=8, max_distance=9,
    router=RouterConfig(experts=5, top_k=2, logits_bias=True),
)  # fmt: skip


def test_an_encoder_decoder_by_hand() -> None:
    """One MoE layer in each stack (the second); a token is one of the source and one of the target."""
    price = cost(SWITCH, context=10)
    projection, expert, router = 6 * 8, 2 * 6 * 7, 5 * 6
    total, active = price.total_parameters.parts, price.active_parameters.parts
    assert total.attention == (2 * 4 + 3 * 8) * projection + 2 * 8 * 2  # with the tables of relative positions
    assert (total.dense_ffn, total.routed_experts, active.routed_experts) == (3 * expert, 10 * expert, 4 * expert)
    assert (total.routers, total.norms, total.embeddings) == (2 * (router + 5), (2 * 2 + 3 * 3 + 2) * 6, 11 * 6)
    # The source passes the encoder and is made keys and values of; it attends to all of itself.
    source = 2 * (2 * 4 * projection + expert + 2 * expert + router + 3 * 2 * projection)
    target = 2 * (3 * 6 * projection + 2 * expert + 2 * expert + router + 11 * 6)
    one = 2 * 2 * 4 * 2  # FLOPs x (score, value) x head width x heads
    assert price.flops.prefill == source + one * 2 * 10
    assert price.flops.decode == target + one * 3 * (10 + 10)  # itself, and the source
    assert price.flops.training == 3 * (source + target + one * (2 * 10 + 3 * 5.5 + 3 * 10))
    assert price.bytes.cache == 10 * 3 * (2 + 2) * 8 * 2  # a key and a value of both, 8 numbers, 2 bytes


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_an_encoder_decoder_holds_its_total(data: st.DataObject) -> None:
    sizes = st.integers(1, 5)
    experts = data.draw(sizes)
    config = dataclasses.replace(
        SWITCH,
        encoder_layers=data.draw(sizes),
        decoder_layers=data.draw(sizes),
        encoder_moe_every=1,
        decoder_moe_every=data.draw(st.integers(0, 3)),
        router=RouterConfig(experts=experts, top_k=1, logits_bias=data.draw(st.booleans())),
        activation=data.draw(st.sampled_from(["relu", "gelu", "swiglu", "geglu"])),
        tied=data.draw(st.booleans()),
    )  # fmt: skip
    with torch.device("meta"):
        state = EncoderDecoder(config).state_dict()
    assert cost(config).total == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize(("name", "billions"), [("v3", 250), ("v2", 155)])
def test_training_flops_are_those_that_deepseek_published(name: str, billions: int) -> None:
    """arXiv:2505.09343, table 2: FLOPs per token at 4096 tokens, in billions."""
    v3 = PRESETS["deepseek-v3"].model
    assert v3 is not None
    v2 = dataclasses.replace(
        v3,
        vocab=102400,
        width=5120,
        layers=60,
        ffn=12288,
        expert_width=1536,
        shared_width=3072,
        dense_first=1,
        router=RouterConfig(experts=160, top_k=6, normalize=False, scale=16.0, groups=8, top_groups=3),
    )
    assert round(cost({"v3": v3, "v2": v2}[name], context=4096).train_flops / 1e9) == billions


def test_mla_by_hand() -> None:
    mla = MLAConfig(q_rank=3, kv_rank=5, nope_dim=4, rope_dim=2, v_dim=7)
    config = ModelConfig(vocab=11, width=8, layers=2, heads=6, head_dim=4, ffn=13, mla=mla)
    query, expand, out = 8 * 3 + 3 * 6 * (4 + 2), 5 * 6 * (4 + 7), 6 * 7 * 8
    price = cost(config, context=9)
    assert price.total_parameters.parts.attention == 2 * (query + 8 * (5 + 2) + expand + out)
    assert price.total_parameters.parts.norms == 2 * (2 * 8 + 3 + 5) + 8
    assert price.bytes.cache_per_token == 2 * 2 * (5 + 2)
    matrices = 2 * (2 * (query + 8 * 7 + expand + out) + 2 * 3 * 8 * 13 + 11 * 8)
    assert price.flops.prefill == matrices + 2 * 6 * 2 * (4 + 2 + 7) * 5
    assert price.flops.decode == matrices + 2 * 6 * 2 * (5 + 2 + 5) * 9  # scores and values in the latent space
    plain_query = cost(dataclasses.replace(config, mla=dataclasses.replace(mla, q_rank=None)))
    assert plain_query.total_parameters.parts.attention - price.total_parameters.parts.attention == 2 * (
        8 * 6 * 6 - query
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bytes.


@pytest.mark.parametrize(
    ("config", "cached"),
    [
        (PRESETS["deepseek-v3"].model, 70272),
        (ModelConfig(vocab=152064, width=8192, layers=80, heads=64, kv_heads=8, ffn=29568), 327680),  # Qwen2.5-72B
        (ModelConfig(vocab=128256, width=16384, layers=126, heads=128, kv_heads=8, ffn=53248), 516096),  # Llama-3.1
    ],
)
def test_cache_is_the_published_one(config: ModelConfig, cached: int) -> None:
    """arXiv:2505.09343, table 1: bytes per token in bfloat16."""
    held = cost(config, context=1000).bytes
    assert (held.cache_per_token, held.cache) == (cached, 1000 * cached)


def test_weights_and_training_by_hand() -> None:
    total, balance_bias = cost(SMALL).total, 2 * 5
    for dtype, size in {"float32": 4, "bfloat16": 2, "float16": 2}.items():
        assert cost(SMALL, dtype=dtype).bytes.weights == size * total
    held = cost(SMALL).bytes
    assert held.training_weights == 4 * total
    assert held.training_gradients == 4 * (total - balance_bias)
    assert held.training_moments == 8 * (total - balance_bias)
    assert held.training == 16 * total - 12 * balance_bias


@settings(max_examples=15, deadline=None)
@given(runnable_configs(), st.sampled_from([8, 4]))
def test_packed_weights_are_what_quantize_model_holds(config: ModelConfig, bits: int) -> None:
    model = Decoder(config, backend="reference").bfloat16()
    report = quantize_model(model, bits=bits)
    extra = 2 * sum(row.bytes_after // 4 for row in report.tensors if row.name.endswith("router.balance_bias"))
    assert cost(config, dtype=f"int{bits}").bytes.weights == report.bytes_after - extra  # which stays in float32
    assert cost(config, dtype=f"int{bits}").bytes.cache == cost(config).bytes.cache


def test_mxfp4_packs_the_experts_of_gpt_oss() -> None:
    model = PRESETS["gpt-oss"].model
    assert model is not None
    parts = cost(model).total_parameters.parts
    biases = 24 * 32 * (2 * 2880 + 2880)
    saved = (parts.routed_experts - biases) * (16 - 4.25) / 8  # 4 bits, and a scale of 8 for 32 numbers
    assert cost(model, dtype="mxfp4").bytes.weights == 2 * cost(model).total - saved


# ---------------------------------------------------------------------------------------------------------------------
# Traffic.


def test_traffic_by_hand() -> None:
    # Five experts on two ranks: three and two. Both of a token's two experts miss the first with C(2, 2) of the
    # C(5, 2) = 10 pairs, the second with C(3, 2).
    reached = (1 - 1 / 10) + (1 - 3 / 10)
    traffic = cost(SMALL, ranks=2).communication
    assert traffic.moe_layers == 2
    assert traffic.remote_share == 0.5
    assert traffic.ranks_per_token == pytest.approx(reached)
    # There and back, two assignments, half of them remote, eight numbers of two bytes.
    assert dataclasses.astuple(traffic.per_assignment) == pytest.approx((2 * 2 * 0.5 * 8 * 2, 64, 128))
    assert dataclasses.astuple(traffic.per_rank) == pytest.approx(tuple(n * reached / 2 for n in (32, 64, 128)))


def test_the_exchange_by_hand() -> None:
    """2 of 4 experts, on 4 ranks and 2 hosts: a row of 8 numbers in 2 bytes and 2 experts' numbers to each of 2 ranks,
    3 of 4 of which are another; two answers of 8 numbers in float32. A host is missed by 1 of 6 pairs, and is told a
    row's home as well."""
    router = RouterConfig(experts=4, top_k=2)
    found = cost(dataclasses.replace(SMALL, router=router), ranks=4, hosts=2).communication
    forward, backward = 2 * 0.75 * (16 + 8) + 2 * 0.75 * 32, 2 * 0.75 * 16 + 2 * 0.75 * 32
    assert dataclasses.astuple(found.exchange) == pytest.approx((forward, 2 * forward, 2 * (forward + backward)))
    rows = 2 * (1 - 1 / 6) / 2
    forward, backward = rows * (16 + 8 + 4) + 32, rows * 16 + 32
    assert dataclasses.astuple(found.between_hosts) == pytest.approx((forward, 2 * forward, 2 * (forward + backward)))
    with pytest.raises(ConfigError, match=r"^hosts = 3: a number that divides the 4 ranks$"):
        cost(SMALL, ranks=4, hosts=3)


def test_one_rank_and_a_dense_model_send_nothing() -> None:
    dense = ModelConfig(vocab=11, width=8, layers=2, heads=2, ffn=13)
    for price in (cost(SMALL, ranks=1), cost(dense)):
        assert price.communication.per_assignment.training == price.communication.per_rank.training == 0


def test_more_ranks_than_experts_are_refused() -> None:
    dense = ModelConfig(vocab=11, width=8, layers=2, heads=2, ffn=13)
    model = PRESETS["mixtral"].model
    assert model is not None
    assert cost(model, ranks=8).ranks == 8
    with pytest.raises(ConfigError, match=r"^ranks = 9: at most 8, the experts of a layer"):
        cost(model, ranks=9)
    with pytest.raises(ConfigError, match=r"^ranks = 2: 1 for a model without experts$"):
        cost(dense, ranks=2)


def test_deepseek_v3_reaches_at_most_the_four_nodes_it_allows() -> None:
    model = PRESETS["deepseek-v3"].model
    assert model is not None
    assert model.router is not None
    free = dataclasses.replace(model.router, groups=1, top_groups=1, group_score="max")
    assert ranks_per_token(model.router, 8) < 4 < ranks_per_token(free, 8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.data())
def test_ranks_per_token_by_brute_force(groups: int, size: int, ranks: int, data: st.DataObject) -> None:
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    experts = groups * size
    router = RouterConfig(experts=experts, top_k=top_k, groups=groups, top_groups=top_groups)
    reached = [
        len({expert * ranks // experts for expert in chosen})
        for among in itertools.combinations(range(groups), top_groups)
        for chosen in itertools.combinations([g * size + i for g in among for i in range(size)], top_k)
    ]
    assert ranks_per_token(router, ranks) == pytest.approx(sum(reached) / len(reached))


# ---------------------------------------------------------------------------------------------------------------------


def test_defaults_and_plain_values() -> None:
    price = cost(SMALL)
    assert (price.context, price.ranks, price.dtype) == (9, 1, "bfloat16")
    assert (price.train_flops, price.weight_bytes) == (price.flops.training, price.bytes.weights)
    plain = json.loads(json.dumps(price.to_dict()))
    assert plain["total_parameters"]["incl_all_embeddings"] == price.total
    assert plain["communication"]["per_rank"]["forward"] == 0
    assert set(plain) == {field.name for field in dataclasses.fields(Cost)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"context": 0}, "context = 0: at least 1"),
        ({"ranks": 0}, "ranks = 0: at least 1"),
        ({"dtype": "int3"}, "dtype = 'int3': one of float32, bfloat16, float16, int8, int4, mxfp4"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cost(SMALL, **wrong)


def test_a_trillion_parameters_are_priced_without_torch() -> None:
    code = (
        "import sys; from handful.config import ModelConfig, RouterConfig; from handful.cost import cost;"
        "print(cost(ModelConfig(vocab=163840, width=7168, layers=61, heads=64, expert_width=2048,"
        " router=RouterConfig(experts=384, top_k=8))).total); assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert math.log10(int(out)) > 12
