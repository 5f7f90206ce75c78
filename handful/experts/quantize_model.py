"""A whole model with its weights in 8 or 4 bits: every Experts and nn.Linear in it, in place.

quantize_model(model, bits=4)   -> a report of every tensor
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from handful.errors import ConfigError
from handful.experts.layer import Experts
from handful.experts.linear import Linear
from handful.experts.quantized import PackedWeight, QuantizedExperts, QuantizedLinear
from handful.quantize import Packed, check_format, check_weight, error

__all__ = [
    "QuantizationReport",
    "QuantizedTensor",
    "quantizable",
    "quantizable_weights",
    "quantize_model",
    "quantized_from",
]


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """What became of one tensor of a model.

    bytes_before, bytes_after   that it holds in memory; codes and scales are counted together.
    error                       ‖quantized − before‖ / ‖before‖, None if it was not quantized.
    reason                      why it was not; None if it was.
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What `quantize_model` did: one row for every tensor of the model, in the model's order."""

    bits: int
    group: int
    tensors: tuple[QuantizedTensor, ...]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.tensors)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.tensors)

    @property
    def share(self) -> float:
        """Of the model's bytes before, those that were quantized: 0 to 1."""
        held = sum(row.bytes_before for row in self.tensors if row.reason is None)
        return held / self.bytes_before if held else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The rows and the totals, as plain values."""
        return {
            "bits": self.bits,
            "group": self.group,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "share": self.share,
            "tensors": [asdict(row) | {"shape": list(row.shape)} for row in self.tensors],
        }


def quantize_model(model: nn.Module, bits: int = 4, group: int = 32, skip: Sequence[str] = ()) -> QuantizationReport:
    """Replace every Experts and every nn.Linear in a model by its quantized twin, in place, one after another.

    Nothing else is touched: routers, norms, embeddings and biases stay as they are. So does a weight that another
    module holds too (a tied output layer), for a quantized copy would stand beside it and save nothing, and a subclass
    of Linear or Experts, whose forward pass may differ. The report says so, with a row for every tensor.

    skip   names of modules or weights to leave as they are; `*` stands for anything ("head", "layers.0", "*.attn.*").

    ConfigError, before anything is replaced, for other bits (8, 4) or groups (32, 128), a name in `skip` that matches
    nothing, one that splits an Experts, and a weight that cannot be quantized (see `handful.quantize.check_weight`).
    """
    check_format(bits, group)
    rows = _survey(model, skip)
    chosen = _choose(model, {row.name: row.reason for row in rows})
    for path in chosen:
        for key in quantizable_weights(model.get_submodule(path)):
            check_weight(model.get_parameter(f"{path}.{key}"), f"{path}.{key}")
    places: dict[nn.Module, list[str]] = {}  # a module may stand in several
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    done: dict[str, tuple[int, float]] = {}
    for name in chosen:
        module = model.get_submodule(name)
        names = places.pop(module)
        quantized: QuantizedExperts | QuantizedLinear
        if isinstance(module, Experts):
            quantized = QuantizedExperts.pack(module, bits, group, name)
            held = {"gate_up": quantized.gate_up.value, "down": quantized.down.value}
        else:
            assert isinstance(module, nn.Linear)
            quantized = QuantizedLinear.pack(module, bits, group, name)
            held = {"weight": quantized.packed.value}
        for key, packed in held.items():
            done[f"{name}.{key}"] = packed.nbytes, error(getattr(module, key), packed)
        for place in names:
            model.set_submodule(place, quantized)
    for i, row in enumerate(rows):
        if row.name in done:
            after, off = done[row.name]
            rows[i] = replace(row, bytes_after=after, error=off)
    return QuantizationReport(bits=bits, group=group, tensors=tuple(rows))


def quantizable(model: nn.Module, skip: Sequence[str] = ()) -> list[str]:
    """The names of the modules that `quantize_model` would replace; it may be on the meta device. ConfigError as there,
    but for values that cannot be quantized."""
    return _choose(model, {row.name: row.reason for row in _survey(model, skip)})


def quantized_from(
    module: nn.Module, packed: Mapping[str, Packed], biases: Mapping[str, Tensor], dtype: torch.dtype
) -> QuantizedExperts | QuantizedLinear:
    """What is quantized of an Experts or nn.Linear that may be on the meta device, of weights that are packed already.

    packed, biases   by the module's own names. dtype: what the packed weights were of.
    """
    if isinstance(module, Experts):
        return QuantizedExperts(
            packed["gate_up"],
            packed["down"],
            activation=module.activation,
            gate_up_bias=biases.get("gate_up_bias"),
            down_bias=biases.get("down_bias"),
            backend=module.backend,
        ).train(module.training)
    return QuantizedLinear(packed["weight"], biases.get("bias"), dtype=dtype).train(module.training)


def quantizable_weights(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights by which a module is quantized; of its own class alone, not of a subclass."""
    return {Experts: ("gate_up", "down"), nn.Linear: ("weight",), Linear: ("weight",)}.get(type(module), ())


def _survey(model: nn.Module, skip: Sequence[str]) -> list[QuantizedTensor]:
    """A row for every tensor, as it stands, with the reason why it is to stay, if there is one."""
    found: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[id(tensor)] = tensor
                names.setdefault(id(tensor), []).append(f"{path}.{key}" if path else key)
                if (module, key) not in owners.setdefault(id(tensor), []):
                    owners[id(tensor)].append((module, key))
    idle = [pattern for pattern in skip if not any(_matches(name, pattern) for all in names.values() for name in all)]
    if idle:
        raise ConfigError(f"skip = {idle[0]!r}: no module or tensor of the model has that name")
    output = getattr(model, "output_weight", None)
    rows = []
    for which, tensor in found.items():
        module, key = owners[which][0]
        reason: str | None = None
        weights = quantizable_weights(module)
        if isinstance(module, PackedWeight):
            reason = "quantized already"
        elif key in weights and any(_matches(name, pattern) for name in names[which] for pattern in skip):
            reason = "skipped, as asked"
        elif len(owners[which]) > 1:
            reason = f"tied: also {names[which][1]}"
        elif key.endswith("bias"):
            reason = "bias"
        elif key not in weights:
            reason = f"of {type(module).__name__}, which stays as it is"
            if tensor is output:
                reason += "; it is the output layer too"
        size = tensor.numel() * tensor.element_size()
        rows.append(
            QuantizedTensor(
                name=names[which][0], shape=tuple(tensor.shape), bytes_before=size, bytes_after=size, reason=reason
            )
        )
    return rows


def _choose(model: nn.Module, reasons: Mapping[str, str | None]) -> list[str]:
    """The modules to be replaced. ConfigError for one that cannot be."""
    chosen = []
    for path, module in model.named_modules():
        names = [f"{path}.{key}" if path else key for key in quantizable_weights(module)]
        # A name that is not there is a second name of a tied weight.
        left = [name for name in names if reasons.get(name, "tied") is not None]
        if len(left) == len(names):
            continue
        if left:
            wanted = next(name for name in names if name not in left)
            raise ConfigError(f"{wanted} cannot be quantized without {left[0]} ({reasons.get(left[0], 'tied')})")
        if not path:
            kind = type(module).__name__
            raise ConfigError(f"model is itself of {kind}, with nothing to put its twin into: Quantized{kind}.pack it")
        chosen.append(path)
    return chosen


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is a tensor's name, or that of a module above it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
