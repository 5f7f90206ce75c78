"""A recorded load, and placements, from the files that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from handful.checkpoint import read_json
from handful.errors import ConfigError
from handful.observe import Recording
from handful.placement.placement import Ints, Placement

__all__ = ["read_load", "read_placements", "read_split", "read_tokens"]


def read_load(path: str | Path) -> list[list[float]]:
    """The load of every expert in each MoE layer: of `inspect.json` of `handful inspect`, of a routing that `handful
    generate --routing` wrote (.safetensors), or of a JSON file {"load": [[...], ...]}. ConfigError for another one."""
    path = Path(path)
    if path.suffix == ".safetensors":
        recording = Recording.read(path)
        most = 1 + max((int(experts_TK.max()) for experts_TK in recording.experts_TK if experts_TK.numel()), default=0)
        return [
            np.bincount(experts_TK.long().flatten().numpy(), minlength=most).astype(float).tolist()
            for experts_TK in recording.experts_TK
        ]
    found: Any = read_json(path)
    try:
        if "sides" in found:
            rows = [[expert["load"] for expert in layer["experts"]] for layer in found["sides"][0]["layers"]]
        else:
            rows = found["load"]
        loads = [[float(value) for value in row] for row in rows]
    except (KeyError, TypeError, ValueError, IndexError):
        loads = []
    if not loads:
        raise ConfigError(f'load = {str(path)!r}: neither inspect.json, nor a routing, nor {{"load": [[...], ...]}}')
    return loads


def read_tokens(path: str | Path) -> list[Ints] | None:
    """The experts of every token in each MoE layer, (T, K), of a routing (.safetensors); None of another file."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return None
    return [experts_TK.long().numpy() for experts_TK in Recording.read(path).experts_TK]


def read_placements(path: str | Path, name: str = "before") -> list[Placement]:
    """Of every layer, from a file that `handful place` wrote. ConfigError for another one."""
    return [placement for placement, _ in read_split(path, name)]


def read_split(path: str | Path, name: str) -> list[tuple[Placement, list[list[float]] | None]]:
    """The same with the shares of each device's experts, where the file has them."""
    found: Any = read_json(Path(path))
    try:
        layers = [(layer["experts"], layer.get("shares")) for layer in found["layers"]]
        return [(Placement(tuple(tuple(own) for own in held)), shares) for held, shares in layers]
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"{name} = {str(path)!r}: no placement that handful place wrote") from None
