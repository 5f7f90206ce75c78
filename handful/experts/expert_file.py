"""Experts in one file, a record for each: written once, then read record by record, in any order.

    start · description (JSON) · a checksum of every record · records: layer 0 expert 0, layer 0 expert 1, …

A record holds all of an expert's weights, at places that are the same in every record, and is a whole number of pages,
so that it can be read straight into the memory that the kernels multiply from, past the system's own cache of files.

Legend: E experts · D model width · F an expert's hidden width · G = 2·F gate and up rows (F without a gate)
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import math
import os
import secrets
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handful.errors import CheckpointError, ConfigError
from handful.quantize import check_format, columns_of

__all__ = ["Layout", "PackFile", "RecordField", "layout_of", "sole_writer", "view", "write_pack"]

MAGIC, VERSION = b"HANDFUL\x00", 3
PAGE = 4096  # what direct reads are aligned to: the largest block of common disks
UNKNOWN = "0" * 64  # a source that is not known yet, as long as one that is
ALIGN = 64  # a cache line, for a field within a record
LONGEST = 1 << 24  # of a description, in bytes

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DTYPES = FLOATS | {"int8": torch.int8, "uint8": torch.uint8}

# Where a test may make the disk fail.
preadv = os.preadv
pwrite = os.pwrite


@dataclass(frozen=True)
class RecordField:
    """One tensor of every record: its name, dtype, shape, and where in the record it begins."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a pack holds and where.

    source     a digest of every number that was packed: `attach` holds a model in memory against it.
    files      of the checkpoint that it was packed from, their names, sizes, times and a digest of their headers:
               `load` holds the folder against these, which takes no reading of weights. Empty: packed from memory.
    layers     the names of the modules that hold experts, in order.
    experts    E, of each of them.
    bits       8 or 4 with `group` weights to a scale; 0: floating weights.
    dtype      of the weights, or of what they were before they were quantized.
    fields     of a record: gate_up (G, D) and down (D, F), or their codes (`handful.quantize.Packed`) and
               gate_up_scales and down_scales; gate_up_bias (G,) and down_bias (D,) if there are any.
    """

    source: str
    files: tuple[tuple[str, int, int, str], ...]
    layers: tuple[str, ...]
    experts: int
    bits: int
    group: int
    dtype: str
    fields: tuple[RecordField, ...]

    @property
    def record_bytes(self) -> int:
        last = self.fields[-1]
        return _up(last.offset + last.nbytes, PAGE)

    @property
    def records(self) -> int:
        return len(self.layers) * self.experts

    @property
    def start(self) -> int:
        """Where in the file the records begin."""
        return _up(len(MAGIC) + 8 + len(self.text()) + 4 * self.records + 4, PAGE)

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.start + self.records * self.record_bytes

    @property
    def format(self) -> str:
        """In words: "bfloat16", "int4/32"."""
        return f"int{self.bits}/{self.group}" if self.bits else self.dtype

    def text(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()


def layout_of(
    layers: tuple[str, ...],
    gate_up: tuple[int, int, int],
    down: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    bias: bool,
    bits: int = 0,
    group: int = 32,
    files: tuple[tuple[str, int, int, str], ...] = (),
) -> Layout:
    """The layout for experts of these shapes, (E, G, D) and (E, D, F). ConfigError for a format that is not there."""
    name = str(dtype).removeprefix("torch.")
    if name not in FLOATS:
        raise ConfigError(f"experts of {name} cannot be packed: one of {', '.join(FLOATS)}")
    wanted: list[tuple[str, str, tuple[int, ...]]] = []
    if bits:
        check_format(bits, group)
        for key, (_, rows, inputs) in (("gate_up", gate_up), ("down", down)):
            columns = columns_of(inputs, group)
            codes = ("int8", columns) if bits == 8 else ("uint8", columns // 2)
            wanted += [(key, codes[0], (rows, codes[1])), (f"{key}_scales", "bfloat16", (rows, columns // group))]
    else:
        wanted += [("gate_up", name, gate_up[1:]), ("down", name, down[1:])]
    if bias:
        wanted += [("gate_up_bias", name, gate_up[1:2]), ("down_bias", name, down[1:2])]
    fields: list[RecordField] = []
    offset = 0
    for key, kind, shape in wanted:
        fields.append(RecordField(key, kind, shape, offset))
        offset = _up(offset + fields[-1].nbytes, ALIGN)
    return Layout(
        source=UNKNOWN,
        files=files,
        layers=layers,
        experts=gate_up[0],
        bits=bits,
        group=group if bits else 0,
        dtype=name,
        fields=tuple(fields),
    )


def _up(value: int, grid: int) -> int:
    return -(-value // grid) * grid


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def write_pack(
    path: str | Path,
    layout: Layout,
    record: Callable[[int, int], Mapping[str, Tensor]],
    progress: Callable[[int, int], None] | None = None,
    *,
    source: Callable[[], str] = lambda: UNKNOWN,
) -> None:
    """Write a pack, one expert in memory at a time, so that it appears whole or not at all.

    record     (layer, expert) -> its tensors by the fields' names.
    progress   is told (bytes done, bytes in all) after every record.
    source     asked for after the last record, what `Layout.source` is then.

    The file's size is claimed from the disk before anything is written. Its temporary name is this writer's alone.
    CheckpointError if the disk refuses, with nothing left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".new-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    data = bytearray(layout.record_bytes)
    whole = torch.frombuffer(data, dtype=torch.uint8)
    sums: list[int] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, layout.nbytes)
            at = layout.start
            for layer in range(len(layout.layers)):
                for expert in range(layout.experts):
                    tensors = record(layer, expert)
                    for field in layout.fields:
                        view(whole, field).copy_(tensors[field.name])
                    sums.append(checksum(data))
                    _write(file, data, at)
                    at += len(data)
                    if progress is not None:
                        progress(at - layout.start, layout.nbytes - layout.start)
            text = replace(layout, source=source()).text()
            head = MAGIC + VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
            head += b"".join(value.to_bytes(4, "little") for value in sums)
            _write(file, head + zlib.crc32(head).to_bytes(4, "little"), 0)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        what = f"cannot be written: {error.strerror} (it has {layout.nbytes:,} bytes)"
        raise CheckpointError(f"{path}: {what}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """One process at a time packs into a folder: whoever waited finds what the first one made. What a writer that was
    killed left of this pack is removed. Where the file system has no locks, several write, each under its own name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
            for left in path.parent.glob(f".new-{glob.escape(path.name)}-*"):
                left.unlink()
        yield
    finally:
        os.close(folder)


def checksum(record: bytearray | memoryview) -> int:
    """The CRC-32 of the sums of a record's pages, as 64-bit words: it finds what a disk or a copy does to a file, pages
    that are missing, swapped or of something else among it, at ten times the rate of a CRC of all bytes."""
    sums = np.frombuffer(record, np.uint64).reshape(-1, PAGE // 8).sum(axis=1)
    return zlib.crc32(sums.data)


def _write(file: int, data: bytes | bytearray, at: int) -> None:
    view = memoryview(data)
    while view:
        done = pwrite(file, view, at)
        view, at = view[done:], at + done


def view(record: Tensor, field: RecordField) -> Tensor:
    """A field of a record of bytes, or of a stack of them."""
    part = record[..., field.offset : field.offset + field.nbytes].view(DTYPES[field.dtype])
    stack: Tensor = part.unflatten(-1, field.shape)
    return stack


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


class PackFile:
    """A pack, open. Several threads may read from it at once.

    Reads go past the system's cache of files where the file system can do that; elsewhere what was read is dropped from
    it, so that a memory budget is one. Every record's checksum is looked at whenever it is read.

    CheckpointError for a file that is missing, truncated, of another version, or no pack.
    """

    def __init__(self, path: str | Path, *, direct: bool = True) -> None:
        self.path = Path(path)
        self._file: int | None = None
        self._lock = threading.Lock()
        try:
            self._file = os.open(self.path, os.O_RDONLY)
            self.layout, self._sums = self._read_head()
            if direct:
                self._go_direct()
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: no such file") from None
        except OSError as error:
            self.close()
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def _go_direct(self) -> None:
        """Read past the cache, if the file system lets us: it says so when it is first asked."""
        self.direct = False
        flag = getattr(os, "O_DIRECT", 0)
        if not flag:
            return
        try:
            file = os.open(self.path, os.O_RDONLY | flag)
        except OSError:
            return
        assert self._file is not None
        if os.fstat(file).st_ino == os.fstat(self._file).st_ino:
            os.close(self._file)
            self._file, self.direct = file, True
        else:  # it was replaced in this moment: the description read is of the other
            os.close(file)

    direct = False

    def _read_head(self) -> tuple[Layout, list[int]]:
        assert self._file is not None
        size = os.fstat(self._file).st_size
        first = os.pread(self._file, len(MAGIC) + 8, 0)
        if first[: len(MAGIC)] != MAGIC:
            raise CheckpointError(f"{self.path}: not a pack of experts")
        version, length = (int.from_bytes(first[i : i + 4], "little") for i in (len(MAGIC), len(MAGIC) + 4))
        if version != VERSION:
            raise CheckpointError(f"{self.path}: a pack of version {version}: this reads {VERSION}; make it again")
        if length > min(size, LONGEST):
            raise CheckpointError(f"{self.path}: truncated or malformed: a description of {length} bytes")
        text = os.pread(self._file, length, len(first))
        try:
            layout = _layout_from(json.loads(text))
            if layout.records > size:
                raise ValueError("records")
            head = os.pread(self._file, len(first) + length + 4 * layout.records + 4, 0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            raise CheckpointError(f"{self.path}: malformed: its description is no pack's") from None
        table, check = head[len(first) + length : -4], head[-4:]
        if zlib.crc32(head[:-4]) != int.from_bytes(check, "little") or len(table) != 4 * layout.records:
            raise CheckpointError(f"{self.path}: damaged: its description's checksum is wrong; make it again")
        if size != layout.nbytes:
            raise CheckpointError(f"{self.path}: truncated: {size} bytes, must be {layout.nbytes}; make it again")
        return layout, [int.from_bytes(table[i : i + 4], "little") for i in range(0, len(table), 4)]

    def read(self, layer: int, expert: int, into: memoryview) -> None:
        """Fill `into`, page-aligned memory of a record's size, with an expert's record.

        CheckpointError names the file and the expert, if the disk fails, the file was cut, or its checksum is wrong.
        """
        index = layer * self.layout.experts + expert
        size, at = self.layout.record_bytes, self.layout.start + index * self.layout.record_bytes
        file = self._file
        if file is None:
            raise CheckpointError(f"{self._where(layer, expert)}: the pack is closed")
        done = 0
        try:
            while done < size:
                count = preadv(file, [into[done:size]], at + done)
                # A direct read can only go on at a page's beginning.
                reached = (done + count) // PAGE * PAGE if self.direct and done + count < size else done + count
                if reached <= done:
                    raise CheckpointError(f"{self._where(layer, expert)}: truncated while in use")
                done = reached
            if not self.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, at, size, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{self._where(layer, expert)}: cannot be read: {error.strerror}") from None
        if checksum(into[:size]) != self._sums[index]:
            raise CheckpointError(f"{self._where(layer, expert)}: damaged: its checksum is wrong; make it again")

    def _where(self, layer: int, expert: int) -> str:
        return f"{self.path}: {self.layout.layers[layer]} expert {expert}"

    def close(self) -> None:
        """Give the file back. Nobody may be reading."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def _layout_from(values: Any) -> Layout:
    """A description, as it was written. ValueError, KeyError or TypeError if it is not one."""
    fields = tuple(
        RecordField(str(f["name"]), str(f["dtype"]), tuple(int(n) for n in f["shape"]), int(f["offset"]))
        for f in values["fields"]
    )
    if not fields or any(f.dtype not in DTYPES or f.offset < 0 or min(f.shape, default=0) < 1 for f in fields):
        raise ValueError("fields")
    files = tuple((str(name), int(size), int(time), str(header)) for name, size, time, header in values["files"])
    layers = tuple(str(name) for name in values["layers"])
    return Layout(**(values | {"fields": fields, "files": files, "layers": layers}))
