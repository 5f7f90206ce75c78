"""Switch Transformers (arXiv:2101.03961): T5's encoder-decoder with top-1 routing, between its public form and ours.

A config that this form cannot say (two experts a token, no capacity, a gated activation, which it has no names for) is
written as model_type "handful": ours under "encoder_decoder", our own tensor names.

Legend: D model width · E experts · F a feed-forward network's hidden width
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from handful.checkpoint import check_tensors
from handful.config import EncoderDecoderConfig, ModelConfig
from handful.config_io import from_dict, to_dict
from handful.encoder_decoder import EncoderDecoder
from handful.errors import CheckpointError, ConfigError
from handful.families.config_fields import Field, Implied, Only, TableRow, Values, get, refusal, setting
from handful.families.family import NO_MATHS, check_known, read_rows
from handful.families.weights import FLOATS, shapes_of, where
from handful.lazy_tensors import Entry, Tensors

__all__ = ["config_from_hf", "config_to_hf", "is_encoder_decoder", "shapes", "tensors_from_hf", "tensors_to_hf"]

MODEL_TYPE = "switch_transformers"
OURS, OURS_KEY = "handful", "encoder_decoder"


# ---------------------------------------------------------------------------------------------------------------------
# Configs.


@dataclass(frozen=True)
class MoEEvery(TableRow):
    """Which layers of a stack are MoE. The step is what counts; where it is absent, the number of them says it."""

    stack: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (f"{self.stack}_sparse_step", f"num_sparse_{self.stack}_layers")

    def read(self, values: Values) -> dict[str, Any]:
        step, count = (values.get(key) for key in self.keys)
        if step is None:
            both = get(values, "num_layers")
            layers = both if self.stack == "encoder" else get(values, "num_decoder_layers", both)
            step = layers // get(values, self.keys[1], 3) if count != 0 else layers
        return {f"{self.stack}_moe_every": step}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        layers, is_moe = setting(config, f"{self.stack}_layers"), setting(config, f"{self.stack}_is_moe")
        step = setting(config, f"{self.stack}_moe_every")
        return {self.keys[0]: step, self.keys[1]: sum(map(is_moe, range(layers)))}


@dataclass(frozen=True)
class DecoderLayers(TableRow):
    """As many as the encoder's where it does not say."""

    keys = ("num_decoder_layers",)

    def read(self, values: Values) -> dict[str, Any]:
        return {"decoder_layers": get(values, "num_decoder_layers", get(values, "num_layers"))}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"num_decoder_layers": setting(config, "decoder_layers")}


@dataclass(frozen=True)
class StartStop(TableRow):
    """The output's first token, which is T5's padding, and its last, which may be null: none."""

    keys = ("decoder_start_token_id", "pad_token_id", "eos_token_id")

    def read(self, values: Values) -> dict[str, Any]:
        start = get(values, "decoder_start_token_id", get(values, "pad_token_id", 0))
        return {"start": start, "stop": values.get("eos_token_id", 1)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        start, stop = setting(config, "start"), setting(config, "stop")
        return {"decoder_start_token_id": start, "pad_token_id": start, "eos_token_id": stop}


@dataclass(frozen=True)
class DenseActivation(TableRow):
    """By its own name: the public form has no gated ones."""

    keys = ("dense_act_fn",)

    def read(self, values: Values) -> dict[str, Any]:
        return {"activation": get(values, "dense_act_fn", "relu")}

    def check(self, values: Values) -> None:
        if get(values, "dense_act_fn", "relu") not in ("relu", "gelu"):
            raise refusal("dense_act_fn", values["dense_act_fn"], "only 'relu' and 'gelu' are supported")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"dense_act_fn": setting(config, "activation")}


ROWS: tuple[TableRow, ...] = (
    Field("vocab_size", "vocab"),
    Field("d_model", "width", also="hidden_size"),
    Field("num_layers", "encoder_layers"),
    DecoderLayers(),
    Field("num_heads", "heads"),
    Field("d_kv", "head_dim"),
    Field("d_ff", "ffn"),
    MoEEvery("encoder"),
    MoEEvery("decoder"),
    DenseActivation(),
    Field("relative_attention_num_buckets", "buckets", default=32),
    Field("relative_attention_max_distance", "max_distance", default=128),
    Field("layer_norm_epsilon", "norm_eps", default=1e-6),
    Field("tie_word_embeddings", "tied", default=True),
    StartStop(),
    Field("num_experts", "router.experts"),
    Field("expert_capacity", "router.sequence_capacity"),
    Field("router_bias", "router.logits_bias", default=False),
    Field("router_jitter_noise", "router.jitter", default=0.01),
    Implied("router.top_k", 1),
    Implied("router.normalize", False),
    Only("num_selected_experts", 1),
    Only("router_type", "tokens_masked"),
    Only("router_dtype", "float32"),
    Only("router_ignore_padding_tokens", False),
    Only("feed_forward_proj", "relu"),
    Only("is_encoder_decoder", True),
)
# Beside those of every family: dropout, losses, how weights began, and what the published files say of T5's training.
NO_EFFECT = NO_MATHS | {
    "add_router_probs",
    "dropout_rate",
    "initializer_factor",
    "n_positions",
    "output_past",
    "router_z_loss_coef",
    "task_specific_params",
}


def is_encoder_decoder(values: Values) -> bool:
    """Whether a config.json is of an encoder-decoder, and so read here."""
    return values.get("model_type") == MODEL_TYPE or (values.get("model_type") == OURS and OURS_KEY in values)


def config_from_hf(values: Values) -> EncoderDecoderConfig:
    """A config.json's values as our config. CheckpointError names the field that is missing, malformed or unknown."""
    nested: dict[str, Any] = {}
    if values.get("model_type") == OURS:
        nested = values[OURS_KEY]
        if not isinstance(nested, Mapping):
            raise refusal(OURS_KEY, nested, "must be an object")
    else:
        nested = read_rows(ROWS, values)
        check_known(MODEL_TYPE, ROWS, values, NO_EFFECT)
    try:
        return from_dict(EncoderDecoderConfig, nested, OURS_KEY)
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from None


def config_to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """A config.json's values: the public form's if it can say all of the config, or our own."""
    public: dict[str, Any] = {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "is_encoder_decoder": True,
    }
    for row in ROWS:
        # Rows read settings by path, so that they serve any config that has these.
        public |= row.write(cast("ModelConfig", config))
    try:
        if config_from_hf(public) == config:
            return public
    except CheckpointError:
        pass
    return {"model_type": OURS, OURS_KEY: to_dict(config)}


# ---------------------------------------------------------------------------------------------------------------------
# Tensors.

ATTENTION = {f"{part}.weight": f"{part}.weight" for part in "qkvo"}
LAYER: dict[str, str] = {
    "attn_norm.weight": "layer.0.layer_norm.weight",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in ATTENTION},
    "cross_norm.weight": "layer.1.layer_norm.weight",
    **{f"cross.{part}": f"layer.1.EncDecAttention.{part}" for part in ATTENTION},
    # The feed-forward part is the last of a layer's two or three.
    "ffn_norm.weight": "layer.{last}.layer_norm.weight",
    "ffn.gate_up.weight": "layer.{last}.mlp.wi.weight",
    "ffn.down.weight": "layer.{last}.mlp.wo.weight",
    "ffn.router.weight": "layer.{last}.mlp.router.classifier.weight",
    "ffn.router.bias": "layer.{last}.mlp.router.classifier.bias",
    "ffn.experts.gate_up": "layer.{last}.mlp.experts.expert_{e}.wi.weight",
    "ffn.experts.down": "layer.{last}.mlp.experts.expert_{e}.wo.weight",
}
OUTSIDE = {
    "position.weight": "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "norm.weight": "final_layer_norm.weight",
}
EMBED = "shared.weight"
# Where they are not tied, transformers 5 reads each stack's embedding from a copy of its own.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
HEAD = "lm_head.weight"
# Of T5's first releases: never read.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def shapes(config: EncoderDecoderConfig) -> dict[str, tuple[int, ...]]:
    """Our tensors' names and shapes, without allocating them. CheckpointError for sizes that no tensor can have."""
    return shapes_of(lambda: EncoderDecoder(config))


def theirs(ours: str) -> str:
    """The public name of one of our tensors; with {e} where it is one per expert."""
    if ours == "embed.weight":
        return EMBED
    if ours == "head.weight":
        return HEAD
    stack, name = ours.split(".", 1)
    layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    if layer is None:
        return f"{stack}.{OUTSIDE[name]}"
    last = "1" if stack == "encoder" else "2"
    return f"{stack}.block.{layer[1]}.{LAYER[layer[2]].replace('{last}', last)}"


def per_expert(ours: str, count: int) -> Iterator[str]:
    """The public names that make one of our tensors, in order."""
    name = theirs(ours)
    return (name.format(e=e) for e in range(count if "{e}" in name else 1))


def tensors_to_hf(config: EncoderDecoderConfig, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state_dict under the names of `config_to_hf`'s form. Views, but for the embedding's copies where it is not
    tied."""
    check_tensors(shapes(config), state, source="the model")
    if config_to_hf(config)["model_type"] == OURS:
        return dict(state)
    out: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        parts = tensor if "{e}" in theirs(ours) else [tensor]
        out |= zip(per_expert(ours, config.router.experts), parts, strict=True)
    return out if config.tied else out | {name: state["embed.weight"].clone() for name in COPIES}


def tensors_from_hf(config: EncoderDecoderConfig, found: Mapping[str, Tensor]) -> Tensors:
    """A checkpoint's tensors, under the public names or ours, as a state_dict, each made when it is asked for.

    CheckpointError names the file and the tensor that is missing, unexpected, of the wrong shape or quantized, or a
    copy that differs from the embedding.
    """
    tensors, wanted, E = Tensors.of(found), shapes(config), config.router.experts
    if "embed.weight" in tensors:
        check_tensors(wanted, tensors)
        return tensors
    copies = [name for name in ((*COPIES, HEAD) if config.tied else COPIES) if name in tensors]
    expected = itertools.chain(
        ((name, wanted["embed.weight"]) for name in copies),
        (
            (name, shape[1:] if "{e}" in theirs(ours) else shape)
            for ours, shape in wanted.items()
            for name in per_expert(ours, E)
        ),
    )
    # One more than are there is enough to miss one: a config may ask for a billion experts.
    check_tensors(dict(itertools.islice(expected, len(tensors) + 1)), tensors, ignored={UNUSED})
    entries = {ours: _entry(list(per_expert(ours, E)), shape, tensors) for ours, shape in wanted.items()}
    for name in copies:
        if not tensors[name].equal(tensors[EMBED]):
            raise CheckpointError(f"{where(name, tensors)} differs from {EMBED!r}: must be a copy of it")
    return Tensors(entries)


def _entry(names: list[str], shape: tuple[int, ...], found: Tensors) -> Entry:
    """One of ours, made of one of theirs or of one per expert. CheckpointError for a dtype that cannot be."""
    parts = [found.entry(name) for name in names]
    dtype = parts[0].dtype
    for name, part in zip(names, parts, strict=True):
        if part.dtype not in FLOATS:
            raise CheckpointError(f"{where(name, found)} is {part.dtype}: quantized weights cannot be loaded")
        if part.dtype != dtype:
            raise CheckpointError(f"{where(name, found)} is {part.dtype}: must be {dtype} as its neighbours")
    if parts[0].shape == shape:
        return parts[0]

    def fill(out: Tensor, expert: int | None) -> None:
        for to, part in zip(out, parts, strict=True) if expert is None else [(out, parts[expert])]:
            part.fill(to, None)

    return Entry(dtype, shape, fill)
