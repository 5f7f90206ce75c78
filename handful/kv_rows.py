"""Keys and values in 8 bits: the rows of a KV cache that takes a little more than half of one in bfloat16.

A row is what a key-value head holds of a token: a bfloat16 scale for each 32 numbers, then the numbers' codes, and a
byte more where these are odd. Each group of 32 is scaled for itself, so that a large number costs its 31 neighbours
precision and nobody else: 8.5 bits a number.

    number = scale · code      scale = largest of the group / 127, code a whole number from -127 to 127

The kernels write and read the same rows (`to_cache8` in csrc/rows.inc), and no tensor of all numbers is made.

Legend: d head width · G groups of a row
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from handful.cost import CACHE_GROUP as GROUP
from handful.cost import cache_row_bytes

__all__ = ["pack_rows", "unpack_rows"]

TINY = torch.finfo(torch.bfloat16).tiny  # the least scale


def pack_rows(x: Tensor) -> Tensor:
    """Rows of numbers (..., d) in 8 bits: int8 (..., `cache_row_bytes`). A group with one that is not finite is NaN."""
    d = x.shape[-1]
    groups = -(-d // GROUP)
    x_Gd = F.pad(x.float(), (0, groups * GROUP - d)).unflatten(-1, (groups, GROUP))
    largest_G = x_Gd.abs().amax(-1) / 127 + (x_Gd - x_Gd).sum(-1)
    scales_G = largest_G.clamp_min(TINY).to(torch.bfloat16)
    codes_Gd = (x_Gd / scales_G.float().unsqueeze(-1)).nan_to_num().round().to(torch.int8)
    rows = torch.cat([scales_G.view(torch.int8), codes_Gd.flatten(-2)[..., :d]], dim=-1)
    return F.pad(rows, (0, cache_row_bytes(d) - rows.shape[-1]))


def unpack_rows(rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The numbers (..., width) of rows in 8 bits, rounded to a dtype."""
    groups = -(-width // GROUP)
    scales_G = rows[..., : 2 * groups].contiguous().view(torch.bfloat16).to(torch.promote_types(dtype, torch.float32))
    codes = rows[..., 2 * groups : 2 * groups + width]
    return (codes * scales_G.repeat_interleave(GROUP, dim=-1)[..., :width]).to(dtype)
