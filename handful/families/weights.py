"""Tensors: our names and a family's, by one table in both directions.

A table maps our name to theirs, within a layer or outside the layers. Two names are the rows of ours, one after the
other (gate, then up); a name with {e} is one tensor per expert, stacked in ours; what lies otherwise is a `Stored`.

Nothing is made before it is asked for, and then one expert at a time: neither direction holds a second model.

Legend: D model width · E experts · F an expert's hidden width · V vocabulary
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from handful.checkpoint import check_tensors
from handful.config import ModelConfig
from handful.errors import CheckpointError
from handful.lazy_tensors import Entry, Tensors
from handful.meta_device import meta_device
from handful.model import Decoder
from handful.quantize import MX_GROUP, unpack_mxfp4

__all__ = [
    "DECODER_NAMES",
    "DENSE_NAMES",
    "FLOATS",
    "FUSED",
    "Names",
    "Stored",
    "from_public",
    "moe_names",
    "shapes",
    "shapes_of",
    "to_public",
    "where",
]


@dataclass(frozen=True)
class Stored:
    """A name of theirs whose matrices do not lie as ours, (E, rows, inputs).

    transposed    they are (E, inputs, rows).
    interleaved   gate and up rows in turn, where ours are the gate's, then the up's.
    mxfp4         packed: `name`_blocks (E, rows, inputs / 32, 16) and `name`_scales (E, rows, inputs / 32), of bytes.
                  Such a table is read and never written.
    """

    name: str
    transposed: bool = False
    interleaved: bool = False
    mxfp4: bool = False


Plain = dict[str, tuple[str, ...]]
Names = Mapping[str, tuple[str | Stored, ...]]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXPERTS = "ffn.experts."  # ours under this name are a stack with a matrix, or a vector, of each expert

# What nearly every family has under the same names: all but the feed-forward parts.
DECODER_NAMES: Plain = {
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
DENSE_NAMES: Plain = {
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down.weight": ("mlp.down_proj.weight",),
}
# As transformers 5 holds experts in memory, and as some tools save them: (E, 2F, D) and (E, D, F), like ours.
FUSED: Plain = {
    "ffn.router.weight": ("mlp.gate.weight",),
    "ffn.experts.gate_up": ("mlp.experts.gate_up_proj",),
    "ffn.experts.down": ("mlp.experts.down_proj",),
}


def moe_names(block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Plain:
    """A router and one set of tensors per expert, as checkpoints on disk have them."""
    expert = f"{block}.experts.{{e}}"
    return {
        "ffn.router.weight": (f"{block}.gate.weight",),
        "ffn.experts.gate_up": (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
        "ffn.experts.down": (f"{expert}.{down}.weight",),
    }


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our tensors' names and shapes, without allocating them. CheckpointError for sizes that no tensor can have."""
    return shapes_of(lambda: Decoder(config))


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the model that `make` makes, without allocating them."""
    try:
        with meta_device(), warnings.catch_warnings(action="ignore"):
            return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
    except (OverflowError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"config.json: sizes that no tensor can have: {reason}") from None


@dataclass(frozen=True)
class TensorPart:
    """Rows of one of our tensors, and where they lie with them: in one tensor, or with {e} in one of each expert.

    shape     of these rows in ours, of one expert's matrix (or vector) where ours is a stack of them.
    experts   how many matrices ours is a stack of; None: it is no stack.
    """

    stored: Stored
    rows: slice
    shape: tuple[int, ...]
    experts: int | None

    @property
    def apart(self) -> bool:
        return "{e}" in self.stored.name

    @property
    def as_ours(self) -> bool:
        return not (self.stored.transposed or self.stored.interleaved or self.stored.mxfp4)

    def names(self, expert: int | None = None) -> tuple[str, ...]:
        """Of the tensors that an expert's rows are in."""
        name = self.stored.name.format(e=expert or 0) if self.apart else self.stored.name
        return (f"{name}_blocks", f"{name}_scales") if self.stored.mxfp4 else (name,)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all of them."""
        shape = self.shape[::-1] if self.stored.transposed else self.shape
        if self.stored.mxfp4 and shape[-1] % MX_GROUP:
            raise CheckpointError(f"tensor {self.names()[0]!r}: {shape[-1]} inputs: must be a multiple of {MX_GROUP}")
        groups = (*shape[:-1], shape[-1] // MX_GROUP)
        shapes = ((*groups, MX_GROUP // 2), groups) if self.stored.mxfp4 else (shape,)
        lead = () if self.experts is None or self.apart else (self.experts,)
        for expert in range(self.experts or 1) if self.apart else (None,):
            yield from ((name, (*lead, *one)) for name, one in zip(self.names(expert), shapes, strict=True))

    def fill(self, out: Tensor, found: Tensors, expert: int | None) -> None:
        """Read them, those of one expert if ours is a stack, into `out`."""
        names, index = self.names(expert), None if self.apart else expert
        if self.as_ours:
            found.entry(names[0]).fill(out, index)
            return
        read = [found.entry(name).read(index) for name in names]
        theirs = unpack_mxfp4(read[0], read[1], where(names[1], found)) if self.stored.mxfp4 else read[0]
        theirs = theirs.mT if self.stored.transposed else theirs
        if self.stored.interleaved:
            half = len(out) // 2
            out[:half].copy_(theirs[0::2])
            out[half:].copy_(theirs[1::2])
        else:
            out.copy_(theirs)

    def turned(self, ours: Tensor) -> Tensor:
        """These rows of one matrix of ours as they lie with them."""
        if self.stored.interleaved:
            ours = torch.stack(ours.chunk(2), dim=1).flatten(0, 1)
        return ours.mT if self.stored.transposed else ours


def parts(ours: str, theirs: tuple[str | Stored, ...], shape: tuple[int, ...]) -> list[TensorPart]:
    """Where one of our tensors lies, by the names that a table has for it."""
    layer, name = split(ours)
    stack = name.startswith(EXPERTS)
    rows, *rest = shape[1:] if stack else shape or (1,)
    each = rows // len(theirs)
    found = []
    for i, entry in enumerate(theirs):
        stored = entry if isinstance(entry, Stored) else Stored(entry)
        stored = dataclasses.replace(stored, name=(f"model.{layer}" if layer else "") + stored.name)
        own = (each, *rest) if shape else ()
        found.append(TensorPart(stored, slice(i * each, (i + 1) * each), own, shape[0] if stack else None))
    return found


def split(ours: str) -> tuple[str, str]:
    """("layers.3.", "attn.q.weight"), or ("", name) outside the layers."""
    layer = re.match(r"layers\.\d+\.", ours)
    start = layer.group() if layer else ""
    return start, ours.removeprefix(start)


def to_public(config: ModelConfig, names: Names, state: Mapping[str, Tensor]) -> Tensors:
    """Our tensors under a family's names: views where they lie as ours, else made when they are asked for."""
    check_tensors(shapes(config), state, source="the model")
    entries: dict[str, Entry] = {}
    found = Tensors.of(state)
    for ours in found:
        entry = found.entry(ours)
        for part in parts(ours, names[split(ours)[1]], entry.shape):
            entries |= _later(part, entry) if entry.held is None else _entries(part, entry.held)
    return Tensors(entries)


def _later(part: TensorPart, ours: Entry) -> dict[str, Entry]:
    """The same of one of ours that is not in memory: its experts are asked for one after another."""
    assert not part.stored.mxfp4, "such a table is read and never written"

    def fill(out: Tensor, expert: int | None) -> None:
        if expert is None and part.experts is not None:
            for e, matrix in enumerate(out):
                fill(matrix, e)
            return
        matrix = ours.read(expert)
        out.copy_(part.turned(matrix[part.rows] if matrix.dim() else matrix))

    def of(expert: int) -> Callable[[Tensor, int | None], None]:
        return lambda out, _: fill(out, expert)

    tensors = enumerate(part.tensors())
    return {name: Entry(ours.dtype, shape, of(i) if part.apart else fill) for i, (name, shape) in tensors}


def _entries(part: TensorPart, tensor: Tensor) -> dict[str, Entry]:
    """Their tensors that hold a part of ours."""
    assert not part.stored.mxfp4, "such a table is read and never written"
    rows = tensor
    if tensor.dim():
        rows = tensor[part.rows] if part.experts is None else tensor[:, part.rows]
    if part.apart:
        return {part.names(e)[0]: Entry.of(part.turned(matrix)) for e, matrix in enumerate(rows)}
    if part.as_ours or part.experts is None:
        return {part.stored.name: Entry.of(part.turned(rows))}

    def fill(out: Tensor, expert: int | None) -> None:
        matrices = [(out, rows[expert])] if expert is not None else zip(out, rows, strict=True)
        for to, matrix in matrices:
            to.copy_(part.turned(matrix))

    return {name: Entry(tensor.dtype, shape, fill) for name, shape in part.tensors()}


def from_public(
    config: ModelConfig, tables: Sequence[Names], found: Mapping[str, Tensor], *, later_tokens: bool = False
) -> Tensors:
    """Tensors under the names of any of the tables as ours, each made when it is asked for.

    The first table that has a tensor's name is taken, and the first of all is what a missing one is asked by. All
    names, shapes and dtypes are checked now. `later_tokens` leaves a layer past the last unread.
    """
    tensors = Tensors.of(found)
    wanted = shapes(config)
    plan: dict[str, list[TensorPart]] = {}
    for ours, shape in wanted.items():
        key = split(ours)[1]
        known = list(dict.fromkeys(table[key] for table in tables if key in table))
        layouts = (parts(ours, theirs, shape) for theirs in known)
        plan[ours] = next((p for p in layouts if p[0].names()[0] in tensors), parts(ours, known[0], shape))
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if later_tokens:
        ignored |= {name for name in tensors if name.startswith(f"model.layers.{config.layers}.")}
    if config.tied:
        ignored.add("lm_head.weight")
    expected = (tensor for layout in plan.values() for part in layout for tensor in part.tensors())
    # One more than are there is enough to miss one: a config may ask for a billion experts.
    check_tensors(dict(itertools.islice(expected, len(tensors) + 1)), tensors, ignored=ignored)
    return Tensors({ours: _assembled(layout, wanted[ours], tensors) for ours, layout in plan.items()})


def _assembled(layout: list[TensorPart], shape: tuple[int, ...], found: Tensors) -> Entry:
    """One of ours that is read from theirs. CheckpointError for a dtype that cannot be."""
    first = layout[0]
    dtype = torch.bfloat16 if first.stored.mxfp4 else found.entry(first.names()[0]).dtype
    for part in layout:
        for name, _ in part.tensors():
            has = found.entry(name).dtype
            if part.stored.mxfp4 and has != torch.uint8:
                raise CheckpointError(f"{where(name, found)} is {has}: must be {torch.uint8}")
            if not part.stored.mxfp4 and has not in FLOATS:
                raise CheckpointError(f"{where(name, found)} is {has}: quantized weights cannot be loaded")
            if not part.stored.mxfp4 and has != dtype:
                raise CheckpointError(f"{where(name, found)} is {has}: must be {dtype} as its neighbours")

    def fill(out: Tensor, expert: int | None) -> None:
        if first.experts is None and expert is not None:  # nobody asks for a row of what is no stack
            whole = torch.empty(shape, dtype=dtype)
            fill(whole, None)
            out.copy_(whole[expert])
            return
        if (
            first.experts is not None
            and expert is None
            and not (first.as_ours and not first.apart and len(layout) == 1)
        ):
            for e, matrix in enumerate(out):
                fill(matrix, e)
            return
        for part in layout:
            # A scalar, and a stack that lies as ours, are one part and all of it.
            part.fill(out if len(layout) == 1 else out[part.rows], found, expert)

    return Entry(dtype, shape, fill, found.where(first.names()[0]))


def where(name: str, found: Tensors) -> str:
    """A tensor, with the file that holds it if one does, as an error names it."""
    file = found.where(name)
    return f"{file}: tensor {name!r}" if file else f"tensor {name!r}"
