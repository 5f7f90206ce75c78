"""Tensors by name that are made when they are asked for: from a file, from memory, or from other tensors.

Tensors   a mapping from name to tensor, whose names, shapes and dtypes are known before
Entry     one of them
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Entry", "Tensors"]


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor that is made when it is asked for.

    dtype, shape   known without making it.
    fill           fill(out, None) writes it into `out`, of its shape; fill(out, i) its part i along the first
                   dimension. `out` may be of any dtype, on any device.
    file           that holds it; None: it is in no file.
    held           the tensor, if it is in memory anyway.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: Callable[[Tensor, int | None], None]
    file: Path | None = None
    held: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """One that is in memory."""

        def fill(out: Tensor, part: int | None) -> None:
            out.copy_(tensor if part is None else tensor[part])

        tensor = tensor.detach()
        return cls(tensor.dtype, tuple(tensor.shape), fill, held=tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(
        self, part: int | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The tensor, or its part along the first dimension, in a dtype of its own or another."""
        if self.held is not None:
            held = self.held if part is None else self.held[part]
            return held.to(dtype=dtype or self.dtype, device=device)
        out = torch.empty(self.shape if part is None else self.shape[1:], dtype=dtype or self.dtype, device=device)
        self.fill(out, part)
        return out


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, made when they are asked for; names, shapes and dtypes are known before."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Tensors:
        """Any mapping as one of these."""
        if isinstance(tensors, Tensors):
            return tensors
        return cls({name: Entry.of(tensor) for name, tensor in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # a Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> Entry:
        """A tensor that is not read yet."""
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._entries[name].shape

    def where(self, name: str) -> Path | None:
        """The file that holds a tensor, if one does."""
        return self._entries[name].file

    @property
    def files(self) -> list[Path]:
        """All files that hold one."""
        return list(dict.fromkeys(entry.file for entry in self._entries.values() if entry.file is not None))
