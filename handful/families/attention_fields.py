"""Rows of a family's table that say how it attends: positions, windows, heads, biases, latents.

Legend as in `config_fields.py`: a row ties fields of a config.json to settings of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from handful.config import MOST_LAYERS, ModelConfig
from handful.families.config_fields import TableRow, Values, get, refusal, setting

__all__ = ["AttentionBias", "AttentionScale", "FullAttention", "HeadNorm", "Latent", "Rope", "WholeHeads", "Window"]

# The fields of a scaled RoPE and the settings of RopeScaling that they are.
SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
}


@dataclass(frozen=True)
class Rope(TableRow):
    """RoPE's base, how it is scaled, and with `partial` the share of a head that it turns.

    Transformers 5 keeps all of it in `rope_parameters`; before, it was `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`. Both are read; the older form, which every version reads, is written. `scaling` is what the
    family has where the config says nothing.
    """

    theta: float = 10000.0
    partial: float | None = None
    scaling: Mapping[str, Any] | None = None

    keys = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_dim")

    def _parameters(self, values: Values) -> tuple[str, Values]:
        key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
        found = get(values, key, self.scaling or {})
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
        kind = _rope_kind(rope)
        if kind in SCALINGS:
            given = {"original_max_position_embeddings": get(values, "max_position_embeddings", None), **rope}
            found = {name: given[field] for field, name in SCALINGS[kind].items() if given.get(field) is not None}
            if kind == "yarn" and "factor" not in found:
                found["factor"] = get(values, "max_position_embeddings") / found["original_context"]
            out |= {f"rope_scaling.{name}": value for name, value in {"kind": kind, **found}.items()}
            if kind == "yarn":
                # Who adds YaRN to a config.json leaves the length as it was: the factor is what extends it.
                reach = int(found["factor"] * found.get("original_context", 0))
                out["context"] = max(get(values, "max_position_embeddings", 0), reach)
        return out

    def check(self, values: Values) -> None:
        key, rope = self._parameters(values)
        kind, given = _rope_kind(rope), get(values, key, {})
        if any(isinstance(value, Mapping) for value in given.values()):
            raise refusal(key, given, "must be one for all layers")
        if kind != "default" and kind not in SCALINGS:
            raise refusal(key, given, f"rope_type must be default, {', '.join(SCALINGS)}")
        plain = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        unknown = [name for name in rope if name not in plain and name not in SCALINGS.get(kind, {})]
        if unknown and kind != "default":
            raise refusal(f"{key}.{unknown[0]}", rope[unknown[0]], f"not known of {kind}")
        share = {
            "partial_rotary_factor": get(rope, "partial_rotary_factor", 1.0),
            "rotary_dim": values.get("rotary_dim"),
        }
        for name, value in share.items():
            if self.partial is None and value not in (None, 1.0):
                raise refusal(name, value, "this family turns whole heads")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        out: dict[str, Any] = {"rope_theta": config.rope_theta}
        if self.partial is not None:
            out["partial_rotary_factor"] = config.rotary_fraction
        scaling = config.rope_scaling
        if scaling is not None:
            fields = {field: getattr(scaling, name) for field, name in SCALINGS[scaling.kind].items()}
            # Without the two scales, and not with both at 0, YaRN's factor goes by the length alone.
            written = {field: value for field, value in fields.items() if value or isinstance(value, bool)}
            out["rope_scaling"] = {"rope_type": scaling.kind, **written}
        elif self.scaling is not None:
            out["rope_scaling"] = {"rope_type": "default"}
        return out


def _rope_kind(rope: Values) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


@dataclass(frozen=True)
class FullAttention(TableRow):
    """The family has no sliding window: a config that asks for one is refused."""

    keys = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

    def check(self, values: Values) -> None:
        if values.get("sliding_window"):
            raise refusal("sliding_window", values["sliding_window"], "this family has only full attention")
        if set(get(values, "layer_types", [])) - {"full_attention"}:
            raise refusal("layer_types", values["layer_types"], "this family has only full attention")


@dataclass(frozen=True)
class Window(TableRow):
    """A sliding window, and the layers that have it.

    default   where `sliding_window` is absent.
    switch    the window is there only where `use_sliding_window` says so.
    slides    (layer, config.json's values) -> whether it has the window where `layer_types` does not say. None: all
              layers have it, and there are no `layer_types`.
    """

    default: int | None = None
    switch: bool = False
    slides: Callable[[int, Values], bool] | None = None

    keys = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

    def _window(self, values: Values) -> int | None:
        off = self.switch and not get(values, "use_sliding_window", False)
        return None if off else values.get("sliding_window", self.default) or None

    def read(self, values: Values) -> dict[str, Any]:
        window, layers = self._window(values), get(values, "num_hidden_layers")
        if window is None:
            return {}
        if layers > MOST_LAYERS:
            raise refusal("num_hidden_layers", layers, f"at most {MOST_LAYERS}")
        full: tuple[int, ...] = ()
        if self.slides is not None:
            kinds = get(values, "layer_types", None)
            if kinds is None:
                full = tuple(i for i in range(layers) if not self.slides(i, values))
            else:
                full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
        return {} if len(full) >= layers else {"window": window, "full_layers": full}

    def check(self, values: Values) -> None:
        kinds = get(values, "layer_types", None)
        if kinds is None:
            return
        if len(kinds) != get(values, "num_hidden_layers"):
            raise refusal("layer_types", kinds, f"must name all {values['num_hidden_layers']} layers")
        window = self._window(values)
        plain = {"full_attention"} if window is None else {"sliding_attention"}
        known = plain if self.slides is None else plain | {"full_attention"}
        if set(kinds) - known:
            raise refusal("layer_types", kinds, f"must be {' or '.join(sorted(known))} with a window of {window}")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if self.switch and config.window is None:
            return {}
        out: dict[str, Any] = {"sliding_window": config.window}
        if self.switch:
            out["use_sliding_window"] = True
        if self.slides is not None:
            out["sliding_window"] = config.window or self.default
            full = [config.window_of(layer) is None for layer in range(config.layers)]
            out["layer_types"] = ["full_attention" if whole else "sliding_attention" for whole in full]
        return out


class WholeHeads(TableRow):
    """Transformers takes this family only where the heads divide the model's width, whatever a head's own width is."""

    def check(self, values: Values) -> None:
        width, heads = get(values, "hidden_size"), get(values, "num_attention_heads")
        if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads:
            raise refusal("hidden_size", width, f"must be a multiple of the {heads} heads in this family")


@dataclass(frozen=True)
class AttentionScale(TableRow):
    """What scores are multiplied by, where a family says it: 1 over the root of a head's width is ours without one."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, values: Values) -> dict[str, Any]:
        width = get(values, "head_dim", get(values, "hidden_size") // get(values, "num_attention_heads"))
        scale = get(values, self.key, 1.0)
        return {"attention_scale": None if scale == width**-0.5 else scale}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.key: config.d_head**-0.5 if config.attention_scale is None else config.attention_scale}


@dataclass(frozen=True)
class Latent(TableRow):
    """Multi-head latent attention's sizes. Transformers writes two more, which follow from them."""

    fields: ClassVar[dict[str, str]] = {
        "q_lora_rank": "q_rank",
        "kv_lora_rank": "kv_rank",
        "qk_nope_head_dim": "nope_dim",
        "qk_rope_head_dim": "rope_dim",
        "v_head_dim": "v_dim",
    }
    keys = (*fields, "qk_head_dim", "head_dim")

    def read(self, values: Values) -> dict[str, Any]:
        optional = ("q_lora_rank",)
        return {
            f"mla.{name}": get(values, field, None) if field in optional else get(values, field)
            for field, name in self.fields.items()
        }

    def check(self, values: Values) -> None:
        nope, rope = get(values, "qk_nope_head_dim"), get(values, "qk_rope_head_dim")
        for field, right in (("qk_head_dim", nope + rope), ("head_dim", rope)):
            if get(values, field, right) != right:
                raise refusal(field, values[field], f"must be {right}")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {field: setting(config, f"mla.{name}") for field, name in self.fields.items()}


@dataclass(frozen=True)
class AttentionBias(TableRow):
    """One field for the biases of query, key and value, and in most families of the output too."""

    output: bool = True
    default: bool = False

    keys = ("attention_bias",)

    def read(self, values: Values) -> dict[str, Any]:
        bias = get(values, "attention_bias", self.default)
        return {"qkv_bias": bias, "o_bias": bias and self.output}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": config.qkv_bias}


@dataclass(frozen=True)
class HeadNorm(TableRow):
    """A switch for QK-norm per head."""

    keys = ("use_qk_norm",)

    def read(self, values: Values) -> dict[str, Any]:
        return {"qk_norm": "head" if get(values, "use_qk_norm", False) else "none"}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"use_qk_norm": config.qk_norm == "head"}
