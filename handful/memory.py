"""A model in less memory than it needs: what every token uses is held, experts wait on disk until they are chosen.

    pack(folder, file)             its experts, in one file that they can be read from one by one
    load(folder, memory_bytes)     a model and the store of its experts; packs them first if that is not done
    attach(model, file, bytes)     the same for a model that is loaded already, whose experts leave memory

What is in memory is `handful.experts.stored`; what is on disk, `handful.experts.disk`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from handful.checkpoint import Tensors
from handful.encoder_decoder import EncoderDecoder
from handful.errors import CheckpointError, ConfigError
from handful.experts import Experts
from handful.experts.disk import Layout, PackFile, layout_of, write_pack
from handful.experts.stored import DEFAULT_POLICY, Store, StoredExperts
from handful.families.fill import fill
from handful.families.io import find_tokenizer, open_checkpoint
from handful.model import Decoder
from handful.moe import MoE
from handful.quantize import pack as quantized

__all__ = ["attach", "load", "pack", "resident_bytes"]

Model = Decoder | EncoderDecoder
Progress = Callable[[int, int], None]


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
    dtype      what they are turned to, before they are quantised; None: the source's.
    progress   is told (bytes done, bytes in all) after every expert.

    The file appears whole or not at all; one that stands there is replaced. CheckpointError for a source that cannot be
    read or a disk that refuses, ConfigError for a wrong format, for a model without experts, and for one whose experts
    are quantised already.
    """
    model, state, _ = (
        (source, Tensors.of(source.state_dict()), None) if isinstance(source, nn.Module) else open_checkpoint(source)
    )
    layout = _layout(model, state, quantize, group, dtype)
    _write(path, layout, state, progress)
    return layout


def attach(
    model: nn.Module,
    path: str | Path,
    memory_bytes: int,
    *,
    policy: str = DEFAULT_POLICY,
    read_ahead: bool = True,
) -> Store:
    """Let a loaded model's experts go, and take them from a pack of them from now on.

    memory_bytes   for all of the model's weights: what every token needs, and the experts that are in memory.
    policy         which experts stay (see `handful.experts.cache`).
    read_ahead     guess the next layer's experts, and read them while this layer computes.

    Close the store that is returned when the model is done with. CheckpointError for a pack of other experts;
    ConfigError, with the least that would do, for too little memory.
    """
    state = Tensors.of(model.state_dict())
    file = PackFile(path)
    try:
        _check(file, _layout(model, state, file.layout.bits or None, file.layout.group or 32, _dtype(file.layout)))
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
    read_ahead: bool = True,
    progress: Progress | None = None,
) -> tuple[Model, Store]:
    """A model in evaluation mode, and the store of its experts, within `memory_bytes` of weights.

    file        the pack; None: `experts-FORMAT.pack` in the checkpoint's folder. It is made if it is not there, and
                made again if it is of other weights or another format.
    quantize, group, dtype, backend   as in `handful.load`, whose bits the model gives.
    policy, read_ahead                as in `attach`.
    progress    of packing: is told (bytes done, bytes in all).

    Close the store when the model is done with. Errors as those of `handful.load`, `pack` and `attach`.
    """
    model, state, folder = open_checkpoint(path_or_repo, backend)
    layout = _layout(model, state, quantize, group, dtype)
    tokenizer = find_tokenizer(folder, model)
    path = Path(file) if file is not None else folder / f"experts-{layout.format.replace('/', '-')}.pack"
    opened = _fitting(path, layout)
    if opened is None:
        _write(path, layout, state, progress)
        opened = PackFile(path)
    try:
        modules = _modules(model)
        for name in modules:
            model.set_submodule(name, nn.Identity())
        kept = {name: state.entry(name) for name in state if name.rpartition(".")[0] not in modules}
        fill(model, Tensors(kept), dtype=dtype, quantize=quantize, group=group)
        for name, module in modules.items():
            model.set_submodule(name, module)
        store = _exchange(model, opened, memory_bytes, policy, read_ahead)
    except BaseException:
        opened.close()
        raise
    model.tokenizer = tokenizer
    model.eval()
    return model, store


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


def _layout(model: nn.Module, state: Tensors, quantize: int | None, group: int, dtype: torch.dtype | None) -> Layout:
    """How these experts are packed. ConfigError if they cannot be."""
    modules = _modules(model)
    if not modules:
        raise ConfigError("the model has no experts that can be packed: it is dense, or they are quantised already")
    shapes = {name: (state.shape(f"{name}.gate_up"), state.shape(f"{name}.down")) for name in modules}
    first = next(iter(modules))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            raise ConfigError(f"{name} is of shape {shape}, {first} of {shapes[first]}: a pack holds experts of one")
    gate_up, down = shapes[first]
    return layout_of(
        _identity(state, tuple(modules)),
        tuple(modules),
        (gate_up[0], gate_up[1], gate_up[2]),
        (down[0], down[1], down[2]),
        dtype or state.entry(f"{first}.down").dtype,
        bias=f"{first}.down_bias" in state,
        bits=quantize or 0,
        group=group,
    )


def _identity(state: Tensors, layers: tuple[str, ...]) -> str:
    """What tells these experts from those of another model, or of another step of its training: a digest of every
    router and of one expert of each layer. As bfloat16, so that a model in another dtype is the same."""
    digest = hashlib.sha256()
    for i, name in enumerate(layers):
        down = state.entry(f"{name}.down")
        router = f"{name.rpartition('.')[0]}.router.weight"
        read = [down.read(i % down.shape[0], dtype=torch.bfloat16)]
        read += [state.entry(router).read(dtype=torch.bfloat16)] if router in state else []
        for tensor in read:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()


def _write(path: str | Path, layout: Layout, state: Tensors, progress: Progress | None) -> None:
    dtype = _dtype(layout)

    def record(layer: int, expert: int) -> Mapping[str, Tensor]:
        name = layout.layers[layer]
        found: dict[str, Tensor] = {}
        for key in ("gate_up", "down"):
            weight = state.entry(f"{name}.{key}").read(expert, dtype=dtype)
            if layout.bits:
                packed = quantized(weight, layout.bits, layout.group, f"{name}.{key}[{expert}]")
                found |= {key: packed.codes, f"{key}_scales": packed.scales}
            else:
                found[key] = weight
            if any(field.name == f"{key}_bias" for field in layout.fields):
                found[f"{key}_bias"] = state.entry(f"{name}.{key}_bias").read(expert, dtype=dtype)
        return found

    with torch.no_grad():
        write_pack(path, layout, record, progress)


def _check(file: PackFile, wanted: Layout) -> None:
    """CheckpointError unless a pack holds just what is wanted."""
    found = file.layout
    if replace(found, source=wanted.source) != wanted:
        has = f"{len(found.layers)} layers of {found.experts} experts in {found.format}"
        right = f"{len(wanted.layers)} of {wanted.experts} in {wanted.format}"
        raise CheckpointError(f"{file.path}: holds {has}: the model has {right}, or of other shapes")
    if found.source != wanted.source:
        raise CheckpointError(f"{file.path}: holds the experts of other weights: pack these, or name their own pack")


def _fitting(path: Path, wanted: Layout) -> PackFile | None:
    """A pack that holds what is wanted; None if it is to be made."""
    if not path.exists():
        return None
    try:
        file = PackFile(path)
    except CheckpointError:
        return None
    try:
        _check(file, wanted)
    except CheckpointError:
        file.close()
        return None
    return file


def _exchange(model: nn.Module, file: PackFile, memory_bytes: int, policy: str, read_ahead: bool) -> Store:
    """Put stored experts in the place of those that a model has."""
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
        stored = StoredExperts(store, layer, activation=experts.activation, backend=experts.backend)
        model.set_submodule(name, stored.train(experts.training))
        if isinstance(owner, MoE):
            store.guess_with(layer, owner.router)
    return store
