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
    "REQUIRED",
    "Aside",
    "Everywhere",
    "Field",
    "GatedActivation",
    "Groups",
    "Implied",
    "Inside",
    "Only",
    "Quantized",
    "SharedExperts",
    "SparseLayers",
    "TableRow",
    "Values",
    "get",
    "refusal",
    "setting",
]

Values = Mapping[str, Any]
REQUIRED = object()


def setting(config: ModelConfig, path: str) -> Any:
    """The value of a setting; None for one of a part (router, mla) that the model does not have."""
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


class TableRow:
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
class Field(TableRow):
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
class Implied(TableRow):
    """A setting that goes without saying in this family."""

    path: str
    value: Any

    def read(self, values: Values) -> dict[str, Any]:
        return {self.path: self.value}


@dataclass(frozen=True)
class Only(TableRow):
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
class Everywhere(TableRow):
    """A list that says one thing of every layer, and must say it of all."""

    key: str
    value: Any

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def check(self, values: Values) -> None:
        found = get(values, self.key, [])
        if not isinstance(found, list) or any(item != self.value for item in found):
            raise refusal(self.key, found, f"only {self.value!r} is supported, in every layer")


@dataclass(frozen=True)
class Aside(TableRow):
    """Fields that describe what stands beside the model and is not read: heads that predict later tokens."""

    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class GatedActivation(TableRow):
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
class Quantized(TableRow):
    """How the family is published, quantized: the tensors say the rest themselves, and become plain ones when read."""

    method: str
    blocks: tuple[int, ...] | None = None

    keys = ("quantization_config",)

    def check(self, values: Values) -> None:
        found = get(values, "quantization_config", None)
        if not found:
            return
        if not isinstance(found, Mapping) or found.get("quant_method") != self.method:
            raise refusal("quantization_config", found, f"quant_method must be {self.method!r}")
        blocks = found.get("weight_block_size")
        if self.blocks is not None and blocks != list(self.blocks):
            raise refusal("quantization_config.weight_block_size", blocks, f"must be {list(self.blocks)}")


@dataclass(frozen=True)
class SparseLayers(TableRow):
    """Which layers are MoE: every n-th, without those that `mlp_only_layers` lists."""

    keys = ("decoder_sparse_step", "mlp_only_layers")

    def read(self, values: Values) -> dict[str, Any]:
        step, dense = get(values, "decoder_sparse_step", 1), get(values, "mlp_only_layers", [])
        layers = get(values, "num_hidden_layers")
        if not isinstance(dense, list) or not all(type(i) is int for i in dense):
            raise refusal("mlp_only_layers", dense, "a list of layers")
        first = next(i for i in range(len(dense) + 1) if i not in dense)
        others = {i for i in dense if first < i < layers and (i + 1) % step == 0}
        return {"dense_first": first, "moe_every": step, "dense_layers": tuple(sorted(others))}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        dense = [*range(config.dense_first), *config.dense_layers]
        return {"decoder_sparse_step": config.moe_every, "mlp_only_layers": dense}


@dataclass(frozen=True)
class SharedExperts(TableRow):
    """How many experts of the routed ones' width are shared; ours are one expert of their summed width."""

    key: str = "n_shared_experts"
    optional: bool = True

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        count = get(values, self.key, 0)
        if not isinstance(count, int):
            raise refusal(self.key, count, "a whole number")
        if not count and not self.optional:
            raise refusal(self.key, count, "at least 1 in this family")
        return {"shared_width": count * get(values, "moe_intermediate_size")}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.key: config.shared_width // config.expert_width or None}


@dataclass(frozen=True)
class Groups(TableRow):
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
class Inside(TableRow):
    """Rows of an object within the config.json, or of the config.json itself where it has no such object."""

    key: str
    rows: tuple[TableRow, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        inner = get(values, self.key, values)
        return {path: value for row in self.rows for path, value in row.read(inner).items()}


# What nearly every family has under the same names.
DECODER: tuple[TableRow, ...] = (
    Field("vocab_size", "vocab"),
    Field("hidden_size", "width"),
    Field("num_hidden_layers", "layers"),
    Field("num_attention_heads", "heads"),
    Field("num_key_value_heads", "kv_heads", default=None),
    Field("max_position_embeddings", "context"),
    Field("rms_norm_eps", "norm_eps"),
    Field("tie_word_embeddings", "tied", default=False),
)
