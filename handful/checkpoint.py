"""Checkpoints in and out: written whole or not at all, read lazily, refused with file and tensor named.

    write_folder(path, files)   a folder of files, published in one rename
    write_file(path, data)      one file, replaced in one rename
    point(link, target)         a symlink, replaced in one rename
    shards(tensors, limit)      the files of a checkpoint, one or several and their index
    read_tensors(path)          `Tensors`: a mapping from name to tensor that reads a tensor when it is asked for
    read_json(path)
    check_tensors(expected, found)

A reader sees the old state or the new one, whenever the writer is killed: everything is written under a temporary name,
flushed to the disk, and renamed. Nothing here unpickles, and no code from a checkpoint is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from handful.errors import CheckpointError, ConfigError
from handful.lazy_tensors import Entry, Tensors
from handful.safetensors_file import Scratch, quoted, read_header, write_tensors

__all__ = ["check_tensors", "point", "read_json", "read_tensors", "shards", "write_file", "write_folder"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Parsed JSON takes up to twenty times its text, so texts are limited.
JSON_LIMIT = 1 << 26
SHARD = 5_000_000_000


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
        write_tensors(path, Tensors.of(content))
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        raise TypeError(f"{path.name}: content of type {type(content).__name__}")
    _flush(path)


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
        return Tensors(read_header(path, Scratch()))
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
    scratch = Scratch()
    for name, shard in weight_map.items():
        # A shard stands beside its index: a name that leads elsewhere is not one.
        name_of_file = isinstance(shard, str) and Path(shard).name == shard and shard.isprintable()
        if not name_of_file or not shard.endswith(".safetensors"):
            given = f"weight_map[{quoted(name)}] = {quoted(shard)}"
            raise CheckpointError(f"{file}: {given}: must name a .safetensors file beside it")
        if shard not in held:
            held[shard] = read_header(folder / shard, scratch)
        if name not in held[shard]:
            raise CheckpointError(f"{folder / shard}: tensor {quoted(name)} is missing")
    return {name: held[shard][name] for name, shard in weight_map.items()}


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
        raise CheckpointError(f"{where}: unexpected tensor {quoted(unexpected[0])}{_more(unexpected)}")
    for name, shape in expected.items():
        if tensors.shape(name) != tuple(shape):
            has, where = list(tensors.shape(name)), tensors.where(name) or source
            raise CheckpointError(f"{where}: tensor {name!r} has shape {has}: must be {list(shape)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
