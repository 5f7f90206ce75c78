"""One file of tensors, in safetensors: written, and read tensor by tensor.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON header that says of every
tensor its dtype, shape and place, then the tensors' bytes. Both directions are written out here, because both hold one
tensor at a time: a mapped file's pages count as the process's memory until the last of its tensors is gone.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from handful.errors import CheckpointError
from handful.lazy_tensors import Entry, Tensors

__all__ = ["DTYPES", "HEADER_LIMIT", "Scratch", "quoted", "read_header", "write_tensors"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 1 << 24  # parsed JSON takes up to twenty times its text: some 100,000 tensors a file
CHUNK = 1 << 22


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file, one tensor in memory at a time, or one matrix of a stack that is made for this."""
    # Wide dtypes first: then every tensor begins at a multiple of its item's size.
    order = sorted(tensors, key=lambda name: (-tensors.entry(name).dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in order:
        entry = tensors.entry(name)
        if entry.dtype not in NAMES:
            raise ValueError(f"tensor {name!r} is {entry.dtype}, which safetensors has not")
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end := end + entry.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            entry = tensors.entry(name)
            parts = range(entry.shape[0]) if entry.held is None and len(entry.shape) > 2 else [None]
            for part in parts:
                file.write(_bytes(entry.read(part).cpu().contiguous()))


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class Scratch:
    """Room for what is read in one dtype and wanted in another: a few megabytes, which stay in the processor's cache.

    It is kept, for the allocator breaks up what is given back, and then has to find as much again.
    """

    def __init__(self) -> None:
        self.room: Tensor | None = None

    def of(self, dtype: torch.dtype) -> Tensor:
        if self.room is None:
            self.room = torch.empty(CHUNK, dtype=torch.uint8)
        return self.room.view(dtype)


class _File:
    """An open file: what is read later is of the file whose header was read, whatever is renamed meanwhile."""

    def __init__(self, path: Path, scratch: Scratch) -> None:
        self.path, self.scratch = path, scratch
        self.handle = open(path, "rb", buffering=0)  # noqa: SIM115 - it stays open as long as its tensors

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.handle.close()

    def fill(self, out: Tensor, start: int) -> None:
        """Read a contiguous CPU tensor's bytes from a place in the file."""
        try:
            self.handle.seek(start)
            view, done = _bytes(out), 0
            while done < len(view):  # one call reads at most 2 GiB
                count = self.handle.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.path}: truncated while it was read")
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None

    def entry(self, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Entry:
        def fill(out: Tensor, part: int | None) -> None:
            at = start + (part or 0) * math.prod(shape[1:]) * dtype.itemsize
            if out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
                self.fill(out, at)
                return
            if not out.is_contiguous():
                whole = torch.empty(out.shape, dtype=dtype)
                self.fill(whole, at)
                out.copy_(whole)
                return
            flat, step = out.view(-1), CHUNK // dtype.itemsize
            for first in range(0, len(flat), step):
                to = flat[first : first + step]
                read = self.scratch.of(dtype)[: len(to)]
                self.fill(read, at + first * dtype.itemsize)
                to.copy_(read)

        return Entry(dtype, shape, fill, self.path)


def read_header(path: Path, scratch: Scratch) -> dict[str, Entry]:
    """The tensors of one file. All that a header says is checked against the file's size before it is believed."""

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: truncated or malformed: {what}")

    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        file = _File(path, scratch)
        size = os.fstat(file.handle.fileno()).st_size
        length = int.from_bytes(file.handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise wrong(f"a header of {length} bytes in a file of {size}")
        if length > HEADER_LIMIT:
            raise wrong(f"a header of {length} bytes: at most {HEADER_LIMIT}")
        text = file.handle.read(length)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{quoted(str(path))}: cannot be read: {error}") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise wrong(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise wrong("its header is no JSON object")
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise wrong("its __metadata__ is no JSON object")
    begin = 8 + length
    entries, spans = {}, []
    for name, info in header.items():
        try:
            dtype, shape, start, end = _checked(info, size - begin)
        except ValueError as error:
            raise wrong(f"{quoted(name)} {error}") from None
        entries[name] = file.entry(dtype, shape, begin + start)
        spans.append((start, end, name))
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            raise wrong(f"{quoted(name)} begins at byte {start} of the tensors, where {at} is next")
        at = end
    if at != size - begin:
        raise wrong(f"its tensors have {at} bytes, and the file {size - begin}")
    return entries


def _checked(info: Any, size: int) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """A header's (dtype, shape, start, end) of one tensor in a file with `size` bytes of tensors, or ValueError."""
    if not isinstance(info, dict):
        raise ValueError("is not described")
    name, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"has dtype {quoted(name)}: one of {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > 64 or math.prod(max(1, n) for n in shape) >= 1 << 60:
        raise ValueError(f"has shape {quoted(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise ValueError(f"has data_offsets {quoted(offsets)} in {size} bytes of tensors")
    dtype = DTYPES[name]
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"is {name} {shape} in {offsets[1] - offsets[0]} bytes")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _counts(value: Any) -> TypeGuard[list[int]]:
    """A list of whole numbers from 0 that a file can have."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 60 for n in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"two entries named {quoted(twice)}")
    return found


def quoted(value: Any) -> str:
    """A value from a file as an error may show it: on one line, and not a megabyte of it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
