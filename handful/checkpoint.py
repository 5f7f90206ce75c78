"""Safetensors in and out: written whole or not at all, read lazily, refused with file and tensor named.

    write_folder(path, files)   a folder of files, published in one rename
    write_file(path, data)      one file, replaced in one rename
    point(link, target)         a symlink, replaced in one rename
    shards(tensors, limit)      the files of a checkpoint, one or several and their index
    read_tensors(path)          `Tensors`: a mapping from name to tensor that reads a tensor when it is asked for
    read_json(path)
    check_tensors(expected, found)

A reader sees the old state or the new one, whenever the writer is killed: everything is written under a temporary name,
flushed to the disk, and renamed. Nothing here unpickles, and no code from a checkpoint is run.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON header that says of every
tensor its dtype, shape and place, then the tensors' bytes. Both directions are written out here, because both hold one
tensor at a time: a mapped file's pages count as the process's memory until the last of its tensors is gone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from handful.errors import CheckpointError, ConfigError

__all__ = [
    "Entry",
    "Tensors",
    "check_tensors",
    "point",
    "read_json",
    "read_tensors",
    "shards",
    "write_file",
    "write_folder",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Parsed JSON takes up to twenty times its text, so texts are limited: to some 100,000 tensors a file.
HEADER_LIMIT, JSON_LIMIT = 1 << 24, 1 << 26
SHARD = 5_000_000_000
CHUNK = 1 << 22


# ---------------------------------------------------------------------------------------------------------------------
# Tensors by name.


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


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def write_folder(path: str | Path, files: Mapping[str, Any]) -> None:
    """Write a folder so that it appears whole or not at all. One that stands there gives way when the new one is whole.

    files   file name -> content: for "*.safetensors" a mapping of name to tensor (a `Tensors` makes one at a time),
            for "*.json" plain values, bytes or text as they are for any name.

    Giving way takes two renames. A kill between them leaves both folders whole under hidden names, and the next write
    puts the old one back first. Where a path must never be absent, write to a new name and `point` a link at it.
    CheckpointError if the disk refuses.
    """
    path = Path(path)
    temporary, old = path.with_name(f".new-{path.name}"), path.with_name(f".old-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():
            os.rename(old, path)
        for left in (temporary, old):  # by a writer that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        for name, content in files.items():
            _write(temporary / name, content)
        _flush(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be written: {_why(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # what a full disk left of it
        if old.exists() and not path.exists():
            with contextlib.suppress(OSError):
                os.rename(old, path)


def write_file(path: str | Path, content: Any) -> None:
    """Write or replace one file in one rename. Content as in `write_folder`. CheckpointError if the disk refuses."""
    path = Path(path)
    temporary = path.with_name(f".new-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, content)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be written: {_why(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def point(link: str | Path, target: str | Path) -> None:
    """Make `link` a symlink to `target` (relative to the link's folder), in one rename if it stands already."""
    link = Path(link)
    temporary = link.with_name(f".new-{link.name}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target, target_is_directory=True)
        os.replace(temporary, link)
        _flush(link.parent)
    except OSError as error:
        raise CheckpointError(f"{link}: cannot be pointed at {target}: {_why(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _why(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # a name may have a folder in it
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".safetensors":
        _write_tensors(path, Tensors.of(content))
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        raise TypeError(f"{path.name}: content of type {type(content).__name__}")
    _flush(path)


def _write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file, one tensor in memory at a time, or one part of it where it is made for this."""
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
            parts = range(entry.shape[0]) if entry.held is None and len(entry.shape) > 1 else [None]
            for part in parts:
                file.write(_bytes(entry.read(part).cpu().contiguous()))


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def shards(tensors: Mapping[str, Tensor], limit: int = SHARD) -> dict[str, Any]:
    """File name -> content of a checkpoint's tensors, as transformers names them: `model.safetensors`, or where that
    would have more than `limit` bytes, files of at most as many (or of one tensor) and their index."""
    if limit < 1:
        raise ConfigError(f"max_shard_bytes = {limit}: at least 1")
    found = Tensors.of(tensors)
    groups: list[dict[str, Entry]] = [{}]
    room = limit
    for name in found:
        entry = found.entry(name)
        if groups[-1] and entry.nbytes > room:
            groups.append({})
            room = limit
        groups[-1][name] = entry
        room -= entry.nbytes
    if len(groups) == 1:
        return {SINGLE: found}
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    index = {
        "metadata": {"total_size": sum(found.entry(name).nbytes for name in found)},
        "weight_map": {name: file for file, group in zip(names, groups, strict=True) for name in group},
    }
    return {**{file: Tensors(group) for file, group in zip(names, groups, strict=True)}, INDEX: index}


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


def read_tensors(path: str | Path) -> Tensors:
    """The tensors of a safetensors file, or of a folder's `model.safetensors`, in one file or in shards with an index.

    Only headers are read now. CheckpointError names a file that is missing, truncated or malformed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return Tensors(_read_header(path, _Scratch()))
    if (path / INDEX).exists():
        return Tensors(_read_shards(path))
    if (path / SINGLE).exists():
        return read_tensors(path / SINGLE)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickled:
        raise CheckpointError(f"{path}: {pickled[0]} is a pickle, which can run code: convert it to {SINGLE}")
    raise CheckpointError(f"{path}: no {SINGLE} and no {INDEX}")


def _read_shards(folder: Path) -> dict[str, Entry]:
    file = folder / INDEX
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: no weight_map from tensor to file")
    held: dict[str, dict[str, Entry]] = {}
    scratch = _Scratch()
    for name, shard in weight_map.items():
        # A shard stands beside its index: a name that leads elsewhere is not one.
        name_of_file = isinstance(shard, str) and Path(shard).name == shard and shard.isprintable()
        if not name_of_file or not shard.endswith(".safetensors"):
            given = f"weight_map[{_short(name)}] = {_short(shard)}"
            raise CheckpointError(f"{file}: {given}: must name a .safetensors file beside it")
        if shard not in held:
            held[shard] = _read_header(folder / shard, scratch)
        if name not in held[shard]:
            raise CheckpointError(f"{folder / shard}: tensor {_short(name)} is missing")
    return {name: held[shard][name] for name, shard in weight_map.items()}


class _Scratch:
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

    def __init__(self, path: Path, scratch: _Scratch) -> None:
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


def _read_header(path: Path, scratch: _Scratch) -> dict[str, Entry]:
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
        raise CheckpointError(f"{_short(str(path))}: cannot be read: {error}") from None
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
            raise wrong(f"{_short(name)} {error}") from None
        entries[name] = file.entry(dtype, shape, begin + start)
        spans.append((start, end, name))
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            raise wrong(f"{_short(name)} begins at byte {start} of the tensors, where {at} is next")
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
        raise ValueError(f"has dtype {_short(name)}: one of {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > 64 or math.prod(max(1, n) for n in shape) >= 1 << 60:
        raise ValueError(f"has shape {_short(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise ValueError(f"has data_offsets {_short(offsets)} in {size} bytes of tensors")
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
        raise ValueError(f"two entries named {_short(twice)}")
    return found


def _short(value: Any) -> str:
    """A value from a file as an error may show it: on one line, and not a megabyte of it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file's object. CheckpointError if it is missing, malformed, not an object or of absurd length."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            text = file.read(JSON_LIMIT + 1)
        if len(text) > JSON_LIMIT:
            raise CheckpointError(f"{path}: longer than {JSON_LIMIT} bytes")
        value = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Tensor],
    *,
    ignored: Container[str] = (),
    source: str | Path = "checkpoint",
) -> None:
    """CheckpointError unless `found` has exactly the expected names, with the expected shapes. No data is read.

    ignored   names that may be there and do not matter.
    source    what to call tensors that are in no file.
    """
    tensors = Tensors.of(found)
    whole = ", ".join(path.name for path in tensors.files[:3]) or source
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(f"{whole}: tensor {missing[0]!r} is missing{_more(missing)}")
    unexpected = [name for name in tensors if name not in expected and name not in ignored]
    if unexpected:
        where = tensors.where(unexpected[0]) or source
        raise CheckpointError(f"{where}: unexpected tensor {_short(unexpected[0])}{_more(unexpected)}")
    for name, shape in expected.items():
        if tensors.shape(name) != tuple(shape):
            has, where = list(tensors.shape(name)), tensors.where(name) or source
            raise CheckpointError(f"{where}: tensor {name!r} has shape {has}: must be {list(shape)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
