"""Weights in 8 or 4 bits, and in MXFP4: pack, unpack, error.

Symmetric, in groups along the inputs: the `group` neighbouring weights of a row share one scale, a bfloat16 number, and
each is kept as a whole number q of ±127 (8 bits) or ±7 (4 bits) that stands for q · scale.

    weight (..., O, I)  ──►  codes (..., O, columns at 8 or 4 bits)  +  scales (..., O, columns / group)

MXFP4 is how gpt-oss is published (OCP Microscaling Formats 1.0): 4-bit floats, and a power of two for 32 neighbours.

Legend: O outputs · I inputs · C columns: the inputs, padded to whole groups and blocks · r rows of a slice
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from handful.errors import CheckpointError, ConfigError

__all__ = [
    "MX_GROUP",
    "Mxfp4",
    "Packed",
    "check_format",
    "check_weight",
    "error",
    "pack",
    "pack_mxfp4",
    "pack_stack",
    "unpack",
    "unpack_mxfp4",
]

LARGEST = {8: 127, 4: 7}  # what q can be, either sign
GROUPS = (32, 128)
GRID = 64  # columns are padded to a multiple
PIECE, BLOCK = 32, 512  # columns that kernels multiply in one lane, and in all of them
# Weights up to here stay finite in float32 and bfloat16, whichever way their scale is rounded.
LIMIT = 3.3e38
SLICE = 1 << 20  # weights in float32 at a time

MX_GROUP = 32  # weights that share a scale in MXFP4
# What the lower three bits of a code stand for; the fourth is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_EXPONENT = 2  # of the largest
E8M0_BIAS = 127


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantized weight of shape (..., O, I).

    codes    8 bits: int8 (..., O, columns), the q themselves, -127 to 127. 4 bits: uint8 (..., O, columns // 2), two
             q + 8 in a byte, with q from -7 to 7. A row is cut into blocks of 512 columns, of which the last may be
             shorter, and a block into pieces of 32. A block's words of 4 bytes are: the first word of every piece, the
             second of every piece, and so on. Word j of a piece holds its columns 4j to 4j + 3; at 4 bits those in the
             low halves of its bytes, and columns 4j + 16 to 4j + 19 in the high ones.
    scales   bfloat16 (..., O, columns // group): the largest magnitude of the group / 127 or 7. 0: a group of zeros.
    bits     8 or 4.
    group    32 or 128.
    inputs   I. columns is I rounded up to a multiple of max(group, 64); the padding's codes stand for 0.

    Both tensors are contiguous. ConfigError if they do not fit together: kernels read them by these sizes.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    inputs: int

    def __post_init__(self) -> None:
        check_format(self.bits, self.group)
        columns = columns_of(self.inputs, self.group)
        codes, scales = self.codes, self.scales
        kind, width = (torch.int8, columns) if self.bits == 8 else (torch.uint8, columns // 2)
        if codes.dtype != kind or codes.dim() < 2 or codes.shape[-1] != width or not codes.is_contiguous():
            raise ConfigError(
                f"packed codes are {_describe(codes)}: {self.bits} bits and {self.inputs} inputs in groups of "
                f"{self.group} need contiguous {_name(kind)} (..., outputs, {width})"
            )
        right = (*codes.shape[:-1], columns // self.group)
        if scales.dtype != torch.bfloat16 or scales.shape != right or not scales.is_contiguous():
            raise ConfigError(f"packed scales are {_describe(scales)}: they must be contiguous bfloat16 {right}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own: (..., O, I)."""
        return (*self.codes.shape[:-1], self.inputs)

    @property
    def nbytes(self) -> int:
        """Of codes and scales together."""
        return self.codes.nbytes + self.scales.nbytes


def columns_of(inputs: int, group: int) -> int:
    """The inputs, padded to whole groups and whole blocks."""
    whole = max(group, GRID)
    return -(-inputs // whole) * whole


def check_format(bits: int, group: int) -> None:
    """ConfigError unless there is such a format: 8 or 4 bits, groups of 32 or 128."""
    if bits not in LARGEST:
        raise ConfigError(f"bits = {bits}: one of {', '.join(map(str, LARGEST))}")
    if group not in GROUPS:
        raise ConfigError(f"group = {group}: one of {', '.join(map(str, GROUPS))}")


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """ConfigError, naming the tensor, unless it can be quantized: floating, (..., O, I), every value finite."""
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ConfigError(f"{name} is {_describe(weight)}: only floating (..., outputs, inputs) can be quantized")
    if weight.is_meta:
        raise ConfigError(f"{name} has no values (it is on the meta device): it cannot be quantized")
    for index in _slices(tuple(weight.shape)):
        low, high = torch.aminmax(weight.detach()[index])
        largest = max(-float(low), float(high))  # nan where there is one
        if not largest <= LIMIT:
            wrong = f"a value of magnitude {largest:.2g}" if math.isfinite(largest) else "values that are not finite"
            raise ConfigError(f"{name} holds {wrong}: it cannot be quantized (the most is {LIMIT:.2g})")


@torch.no_grad()
def pack(weight: Tensor, bits: int = 4, group: int = 32, name: str = "weight") -> Packed:
    """Quantize a weight of any floating dtype, (..., O, I), on the device where it is.

    Each scale is rounded to bfloat16 first, and the q follow from the rounded one: q = weight / scale, to the nearest,
    ties to even. Memory beyond the result is a few slices, whatever the weight's size.

    name   what errors call it. ConfigError for other bits (8, 4) or groups (32, 128), or a weight that `check_weight`
           refuses.
    """
    check_format(bits, group)
    check_weight(weight, name)
    *lead, inputs = weight.shape
    columns, largest, device = columns_of(inputs, group), LARGEST[bits], weight.device
    codes = torch.empty(*lead, columns * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8, device=device)
    scales = torch.empty(*lead, columns // group, dtype=torch.bfloat16, device=device)
    for index in _slices(tuple(weight.shape)):
        w_rI = weight[index]
        rows = len(w_rI)
        w_rC = torch.zeros(rows, columns, device=device)
        w_rC[:, :inputs] = w_rI
        w_rgn = w_rC.view(rows, columns // group, group)
        scales[index] = w_rgn.abs().amax(-1) / largest
        scale_rg1 = scales[index].float().unsqueeze(-1)
        # A group of zeros has scale 0: any divisor gives its codes.
        q_rgn = (w_rgn / scale_rg1.masked_fill(scale_rg1 == 0, 1.0)).round_().clamp_(-largest, largest)
        q_rC = q_rgn.to(torch.int8).view(rows, columns)
        codes[index] = _interleave(q_rC, bits)
    return Packed(codes, scales, bits, group, inputs)


def pack_stack(parts: Iterable[Tensor], count: int, bits: int = 4, group: int = 32, name: str = "weight") -> Packed:
    """`pack` of `count` weights (O, I), stacked, that come one after the other and are never held together."""
    codes = scales = torch.empty(0)
    inputs = 0
    for i, part in enumerate(parts):
        one = pack(part, bits, group, f"{name}[{i}]")
        if i == 0:
            codes, scales = (t.new_empty(count, *t.shape) for t in (one.codes, one.scales))
            inputs = one.inputs
        codes[i], scales[i] = one.codes, one.scales
    return Packed(codes, scales, bits, group, inputs)


@torch.no_grad()
def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that the codes stand for, (..., O, I): q · scale in float32, then cast."""
    out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    for index in _slices(packed.shape):
        out[index] = _unpack_rows(packed, index)
    return out


@torch.no_grad()
def error(weight: Tensor, packed: Packed | Mxfp4) -> float:
    """‖unpacked − weight‖ / ‖weight‖; 0 for a weight of zeros. ConfigError if their shapes differ."""
    if tuple(weight.shape) != packed.shape:
        raise ConfigError(f"weight has shape {tuple(weight.shape)}: packed is of shape {packed.shape}")
    off, size = 0.0, 0.0
    for index in _slices(packed.shape):
        w_rI = weight[index]
        diff_rI = _unpack_rows(packed, index) - w_rI.to(torch.promote_types(w_rI.dtype, torch.float32))
        off = math.hypot(off, float(torch.linalg.vector_norm(diff_rI, dtype=torch.float64)))
        size = math.hypot(size, float(torch.linalg.vector_norm(w_rI, dtype=torch.float64)))
    return off / size if size else 0.0


def _unpack_rows(packed: Packed | Mxfp4, index: tuple[int | slice, ...]) -> Tensor:
    """Some rows of a packed weight, float32 (r, I)."""
    if isinstance(packed, Mxfp4):
        return unpack_mxfp4(packed.blocks[index], packed.scales[index]).float()
    codes, scales_rg = packed.codes[index], packed.scales[index].float()
    q_rC = _in_order(codes, packed.bits)
    q_rgn = q_rC.view(*scales_rg.shape, packed.group)
    return (q_rgn * scales_rg.unsqueeze(-1)).view(q_rC.shape)[:, : packed.inputs]


def _interleave(q_rC: Tensor, bits: int) -> Tensor:
    """int8 q (r, C) -> codes, as `Packed` holds them."""

    def turn(q_nC: Tensor) -> Tensor:
        words: Tensor = q_nC.unflatten(1, (-1, PIECE // 4, 4)).transpose(1, 2)  # (n, words, pieces, 4)
        if bits == 4:
            low, high = (words + 8).to(torch.uint8).chunk(2, dim=1)
            words = low | high << 4
        return words.flatten(1)

    return _by_blocks(q_rC, BLOCK, turn)


def _in_order(codes: Tensor, bits: int) -> Tensor:
    """`_interleave`, the other way."""

    def turn(codes: Tensor) -> Tensor:
        words: Tensor = codes.unflatten(1, (PIECE * bits // 32, -1, 4))
        if bits == 4:
            words = torch.cat([words & 15, words >> 4], dim=1).to(torch.int8) - 8
        return words.transpose(1, 2).flatten(1)

    return _by_blocks(codes, BLOCK * bits // 8, turn)


def _by_blocks(rows: Tensor, size: int, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """turn((n, size)) of all blocks of the rows at once, and of the rows' last ones where they are shorter."""
    count, width = rows.shape
    parts = [part for part in rows.split([width - width % size, width % size], dim=1) if part.shape[1]]
    return torch.cat([turn(part.reshape(-1, min(size, part.shape[1]))).view(count, -1) for part in parts], dim=1)


def _slices(shape: tuple[int, ...]) -> Iterator[tuple[int | slice, ...]]:
    """Indices of slices that are (r, I) and together the whole: one matrix after another, each in runs of rows."""
    *lead, rows, inputs = shape
    if rows * inputs == 0:
        return
    step = max(1, SLICE // inputs)
    for matrix in itertools.product(*map(range, lead)):
        for first in range(0, rows, step):
            yield (*matrix, slice(first, first + step))


def _describe(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {tuple(tensor.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# MXFP4.


@dataclass(frozen=True, eq=False)
class Mxfp4:
    """A weight of shape (..., O, I) in MXFP4, as checkpoints hold it.

    blocks   uint8 (..., O, I / 32, 16): byte j holds the codes of weights 2j (low half) and 2j + 1 of its group. A code
             is a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4 or 6.
    scales   uint8 (..., O, I / 32): s stands for 2^(s - 127). 255 stands for no number.
    """

    blocks: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own: (..., O, I)."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * MX_GROUP)

    @property
    def nbytes(self) -> int:
        """Of blocks and scales together."""
        return self.blocks.nbytes + self.scales.nbytes


@torch.no_grad()
def unpack_mxfp4(blocks: Tensor, scales: Tensor, name: str = "scales") -> Tensor:
    """The weight that MXFP4 stands for, bfloat16 (..., O, I): every number that it can hold is one of bfloat16's.

    blocks, scales as in `Mxfp4`. CheckpointError, by `name`, for a scale that is no number, or so large that a weight
    is beyond bfloat16.
    """
    highest = int(scales.max()) if scales.numel() else 0
    if highest == 255:
        raise CheckpointError(f"{name} holds scale 255, which stands for no number")
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.bfloat16, device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=1)
    # As bfloat16's own bits: 8 of exponent with the same bias before 7 of mantissa; 2^-127 has no exponent left.
    bits = (scales.to(torch.int16) << 7).masked_fill_(scales == 0, 1 << 6)
    scale = bits.view(torch.bfloat16).reshape(-1, 1)
    groups = blocks.reshape(-1, MX_GROUP // 2)
    out = torch.empty(len(groups), MX_GROUP, dtype=torch.bfloat16, device=blocks.device)
    for first in range(0, len(groups), SLICE // MX_GROUP):
        part = slice(first, first + SLICE // MX_GROUP)
        torch.mul(pairs[groups[part].int()].flatten(1), scale[part], out=out[part])
    if highest + E2M1_EXPONENT > 254 and not out.isfinite().all():
        raise CheckpointError(f"{name} holds scale {highest}, with which a weight is beyond bfloat16")
    return out.view(*scales.shape[:-1], scales.shape[-1] * MX_GROUP)


@torch.no_grad()
def pack_mxfp4(weight: Tensor, name: str = "weight") -> Mxfp4:
    """A weight of any floating dtype, (..., O, I), in MXFP4, by the rule of OCP Microscaling Formats 1.0, section 6.3.

    A group's scale is the power of two under its largest magnitude, over 4, the power of two in the largest code: what
    is beyond 6 scales then is held as 6. Codes are the nearest, ties to the even one.

    ConfigError, by `name`, for inputs that are no multiple of 32, or a weight that `check_weight` refuses.
    """
    check_weight(weight, name)
    *lead, inputs = weight.shape
    if inputs % MX_GROUP:
        raise ConfigError(f"{name} has {inputs} inputs: MXFP4 needs a multiple of {MX_GROUP}")
    blocks = torch.empty(*lead, inputs // MX_GROUP, MX_GROUP // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(*lead, inputs // MX_GROUP, dtype=torch.uint8, device=weight.device)
    for index in _slices(tuple(weight.shape)):
        w_rgn = weight[index].float().unflatten(-1, (-1, MX_GROUP))
        # frexp: largest = m · 2^e with m from 0.5 to below 1. A group of zeros has the least scale.
        power_rg = torch.frexp(w_rgn.abs().amax(-1)).exponent - 1 - E2M1_EXPONENT
        power_rg = power_rg.masked_fill(w_rgn.abs().amax(-1) == 0, -E8M0_BIAS).clamp_(min=-E8M0_BIAS)
        w_rgn = torch.ldexp(w_rgn, -power_rg.unsqueeze(-1))
        code_rgn = torch.zeros_like(w_rgn, dtype=torch.uint8)
        for low, (a, b) in enumerate(itertools.pairwise(E2M1)):
            half = (a + b) / 2  # which goes to the even code
            code_rgn += (w_rgn.abs() > half) if low % 2 == 0 else (w_rgn.abs() >= half)
        code_rgn |= (w_rgn < 0).to(torch.uint8) << 3
        blocks[index] = code_rgn[..., 0::2] | code_rgn[..., 1::2] << 4
        scales[index] = (power_rg + E8M0_BIAS).to(torch.uint8)
    return Mxfp4(blocks, scales)
