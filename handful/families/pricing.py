"""What `cost` prices of a config.json: families that are run, families that are only counted, and unknown ones.

runs as it is       our config, and nothing more is said
counted, not run    what it is made of, with what our models lack
multimodal          its text model
unknown             a plain decoder, as far as common field names say; the others are listed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from handful.config import EncoderDecoderConfig, ModelConfig
from handful.config_io import from_dict
from handful.count import Counted, count, count_encoder_decoder
from handful.errors import CheckpointError, ConfigError
from handful.families import switch_transformers
from handful.families.config_fields import Values, refusal
from handful.families.config_reader import EXPERTS, SHARED, ConfigReader, check_sizes
from handful.families.convert import OURS, RUN, config_from_hf
from handful.families.count_only import COUNT_ONLY
from handful.families.family import NO_MATHS, has_dense, is_harmless
from handful.families.hybrids import HYBRIDS

__all__ = ["count_from_hf"]

# Text models that multimodal configs name apart from the family.
ALIASES = {"llama4_text": "llama4"}
ROPE = ("rope_scaling", "rope_parameters")
KNOWN = {name for family in (*RUN, *COUNT_ONLY) for name in (family.model_type, *family.also)} | {OURS}


def count_from_hf(values: Values) -> ModelConfig | EncoderDecoderConfig | Counted:
    """What a config.json describes: our config where the model can be run as it is, otherwise what it is made of.

    CheckpointError names a field that is missing or malformed.
    """
    check_sizes(values)
    try:
        return _read(values)
    except ConfigError as error:
        family = values.get("model_type")
        raise CheckpointError(f"config.json{f' of {family}' if family else ''}: {error}") from None


def _read(values: Values) -> ModelConfig | EncoderDecoderConfig | Counted:
    model_type = values.get("model_type")
    if not isinstance(model_type, str) and model_type is not None:
        raise refusal("model_type", model_type, "a name")
    if switch_transformers.is_encoder_decoder(values):
        return switch_transformers.config_from_hf(values)
    family = ALIASES.get(model_type or "", model_type or "")
    if family in HYBRIDS:
        return _counted_by(family, values)
    if family in KNOWN:
        return _of_a_table({**values, "model_type": family})
    inner = values.get("text_config")
    if isinstance(inner, Mapping):
        return _text_model(values, inner)
    return _unknown(values, family)


def _of_a_table(values: Values) -> ModelConfig | Counted:
    """A family with rows. Where our decoder lacks something that it asks for, that is why it is only counted."""
    try:
        return config_from_hf(values)
    except CheckpointError as error:
        why = str(error).removeprefix("config.json: ")
    # RoPE has no parameters: a form of it that is not known here is no reason not to count.
    config = config_from_hf({k: v for k, v in values.items() if k not in ROPE}, count_only=True)
    family = str(values["model_type"])
    lacks = next((f"it has {other.lacks}" for other in COUNT_ONLY if other.model_type == family), why)
    return dataclasses.replace(count(config), family=family, lacks=lacks, notes=_other_parts(values))


def _counted_by(family: str, values: Values) -> Counted:
    fields = ConfigReader(values)
    read, lacks = HYBRIDS[family]
    found = read(fields)
    notes = [*found.notes]
    if fields.assumed:
        notes.append(f"not in config.json, so the family's default: {', '.join(fields.assumed)}")
    return dataclasses.replace(found, family=family, lacks=f"it has {lacks}", notes=(*notes, *_other_parts(values)))


def _other_parts(values: Values) -> tuple[str, ...]:
    """What a model holds beside the decoder that is counted."""
    notes = []
    later = values.get("num_nextn_predict_layers")
    if isinstance(later, int) and later:
        notes.append(f"num_nextn_predict_layers = {later}: what predicts later tokens is not counted")
    inner = values.get("text_config")
    chunk = (inner if isinstance(inner, Mapping) else values).get("attention_chunk_size")
    if chunk:
        notes.append(f"attention_chunk_size = {chunk}: attention is priced as if it were full, an upper bound")
    others = [key for key in values if key.endswith("_config") and key.split("_")[0] in ("vision", "audio")]
    if others:
        notes.append(f"the text model alone is counted, not {', '.join(others)}")
    return tuple(notes)


def _text_model(values: Values, inner: Values) -> Counted:
    """The text model of a multimodal config, with what only the outer one says."""
    outer = {key: values[key] for key in ("tie_word_embeddings",) if key in values}
    text = {"model_type": values.get("model_type"), **outer, **inner}
    if isinstance(text.get("text_config"), Mapping):
        raise refusal("text_config", "…", "one that holds no text_config of its own")
    found = _read(text)
    if isinstance(found, ModelConfig):
        found = dataclasses.replace(count(found), family=str(text["model_type"]), notes=_other_parts(text))
    elif isinstance(found, EncoderDecoderConfig):
        found = dataclasses.replace(count_encoder_decoder(found), family=str(text["model_type"]))
    others = [key for key, value in values.items() if isinstance(value, Mapping) and key != "text_config"]
    beside = f", not {', '.join(others)}" if others else ""
    return dataclasses.replace(
        found,
        lacks=found.lacks or "it has more than text",
        notes=(f"multimodal: text_config alone is counted{beside}", *found.notes),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Families that nobody here knows.

CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k")
# Read by many families and without a say in any count.
NO_COUNT = NO_MATHS | {
    "attn_implementation",
    "hidden_act",
    "hidden_activation",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "max_window_layers",
    "n_group",
    "norm_topk_prob",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "routed_scaling_factor",
    "scoring_func",
    "topk_group",
    "topk_method",
}


def _unknown(values: Values, family: str) -> Counted:
    """A plain decoder by common field names: RMSNorm, grouped-query attention, gated feed-forward networks."""
    f = ConfigReader(values)
    f.only("is_encoder_decoder", False)
    width = f.size("hidden_size", "d_model", "n_embd")
    heads = f.size("num_attention_heads", "n_heads", "num_heads", "n_head")
    _, context = f.get(*CONTEXT)
    settings: dict[str, Any] = {
        "vocab": f.size("vocab_size"),
        "width": width,
        "layers": f.size("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
        "heads": heads,
        # Transformers long left this field out of a config.json where it was true.
        "tied": f.flag("tie_word_embeddings", True, told=True),
        "context": 1 if context is None else f.size(*CONTEXT),
        **(_latent(f) if f.get("kv_lora_rank")[1] is not None else _grouped(f, width, heads)),
        **_unknown_ffn(f),
    }
    config = from_dict(ModelConfig, settings, "model")
    if not has_dense(config):
        config = dataclasses.replace(config, ffn=0)
    known = f.used | NO_COUNT
    left = tuple(sorted(key for key, value in values.items() if value and key not in known and not is_harmless(key)))
    notes = ["counted as a plain decoder: RMSNorm, grouped-query or latent attention, gated feed-forward networks"]
    if f.assumed:
        notes.append(f"not in config.json, and assumed: {', '.join(f.assumed)}")
    if left:
        notes.append(f"fields that are not understood: {', '.join(left)}")
    return dataclasses.replace(
        count(config),
        context=None if context is None else config.context,
        family=family,
        lacks=f"model_type = {family!r} is not known" if family else "it names no model_type",
        notes=(*notes, *_other_parts(values)),
        known=False,
        not_understood=left,
    )


def _latent(f: ConfigReader) -> dict[str, Any]:
    """Multi-head latent attention."""
    rank = f.size("q_lora_rank") if f.get("q_lora_rank")[1] is not None else None
    names = {"nope_dim": "qk_nope_head_dim", "rope_dim": "qk_rope_head_dim", "v_dim": "v_head_dim"}
    f.get("num_key_value_heads")  # as many as there are heads
    return {
        "mla": {"q_rank": rank, "kv_rank": f.size("kv_lora_rank"), **{ours: f.size(key) for ours, key in names.items()}}
    }


def _grouped(f: ConfigReader, width: int, heads: int) -> dict[str, Any]:
    """Grouped-query attention."""
    bias = f.flag("attention_bias", False)
    return {
        "kv_heads": f.size("num_key_value_heads", default=heads),
        "head_dim": f.size("head_dim", default=max(1, width // heads), told=False),
        "qkv_bias": bias or f.flag("qkv_bias", False),
        "o_bias": bias,
    }


def _unknown_ffn(f: ConfigReader) -> dict[str, Any]:
    """The feed-forward part: dense, or routed from some layer on and every so many layers."""
    if all(f.values.get(name) is None for name in EXPERTS):
        return {"ffn": f.size("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff")}
    expert = f.same("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
    experts, top_k = f.size(*EXPERTS), f.same(*TOP_K)
    shared = expert * f.same(*SHARED, default=0, least=0, told=False)
    wider = ("shared_expert_intermediate_size", "shared_intermediate_size")
    return {
        "router": {"experts": experts, "top_k": top_k},
        "expert_width": expert,
        "shared_width": f.same(*wider, default=shared, least=0, told=False),
        "dense_first": f.size("first_k_dense_replace", default=0, least=0, told=False),
        "moe_every": f.size("decoder_sparse_step", "moe_layer_freq", default=1, told=False),
        "ffn": f.size("intermediate_size", default=expert, least=0, told=False),
    }
