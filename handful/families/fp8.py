"""Weights in 8-bit floats with a scale for every block, as DeepSeek-V3 and others are published: read, never written.

A weight of dtype float8 has a tensor of scales beside it, NAME_scale_inv, one for each block of 128 × 128 of its
numbers (arXiv:2412.19437, section 3.3). A number is its code times its block's scale.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from handful.errors import CheckpointError
from handful.lazy_tensors import Entry, Tensors

__all__ = ["BLOCK", "unscaled"]

BLOCK = 128
SCALE = "_scale_inv"


def unscaled(found: Tensors) -> Tensors:
    """The same tensors with every float8 weight multiplied out, as bfloat16, when it is asked for.

    CheckpointError for one whose scales are missing or of another shape or dtype.
    """
    codes = [name for name in found if found.entry(name).dtype == torch.float8_e4m3fn]
    entries = {name: found.entry(name) for name in found}
    for name in codes:
        code, key = entries[name], name + SCALE
        scale = entries.pop(key, None)
        where = f"{code.file}: " if code.file else ""
        if scale is None:
            raise CheckpointError(f"{where}tensor {key!r} is missing, and {name!r} is {code.dtype}")
        right = tuple(-(-size // BLOCK) for size in code.shape)
        if len(right) != 2 or scale.shape != right or scale.dtype not in (torch.float32, torch.bfloat16):
            wanted = f"must be {list(right)}, float32 or bfloat16, for blocks of {BLOCK} x {BLOCK}"
            raise CheckpointError(f"{where}tensor {key!r} has shape {list(scale.shape)}, {scale.dtype}: {wanted}")
        entries[name] = Entry(torch.bfloat16, code.shape, partial(_fill, code, scale), code.file)
    return Tensors(entries)


def _fill(code: Entry, scale: Entry, out: Tensor, row: int | None) -> None:
    """Codes (O, I) times scales (O / 128, I / 128), all rows or one; a row of blocks at a time."""
    codes_OI, scale_OI = code.read(row), scale.read(dtype=torch.float32)
    columns = code.shape[1]

    def times(codes: Tensor, block: int) -> Tensor:
        return codes.float() * scale_OI[block].repeat_interleave(BLOCK)[:columns]

    if row is not None:
        out.copy_(times(codes_OI, row // BLOCK))
        return
    for block in range(len(scale_OI)):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        out[rows].copy_(times(codes_OI[rows], block))
