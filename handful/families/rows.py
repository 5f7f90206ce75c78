"""What a public family's table is made of: rows that tie fields of its config.json to settings of ours.

A family is read and written by the same rows, so that whether it has a config's maths needs no rule of its own: it has
if what it writes, it reads back as the same config.

    Field    one field, one setting:  Field("num_experts", "router.experts")
    Implied  a setting that the family has without a field for it:  Implied("qk_norm", "head")
    Only     a field that our decoder computes for one value alone:  Only("clip_qkv", None)

The others are fields that need a word of explanation. Settings are named by their path in ModelConfig: "width",
"router.experts".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handful.config import ModelConfig
from handful.errors import CheckpointError

__all__ = [
    "DECODER",
    "Activation",
    "AttentionBias",
    "Field",
    "FullAttention",
    "Groups",
    "HeadNorm",
    "Implied",
    "Inside",
    "Only",
    "Rope",
    "Row",
    "SharedExperts",
    "SparseLayers",
    "Values",
    "refusal",
    "setting",
]

Values = Mapping[str, Any]
REQUIRED = object()


def setting(config: ModelConfig, path: str) -> Any:
    """The value of a setting; None for a router's in a dense model."""
    value: Any = config
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def get(values: Values, key: str, default: Any = REQUIRED) -> Any:
    """A field, or the default where it is absent or null. CheckpointError if there is no default."""
    value = values.get(key)
    if value is None and default is REQUIRED:
        raise CheckpointError(f"config.json: {key} is missing")
    return default if value is None else value


def refusal(key: str, value: Any, right: str) -> CheckpointError:
    return CheckpointError(f"config.json: {key} = {value!r}: {right}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows.


class Row:
    """A piece of a family's table. This one says nothing; each kind says some of it."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The fields that it knows."""
        return ()

    def read(self, values: Values) -> dict[str, Any]:
        """Our settings, by path. CheckpointError for a field that is missing or has no setting of ours."""
        return {}

    def check(self, values: Values) -> None:
        """CheckpointError if a field asks for maths that our decoder does not have. Not asked of a counted model."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The fields."""
        return {}


@dataclass(frozen=True)
class Field(Row):
    """A field and the setting that it is. `also` is another name for it, read but not written."""

    key: str
    path: str
    default: Any = REQUIRED
    also: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,) if self.also is None else (self.key, self.also)

    def read(self, values: Values) -> dict[str, Any]:
        key = next((key for key in self.keys if values.get(key) is not None), self.key)
        return {self.path: get(values, key, self.default)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.key: setting(config, self.path)}


@dataclass(frozen=True)
class Implied(Row):
    """A setting that goes without saying in this family."""

    path: str
    value: Any

    def read(self, values: Values) -> dict[str, Any]:
        return {self.path: self.value}


@dataclass(frozen=True)
class Only(Row):
    """A field that must be absent, null or `value`. With `counts`, another value would change the parameters too."""

    key: str
    value: Any
    counts: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        if self.counts:
            self.check(values)
        return {}

    def check(self, values: Values) -> None:
        if get(values, self.key, self.value) != self.value:
            raise refusal(self.key, values[self.key], f"only {self.value!r} is supported")


@dataclass(frozen=True)
class Rope(Row):
    """RoPE's base, and with `partial` the share of a head that it turns. Scaled forms, YaRN and others, are refused.

    Transformers 5 keeps all of it in `rope_parameters`; before, it was `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`. Both are read; the older form, which every version reads, is written.
    """

    theta: float = 10000.0
    partial: float | None = None

    keys = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_dim")

    def _parameters(self, values: Values) -> tuple[str, Values]:
        key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
        found = get(values, key, {})
        if not isinstance(found, Mapping):
            raise refusal(key, found, "must be an object")
        return key, {**{key: values[key] for key in ("rope_theta", "partial_rotary_factor") if key in values}, **found}

    def read(self, values: Values) -> dict[str, Any]:
        _, rope = self._parameters(values)
        out = {"rope_theta": get(rope, "rope_theta", self.theta)}
        if self.partial is not None:
            share = self.partial
            if values.get("rotary_dim") is not None:  # MiniMax-M2's published form
                share = values["rotary_dim"] / get(values, "head_dim")
            out["rotary_fraction"] = get(rope, "partial_rotary_factor", share)
        return out

    def check(self, values: Values) -> None:
        key, rope = self._parameters(values)
        kind = rope.get("rope_type", rope.get("type", "default"))
        by_layer = any(isinstance(value, Mapping) for value in get(values, key, {}).values())
        if kind != "default" or by_layer:
            raise refusal(key, values[key], "only plain RoPE is supported")
        share = {
            "partial_rotary_factor": get(rope, "partial_rotary_factor", 1.0),
            "rotary_dim": values.get("rotary_dim"),
        }
        for name, value in share.items():
            if self.partial is None and value not in (None, 1.0):
                raise refusal(name, value, "this family turns whole heads")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        share = {} if self.partial is None else {"partial_rotary_factor": config.rotary_fraction}
        return {"rope_theta": config.rope_theta, **share}


@dataclass(frozen=True)
class Activation(Row):
    """The gated activation, named after what the gate goes through."""

    keys = ("hidden_act",)

    def read(self, values: Values) -> dict[str, Any]:
        name = get(values, "hidden_act", "silu")
        if name not in ("silu", "gelu"):
            raise refusal("hidden_act", name, "must be 'silu' or 'gelu'")
        return {"activation": "swiglu" if name == "silu" else "geglu"}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"hidden_act": {"swiglu": "silu", "geglu": "gelu"}.get(config.activation, config.activation)}


@dataclass(frozen=True)
class FullAttention(Row):
    """Sliding windows are refused. With `switch`, the family has one only where `use_sliding_window` says so."""

    switch: bool = False

    keys = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

    def check(self, values: Values) -> None:
        if get(values, "use_sliding_window", not self.switch) and values.get("sliding_window"):
            raise refusal("sliding_window", values["sliding_window"], "only full attention is supported")
        if set(get(values, "layer_types", [])) - {"full_attention"}:
            raise refusal("layer_types", values["layer_types"], "only full attention is supported")


@dataclass(frozen=True)
class AttentionBias(Row):
    """One field for the biases of query, key and value, and in most families of the output too."""

    output: bool = True

    keys = ("attention_bias",)

    def read(self, values: Values) -> dict[str, Any]:
        bias = get(values, "attention_bias", False)
        return {"qkv_bias": bias, "o_bias": bias and self.output}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": config.qkv_bias}


@dataclass(frozen=True)
class HeadNorm(Row):
    """A switch for QK-norm per head."""

    keys = ("use_qk_norm",)

    def read(self, values: Values) -> dict[str, Any]:
        return {"qk_norm": "head" if get(values, "use_qk_norm", False) else "none"}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"use_qk_norm": config.qk_norm == "head"}


@dataclass(frozen=True)
class SparseLayers(Row):
    """Which layers are MoE. `mlp_only_layers` may list any; ours are some dense ones, then every n-th MoE."""

    keys = ("decoder_sparse_step", "mlp_only_layers")

    def read(self, values: Values) -> dict[str, Any]:
        step, dense = get(values, "decoder_sparse_step", 1), get(values, "mlp_only_layers", [])
        first = next(i for i in range(len(dense) + 1) if i not in dense)
        if any(i > first and (i + 1) % step == 0 for i in dense):
            raise refusal("mlp_only_layers", dense, "only the first layers may be dense")
        return {"dense_first": first, "moe_every": step}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"decoder_sparse_step": config.moe_every, "mlp_only_layers": list(range(config.dense_first))}


@dataclass(frozen=True)
class SharedExperts(Row):
    """How many experts of the routed ones' width are shared; ours are one expert of their summed width."""

    key: str = "n_shared_experts"
    optional: bool = True

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        count = get(values, self.key, 0)
        if not count and not self.optional:
            raise refusal(self.key, count, "at least 1 in this family")
        return {"shared_width": count * get(values, "moe_intermediate_size")}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.key: config.shared_width // config.expert_width or None}


@dataclass(frozen=True)
class Groups(Row):
    """Group-limited selection (DeepSeek-V2, V3), with how a group is scored."""

    score: str

    keys = ("n_group", "topk_group")

    def read(self, values: Values) -> dict[str, Any]:
        groups = get(values, "n_group", 1)
        return {
            "router.groups": groups,
            "router.top_groups": get(values, "topk_group", 1),
            "router.group_score": self.score if groups > 1 else "max",
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"n_group": setting(config, "router.groups"), "topk_group": setting(config, "router.top_groups")}


@dataclass(frozen=True)
class Inside(Row):
    """Rows of an object within the config.json, or of the config.json itself where it has no such object."""

    key: str
    rows: tuple[Row, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        inner = get(values, self.key, values)
        return {path: value for row in self.rows for path, value in row.read(inner).items()}


# What nearly every family has under the same names.
DECODER: tuple[Row, ...] = (
    Field("vocab_size", "vocab"),
    Field("hidden_size", "width"),
    Field("num_hidden_layers", "layers"),
    Field("num_attention_heads", "heads"),
    Field("num_key_value_heads", "kv_heads", default=None),
    Field("max_position_embeddings", "context"),
    Field("rms_norm_eps", "norm_eps"),
    Field("tie_word_embeddings", "tied", default=False),
)
