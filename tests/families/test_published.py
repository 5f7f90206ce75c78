"""config.json as people get them: as published, as tools wrote them, and with what a user added. What repeats the
family's maths or says nothing of maths loads; what says other maths is refused; transformers judges the rest."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from handful.config import ModelConfig
from handful.errors import CheckpointError
from handful.families import config_from_hf, why_not_public
from handful.families.io import load_decoder, save
from handful.families.pricing import count_from_hf
from handful.generate import generate_tokens

transformers: Any = importlib.import_module("transformers")  # its types know less than its configs accept
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

QWEN3_CODER: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_dropout": 0.0, "decoder_sparse_step": 1,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5472, "max_position_embeddings": 262144, "max_window_layers": 28, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "output_router_logits": False, "qkv_bias": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.0, "shared_expert_intermediate_size": 0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MINIMAX_M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"], "attention_dropout": 0.0, "attn_type_list": [1] * 62,
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"}, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 3072, "intermediate_size": 1536, "max_position_embeddings": 196608, "model_type": "minimax_m2",
    "mtp_transformer_layers": 1, "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62,
    "num_key_value_heads": 8, "num_local_experts": 256, "num_mtp_modules": 3, "qk_norm_type": "per_layer",
    "rms_norm_eps": 1e-06, "rope_theta": 5000000, "rotary_dim": 64, "scoring_func": "sigmoid",
    "shared_intermediate_size": 0, "tie_word_embeddings": False, "use_mtp": True, "use_qk_norm": True,
    "use_routing_bias": True, "vocab_size": 200064,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8",
                            "weight_block_size": [128, 128], "modules_to_not_convert": ["gate", "lm_head"]},
}  # fmt: skip


def test_published_files_load_whole() -> None:
    coder = config_from_hf(QWEN3_CODER)
    assert (coder.layers, coder.qk_norm, coder.dense_layers) == (48, "head", ())
    minimax = config_from_hf(MINIMAX_M2)
    assert (minimax.layers, minimax.qk_norm, minimax.rotary_dim) == (62, "full", 64)
    for values in (QWEN3_CODER, MINIMAX_M2):
        assert isinstance(count_from_hf(values), ModelConfig)  # and not as what cannot be run


WRITTEN_OUT = transformers.PretrainedConfig().to_dict()


@pytest.mark.parametrize("values", [QWEN3_CODER, MINIMAX_M2], ids=["qwen3_moe", "minimax_m2"])
@pytest.mark.parametrize(
    "more",
    [
        {"unsloth_fixed": True, "unsloth_version": "2025.7.3"},
        {"_attn_implementation_autoset": True, "_commit_hash": "0123", "_anything_of_its_own": {"a": 1}},
        {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "max_length": 20, "num_beams": 1, "top_k": 50,
         "return_dict": True, "temperature": 1.0, "top_p": 0.9, "do_sample": True, "typical_p": 1.0,
         "length_penalty": 1.0, "chunk_size_feed_forward": 0, "num_return_sequences": 1, "torchscript": False,
         "tokenizer_class": "X", "task_specific_params": {}, "problem_type": None, "gradient_checkpointing": True,
         "max_new_tokens": 512, "finetuning_task": "chat", "prefix": " "},
    ],
    ids=["a maker's mark", "transformers' own notes", "all fields written out"],
)  # fmt: skip
def test_what_says_nothing_of_the_maths_is_no_obstacle(values: dict[str, Any], more: dict[str, Any]) -> None:
    assert config_from_hf({**values, **more}) == config_from_hf(values)


@pytest.mark.parametrize("values", [QWEN3_CODER, MINIMAX_M2], ids=["qwen3_moe", "minimax_m2"])
def test_the_defaults_of_every_config_are_no_obstacle(values: dict[str, Any]) -> None:
    """What transformers itself writes where nothing was said, with true and 1 in some."""
    assert config_from_hf({**WRITTEN_OUT, **values}) == config_from_hf(values)


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        (QWEN3_CODER, {"use_qk_norm": False}, "use_qk_norm = False: only True is supported"),
        (QWEN3_CODER, {"mlp_only_layers": list(range(48))}, "dense_first = 48: few enough to leave an MoE layer"),
        (QWEN3_CODER, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: not known"),
        (QWEN3_CODER, {"is_encoder_decoder": True}, "is_encoder_decoder = True: not known"),
        (QWEN3_CODER, {"add_cross_attention": True}, "add_cross_attention = True: not known"),
        (QWEN3_CODER, {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size = 512: not known"),
        (QWEN3_CODER, {"qkv_bias": True}, "qkv_bias = True: not known"),
        (MINIMAX_M2, {"attn_type_list": [0] + [1] * 61}, "only 1 is supported, in every layer"),
        (MINIMAX_M2, {"attn_type_list": 1}, "attn_type_list = 1: only 1 is supported, in every layer"),
        (MINIMAX_M2, {"use_routing_bias": False}, "use_routing_bias = False: only True"),
        (MINIMAX_M2, {"num_mtp_layers_shared": 2}, "num_mtp_layers_shared = 2: not known"),
    ],
)
def test_other_maths_is_refused(values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_from_hf({**values, **change})


# ---------------------------------------------------------------------------------------------------------------------
# The same weights under other files, beside transformers.

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **dict.fromkeys(("bos_token_id", "eos_token_id")),
    "pad_token_id": 0,
}  # fmt: skip
MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                  "shared_expert_intermediate_size": 12},
    "llama": {},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
}  # fmt: skip
Edit = Callable[[dict[str, Any]], Any]
Tensors = dict[str, Tensor]


def write(folder: Path, kind: str, edit: Edit = lambda values: None, tensors: Any = None, **sizes: Any) -> Path:
    """A random checkpoint that transformers wrote, its config.json in transformers 4's form and then edited."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **MOE[kind], **sizes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    edit(values)
    file.write_text(json.dumps(values))
    if tensors is not None:
        state = tensors(load_file(folder / "model.safetensors"))
        save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def beside_transformers(folder: Path, tokens: int = 50) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens_BS = torch.arange(1, tokens).view(1, -1) % 61
    ours = load_decoder(folder)
    with torch.no_grad():
        right, found = theirs(tokens_BS).logits, ours(tokens_BS)[0]
    assert float((found - right).norm() / right.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize(
    ("layers", "step", "dense"),
    [(3, 1, [1]), (3, 1, [2]), (4, 1, [0, 2]), (4, 2, []), (4, 2, [1]), (6, 2, [0, 3]), (4, 3, [3]), (3, 1, [7])],
)
def test_dense_layers_anywhere(kind: str, layers: int, step: int, dense: list[int], tmp_path: Path) -> None:
    old = write(tmp_path / "old", kind, num_hidden_layers=layers, decoder_sparse_step=step, mlp_only_layers=dense)
    beside_transformers(old)
    model = load_decoder(old)
    moe = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
    assert [i for i in range(layers) if model.config.is_moe(i)] == moe
    model.origin = None  # so that its config.json is written from our config alone
    save(model, tmp_path / "new")
    beside_transformers(tmp_path / "new")
    assert load_decoder(tmp_path / "new").config == model.config


def test_our_dense_layers_are_checked() -> None:
    config = config_from_hf({**QWEN3_CODER, "mlp_only_layers": [5, 7]})
    assert config.dense_layers == (5, 7)
    assert config.dense_first == 0
    again = config_from_hf({**QWEN3_CODER, "mlp_only_layers": [7, 5, 5]})
    assert again == config


def other_head(state: Tensors) -> Tensors:
    return {**state, "lm_head.weight": torch.randn_like(state["model.embed_tokens.weight"])}


def same_head(state: Tensors) -> Tensors:
    return {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama"])
def test_a_head_that_is_said_to_be_tied(kind: str, tmp_path: Path) -> None:
    """As transformers has it: tied if it is not there or the same, and its own where it differs."""
    for name, tensors, tied in (("same", same_head, True), ("other", other_head, False), ("none", None, True)):
        folder = write(tmp_path / name, kind, tensors=tensors, tie_word_embeddings=True)
        beside_transformers(folder)
        model = load_decoder(folder)
        assert model.config.tied is tied
        save(model, tmp_path / f"{name} again")
        beside_transformers(tmp_path / f"{name} again")
        again = load_decoder(tmp_path / f"{name} again")
        assert again.config == model.config
        assert torch.equal(again.logits(torch.ones(1, 24)), model.logits(torch.ones(1, 24)))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (YARN, 256),
        ({"type": "yarn", "factor": 4.0}, 256),  # without the length: max_position_embeddings is meant
        ({**YARN, "original_max_position_embeddings": 32}, 128),
        ({**YARN, "original_max_position_embeddings": 16}, 64),  # the length says it already
        ({"rope_type": "linear", "factor": 4.0}, 64),
        (None, 64),
    ],
)
def test_yarn_reaches_as_far_as_its_factor_says(scaling: Any, context: int, tmp_path: Path) -> None:
    old = write(tmp_path / "old", "qwen3_moe", lambda values: values.update(rope_scaling=scaling))
    model = load_decoder(old)
    assert model.config.context == context
    beside_transformers(old, tokens=context)
    assert len(list(generate_tokens(model, [1] * (context - 3), 9))) == 3
    model.origin = None
    save(model, tmp_path / "new")
    assert json.loads((tmp_path / "new/config.json").read_text())["model_type"] == "qwen3_moe"
    assert load_decoder(tmp_path / "new").config == model.config


def test_a_shorter_context_of_our_own_is_still_public() -> None:
    """How far a model is used is no part of its maths."""
    config = config_from_hf({**QWEN3_CODER, "rope_scaling": {**YARN, "original_max_position_embeddings": 262144}})
    assert config.context == 4 * 262144
    assert why_not_public(dataclasses.replace(config, context=1000)) is None
