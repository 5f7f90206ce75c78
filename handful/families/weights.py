"""Tensors: our names and a family's, by one table in both directions.

A table maps our name to theirs, within a layer or outside the layers. Two names are the rows of ours, one after the
other (gate, then up); a name with {e} is one tensor per expert, stacked in ours.

Legend: D model width · E experts · F an expert's hidden width · V vocabulary
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handful.checkpoint import Tensors, check_tensors
from handful.config import ModelConfig
from handful.errors import CheckpointError
from handful.model import Decoder

__all__ = ["DECODER_NAMES", "DENSE_NAMES", "FUSED", "Names", "from_public", "moe_names", "shapes", "to_public"]

Names = dict[str, tuple[str, ...]]

# What nearly every family has under the same names: all but the feed-forward parts.
DECODER_NAMES: Names = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "attn_norm.weight": ("input_layernorm.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    **{
        f"attn.{part}.{kind}": (f"self_attn.{part}_proj.{kind}",)
        for part in ("q", "k", "v", "o")
        for kind in ("weight", "bias")
    },
    "attn.q_norm.weight": ("self_attn.q_norm.weight",),
    "attn.k_norm.weight": ("self_attn.k_norm.weight",),
}
DENSE_NAMES: Names = {
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down.weight": ("mlp.down_proj.weight",),
}
# As transformers 5 holds experts in memory, and as some tools save them: (E, 2F, D) and (E, D, F), like ours.
FUSED: Names = {
    "ffn.router.weight": ("mlp.gate.weight",),
    "ffn.experts.gate_up": ("mlp.experts.gate_up_proj",),
    "ffn.experts.down": ("mlp.experts.down_proj",),
}


def moe_names(block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Names:
    """A router and one set of tensors per expert, as checkpoints on disk have them."""
    expert = f"{block}.experts.{{e}}"
    return {
        "ffn.router.weight": (f"{block}.gate.weight",),
        "ffn.experts.gate_up": (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
        "ffn.experts.down": (f"{expert}.{down}.weight",),
    }


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our tensors' names and shapes, without allocating them. ConfigError for attention that cannot be run."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}


@dataclass(frozen=True)
class Piece:
    """One of their tensors, and where in ours it lies."""

    name: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


def pieces(ours: str, theirs: tuple[str, ...], shape: tuple[int, ...]) -> list[Piece]:
    """The tensors that make one of ours, by the names that a table has for it."""
    layer, _ = split(ours)
    start = f"model.{layer}" if layer else ""
    per_expert = "{e}" in theirs[0]
    if len(theirs) == 1 and not per_expert:
        return [Piece(start + theirs[0], (), shape)]
    experts: list[tuple[int, ...]] = [(e,) for e in range(shape[0])] if per_expert else [()]
    rows, *rest = shape[1:] if per_expert else shape
    each = rows // len(theirs)
    return [
        Piece(start + name.format(e=e[0] if e else ""), (*e, slice(i * each, (i + 1) * each)), (each, *rest))
        for e in experts
        for i, name in enumerate(theirs)
    ]


def split(ours: str) -> tuple[str, str]:
    """("layers.3.", "attn.q.weight"), or ("", name) outside the layers."""
    layer = re.match(r"layers\.\d+\.", ours)
    start = layer.group() if layer else ""
    return start, ours.removeprefix(start)


def to_public(config: ModelConfig, names: Names, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under a family's names: views, nothing is copied."""
    check_tensors(shapes(config), state, source="the model")
    return {
        piece.name: tensor[piece.index]
        for ours, tensor in state.items()
        for piece in pieces(ours, names[split(ours)[1]], tuple(tensor.shape))
    }


def from_public(
    config: ModelConfig, tables: Sequence[Names], found: Mapping[str, Tensor], *, later_tokens: bool = False
) -> dict[str, Tensor]:
    """Tensors under the names of any of the tables as ours. Names and shapes are checked before anything is read.

    The first table that has a tensor's name is taken, and the first of all is what a missing one is asked by.
    `later_tokens` leaves a layer past the last unread.
    """
    wanted = shapes(config)
    plan: dict[str, list[Piece]] = {}
    for ours, shape in wanted.items():
        key = split(ours)[1]
        known = list(dict.fromkeys(table[key] for table in tables if key in table))
        layouts = (pieces(ours, theirs, shape) for theirs in known)
        plan[ours] = next((p for p in layouts if p[0].name in found), pieces(ours, known[0], shape))
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if later_tokens:
        ignored |= {name for name in found if name.startswith(f"model.layers.{config.layers}.")}
    if config.tied:
        ignored.add("lm_head.weight")
    check_tensors({p.name: p.shape for layout in plan.values() for p in layout}, found, ignored=ignored)
    return {ours: _assemble(layout, wanted[ours], found) for ours, layout in plan.items()}


def _assemble(layout: list[Piece], shape: tuple[int, ...], found: Mapping[str, Tensor]) -> Tensor:
    first = _floats(layout[0], found)
    if len(layout) == 1 and not layout[0].index:
        return first
    whole = torch.empty(shape, dtype=first.dtype)
    for piece in layout:
        part = first if piece is layout[0] else _floats(piece, found)
        if part.dtype != whole.dtype:
            raise CheckpointError(f"{_where(piece, found)} is {part.dtype}: must be {whole.dtype} as its neighbours")
        whole[piece.index] = part
    return whole


def _floats(piece: Piece, found: Mapping[str, Tensor]) -> Tensor:
    tensor = found[piece.name]
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise CheckpointError(f"{_where(piece, found)} is {tensor.dtype}: quantized weights cannot be loaded")
    return tensor


def _where(piece: Piece, found: Mapping[str, Tensor]) -> str:
    file = f"{found.where(piece.name)}: " if isinstance(found, Tensors) else ""
    return f"{file}tensor {piece.name!r}"
