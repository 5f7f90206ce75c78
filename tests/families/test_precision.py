"""How published checkpoints store their weights: sizes by hand, and those of published files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handful.cli.shared import precision_of
from handful.config import ModelConfig, RouterConfig
from handful.cost import PACKED, Precision, cost
from handful.count import count
from handful.errors import ConfigError
from handful.families.precision import METHODS, precision_from_hf
from handful.presets import PRESETS

# One MoE layer and one dense layer; sizes that blocks do not divide.
MODEL = ModelConfig(
    vocab=1000, width=320, layers=2, heads=4, kv_heads=2, head_dim=80, ffn=200, dense_first=1, expert_width=100,
    shared_width=64, router=RouterConfig(experts=8, top_k=2), tied=False, context=64,
)  # fmt: skip
ATTENTION = [(320, 320), (160, 320), (160, 320), (320, 320)] * 2
DENSE = [(400, 320), (320, 200)]
SHARED = [(128, 320), (320, 64)]
ROUTED = [(200, 320), (320, 100)] * 8
ALL = cost(MODEL).total


def up(value: int, size: int) -> int:
    return -(-value // size)


def expected(packed: list[tuple[int, int]], bytes_of: Callable[[int, int], int]) -> int:
    """All numbers in two bytes but for these matrices."""
    return 2 * (ALL - sum(o * i for o, i in packed)) + sum(bytes_of(o, i) for o, i in packed)


def config_with(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen3_moe", "torch_dtype": "bfloat16", "quantization_config": changes}


LINEAR = ATTENTION + DENSE + SHARED + ROUTED
CASES: list[tuple[dict[str, Any], str, int]] = [
    (
        config_with(quant_method="fp8", weight_block_size=[128, 128], modules_to_not_convert=["layers.0.mlp.gate"],
                    fmt="e4m3"),
        "fp8", expected(LINEAR, lambda o, i: o * i + 4 * up(o, 128) * up(i, 128)),
    ),
    (config_with(quant_method="fp8"), "fp8", expected(LINEAR, lambda o, i: o * i + 4)),
    (config_with(quant_method="fbgemm_fp8"), "fp8", expected(LINEAR, lambda o, i: o * i + 4 * o)),
    (
        config_with(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"]),
        "mxfp4", expected(ROUTED, lambda o, i: up(4 * o * i + 8 * o * up(i, 32), 8)),
    ),
    (
        config_with(quant_method="awq", bits=4, group_size=64, zero_point=True),
        "awq int4/64", expected(LINEAR, lambda o, i: up(4 * o * i + 20 * o * up(i, 64), 8)),
    ),
    (
        config_with(quant_method="gptq", bits=8, group_size=-1, desc_act=False),
        "gptq int8", expected(LINEAR, lambda o, i: o * i + 3 * o + 4 * i),
    ),
    (
        config_with(
            quant_method="compressed-tensors", format="pack-quantized", ignore=["lm_head", "re:.*mlp.gate$"],
            config_groups={"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}}},
        ),
        "int4/32", expected(LINEAR, lambda o, i: up(4 * o * i + 16 * o * up(i, 32), 8)),
    ),
    (
        config_with(
            quant_method="compressed-tensors", ignore=["re:.*self_attn.*", "model.layers.0.mlp.down_proj"],
            config_groups={"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}},
        ),
        "fp8", expected(SHARED + ROUTED, lambda o, i: o * i + 2 * o),
    ),
    (
        config_with(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4",
                    llm_int8_skip_modules=["lm_head"]),
        "bitsandbytes nf4", expected(LINEAR, lambda o, i: up(4 * o * i + 32 * o * up(i, 64), 8)),
    ),
    (
        config_with(quant_method="bitsandbytes", load_in_8bit=True),
        "bitsandbytes int8", expected(LINEAR, lambda o, i: o * i + 4 * o),
    ),
    (
        config_with(quant_method="modelopt", quant_algo="NVFP4"),
        "nvfp4", expected(LINEAR, lambda o, i: up(4 * o * i + 8 * o * up(i, 16), 8)),
    ),
    (
        config_with(quant_method="fp8", modules_to_not_convert=["experts", "shared_expert"]),
        "fp8", expected(ATTENTION + DENSE, lambda o, i: o * i + 4),
    ),
    ({"torch_dtype": "float32"}, "float32", 4 * ALL),
    ({"dtype": "float16"}, "float16", 2 * ALL),
    ({"text_config": {"dtype": "bfloat16"}, "quantization_config": {"quant_method": "fp8"}}, "fp8",
     expected(LINEAR, lambda o, i: o * i + 4)),
]  # fmt: skip


@pytest.mark.parametrize(("values", "name", "size"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_sizes_by_hand(values: dict[str, Any], name: str, size: int) -> None:
    found = precision_from_hf(values)
    assert found is not None
    assert found.known
    assert found.name == name
    assert found.nbytes(count(MODEL)) == size
    assert cost(MODEL, published=found).bytes.published == size


def test_layers_that_are_left_as_they_are() -> None:
    """DeepSeek-style lists name single layers."""
    two = config_with(quant_method="fp8", modules_to_not_convert=[f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)])
    one = config_with(quant_method="fp8", modules_to_not_convert=["model.layers.1.self_attn.o_proj"])
    none, half = precision_from_hf(two), precision_from_hf(one)
    assert none is not None
    assert half is not None
    without = DENSE + SHARED + ROUTED
    assert none.nbytes(count(MODEL)) == expected(without, lambda o, i: o * i + 4)
    assert half.nbytes(count(MODEL)) == expected(without + ATTENTION[:4], lambda o, i: o * i + 4)


def test_published_files_are_as_large_as_that() -> None:
    """The sum of a checkpoint's files, as its model.safetensors.index.json gives it, to a hundredth."""
    gpt_oss = PRESETS["gpt-oss"].model
    assert gpt_oss is not None
    assert PACKED["mxfp4"].nbytes(count(gpt_oss)) == pytest.approx(13_761_264_768, rel=0.01)
    deepseek = PRESETS["deepseek-v3"].model
    assert deepseek is not None
    # Its files hold 688.6 GB, of which the layer that predicts later tokens, which is not counted, is about 14.
    assert PACKED["fp8"].nbytes(count(deepseek)) == pytest.approx(688.6e9 - 14e9, rel=0.01)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"bits": 4}, "quantization_config"),
        ("int4", "quantization_config"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "modelopt"),
    ],
)
def test_what_is_not_known_is_said(found: Any, name: str) -> None:
    read = precision_from_hf({"quantization_config": found})
    assert read is not None
    assert (read.known, read.name) == (False, name)
    assert cost(MODEL, published=read).bytes.published is None


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-4, 300) | st.text(max_size=6),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=6), some, max_size=3),
    max_leaves=6,
)
KEYS = ["bits", "group_size", "weight_block_size", "config_groups", "ignore", "modules_to_not_convert", "quant_algo"]


@given(st.sampled_from([*METHODS, "", "other"]), st.dictionaries(st.sampled_from(KEYS), plain))
def test_malformed_ones_are_no_traceback(method: str, rest: dict[str, Any]) -> None:
    found = precision_from_hf({"quantization_config": {"quant_method": method, **rest}})
    assert found is not None
    assert not found.known or found.nbytes(count(MODEL)) > 0


def test_presets_know_how_they_are_published() -> None:
    found, notes = precision_of("deepseek-v3")
    assert (found, notes) == (PACKED["fp8"], ("published in fp8",))
    assert precision_of("mixtral") == (Precision(name="bfloat16"), ())
    assert precision_of("switch") == (None, ())


def test_more_ranks_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="ranks = 9: at most 8, the experts of a layer"):
        cost(MODEL, ranks=9)
    assert cost(MODEL, ranks=8).communication.remote_share == 7 / 8
