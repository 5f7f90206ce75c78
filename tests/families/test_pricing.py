"""What `cost` makes of any config.json: counts are those of transformers' classes, and what is not known is said."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BASE, JAMBA
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner, Result

from handful.cli import app
from handful.config import EncoderDecoderConfig, ModelConfig
from handful.cost import Cost, cost, matrix_flops
from handful.count import Counted
from handful.errors import CheckpointError, ConfigError, HandfulError
from handful.families import config_from_hf
from handful.families.hybrids import HYBRIDS
from handful.families.pricing import count_from_hf

MODELS = json.loads((Path(__file__).parents[1] / "data" / "models.json").read_text())
CONFIGS: dict[str, dict[str, Any]] = {entry["name"]: entry["config"] for entry in MODELS}

PHIMOE = {"intermediate_size": 13, "num_local_experts": 5, "num_experts_per_tok": 2}
HUNYUAN = {"intermediate_size": 13, "moe_intermediate_size": 13, "num_experts": 5, "moe_topk": 2, "head_dim": 10}
MAMBA = {"mamba_d_state": 3, "mamba_d_conv": 2, "mamba_expand": 3}
NEMOTRON = {
    "num_hidden_layers": 6,
    "hybrid_override_pattern": "M*E-MM",
    "head_dim": 6,
    "intermediate_size": 11,
    "moe_intermediate_size": 9,
    "moe_shared_expert_intermediate_size": 17,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 5,
    "ssm_state_size": 3,
    "n_groups": 2,
}
V4 = {
    "num_key_value_heads": 1,
    "head_dim": 16,
    "q_lora_rank": 9,
    "o_groups": 2,
    "o_lora_rank": 5,
    "moe_intermediate_size": 11,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "hc_mult": 4,
    "index_n_heads": 3,
    "index_head_dim": 8,
    "partial_rotary_factor": 0.5,
}
RATES = {"compressed_sparse_attention": 3, "heavily_compressed_attention": 10}
ERNIE = {
    "intermediate_size": 13,
    "moe_intermediate_size": 7,
    "moe_num_experts": 5,
    "moe_k": 2,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}
LLAMA4 = {
    "head_dim": 6,
    "intermediate_size": 13,
    "intermediate_size_mlp": 17,
    "num_local_experts": 5,
    "num_experts_per_tok": 1,
}
SWITCH = {
    "vocab_size": 37,
    "d_model": 24,
    "d_ff": 13,
    "d_kv": 5,
    "num_heads": 3,
    "num_layers": 4,
    "num_decoder_layers": 6,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": 5,
    "expert_capacity": 64,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("phimoe", {**BASE, **PHIMOE}),
    ("phimoe", {**BASE, **PHIMOE, "attention_bias": True, "num_key_value_heads": 4}),
    ("phimoe", {**BASE, **PHIMOE, "lm_head_bias": True, "num_hidden_layers": 2}),
    ("hunyuan_v1_moe", {**BASE, **HUNYUAN}),
    ("hunyuan_v1_moe", {**BASE, **HUNYUAN, "attention_bias": True, "tie_word_embeddings": True}),
    ("jamba", {**BASE, **JAMBA}),
    ("jamba", {**BASE, **JAMBA, **MAMBA, "mamba_proj_bias": True, "mamba_dt_rank": 5}),
    ("jamba", {**BASE, **JAMBA, **MAMBA, "mamba_conv_bias": False, "tie_word_embeddings": True}),
    ("jamba", {**BASE, **JAMBA, "num_experts": 1, "num_experts_per_tok": 1}),
    ("nemotron_h", {**BASE, **NEMOTRON, "use_bias": True, "mlp_bias": True, "use_conv_bias": False}),
    ("nemotron_h", {**BASE, **NEMOTRON, "moe_latent_size": 10, "conv_kernel": 3}),
    ("nemotron_h", {**BASE, **NEMOTRON, "moe_latent_size": 24, "mlp_bias": True}),
    ("nemotron_h", {**BASE, **NEMOTRON, "hybrid_override_pattern": "E*", "num_hidden_layers": 2}),
    ("deepseek_v4", {**BASE, **V4}),
    ("deepseek_v4", {**BASE, **V4, "compress_ratios": [0, 0, 4, 128, 4, 128, 0, 0], "num_hash_layers": 0}),
    ("deepseek_v4", {**BASE, **V4, "hc_mult": 3, "compress_rates": RATES, "num_hash_layers": 9}),
    ("deepseek_v4", {**BASE, **V4, "layer_types": ["sliding_attention"] * 3 + ["compressed_sparse_attention"] * 4}),
    ("ernie4_5_moe", {**BASE, **ERNIE}),
    ("llama4_text", {**BASE, **LLAMA4, "interleave_moe_layer_step": 2}),
    ("switch_transformers", SWITCH),
    ("switch_transformers", {**SWITCH, "num_decoder_layers": 3, "num_sparse_decoder_layers": 1, "router_bias": True}),
]


@pytest.mark.parametrize(("family", "shape"), SHAPES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SHAPES)])
def test_the_total_is_what_transformers_holds(family: str, shape: dict[str, Any]) -> None:
    """With the balance bias, which it holds as a buffer."""
    cls = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    with torch.device("meta"):
        model = cls.from_config(AutoConfig.for_model(family, **shape))  # type: ignore[no-untyped-call]
    model.tie_weights()
    held = sum(parameter.numel() for parameter in model.parameters())
    held += sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert cost(count_from_hf({"model_type": family, **shape})).total == held


# ---------------------------------------------------------------------------------------------------------------------
# What is counted of hybrids, by hand.


def test_mamba_by_hand() -> None:
    """Jamba's: of 7 layers 2 attend (the third and the last), each of width 6 x 4 with 2 key-value heads."""
    price = cost(count_from_hf({"model_type": "jamba", **BASE, **JAMBA, **MAMBA}), context=10)
    inner, states, kernel, rank = 3 * 24, 3, 2, 2  # a rank of 24 / 16, rounded up
    mixer = 24 * 2 * inner + inner * (rank + 2 * states) + rank * inner + inner * 24 + inner * kernel
    matrices = 5 * mixer + 2 * (2 * 24 * 24 + 2 * 24 * 12) + 5 * 3 * 24 * 13 + 2 * (2 * 3 * 24 * 13 + 5 * 24) + 37 * 24
    recurrence = 5 * 6 * inner * states
    assert price.flops.prefill == 2 * matrices + recurrence + 11 * 4 * 4 * 6  # the mean position of ten is 5.5
    assert price.flops.decode == 2 * matrices + recurrence + 10 * 2 * 4 * 4 * 6
    assert price.bytes.cache_per_token == 2 * 2 * (2 * 6) * 2
    assert price.bytes.state == 5 * (inner * states + inner * (kernel - 1)) * 2
    assert price.total_parameters.parts.state_space == 5 * (mixer + inner * (1 + 1 + states + 1))


def test_a_latent_is_what_ranks_send() -> None:
    wide, narrow = (
        cost(count_from_hf({"model_type": "nemotron_h", **BASE, **NEMOTRON, **latent}), ranks=2).communication
        for latent in ({}, {"moe_latent_size": 6})
    )
    assert wide.per_rank.forward == 4 * narrow.per_rank.forward > 0
    assert wide.moe_layers == 1


@pytest.mark.parametrize("context", [1, 5, 11, 60])
def test_compressed_attention_by_brute_force(context: int) -> None:
    """One layer of each kind: a window, an index with the best of what is compressed by 3, all that is by 10."""
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    shape = {**BASE, **V4, "num_hidden_layers": 3, "layer_types": kinds, "compress_rates": RATES}
    found = counted({"model_type": "deepseek_v4", **shape, "sliding_window": 4, "index_topk": 2})
    price = cost(found, context=context)
    pair, score = 4 * 4 * 16, 3 * 2 * (8 + 1)  # heads of width 16; the index's 3 of width 8, and their weights

    def attended(t: int) -> int:
        return 3 * min(t, 4) * pair + (t // 3) * score + min(t // 3, 2) * pair + (t // 10) * pair

    prefill = matrix_flops(found, "prefill") * context + sum(map(attended, range(1, context + 1)))
    assert 0 <= prefill - price.flops.prefill * context < 4 * context  # four sums are rounded down
    assert price.flops.decode == matrix_flops(found, "decode") + attended(context)
    assert price.bytes.cache == 2 * (3 * min(context, 4) * 16 + (context // 3) * (16 + 8) + (context // 10) * 16)


def test_of_lists_all_layers_are_alike() -> None:
    config = CONFIGS["tencent/Hunyuan-A13B-Instruct"]
    listed = {**config, "moe_topk": [8] * 32, "moe_intermediate_size": [3072] * 32, "num_shared_expert": [1] * 32}
    assert cost(count_from_hf(listed)).active == cost(count_from_hf(config)).active
    with pytest.raises(CheckpointError, match=r"moe_topk = \[8, 4\]: one number for all layers"):
        count_from_hf({**config, "moe_topk": [8, 4]})


# ---------------------------------------------------------------------------------------------------------------------
# What is said.


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_run_is_our_config_and_what_is_not_says_why(name: str) -> None:
    values = CONFIGS[name]
    if name == "google/switch-large-128":  # a record of its experts alone
        return
    found = count_from_hf(values)
    if isinstance(found, ModelConfig):
        assert config_from_hf(values) == found
    elif isinstance(found, EncoderDecoderConfig):
        assert values["model_type"] == "switch_transformers"
    else:
        assert (found.family, found.known, found.not_understood) == (values["model_type"], True, ())
        assert found.lacks.startswith("it has ")
        with pytest.raises(CheckpointError, match=f"'{found.family}': can be counted but not run: {found.lacks}"):
            config_from_hf(values)


def test_a_default_that_was_taken_is_named() -> None:
    found = counted(CONFIGS["tencent/Hunyuan-A13B-Instruct"])
    (note,) = found.notes
    assert note == (
        "not in config.json, so the family's default: num_key_value_heads = 32, vocab_size = 290943, "
        "tie_word_embeddings = false, max_position_embeddings = 2048"
    )
    found = counted({**CONFIGS["tencent/Hunyuan-A13B-Instruct"], "vocab_size": 128167, "num_key_value_heads": 8})
    assert found.notes[0].count(" = ") == 2


def test_parts_that_are_not_counted_are_named() -> None:
    found = counted(CONFIGS["deepseek-ai/DeepSeek-V4-Flash"])
    assert "num_nextn_predict_layers = 1: what predicts later tokens is not counted" in found.notes
    assert any("in 3 layers a table of the vocabulary" in note for note in found.notes)
    nested = {"model_type": "llama4", "text_config": CONFIGS["meta-llama/Llama-4-Scout-17B-16E-Instruct"]}
    found = counted({**nested, "vision_config": {"hidden_size": 1408}})
    assert found.notes == (
        "attention_chunk_size = 8192: attention is priced as if it were full, an upper bound",
        "the text model alone is counted, not vision_config",
    )
    assert cost(found).total == 107769861120


def test_a_form_of_a_known_family_that_is_not_run_is_counted() -> None:
    values = CONFIGS["Qwen/Qwen3-0.6B"]
    for change in ({"rope_scaling": {"rope_type": "su", "factor": 4.0}}, {"some_new_gate": 3}):
        found = counted({**values, **change})
        assert next(iter(change)) in found.lacks
        assert cost(found).total == 596049920
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        count_from_hf({k: v for k, v in values.items() if k != "num_attention_heads"})


def test_the_text_model_of_a_multimodal_config() -> None:
    text = {k: v for k, v in CONFIGS["deepseek-ai/DeepSeek-V3"].items() if k != "tie_word_embeddings"}
    outer = {"model_type": "kimi_k9", "text_config": text, "vision_config": {}, "tie_word_embeddings": False}
    found = counted(outer)
    assert cost(found).total == 671026419200
    assert (found.family, found.known, found.lacks) == ("deepseek_v3", True, "it has more than text")
    assert found.notes == (
        "multimodal: text_config alone is counted, not vision_config",
        "num_nextn_predict_layers = 1: what predicts later tokens is not counted",
    )
    found = counted({**outer, "text_config": {**text, "model_type": "kimi_k9_text"}})
    assert (found.family, found.known) == ("kimi_k9_text", False)
    # All but the balance bias, of which common field names say nothing.
    assert cost(found).total == 671026419200 - 58 * 256
    with pytest.raises(CheckpointError, match="text_config = '…': one that holds no text_config"):
        count_from_hf({"text_config": outer, "model_type": "twice"})


# ---------------------------------------------------------------------------------------------------------------------
# Families that nobody here knows.


def counted(values: dict[str, Any]) -> Counted:
    found = count_from_hf(values)
    assert isinstance(found, Counted)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "mistralai/Mixtral-8x7B-v0.1",
        "deepseek-ai/deepseek-moe-16b-base",
        "deepseek-ai/DeepSeek-V2-Lite",
        "ibm-granite/granite-3.0-1b-a400m-base",
        "meta-llama/Llama-2-70b-hf",
        "HuggingFaceTB/SmolLM2-135M",
    ],
)
def test_a_plain_decoder_under_a_new_name_is_counted_to_the_digit(name: str) -> None:
    known = cost(count_from_hf(CONFIGS[name]))
    found = counted({**CONFIGS[name], "model_type": "novel"})
    assert prices(cost(found)) == prices(known)
    assert (found.family, found.known, found.lacks) == ("novel", False, "model_type = 'novel' is not known")
    assert "counted as a plain decoder" in found.notes[0]


def prices(price: Cost) -> dict[str, Any]:
    """All but the traffic, for which groups of experts would have to be known."""
    return {name: value for name, value in price.to_dict().items() if name != "communication"}


def test_fields_that_are_not_understood_are_listed() -> None:
    values = {
        **CONFIGS["mistralai/Mixtral-8x7B-v0.1"],
        "model_type": "novel",
        "mtp_depth": 2,
        "gate_rank": 8,
        "off": False,
        "none": [],
    }
    found = counted(values)
    assert found.not_understood == ("gate_rank", "mtp_depth")
    assert "fields that are not understood: gate_rank, mtp_depth" in found.notes
    del values["tie_word_embeddings"], values["num_key_value_heads"]
    assert (
        "not in config.json, and assumed: tie_word_embeddings = true, num_key_value_heads = 32" in counted(values).notes
    )


def test_biases_of_latent_attention_are_not_understood() -> None:
    values = {**CONFIGS["deepseek-ai/DeepSeek-V2-Lite"], "model_type": "novel"}
    assert counted(values).not_understood == ()
    assert counted({**values, "attention_bias": True}).not_understood == ("attention_bias",)


def test_other_common_names() -> None:
    plain = {"vocab_size": 37, "d_model": 24, "n_layers": 3, "n_heads": 4, "d_ff": 13, "n_positions": 64}
    routed = {
        "vocab_size": 37, "hidden_size": 24, "num_layers": 3, "num_attention_heads": 4, "n_positions": 64, "d_ff": 13,
    }  # fmt: skip
    assert cost(counted(plain)).to_dict() == cost(counted({**routed, "model_type": "novel"})).to_dict()
    moe = {**plain, "num_experts": 5, "moe_topk": 2, "moe_intermediate_size": 7, "intermediate_size": 13}
    parts = cost(counted({**moe, "n_shared_experts": 2, "first_k_dense_replace": 1})).total_parameters.parts
    assert parts.routed_experts == 2 * 5 * 3 * 24 * 7
    assert parts.shared_experts == 2 * 3 * 24 * 14
    assert parts.dense_ffn == 3 * 24 * 13
    parts = cost(
        counted({**moe, "shared_expert_intermediate_size": 9, "decoder_sparse_step": 3})
    ).total_parameters.parts
    assert (parts.routed_experts, parts.shared_experts) == (5 * 3 * 24 * 7, 3 * 24 * 9)


def test_without_a_context_one_must_be_given() -> None:
    found = counted({"vocab_size": 37, "d_model": 24, "n_layers": 3, "n_heads": 4, "d_ff": 13})
    assert found.lacks == "it names no model_type"
    with pytest.raises(ConfigError, match="context = None: give one, for this model names none"):
        cost(found)
    assert cost(found, context=9).context == 9


NOVEL = {**BASE, "model_type": "novel", "intermediate_size": 13}


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_field_that_is_missing_is_named(name: str) -> None:
    for values in (NOVEL, {**BASE, **PHIMOE, "model_type": "phimoe"}, {**BASE, **V4, "model_type": "deepseek_v4"}):
        with pytest.raises(CheckpointError, match=f"^config.json: {name} is missing$"):
            count_from_hf({key: value for key, value in values.items() if key != name})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**NOVEL, "hidden_size": -24}, "config.json: hidden_size = -24: at least 1"),
        ({**NOVEL, "hidden_size": "24"}, "config.json: hidden_size = '24': a whole number"),
        ({**NOVEL, "vocab_size": float("nan")}, "config.json: vocab_size = nan: a whole number"),
        ({**NOVEL, "vocab_size": True}, "config.json: vocab_size = True: a whole number"),
        ({**NOVEL, "vocab_size": 10**5000}, "config.json: vocab_size = inf: at most 281474976710656"),
        ({**NOVEL, "num_hidden_layers": 10**9}, "config.json: num_hidden_layers = 1000000000: at most 10000"),
        ({**NOVEL, "num_experts": 10**7}, "config.json: num_experts = 10000000: at most 100000"),
        ({**NOVEL, "num_experts": 4, "num_experts_per_tok": 5}, "config.json of novel: router.top_k = 5: from 1 to"),
        ({**NOVEL, "num_experts": 4}, "config.json: num_experts_per_tok is missing"),
        ({**NOVEL, "num_key_value_heads": 3}, "config.json of novel: model.kv_heads = 3: a divisor of 4 heads"),
        ({**NOVEL, "is_encoder_decoder": True}, "config.json: is_encoder_decoder = True: only False can be counted"),
        ({**NOVEL, "attention_bias": "no"}, "config.json: attention_bias = 'no': true or false"),
        ({**NOVEL, "model_type": ["a"]}, r"config.json: model_type = \['a'\]: a name"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: at most 10000"),
        ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 10**9}}, "moe_num_experts = 1000000000: at most"),
        ({}, "config.json: hidden_size is missing"),
        ({"model_type": "jamba", **BASE, **JAMBA, "attn_layer_offset": 4}, "attn_layer_offset = 4: below attn_layer_p"),
        ({"model_type": "nemotron_h", **BASE, **NEMOTRON, "num_hidden_layers": 5}, "num_hidden_layers = 5: the number"),
        ({"model_type": "nemotron_h", **BASE, **NEMOTRON, "hybrid_override_pattern": "MX"}, "'MX': a letter for every"),
        ({"model_type": "nemotron_h", **BASE}, "config.json: hybrid_override_pattern is missing"),
        ({"model_type": "nemotron_h", **BASE, **NEMOTRON, "mlp_hidden_act": "silu"}, "'silu': only 'relu2' can be"),
        ({"model_type": "deepseek_v4", **BASE, **V4, "o_groups": 7}, "o_groups = 7: a divisor of"),
        ({"model_type": "deepseek_v4", **BASE, **V4, "compress_ratios": [4]}, r"compress_ratios = \[4\]: a list"),
        ({"model_type": "deepseek_v4", **BASE, **V4, "layer_types": ["full"] * 7}, "layer_types = .*: a list"),
        ({"model_type": "phimoe", **BASE, **PHIMOE, "num_attention_heads": 64}, "num_attention_heads = 64: at most"),
        ({"model_type": "phimoe", **BASE, **PHIMOE, "num_key_value_heads": 3}, "num_key_value_heads = 3: a divisor of"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        count_from_hf(values)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 1


STARTS = [{"model_type": name, **shape} for name, shape in SHAPES] + [NOVEL, *CONFIGS.values()]
ODD = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**6, 10**9, 10**30, -(10**30), 10**400])
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(-1, 9) | st.text(max_size=2), max_size=3)
    | st.dictionaries(st.sampled_from(["type", "num_experts", "text_config"]), st.integers(), max_size=2)
)


@settings(max_examples=400, deadline=2000)
@given(st.data())
def test_a_hostile_config_is_priced_or_is_one_line(data: st.DataObject) -> None:
    values = dict(data.draw(st.sampled_from(STARTS)))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*values, "text_config", "sliding_window", "num_experts", "kv_lora_rank"]))
        values[key] = data.draw(ODD)
    ranks = data.draw(st.sampled_from([1, 3, 10**6]))
    try:
        found = cost(count_from_hf(values), ranks=ranks)
    except HandfulError as error:
        said = str(error)
        event("refused")
    else:
        said = ""
        assert 0 < found.active <= found.total
        assert found.bytes.weights == 2 * found.total
        json.dumps(found.to_dict())
    assert "\n" not in said
    assert len(said) < 3000


# ---------------------------------------------------------------------------------------------------------------------
# The verb.


def verb(values: dict[str, Any], folder: Path, *options: str) -> Result:
    (folder / "config.json").write_text(json.dumps(values))
    return CliRunner().invoke(app, ["cost", str(folder / "config.json"), *options], env={"COLUMNS": "80"})


def test_the_verb_says_what_is_only_counted(tmp_path: Path) -> None:
    result = verb(CONFIGS["ai21labs/Jamba-v0.1"], tmp_path)
    assert result.stderr.splitlines()[0] == "counted, not run: it has Mamba layers"
    for words in ("51,570,323,328", "state space", "state of a sequence of any length"):
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    document = json.loads(verb(CONFIGS["ai21labs/Jamba-v0.1"], tmp_path, "--json").stdout)
    assert document["counted"] == {
        "runs": False,
        "family": "jamba",
        "known": True,
        "lacks": "it has Mamba layers",
        "notes": ["not in config.json, so the family's default: max_position_embeddings = 262144"],
        "not_understood": [],
    }
    assert document["note"].startswith("counted, not run: it has Mamba layers; not in config.json")


def test_the_verb_says_nothing_of_what_is_run(tmp_path: Path) -> None:
    document = json.loads(verb(CONFIGS["Qwen/Qwen3-0.6B"], tmp_path, "--json").stdout)
    assert (document["note"], document["counted"]) == (None, None)
    document = json.loads(verb(CONFIGS["google/switch-base-8"], tmp_path, "--json").stdout)
    assert (document["counted"]["runs"], document["counted"]["lacks"], document["context"]) == (True, "", 512)
    assert document["note"].startswith("an encoder-decoder: a token is one of the source and one of the target")


def test_the_verb_says_what_it_did_not_understand(tmp_path: Path) -> None:
    result = verb({**NOVEL, "gate_rank": 8}, tmp_path)
    assert result.stderr.splitlines() == [
        "counted, not run: model_type = 'novel' is not known",
        "counted as a plain decoder: RMSNorm, grouped-query or latent attention, gated feed-forward networks",
        "fields that are not understood: gate_rank",
    ]
    document = json.loads(verb({**NOVEL, "gate_rank": 8}, tmp_path, "--json").stdout)
    assert (document["counted"]["known"], document["counted"]["not_understood"]) == (False, ["gate_rank"])


def test_every_hybrid_is_tried_here() -> None:
    assert set(HYBRIDS) <= {name for name, _ in SHAPES}
