"""Give memory to a model that has none, and read a checkpoint into it: one tensor at a time, in the dtype, on the
device and in the form that it is to have.

What is held beyond the model itself is one of its tensors, or one expert's where the checkpoint holds experts otherwise
or where they are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from handful.experts.quantize_model import quantizable, quantizable_weights, quantized_from
from handful.lazy_tensors import Entry, Tensors
from handful.quantize import Packed, pack, pack_stack

__all__ = ["Progress", "materialize"]

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def materialize(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: int | None = None,
    group: int = 32,
    progress: Progress | None = None,
) -> None:
    """Give a model on the meta device the tensors of its state_dict, names and shapes being right.

    dtype      of the weights; None keeps the checkpoint's. A balance bias stays in float32.
    quantize   4 or 8: what `quantize_model` would do, without the model ever being there in its own dtype.
    progress   is told (bytes done, bytes in all), as the checkpoint counts them, after every tensor.

    ConfigError for a weight that cannot be quantized.
    """
    found = Tensors.of(tensors)
    total, done = sum(found.entry(name).nbytes for name in found), 0

    def kind(name: str) -> torch.dtype:
        stored = found.entry(name).dtype
        if name.endswith("router.balance_bias"):  # its steps are lost in less, and other experts chosen
            return torch.promote_types(stored, torch.float32)
        return dtype or stored

    def took(name: str) -> None:
        nonlocal done
        done += found.entry(name).nbytes
        if progress is not None:
            progress(done, total)

    taken: set[str] = set()
    for path in quantizable(model) if quantize is not None else ():
        module = model.get_submodule(path)
        packed: dict[str, Packed] = {}
        biases: dict[str, Tensor] = {}
        for key, _ in module.named_parameters(recurse=False):
            name = f"{path}.{key}"
            entry = found.entry(name)
            if key in quantizable_weights(module):
                packed[key] = _pack(entry, kind(name), device, quantize or 0, group, name)
            else:
                biases[key] = entry.read(dtype=kind(name), device=device)
            taken.add(name)
            took(name)
        of = kind(f"{path}.{next(iter(packed))}")
        model.set_submodule(path, quantized_from(module, packed, biases, of))
    for name in found:
        if name not in taken:
            _put(model, name, found.entry(name).read(dtype=kind(name), device=device))
            took(name)


def _pack(entry: Entry, dtype: torch.dtype, device: torch.device | str, bits: int, group: int, name: str) -> Packed:
    """A weight in packed form; of experts one after the other."""
    if len(entry.shape) == 2:
        return pack(entry.read(dtype=dtype, device=device), bits, group, name)
    experts = (entry.read(e, dtype=dtype, device=device) for e in range(entry.shape[0]))
    return pack_stack(experts, entry.shape[0], bits, group, name)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    setattr(module, key, tensor)
