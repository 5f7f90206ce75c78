"""Between public checkpoints and ours: config.json <-> ModelConfig, their tensors <-> the decoder's state_dict.

A config is written as the public family that has its maths. Where none has, it is written as model_type "handful": our
config under "model", our own tensor names. `why_not_public` says what stands in the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from handful.checkpoint import check_tensors
from handful.config import EncoderDecoderConfig, ModelConfig, RouterConfig
from handful.config_io import from_dict, to_dict
from handful.errors import CheckpointError, ConfigError, HandfulError
from handful.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    granitemoe,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    switch_transformers,
)
from handful.families.config_fields import refusal, setting
from handful.families.count_only import COUNT_ONLY
from handful.families.family import Family, has_dense, is_harmless
from handful.families.fp8 import unscaled
from handful.families.hybrids import HYBRIDS
from handful.families.plugin_types import plugin_hint
from handful.families.weights import from_public, shapes, to_public
from handful.lazy_tensors import Tensors

__all__ = [
    "COUNT_ONLY",
    "RUN",
    "carried",
    "config_from_hf",
    "config_to_hf",
    "tensors_from_hf",
    "tensors_to_hf",
    "why_not_public",
]

# Those that our decoder runs. A config is written as the first whose maths it has.
RUN: tuple[Family, ...] = tuple(
    module.FAMILY
    for module in (
        qwen3_moe,
        olmoe,
        mixtral,
        qwen2_moe,
        glm4_moe,
        minimax_m2,
        granitemoe,
        deepseek,
        deepseek_v2,
        deepseek_v3,
        gpt_oss,
        qwen3,
        llama,
        mistral,
    )
)
OURS = "handful"

# Settings that change training and no logits: a public config.json keeps them under "handful".
TRAINING_ONLY = ("capacity_factor", "drop_order", "jitter", "random_second")


# ---------------------------------------------------------------------------------------------------------------------
# Configs.


def config_from_hf(values: Mapping[str, Any], *, count_only: bool = False) -> ModelConfig:
    """A config.json's values as our config.

    count_only   the config is for `cost` alone: families and fields whose maths our decoder lacks are fine then.

    CheckpointError names the family or field that is missing, malformed, unknown or not supported.
    """
    try:
        if values.get("model_type") == OURS:
            return from_dict(ModelConfig, _table(values, "model"))
        config = _family(values).read(values, count_only=count_only)
        kept = _table(_table(values, OURS), "router")
        for name in kept:
            if name not in TRAINING_ONLY:
                raise ConfigError(f"{OURS}.router.{name}: one of {', '.join(TRAINING_ONLY)}")
        if config.router is None or not kept:
            return config
        router = from_dict(RouterConfig, {**to_dict(config.router), **kept}, f"{OURS}.router")
        return dataclasses.replace(config, router=router)
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from None


def _table(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key, {})
    if not isinstance(found, Mapping):
        raise ConfigError(f"{key} = {found!r}: must be an object")
    return found


def config_to_hf(config: ModelConfig, like: str | None = None) -> dict[str, Any]:
    """A config.json's values: those of the public family with the same maths, or of our own.

    like   the model_type to write where several have: that of the checkpoint that the model came from.
    """
    family, _ = _choose(config, like)
    if family is None:
        return {"model_type": OURS, "model": to_dict(config)}
    out = {**family.write(config), **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}
    if config.router is not None:
        kept = {name: getattr(config.router, name) for name in TRAINING_ONLY}
        kept = {name: value for name, value in kept.items() if value != RouterConfig.__dict__[name]}
        if kept:
            out[OURS] = {"router": kept}
    return out


# What a saved checkpoint decides anew, or what its other files do.
DTYPE = ("dtype", "torch_dtype")
DECIDED = frozenset({"architectures", "auto_map", "handful", "model_type", "quantization_config", *DTYPE})


def carried(
    written: Mapping[str, Any], config: ModelConfig | EncoderDecoderConfig, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """A config.json's values with what the one that the model came from says beside its maths.

    written   by `config_to_hf`, with the dtype.
    origin    the values of that config.json. Where they still say the model's config they stand as they are, all but
              the dtype, what they say of the weights' quantization, and whose code to run. Where they do not (an
              upcycled model), the fields that change no logits are taken over.
    """
    dtype = written["torch_dtype"]
    if origin.get("model_type") == written["model_type"] and _says(origin, config):
        kept = {key: value for key, value in origin.items() if key not in ("auto_map", "quantization_config")}
        return kept | dict.fromkeys([key for key in DTYPE if key in kept] or ["torch_dtype"], dtype)
    taken = {key: value for key, value in origin.items() if is_harmless(key) and key not in DECIDED}
    return {**written, **taken}


def _says(values: Mapping[str, Any], config: ModelConfig | EncoderDecoderConfig) -> bool:
    read = config_from_hf if isinstance(config, ModelConfig) else switch_transformers.config_from_hf
    try:
        return read(values) == config
    except HandfulError:
        return False


def why_not_public(config: ModelConfig) -> str | None:
    """Why no public family has a config's maths: the nearest one and what it has in place. None: one has."""
    family, why = _choose(config)
    return None if family is not None else why


def _family(values: Mapping[str, Any]) -> Family:
    model_type = values.get("model_type")
    for family in (*RUN, *COUNT_ONLY):
        if model_type == family.model_type or model_type in family.also:
            return family
    if isinstance(model_type, str) and model_type in HYBRIDS:
        lacks = HYBRIDS[model_type][1]
        raise refusal("model_type", model_type, f"can be counted but not run: it has {lacks}{plugin_hint(model_type)}")
    names = ", ".join(family.model_type for family in RUN)
    known = f"must be one of {names}, {OURS}"
    raise refusal("model_type", model_type, f"{known}{plugin_hint(model_type) if isinstance(model_type, str) else ''}")


def _choose(config: ModelConfig, like: str | None = None) -> tuple[Family | None, str]:
    """The family of a model_type, or else the first, that reads back what it writes; or None and what the nearest one
    reads instead."""
    nearest: tuple[int, str] | None = None
    for family in sorted(RUN, key=lambda family: like != family.model_type and like not in family.also):
        if family.dense != (config.router is None):
            continue
        try:
            differences = _differences(family.read(family.write(config)), config)
        except HandfulError:
            continue
        if not differences:
            return family, ""
        if nearest is None or len(differences) < nearest[0]:
            nearest = len(differences), f"{family.model_type} is nearest, where {' and '.join(differences)}"
    return None, nearest[1] if nearest else f"no public family has its activation, {config.activation!r}"


def _differences(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """The settings in which two configs differ, as far as logits go."""
    if not has_dense(ours):
        ours = dataclasses.replace(ours, ffn=0)
    if ours.rope_scaling is not None and ours.rope_scaling.kind == "yarn":
        ours = dataclasses.replace(ours, context=theirs.context)  # YaRN's reach is its own, and no part of the maths
    paths = [f.name for f in dataclasses.fields(ModelConfig) if f.name != "router"]
    paths += [f"router.{f.name}" for f in dataclasses.fields(RouterConfig) if f.name not in TRAINING_ONLY]
    return [
        f"{path} = {setting(theirs, path)!r} and not {setting(ours, path)!r}"
        for path in paths
        if setting(theirs, path) != setting(ours, path)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors.


def tensors_to_hf(config: ModelConfig, state: Mapping[str, Tensor], like: str | None = None) -> Mapping[str, Tensor]:
    """A decoder's state_dict under the names of the family that `config_to_hf` writes. Views: nothing is copied.

    CheckpointError if the state is not this config's.
    """
    family, _ = _choose(config, like)
    if family is None:
        check_tensors(shapes(config), state, source="the model")
        return state
    return to_public(config, family.names[0], state)


def tensors_from_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A checkpoint's tensors, under any family's names or ours, as a decoder's state_dict, in their dtypes.

    The config says what each must be, so the names alone tell the families' layouts apart: experts one tensor each, or
    stacked as transformers 5 holds them. CheckpointError names the file and the tensor that is missing, unexpected, of
    the wrong shape or quantized; nothing is read before all names and shapes are right.
    """
    family, _ = _choose(config)
    if family is None or "embed.weight" in tensors:
        check_tensors(shapes(config), tensors)
        return tensors
    tensors = unscaled(Tensors.of(tensors))
    tables = [table for other in (family, *RUN) for table in other.names]
    return from_public(config, tables, tensors, later_tokens=family.later_tokens)
