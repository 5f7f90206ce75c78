"""Between public checkpoints and ours: config.json <-> ModelConfig, their tensors <-> the decoder's state_dict.

A config is written as the public family that has its maths. Where none has, it is written as model_type "handful": our
config under "model", our own tensor names. `why_not_public` says what stands in the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from handful.checkpoint import Tensors, check_tensors
from handful.config import ModelConfig, RouterConfig, from_dict, to_dict
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
)
from handful.families.counted import COUNTED
from handful.families.elsewhere import hint
from handful.families.family import Family, has_dense
from handful.families.fp8 import unscaled
from handful.families.hybrids import HYBRIDS
from handful.families.rows import refusal, setting
from handful.families.weights import from_public, shapes, to_public

__all__ = [
    "COUNTED",
    "RUN",
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


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json's values: those of the public family with the same maths, or of our own."""
    family, _ = _choose(config)
    if family is None:
        return {"model_type": OURS, "model": to_dict(config)}
    out = {**family.write(config), **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}
    if config.router is not None:
        kept = {name: getattr(config.router, name) for name in TRAINING_ONLY}
        kept = {name: value for name, value in kept.items() if value != RouterConfig.__dict__[name]}
        if kept:
            out[OURS] = {"router": kept}
    return out


def why_not_public(config: ModelConfig) -> str | None:
    """Why no public family has a config's maths: the nearest one and what it has in place. None: one has."""
    family, why = _choose(config)
    return None if family is not None else why


def _family(values: Mapping[str, Any]) -> Family:
    model_type = values.get("model_type")
    for family in (*RUN, *COUNTED):
        if model_type == family.model_type or model_type in family.also:
            return family
    if isinstance(model_type, str) and model_type in HYBRIDS:
        lacks = HYBRIDS[model_type][1]
        raise refusal("model_type", model_type, f"can be counted but not run: it has {lacks}{hint(model_type)}")
    names = ", ".join(family.model_type for family in RUN)
    known = f"must be one of {names}, {OURS}"
    raise refusal("model_type", model_type, f"{known}{hint(model_type) if isinstance(model_type, str) else ''}")


def _choose(config: ModelConfig) -> tuple[Family | None, str]:
    """The first family that reads back what it writes, or None and what the nearest one reads instead."""
    nearest: tuple[int, str] | None = None
    for family in RUN:
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
    paths = [f.name for f in dataclasses.fields(ModelConfig) if f.name != "router"]
    paths += [f"router.{f.name}" for f in dataclasses.fields(RouterConfig) if f.name not in TRAINING_ONLY]
    return [
        f"{path} = {setting(theirs, path)!r} and not {setting(ours, path)!r}"
        for path in paths
        if setting(theirs, path) != setting(ours, path)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors.


def tensors_to_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A decoder's state_dict under the names of `config_to_hf`'s family. Views: nothing is copied.

    CheckpointError if the state is not this config's.
    """
    family, _ = _choose(config)
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
