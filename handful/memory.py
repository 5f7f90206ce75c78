"""A model in less memory than it needs: what every token uses is held, experts wait on disk until they are chosen.

    pack(folder, file)             its experts, in one file that they can be read from one by one
    load(folder, bytes)            a model and the store of its experts; packs them first if that is not done
    attach(model, file, bytes)     the same for a model that is loaded already, whose experts leave memory
    load_without(folder, make)     a model whose experts are elsewhere, as `make` has them

What is in memory is `handful.experts.store`; what is on disk, `handful.experts.expert_file`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from handful.data import default_cache
from handful.encoder_decoder import EncoderDecoder
from handful.errors import CheckpointError, ConfigError
from handful.experts import Experts
from handful.experts.expert_file import UNKNOWN, Layout, PackFile, layout_of, sole_writer, write_pack
from handful.experts.offload import OffloadedExperts
from handful.experts.store import DEFAULT_POLICY, Store
from handful.families.io import find_tokenizer, open_checkpoint
from handful.families.materialize import Progress, materialize
from handful.lazy_tensors import Tensors
from handful.model import Decoder
from handful.moe import MoE
from handful.quantize import pack as quantized

__all__ = ["attach", "load", "load_without", "open_pack", "pack", "resident_bytes"]

Model = Decoder | EncoderDecoder

LARGEST_HEADER = 1 << 26  # bytes of a file's header that are looked at


def pack(
    source: str | Path | nn.Module,
    path: str | Path,
    *,
    quantize: int | None = None,
    group: int = 32,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Layout:
    """Write a model's experts into a file, one expert in memory at a time.

    source     a run folder, a checkpoint folder, `org/name`, or a model that is loaded.
    quantize   8 or 4: in as many bits, in groups of `group` (see `handful.quantize`); None: as they are.
    dtype      what they are turned to, before they are quantized; None: the source's.
    progress   is told (bytes done, bytes in all) after every expert.

    The file appears whole or not at all; one that stands there is replaced. CheckpointError for a source that cannot be
    read or a disk that refuses, ConfigError for a wrong format, for a model without experts, and for one whose experts
    are quantized already.
    """
    model, state, folder = (
        (source, Tensors.of(source.state_dict()), None) if isinstance(source, nn.Module) else open_checkpoint(source)
    )
    layout = _layout(model, state, folder, quantize, group, dtype)
    with sole_writer(Path(path)):
        return _write(path, layout, state, progress)


def attach(
    model: nn.Module, path: str | Path, memory_bytes: int, *, policy: str = DEFAULT_POLICY, read_ahead: bool = False
) -> Store:
    """Let a loaded model's experts go, and take them from a pack of them from now on.

    memory_bytes   for all of the model's weights: what every token needs, and the experts that are in memory.
    policy         which experts stay (see `handful.experts.cache`).
    read_ahead     guess the next layer's experts, and read them while this layer computes; it may cost more than
                   it saves (docs/memory.md).

    Close the store that is returned when the model is done with. CheckpointError for a pack of other experts;
    ConfigError, with the least that would do, for too little memory.
    """
    state = Tensors.of(model.state_dict())
    file = PackFile(path)
    try:
        layout = _layout(model, state, None, file.layout.bits or None, file.layout.group or 32, _dtype(file.layout))
        _check(file, replace(layout, source=_digest(layout, state)))
        return _exchange(model, file, memory_bytes, policy, read_ahead)
    except BaseException:
        file.close()
        raise


def load(
    path_or_repo: str | Path,
    memory_bytes: int,
    *,
    file: str | Path | None = None,
    quantize: int | None = None,
    group: int = 32,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    policy: str = DEFAULT_POLICY,
    read_ahead: bool = False,
    progress: Progress | None = None,
) -> tuple[Model, Store]:
    """A model in evaluation mode, and the store of its experts, within `memory_bytes` of weights.

    file        the pack; None: `experts-FORMAT.pack` in the checkpoint's folder, or where that cannot be written to in
                the user's cache folder. It is made if it is not there, and made again if it is of another format or
                the checkpoint's files are not those that it was made of, by their names, sizes, times and headers.
    quantize, group, dtype, backend   as in `handful.load`, whose bits the model gives.
    policy, read_ahead                as in `attach`.
    progress    of packing: is told (bytes done, bytes in all).

    Close the store when the model is done with. Errors as those of `handful.load`, `pack` and `attach`.
    """
    model, opened = _without_experts(path_or_repo, file, quantize, group, dtype, backend, progress)
    try:
        return model, _exchange(model, opened, memory_bytes, policy, read_ahead)
    except BaseException:
        opened.close()
        raise


def load_without(
    path_or_repo: str | Path,
    make: Callable[[int, Experts, Layout], nn.Module],
    *,
    file: str | Path | None = None,
    quantize: int | None = None,
    group: int = 32,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> tuple[Model, Layout]:
    """A model in evaluation mode whose experts are not in this process, and how they are packed.

    make   (number of the MoE layer, its experts without memory, the pack's layout) -> what stands in their place.

    The rest as in `load`.
    """
    model, opened = _without_experts(path_or_repo, file, quantize, group, dtype, backend, progress)
    with contextlib.closing(opened):
        for layer, (name, experts) in enumerate(_modules(model).items()):
            model.set_submodule(name, make(layer, experts, opened.layout).train(experts.training))
        return model, opened.layout


def open_pack(
    path_or_repo: str | Path,
    *,
    file: str | Path | None = None,
    quantize: int | None = None,
    group: int = 32,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[Model, PackFile]:
    """A checkpoint's model without memory, and the pack of its experts, which is made if need be; as in `load`."""
    model, state, folder = open_checkpoint(path_or_repo)
    return model, _pack_of(model, state, folder, file, quantize, group, dtype, progress)


def _pack_of(
    model: Model,
    state: Tensors,
    folder: Path,
    file: str | Path | None,
    quantize: int | None,
    group: int,
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> PackFile:
    layout = _layout(model, state, folder, quantize, group, dtype)
    path = Path(file) if file is not None else _beside(folder) / f"experts-{layout.format.replace('/', '-')}.pack"
    opened = _fitting(path, layout, state)
    if opened is None:
        with sole_writer(path):
            opened = _fitting(path, layout, state)  # another process may have made it meanwhile
            if opened is None:
                _write(path, layout, state, progress)
                opened = PackFile(path)
    return opened


def _without_experts(
    path_or_repo: str | Path,
    file: str | Path | None,
    quantize: int | None,
    group: int,
    dtype: torch.dtype | None,
    backend: str,
    progress: Progress | None,
) -> tuple[Model, PackFile]:
    """A model whose experts have no memory, and the pack that they are in."""
    model, state, folder = open_checkpoint(path_or_repo, backend)
    tokenizer = find_tokenizer(folder, model)
    opened = _pack_of(model, state, folder, file, quantize, group, dtype, progress)
    try:
        modules = _modules(model)
        for name in modules:
            model.set_submodule(name, nn.Identity())
        kept = {name: state.entry(name) for name in state if name.rpartition(".")[0] not in modules}
        materialize(model, Tensors(kept), dtype=dtype, quantize=quantize, group=group)
        for name, module in modules.items():
            model.set_submodule(name, module)
    except BaseException:
        opened.close()
        raise
    model.tokenizer = tokenizer
    return model.eval(), opened


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the weights that are in memory whatever is chosen: all but those of experts that are to be stored."""
    experts = {id(t) for m in _modules(model).values() for t in m.parameters(recurse=False)}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in experts and not t.is_meta}
    return sum(t.nbytes for t in tensors.values())


# ---------------------------------------------------------------------------------------------------------------------


def _modules(model: nn.Module) -> dict[str, Experts]:
    """The modules that hold experts, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def _dtype(layout: Layout) -> torch.dtype:
    found = getattr(torch, layout.dtype)
    assert isinstance(found, torch.dtype)
    return found


def _beside(folder: Path) -> Path:
    """Where a checkpoint's packs go: into its folder, or where that cannot be written to, into the user's cache."""
    if os.access(folder, os.W_OK):
        return folder
    whole = folder.resolve()
    return default_cache() / "packs" / f"{whole.name}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:16]}"


def _layout(
    model: nn.Module, state: Tensors, folder: Path | None, quantize: int | None, group: int, dtype: torch.dtype | None
) -> Layout:
    """How these experts are packed, of a folder or of a model in memory. ConfigError if they cannot be."""
    modules = _modules(model)
    if not modules:
        raise ConfigError("the model has no experts that can be packed: it is dense, or they are quantized already")
    shapes = {name: (state.shape(f"{name}.gate_up"), state.shape(f"{name}.down")) for name in modules}
    first = next(iter(modules))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise ConfigError(f"{name} is of shape {shape}, {first} of {shapes[first]}: a pack holds experts of one")
    gate_up, down = shapes[first]
    return layout_of(
        tuple(modules),
        (gate_up[0], gate_up[1], gate_up[2]),
        (down[0], down[1], down[2]),
        dtype or state.entry(f"{first}.down").dtype,
        bias=f"{first}.down_bias" in state,
        bits=quantize or 0,
        group=group,
        files=() if folder is None else _stamp(folder),
    )


def _stamp(folder: Path) -> tuple[tuple[str, int, int, str], ...]:
    """What a checkpoint's files are, without reading their weights: names, sizes, times of the last change (ns), and
    digests of their headers, or of small files as they are."""
    found = []
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"))):
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            first = opened.read(8)
            length = int.from_bytes(first, "little") if file.suffix == ".safetensors" else status.st_size
            header = hashlib.sha256(first + opened.read(min(length, LARGEST_HEADER)))
        found.append((file.name, status.st_size, status.st_mtime_ns, header.hexdigest()[:16]))
    return tuple(found)


class _Reader:
    """Reads experts as they are packed, before they are quantized, and makes a digest of all that it read."""

    def __init__(self, layout: Layout, state: Tensors) -> None:
        self.layout, self.state, self.dtype = layout, state, _dtype(layout)
        self._digest = hashlib.sha256()
        self._biased = any(field.name.endswith("_bias") for field in layout.fields)

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        name, found = self.layout.layers[layer], {}
        for key in ("gate_up", "down", *(("gate_up_bias", "down_bias") if self._biased else ())):
            tensor = self.state.entry(f"{name}.{key}").read(expert, dtype=self.dtype).cpu().contiguous()
            self._digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
            found[key] = tensor
        return found

    def digest(self) -> str:
        return self._digest.hexdigest()


def _digest(layout: Layout, state: Tensors) -> str:
    """Of every expert's numbers, in the order of a pack."""
    reader = _Reader(layout, state)
    with torch.no_grad():
        for layer in range(len(layout.layers)):
            for expert in range(layout.experts):
                reader.read(layer, expert)
    return reader.digest()


def _write(path: str | Path, layout: Layout, state: Tensors, progress: Progress | None) -> Layout:
    reader = _Reader(layout, state)

    def record(layer: int, expert: int) -> Mapping[str, Tensor]:
        found = reader.read(layer, expert)
        if layout.bits:
            for key in ("gate_up", "down"):
                name = f"{layout.layers[layer]}.{key}[{expert}]"
                packed = quantized(found[key], layout.bits, layout.group, name)
                found |= {key: packed.codes, f"{key}_scales": packed.scales}
        return found

    with torch.no_grad():
        write_pack(path, layout, record, progress, source=reader.digest)
    return replace(layout, source=reader.digest())


def _check(file: PackFile, wanted: Layout) -> None:
    """CheckpointError unless a pack holds just what is wanted, by its source."""
    found = file.layout
    if replace(found, source=wanted.source, files=wanted.files) != wanted:
        has = f"{len(found.layers)} layers of {found.experts} experts in {found.format}"
        right = f"{len(wanted.layers)} of {wanted.experts} in {wanted.format}"
        raise CheckpointError(f"{file.path}: holds {has}: the model has {right}, or of other shapes")
    if found.source != wanted.source:
        raise CheckpointError(f"{file.path}: holds the experts of other weights: pack these, or name their own pack")


def _fitting(path: Path, wanted: Layout, state: Tensors) -> PackFile | None:
    """A pack of the files that are wanted, or if it was packed from memory of the same weights; None: to be made."""
    if not path.exists():
        return None
    try:
        file = PackFile(path)
    except CheckpointError:
        return None
    found = file.layout
    alike = replace(found, source=UNKNOWN, files=wanted.files) == wanted
    if alike and (found.files == wanted.files or (not found.files and found.source == _digest(wanted, state))):
        return file
    file.close()
    return None


def _exchange(model: nn.Module, file: PackFile, memory_bytes: int, policy: str, read_ahead: bool) -> Store:
    """Put offloaded experts in the place of those that a model has."""
    modules = _modules(model)
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in modules]
    top_k = max((owner.router.config.top_k for owner in owners if isinstance(owner, MoE)), default=1)
    held, size = resident_bytes(model), file.layout.record_bytes
    least = held + min(top_k, file.layout.experts) * size
    if memory_bytes < least:
        raise ConfigError(
            f"memory = {memory_bytes:,} bytes: what every token needs is {held:,}, and its {top_k} experts of a layer "
            f"{top_k * size:,}: at least {least:,}"
        )
    store = Store(file, memory_bytes - held, top_k=top_k, policy=policy, read_ahead=read_ahead)
    for layer, ((name, experts), owner) in enumerate(zip(modules.items(), owners, strict=True)):
        stored = OffloadedExperts(store, layer, activation=experts.activation, backend=experts.backend)
        model.set_submodule(name, stored.train(experts.training))
        if isinstance(owner, MoE):
            store.guess_with(layer, owner.router)
    return store
