"""Public checkpoints become ours and back, byte for byte, with transformers' logits; what we cannot run is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from handful.checkpoint import read_json, read_tensors
from handful.config import ModelConfig, RouterConfig
from handful.cost import cost
from handful.errors import CheckpointError, ConfigError
from handful.families import (
    config_from_hf,
    config_to_hf,
    save,
    tensors_from_hf,
    tensors_to_hf,
    why_not_public,
)
from handful.families.convert import RUN, TRAINING_ONLY
from handful.families.family import has_dense
from handful.families.io import find_config
from handful.families.io import load_decoder as load
from handful.families.plugin_types import PLUGIN_TYPES
from handful.model import Decoder
from handful.presets import PRESETS

transformers: Any = importlib.import_module("transformers")  # its types know less than its configs accept
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

MODELS = [
    entry
    for entry in json.loads((Path(__file__).parents[1] / "data" / "models.json").read_text())
    if entry["config"]["model_type"] != "switch_transformers"  # no decoder
]

VOCAB = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OURS: dict[str, Any] = {"vocab": VOCAB, "width": 24, "layers": 3, "heads": 4, "kv_heads": 2, "context": 32}

# For each family: a transformers config as its users would make it, and what it must mean here.
CASES: dict[str, tuple[Any, ModelConfig]] = {
    "qwen3_moe": (
        transformers.Qwen3MoeConfig(
            **SHAPE,
            head_dim=8,
            intermediate_size=20,
            moe_intermediate_size=12,
            num_experts=5,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=[0],
            attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        ),
        ModelConfig(
            **OURS,
            head_dim=8,
            ffn=20,
            router=RouterConfig(experts=5, top_k=2),
            expert_width=12,
            dense_first=1,
            qk_norm="head",
            qkv_bias=True,
            o_bias=True,
            rope_theta=5000.0,
            tied=False,
        ),
    ),
    "qwen3_moe sparse": (
        transformers.Qwen3MoeConfig(
            **SHAPE,
            head_dim=8,
            intermediate_size=20,
            moe_intermediate_size=12,
            num_experts=5,
            num_experts_per_tok=3,
            decoder_sparse_step=2,
            tie_word_embeddings=True,
            hidden_act="gelu",
        ),
        ModelConfig(
            **OURS,
            head_dim=8,
            ffn=20,
            router=RouterConfig(experts=5, top_k=3, normalize=False),
            expert_width=12,
            moe_every=2,
            activation="geglu",
            qk_norm="head",
            tied=True,
        ),
    ),
    "olmoe": (
        transformers.OlmoeConfig(**SHAPE, intermediate_size=12, num_experts=5, num_experts_per_tok=2),
        ModelConfig(
            **OURS,
            router=RouterConfig(experts=5, top_k=2, normalize=False),
            expert_width=12,
            qk_norm="full",
            norm_eps=1e-5,
            tied=False,
        ),
    ),
    "mixtral": (
        transformers.MixtralConfig(**SHAPE, intermediate_size=12, num_local_experts=5, num_experts_per_tok=2),
        ModelConfig(
            **OURS,
            router=RouterConfig(experts=5, top_k=2),
            expert_width=12,
            rope_theta=1e6,
            norm_eps=1e-5,
            tied=False,
        ),
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig(
            **SHAPE,
            intermediate_size=20,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=14,
            num_experts=5,
            num_experts_per_tok=2,
            decoder_sparse_step=2,
        ),
        ModelConfig(
            **OURS,
            ffn=20,
            router=RouterConfig(experts=5, top_k=2, normalize=False),
            expert_width=12,
            shared_width=14,
            shared_gate=True,
            moe_every=2,
            qkv_bias=True,
            tied=False,
        ),
    ),
    "glm4_moe": (
        transformers.Glm4MoeConfig(
            **SHAPE,
            head_dim=8,
            intermediate_size=20,
            moe_intermediate_size=12,
            n_routed_experts=6,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=3,
            topk_group=2,
            routed_scaling_factor=2.5,
            attention_bias=True,
            use_qk_norm=True,
        ),
        ModelConfig(
            **OURS,
            head_dim=8,
            ffn=20,
            router=RouterConfig(
                experts=6,
                top_k=3,
                score="sigmoid",
                scale=2.5,
                balance_bias=True,
                groups=3,
                top_groups=2,
                group_score="top2",
            ),
            expert_width=12,
            shared_width=24,
            dense_first=1,
            qk_norm="head",
            qkv_bias=True,
            rotary_fraction=0.5,
            norm_eps=1e-5,
            tied=False,
        ),
    ),
    "minimax_m2": (
        transformers.MiniMaxM2Config(
            **SHAPE, head_dim=8, intermediate_size=12, num_local_experts=5, num_experts_per_tok=2, rotary_dim=4
        ),
        ModelConfig(
            **OURS,
            head_dim=8,
            router=RouterConfig(experts=5, top_k=2, score="sigmoid", balance_bias=True),
            expert_width=12,
            qk_norm="full",
            rope_theta=5e6,
            rotary_fraction=0.5,
            tied=False,
        ),
    ),
    "qwen3": (
        transformers.Qwen3Config(**SHAPE, head_dim=8, intermediate_size=20, tie_word_embeddings=True),
        ModelConfig(**OURS, head_dim=8, ffn=20, qk_norm="head", tied=True),
    ),
    "llama": (
        transformers.LlamaConfig(**SHAPE, intermediate_size=20, rms_norm_eps=1e-3, attention_bias=True),
        ModelConfig(**OURS, ffn=20, qkv_bias=True, o_bias=True, norm_eps=1e-3, tied=False),
    ),
}
TOKENS = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(0))

# The first DeepSeek family is not in transformers: its tensors are tested by name alone.
DEEPSEEK = ModelConfig(
    **OURS,
    ffn=20,
    router=RouterConfig(experts=5, top_k=2, normalize=False),
    expert_width=12,
    shared_width=24,
    dense_first=1,
    tied=False,
)
# Sigmoid scores without a balance bias: no public family has that.
PRIVATE = ModelConfig(**OURS, router=RouterConfig(experts=4, top_k=2, score="sigmoid"), expert_width=12)


def random_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ordinary size everywhere, so that none (a bias, a norm, a correction) could be missed."""
    generator = torch.Generator().manual_seed(1)
    out = {}
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        out[name] = 1 + 0.2 * noise if tensor.dim() == 1 and "norm" in name else 0.3 * noise
    return out


def theirs(folder: Path) -> Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


@torch.no_grad()
def ours(model: Decoder) -> Tensor:
    logits: Tensor = model(TOKENS)[0]
    return logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What transformers saves for each case, with random weights."""
    out = {}
    for name, (config, _) in CASES.items():
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict(random_state(model.state_dict()))
        model.tie_weights()
        out[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
        model.save_pretrained(out[name])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# What transformers writes, we read; what we write, transformers reads.


@pytest.mark.parametrize("name", CASES)
def test_config_means_what_it_must(name: str, folders: dict[str, Path]) -> None:
    assert config_from_hf(read_json(folders[name] / "config.json")) == CASES[name][1]
    assert config_to_hf(CASES[name][1])["model_type"] == name.split()[0]


@pytest.mark.parametrize("name", CASES)
def test_tensors_there_and_back_are_the_same_bytes(name: str, folders: dict[str, Path]) -> None:
    config = CASES[name][1]
    state = tensors_from_hf(config, read_tensors(folders[name]))
    back, saved = tensors_to_hf(config, state), load_file(folders[name] / "model.safetensors")
    assert set(back) == set(saved)
    assert all(torch.equal(back[key], saved[key]) for key in saved)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders[name])
    expected = theirs(folders[name])
    assert distance(ours(model), expected) < 1e-5
    save(model, tmp_path / "saved")
    assert torch.equal(theirs(tmp_path / "saved"), expected)
    assert torch.equal(ours(load(tmp_path / "saved")), ours(model))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_shards_and_dtypes(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = load(tmp_path).state_dict()
    whole = tensors_from_hf(CASES[name][1], read_tensors(folders[name]))
    assert all(torch.equal(found[key], whole[key].to(found[key].dtype)) for key in whole)
    # The balance bias moves in steps that bfloat16 does not see: transformers keeps it in float32, and so do we.
    assert {key for key in found if found[key].dtype != torch.bfloat16} == {k for k in whole if "balance_bias" in k}


@pytest.mark.parametrize("name", [name for name, (_, config) in CASES.items() if config.router is not None])
def test_experts_that_are_stacked_are_read_too(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name])
    state = dict(model.state_dict())  # as transformers 5 names and holds them in memory
    if CASES[name][1].tied:
        del state["lm_head.weight"]
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in state)
    save_file(state, tmp_path / "model.safetensors")
    stacked, apart = (tensors_from_hf(CASES[name][1], read_tensors(f)) for f in (tmp_path, folders[name]))
    assert all(torch.equal(stacked[key], apart[key]) for key in apart)


def test_deepseek_tensors_have_their_published_names() -> None:
    state = {name: torch.randn(tensor.shape) for name, tensor in Decoder(DEEPSEEK).state_dict().items()}
    public = tensors_to_hf(DEEPSEEK, state)
    expert, shared = "model.layers.1.mlp.experts.4.", "model.layers.2.mlp.shared_experts."
    assert public[expert + "up_proj.weight"].equal(state["layers.1.ffn.experts.gate_up"][4, 12:])
    assert public[shared + "gate_proj.weight"].equal(state["layers.2.ffn.shared.gate_up.weight"][:24])
    assert public["model.layers.0.mlp.down_proj.weight"].equal(state["layers.0.ffn.down.weight"])
    back = tensors_from_hf(DEEPSEEK, public)
    assert all(back[name].equal(state[name]) for name in state)
    assert config_to_hf(DEEPSEEK)["model_type"] == "deepseek"


def test_ours_is_the_last_resort(tmp_path: Path) -> None:
    assert config_to_hf(PRIVATE)["model_type"] == "handful"
    model = Decoder(PRIVATE).eval()
    model.load_state_dict(random_state(model.state_dict()))
    save(model, tmp_path / "saved")
    found = load(tmp_path / "saved")
    assert found.config == PRIVATE
    assert torch.equal(ours(found), ours(model))


@pytest.mark.parametrize("entry", MODELS, ids=[entry["name"] for entry in MODELS])
def test_published_configs(entry: dict[str, Any]) -> None:
    """Those that are run are written as their own family again; the others say why they are not run."""
    values = entry["config"]
    if values["model_type"] in {family.model_type for family in RUN}:
        config = config_from_hf(values)
        assert config_to_hf(config)["model_type"] == values["model_type"]
        assert config_from_hf(config_to_hf(config)) == config
    else:
        with pytest.raises(CheckpointError, match=rf"'{values['model_type']}': can be counted but not run: it has \w+"):
            config_from_hf(values)


def test_a_counted_model_is_found_by_its_config_file(tmp_path: Path) -> None:
    entry = next(entry for entry in MODELS if entry["name"] == "ai21labs/Jamba-v0.1")
    (tmp_path / "config.json").write_text(json.dumps(entry["config"]))
    for source in (tmp_path, tmp_path / "config.json"):
        assert cost(find_config(source)).total == entry["exact"]["total"]
    with pytest.raises(CheckpointError, match="'jamba': can be counted but not run: it has Mamba layers"):
        load(tmp_path)


def test_llama4_is_counted_inside_its_multimodal_config() -> None:
    flat = next(entry["config"] for entry in MODELS if "Scout" in entry["name"])
    nested = {"model_type": "llama4", "text_config": flat, "vision_config": {"hidden_size": 1408}}
    assert config_from_hf(nested, count_only=True) == config_from_hf(flat, count_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing a family.


@pytest.mark.parametrize(
    ("preset", "family"),
    [
        ("mixtral", "mixtral"),
        ("olmoe", "olmoe"),
        ("qwen3", "qwen3_moe"),
        ("deepseek-moe", "deepseek"),
        ("deepseek-v3", "deepseek_v3"),
        ("gpt-oss", "gpt_oss"),
    ],
)
def test_family_of_a_preset(preset: str, family: str) -> None:
    model = PRESETS[preset].model
    assert model is not None
    assert config_to_hf(model)["model_type"] == family
    assert (why_not_public(model) is None) == (family != "handful")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (PRIVATE, "router.score = 'softmax' and not 'sigmoid'"),
        (dataclasses.replace(CASES["olmoe"][1], o_bias=True), "olmoe is nearest, where o_bias = False and not True"),
        (
            dataclasses.replace(CASES["mixtral"][1], router=RouterConfig(experts=5, top_k=2, choice="expert")),
            "mixtral is nearest, where router.choice = 'token' and not 'expert'",
        ),
        (
            dataclasses.replace(CASES["mixtral"][1], router=RouterConfig(experts=5, top_k=2, eval_capacity_factor=1.0)),
            "router.eval_capacity_factor = None and not 1.0",
        ),
        (
            dataclasses.replace(CASES["mixtral"][1], router=RouterConfig(experts=5, top_k=2, noisy_top_k=True)),
            "router.noisy_top_k = False and not True",
        ),
        (dataclasses.replace(CASES["llama"][1], qk_norm="full"), "qk_norm = '(head|none)' and not 'full'"),
        (dataclasses.replace(CASES["llama"][1], activation="relu"), "no public family has its activation, 'relu'"),
    ],
)
def test_why_no_public_family_fits(config: ModelConfig, why: str) -> None:
    assert config_to_hf(config)["model_type"] == "handful"
    assert re.search(why, why_not_public(config) or "")


ROUTER_CHANGES: dict[str, list[Any]] = {
    "score": ["softmax", "sigmoid"],
    "normalize": [False, True],
    "scale": [1.0, 2.5],
    "balance_bias": [False, True],
    "logits_bias": [True],
    "noisy_top_k": [True],
    "jitter": [0.01],
    "capacity_factor": [1.25],
    "eval_capacity_factor": [2.0],
    "drop_order": ["choice"],
}
CHANGES: dict[str, list[Any]] = {
    "shared_width": [0, 12, 14, 36],
    "shared_gate": [False, True],
    "dense_first": [0, 1, 2],
    "moe_every": [1, 2],
    "dense_layers": [(), (1,), (0, 2), (2,)],
    "activation": ["swiglu", "geglu", "swiglu_clamped"],
    "expert_bias": [True],
    "qk_norm": ["none", "head", "full"],
    "qkv_bias": [False, True],
    "o_bias": [False, True],
    "rope_theta": [1e4, 5e5],
    "rotary_fraction": [1.0, 0.5],
    "head_dim": [4, 8],
    "norm_eps": [1e-5],
    "tied": [False, True],
}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """A config of a public family, or one that is a few settings away."""
    config = draw(st.sampled_from([*(config for _, config in CASES.values()), DEEPSEEK, PRIVATE]))
    for table, part in ((CHANGES, config), (ROUTER_CHANGES, config.router)):
        names = draw(st.lists(st.sampled_from(sorted(table)), max_size=2, unique=True))
        changes = {name: draw(st.sampled_from(table[name])) for name in names}
        try:
            if part is not None:
                part = dataclasses.replace(part, **changes)
                config = part if isinstance(part, ModelConfig) else dataclasses.replace(config, router=part)
        except ConfigError:
            reject()
    return config


@settings(max_examples=150, deadline=None)
@given(configs())
def test_any_config_there_and_back(config: ModelConfig) -> None:
    values = json.loads(json.dumps(config_to_hf(config)))
    event(values["model_type"])
    assert (why_not_public(config) is None) == (values["model_type"] != "handful")
    if values["model_type"] != "handful" and not has_dense(config):
        config = dataclasses.replace(config, ffn=0)  # which no layer has
    assert config_from_hf(values) == config


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_malformed_field_is_a_checkpoint_error(data: st.DataObject) -> None:
    values = config_to_hf(data.draw(configs()))
    odd = st.recursive(
        st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=2),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["router", "type", "a"]), inner),
        max_leaves=3,
    )
    key = data.draw(st.sampled_from([*values, "handful", "rope_parameters", "layer_types", "quantization_config"]))
    with contextlib.suppress(CheckpointError):
        config_from_hf({**values, key: data.draw(odd)}, count_only=data.draw(st.booleans()))


def test_training_settings_stay_beside_the_public_ones(tmp_path: Path) -> None:
    router = RouterConfig(experts=5, top_k=2, jitter=0.01, capacity_factor=1.25, random_second=True)
    config = dataclasses.replace(CASES["mixtral"][1], router=router)
    values = config_to_hf(config)
    assert values["model_type"] == "mixtral"
    assert values["handful"] == {"router": {"capacity_factor": 1.25, "jitter": 0.01, "random_second": True}}
    assert config_from_hf(values) == config
    model = Decoder(config).eval()
    save(model, tmp_path / "saved")
    assert distance(ours(model), theirs(tmp_path / "saved")) < 1e-6
    for wrong, message in (({"scale": 2.0}, r"handful\.router\.scale: one of"), ({"jitter": 3}, r"jitter = 3\.0")):
        with pytest.raises(CheckpointError, match=message):
            config_from_hf({**values, "handful": {"router": wrong}})
    assert set(TRAINING_ONLY) <= {field.name for field in dataclasses.fields(RouterConfig)}


# ---------------------------------------------------------------------------------------------------------------------
# Refusals.

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "qwen3",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling = .*: rope_type must be default, ",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear"}},
            "llama: model.rope_scaling.factor: needed and not given",
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor = 0.5: at least 1"),
        ("mixtral", {"rope_parameters": {"rope_theta": 1e6, **YARN, "beta": 3}}, "rope_parameters.beta = 3: not known"),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters = .*: must be one for",
        ),
        ("qwen3", {"rope_parameters": "default"}, "rope_parameters = 'default': must be an object"),
        ("olmoe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: this family turns whole heads"),
        ("llama", {"rotary_dim": 4}, "rotary_dim = 4: this family turns whole heads"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0: only None is supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True: only False is supported"),
        ("llama", {"sliding_window": 4096}, "sliding_window = 4096: this family has only full attention"),
        ("olmoe", {"layer_types": ["sliding_attention"] * 3}, "layer_types = .*: this family has only full attention"),
        (
            "mixtral",
            {"sliding_window": 8, "layer_types": ["full_attention"] * 3},
            "must be sliding_attention with a wi",
        ),
        ("mixtral", {"sliding_window": -8}, "model.window = -8: at least 1"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 3},
            "layer_types = .*: must be full_attention with a window of",
        ),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, "layer_types = .*: must name all 3 layers"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types = .*: must be full_attention with"),
        ("qwen3_moe", {"hidden_act": "relu2"}, "hidden_act = 'relu2': must be 'silu' or 'gelu'"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "model.dense_first = 3: few enough to leave an MoE layer"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers = 'all': a list of layers"),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm = False: only True"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1]}, r"attn_type_list = \[1, 0, 1\]: only 1 is supported, in every"),
        ("qwen3_moe", {"quantization_config": {"bits": 4}}, "quantization_config = .*: quant_method must be .fp8."),
        ("qwen3_moe", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0: not known"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts = 0: at least 1"),
        ("glm4_moe", {"n_group": 4}, "config.json of glm4_moe: router.groups = 4: a divisor of experts = 6"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm = False: only True"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"hidden_size": "wide"}, "config.json of llama: model.width = 'wide': of type int"),
        ("llama", {"rope_parameters": None, "rope_theta": {}}, "config.json of llama: model.rope_theta = {}: of type"),
        ("qwen3_moe", {"decoder_sparse_step": 0, "mlp_only_layers": [0, 2]}, "decoder_sparse_step = 0, .*: malformed"),
        ("llama", {"num_attention_heads": 5}, "hidden_size = 24: must be a multiple of the 5 heads"),
        ("llama", {"model_type": "mamba"}, "model_type = 'mamba': must be one of qwen3_moe, olmoe"),
        ("llama", {"model_type": None}, "model_type = None: must be one of"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(
    name: str, change: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    values = read_json(folders[name] / "config.json")
    if "rope_scaling" in change or "partial_rotary_factor" in change:
        del values["rope_parameters"]
    config_from_hf(values)
    with pytest.raises(CheckpointError, match=message):
        config_from_hf({**values, **change})


def test_to_count_parameters_it_need_not_run(folders: dict[str, Path]) -> None:
    values = read_json(folders["qwen3"] / "config.json")
    odd = {
        **values,
        "rope_scaling": YARN,
        "sliding_window": 8,
        "use_sliding_window": True,
        "quantization_config": {"a": 1},
    }
    assert config_from_hf(odd, count_only=True) == config_from_hf(values)
    with pytest.raises(CheckpointError, match="mlp_bias = True"):  # but this changes the count
        config_from_hf({**read_json(folders["llama"] / "config.json"), "mlp_bias": True}, count_only=True)


def test_fields_without_a_say_in_the_logits_are_accepted(folders: dict[str, Path]) -> None:
    values = read_json(folders["llama"] / "config.json")
    more = {"torch_dtype": "bfloat16", "pretraining_tp": 1, "is_llama_config": True, "rope_interleaved": False}
    assert config_from_hf({**values, **more, "_name_or_path": "somewhere", "use_cache": True}) == CASES["llama"][1]


def test_our_own_config_is_checked_too() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: model\.colour: no such setting"):
        config_from_hf({"model_type": "handful", "model": {"colour": 1}})
    with pytest.raises(CheckpointError, match=r"config\.json: model\.vocab: needed and not given"):
        config_from_hf({"model_type": "handful"})


DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({DOWN: None}, f"model.safetensors: tensor '{DOWN}' is missing$"),
        ({DOWN: torch.zeros(12, 24)}, rf"tensor '{DOWN}' has shape \[12, 24\]: must be \[24, 12\]"),
        ({GATE: torch.zeros(12, 24, dtype=torch.int8)}, f"tensor '{GATE}' is torch.int8: quantized"),
        ({GATE: torch.zeros(12, 24, dtype=torch.float64)}, f"'{GATE}' is torch.float64: must be torch.float32"),
        ({"model.layers.3.mlp.gate.weight": torch.zeros(5, 24)}, "unexpected tensor 'model.layers.3.mlp.gate.weight'"),
        ({"lm_head.bias": torch.zeros(VOCAB)}, "unexpected tensor 'lm_head.bias'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: dict[str, Tensor | None], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    state: dict[str, Tensor | None] = {**load_file(folders["qwen3_moe"] / "model.safetensors"), **change}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["qwen3_moe"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_tensors_that_do_not_matter_are_left(folders: dict[str, Path]) -> None:
    glm = load_file(folders["glm4_moe"] / "model.safetensors")
    more = {
        "model.layers.3.eh_proj.weight": torch.zeros(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    found, plain = (tensors_from_hf(CASES["glm4_moe"][1], state) for state in (glm | more, glm))
    assert all(found[name].equal(plain[name]) for name in plain)
    tied = load_file(folders["qwen3"] / "model.safetensors")
    assert "head.weight" not in tensors_from_hf(CASES["qwen3"][1], tied | {"lm_head.weight": torch.ones(VOCAB, 24)})


def test_a_state_of_another_config_is_not_written() -> None:
    state = Decoder(PRIVATE).state_dict()
    with pytest.raises(CheckpointError, match=r"the model: tensor 'layers\.0\.ffn\.gate_up\.weight' is missing"):
        tensors_to_hf(DEEPSEEK, state)
    with pytest.raises(CheckpointError, match=r"the model: tensor 'norm\.weight' is missing"):
        tensors_to_hf(PRIVATE, {name: tensor for name, tensor in state.items() if name != "norm.weight"})


def test_the_number_of_experts_does_not_slow_a_plan() -> None:
    """Names are made for one layout, not for all families'; the published shapes have 128 experts and more."""
    config = dataclasses.replace(CASES["mixtral"][1], layers=1, router=RouterConfig(experts=300, top_k=2))
    state = tensors_to_hf(config, Decoder(config).state_dict())
    assert len(state) == 300 * 3 + 10
    assert math.prod(tensors_from_hf(config, state)["layers.0.ffn.experts.down"].shape) == 300 * 24 * 12


def test_the_plug_in_is_offered_where_it_works() -> None:
    """To the families whose experts transformers lets others compute, and to no other."""
    models = Path(transformers.__file__).parent / "models"
    marked = {file.parent.name for file in models.glob("*/modeling_*.py") if "\n@use_experts_impl" in file.read_text()}
    assert marked - {family.model_type for family in RUN} == PLUGIN_TYPES
    offer = "; transformers runs it, with our experts after `import handful.transformers`"
    for model_type, offered in (
        ("ernie4_5_moe", True),
        ("jamba", True),
        ("qwen3_next", True),
        ("dbrx", False),
        ("x", False),
    ):
        with pytest.raises(CheckpointError) as caught:
            config_from_hf({"model_type": model_type})
        assert str(caught.value).endswith(offer) == offered
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# As their makers publish them.


@torch.no_grad()
def test_gpt_oss_as_published_with_experts_in_mxfp4(tmp_path: Path) -> None:
    """Random codes and scales; transformers' own unpacking of them makes the model that ours is held against."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shape = SHAPE | {"hidden_size": 64}
    config = transformers.GptOssConfig(
        **shape, head_dim=8, intermediate_size=32, num_local_experts=3, num_experts_per_tok=2, sliding_window=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(random_state(model.state_dict()))
    state = dict(model.state_dict())
    generator = torch.Generator().manual_seed(2)
    for layer, (name, columns) in itertools.product(range(3), (("gate_up_proj", 64), ("down_proj", 32))):
        key = f"model.layers.{layer}.mlp.experts.{name}"
        rows, groups = state[key].shape[2], columns // 32
        blocks = torch.randint(256, (3, rows, groups, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 126, (3, rows, groups), dtype=torch.uint8, generator=generator)
        state[key].copy_(convert_moe_packed_tensors(blocks, scales))
        del state[key]
        state |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    model.save_pretrained(tmp_path)  # for its config.json
    save_file(state, tmp_path / "model.safetensors")
    values = read_json(tmp_path / "config.json")
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    published = {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": left},
        "experts_per_token": 2,
        "initial_context_length": 4096,
        "swiglu_limit": 7.0,
    }
    (tmp_path / "config.json").write_text(json.dumps(values | published))
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}
    assert distance(ours(load(tmp_path, dtype=torch.float32)), model.float()(TOKENS).logits) < 1e-5
    # What is saved is unquantized, and says so.
    save(load(tmp_path, dtype=torch.float32), tmp_path / "plain")
    assert "quantization_config" not in read_json(tmp_path / "plain" / "config.json")
    assert theirs(tmp_path / "plain").equal(model.float()(TOKENS).logits)
    with pytest.raises(CheckpointError, match=r"quantization_config = .*: quant_method must be 'mxfp4'"):
        config_from_hf(values | {"quantization_config": {"quant_method": "gptq"}})


def test_kimi_k2_is_deepseek_v3(folders: dict[str, Path]) -> None:
    """Kimi-K2's published config.json, its sizes made smaller."""
    values = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
        "model_type": "kimi_k2",
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 24,
        "intermediate_size": 20,
        "kv_lora_rank": 6,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 12,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
        "pretraining_tp": 1,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "v_head_dim": 4,
        "vocab_size": VOCAB,
    }
    config = config_from_hf(values)
    assert config.mla is not None
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor, config.rope_theta) == ("yarn", 32.0, 50000.0)
    assert config.router == RouterConfig(experts=6, top_k=2, score="sigmoid", scale=2.827, balance_bias=True)
    written = config_to_hf(config)
    assert written["model_type"] == "deepseek_v3"
    assert config_from_hf(written) == config


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def float8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix as float8 codes and scales of 128 x 128 blocks, and what the two stand for."""
    rows, columns = weight.shape
    codes, scales = torch.empty_like(weight), torch.empty(-(-rows // 128), -(-columns // 128))
    back = torch.empty_like(weight)
    for i, j in itertools.product(range(len(scales)), range(scales.shape[1])):
        block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        scales[i, j] = weight[block].abs().max() / 448
        codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn).float()
        back[block] = codes[block] * scales[i, j]
    return codes.to(torch.float8_e4m3fn), scales, back


@torch.no_grad()
def test_deepseek_v3_as_published_in_float8(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        **SHAPE | {"hidden_size": 136, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=130,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=40,
        intermediate_size=20,
        moe_intermediate_size=132,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(random_state(model.state_dict()))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if "_proj" in name]:
        state[name], state[f"{name}_scale_inv"], back = float8(state[name])
        state[f"back {name}"] = back
    plain = {name: state.pop(f"back {name}", tensor) for name, tensor in list(state.items()) if "back" not in name}
    plain = {name: tensor for name, tensor in plain.items() if not name.endswith("_scale_inv")}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plain" / "config.json").write_text((tmp_path / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    values = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": FP8}))
    assert distance(ours(load(tmp_path, dtype=torch.float32)), theirs(tmp_path / "plain")) < 1e-5
    down = load(tmp_path).state_dict()["layers.1.ffn.experts.down"]
    assert down[2].equal(plain["model.layers.1.mlp.experts.2.down_proj.weight"].to(torch.bfloat16))
    # What does not fit together is named.
    key = "model.layers.1.mlp.experts.2.down_proj.weight_scale_inv"
    for change, message in (
        ({}, f"tensor '{key}' is missing, and '.*' is torch.float8_e4m3fn"),
        ({key: torch.ones(1, 1)}, rf"tensor '{key}' has shape \[1, 1\], torch.float32: must be \[2, 2\]"),
    ):
        save_file({**{n: t for n, t in state.items() if n != key}, **change}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    for quantized, message in (
        ({"quant_method": "awq"}, "quant_method must be 'fp8'"),
        (FP8 | {"weight_block_size": None}, r"weight_block_size = None: must be \[128, 128\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            config_from_hf(values | {"quantization_config": quantized})
