"""What a checkpoint says beside its weights, kept with the model: to generate as it asks, and to hand on when the model
is saved again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handful.checkpoint import read_json
from handful.errors import CheckpointError, ConfigError
from handful.sampling import Sampling

__all__ = ["GENERATION", "Origin", "read_origin"]

GENERATION = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A checkpoint's config.json and generation_config.json.

    config       config.json, as it was read.
    stop_ids     tokens that end an answer: eos_token_id of both files, which may name several.
    sampling     how generation_config.json asks for tokens to be drawn; None if it does not.
    files        name -> content of what a checkpoint hands on unchanged.
    """

    config: Mapping[str, Any]
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def read_origin(folder: Path, config: Mapping[str, Any]) -> Origin:
    """Of a checkpoint folder whose config.json holds `config`. CheckpointError for a field that is malformed."""
    file = folder / GENERATION
    generation = read_json(file) if file.is_file() else {}
    stops = [*_ids("config.json", config), *_ids(GENERATION, generation)]
    return Origin(
        config=dict(config),
        stop_ids=tuple(dict.fromkeys(stops)),
        sampling=_sampling(generation),
        files={GENERATION: file.read_bytes()} if file.is_file() else {},
    )


def _ids(file: str, values: Mapping[str, Any]) -> list[int]:
    given = values.get("eos_token_id")
    found = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in found):
        raise CheckpointError(f"{file}: eos_token_id = {repr(given)[:80]}: a token's number, or a list of them")
    return [token for token in found if token >= 0]  # some write -1 for none


def _sampling(values: Mapping[str, Any]) -> Sampling | None:
    """The settings that the file has, and beside them none but the model's own probabilities."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: values[name] for name in names if values.get(name) is not None}
    draws = values.get("do_sample")
    if not given and draws is None:
        return None
    for name, value in given.items():
        right = isinstance(value, int) if name == "top_k" else isinstance(value, int | float)
        if not right or isinstance(value, bool):
            raise CheckpointError(f"{GENERATION}: {name} = {repr(value)[:80]}: a number")
    if draws is False:
        given["temperature"] = 0.0
    try:
        return Sampling(**{"temperature": 1.0, "top_p": 1.0, **given})
    except ConfigError as error:
        raise CheckpointError(f"{GENERATION}: {error}") from None
