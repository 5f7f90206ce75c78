"""Safetensors in and out: written whole or not at all, read lazily, refused with file and tensor named.

    write_folder(path, files)   a folder of files, published in one rename
    write_file(path, data)      one file, replaced in one rename
    point(link, target)         a symlink, replaced in one rename
    read_tensors(path)          a mapping from name to tensor that reads a tensor when it is asked for
    read_json(path)
    check_tensors(expected, found)

A reader sees the old state or the new one, whenever the writer is killed: everything is written under a temporary name,
flushed to the disk, and renamed. Nothing here unpickles, and no code from a checkpoint is run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from handful.errors import CheckpointError

__all__ = ["Tensors", "check_tensors", "point", "read_json", "read_tensors", "write_file", "write_folder"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


def write_folder(path: str | Path, files: Mapping[str, Any]) -> None:
    """Write a folder so that it appears whole or not at all. One that stands there gives way when the new one is whole.

    files   file name -> content: for "*.safetensors" a mapping of name to tensor, for "*.json" plain values, bytes or
            text as they are for any name.

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
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


def write_file(path: str | Path, content: Any) -> None:
    """Write or replace one file in one rename. Content as in `write_folder`. CheckpointError if the disk refuses."""
    path = Path(path)
    temporary = path.with_name(f".new-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, content)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


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
        raise CheckpointError(f"{link}: cannot be pointed at {target}: {error}") from None


def _write(path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".safetensors":
        # Transformers asks for the format; safetensors asks for dense tensors in the CPU's memory.
        dense = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
        save_file(dense, path, metadata={"format": "pt"})
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        raise TypeError(f"{path.name}: content of type {type(content).__name__}")
    _flush(path)


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


class Tensors(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files, by name. `self[name]` reads one; shapes come from the headers."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """files: tensor name -> the file that holds it. CheckpointError if one does not."""
        self._files = dict(files)
        self._open = {path: _open(path) for path in dict.fromkeys(self._files.values())}
        held = {path: set(handle.keys()) for path, handle in self._open.items()}
        for name, path in self._files.items():
            if name not in held[path]:
                raise CheckpointError(f"{path}: tensor {name!r} is missing")

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        tensor: Tensor = _guard(path, lambda: self._open[path].get_tensor(name))
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files  # a Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        path = self._files[name]
        return tuple(_guard(path, lambda: self._open[path].get_slice(name).get_shape()))

    def where(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    @property
    def files(self) -> list[Path]:
        return list(self._open)


def read_tensors(path: str | Path) -> Tensors:
    """The tensors of a safetensors file, or of a folder's `model.safetensors`, in one file or in shards with an index.

    Only headers are read now. CheckpointError names a file that is missing, truncated or malformed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return Tensors(dict.fromkeys(_open(path).keys(), path))
    if (path / INDEX).exists():
        return Tensors(_read_index(path))
    if (path / SINGLE).exists():
        return read_tensors(path / SINGLE)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickled:
        raise CheckpointError(f"{path}: {pickled[0]} is a pickle, which can run code: convert it to {SINGLE}")
    raise CheckpointError(f"{path}: no {SINGLE} and no {INDEX}")


def _read_index(folder: Path) -> dict[str, Path]:
    file = folder / INDEX
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: no weight_map from tensor to file")
    for name, shard in weight_map.items():
        # A shard stands beside its index: a name that leads elsewhere is not one.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{file}: weight_map[{name!r}] = {shard!r}: must name a .safetensors file beside it")
    return {name: folder / shard for name, shard in weight_map.items()}


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file's object. CheckpointError if it is missing, malformed or not an object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def _open(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return _guard(path, lambda: safe_open(path, framework="pt"))


def _guard(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or malformed: {error}") from None


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Tensor],
    *,
    ignored: Container[str] = (),
    source: str | Path = "checkpoint",
) -> None:
    """CheckpointError unless `found` has exactly the expected names, with the expected shapes.

    ignored   names that may be there and do not matter.
    source    what to call a mapping that is not `Tensors`. Of `Tensors`, files are named, and no data is read.
    """

    def where(name: str) -> str | Path:
        return found.where(name) if isinstance(found, Tensors) else source

    whole = ", ".join(path.name for path in found.files[:3]) if isinstance(found, Tensors) else source
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"{whole}: tensor {missing[0]!r} is missing{_more(missing)}")
    unexpected = [name for name in found if name not in expected and name not in ignored]
    if unexpected:
        raise CheckpointError(f"{where(unexpected[0])}: unexpected tensor {unexpected[0]!r}{_more(unexpected)}")
    for name, shape in expected.items():
        has = found.shape(name) if isinstance(found, Tensors) else tuple(found[name].shape)
        if has != tuple(shape):
            raise CheckpointError(f"{where(name)}: tensor {name!r} has shape {list(has)}: must be {list(shape)}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
