"""Experts and linear layers whose weights are held in 8 or 4 bits, and a whole model made of them: for inference.

    quantize_model(model, bits=4)   every Experts and nn.Linear in the model, in place -> a report of every tensor

On a CPU the native kernels multiply the codes as they are. Elsewhere the experts that were chosen are unpacked, one
after another, and multiplied as `reference` does.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · G = 2·F gate and up
rows (F without a gate) · I inputs · O outputs · n tokens of one expert
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handful.config import Activation
from handful.errors import ConfigError, HandfulError, RoutingError
from handful.experts.at_once import ExpertsWeights
from handful.experts.layer import BACKENDS, Experts, Linear, _first_rows, check_fits
from handful.experts.native import available, compute_dtype, linear, plain_inference, quantized_experts, takes
from handful.experts.reference import activate
from handful.machine import native_error
from handful.quantize import Packed, check_format, check_weight, error, pack, unpack
from handful.routing import Routing

__all__ = [
    "PackedWeight",
    "QuantizationReport",
    "QuantizedExperts",
    "QuantizedLinear",
    "QuantizedTensor",
    "quantizable",
    "quantize_model",
    "twin",
    "weights_of",
]


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """What became of one tensor of a model.

    bytes_before, bytes_after   that it holds in memory; codes and scales are counted together.
    error                       ‖quantised − before‖ / ‖before‖, None if it was not quantised.
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
        """Of the model's bytes before, those that were quantised: 0 to 1."""
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


class PackedWeight(nn.Module):
    """A `Packed` whose codes and scales are buffers: they move with their module, and keep their dtypes whatever
    dtype it is turned to."""

    codes: Tensor
    scales: Tensor

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.bits, self.group, self.inputs = packed.bits, packed.group, packed.inputs
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self._value: Packed | None = packed

    @property
    def value(self) -> Packed:
        # Made again only when a buffer is another tensor: in decoding a small layer this would be noticed.
        held, codes, scales = self._value, self._buffers["codes"], self._buffers["scales"]
        if held is None or held.codes is not codes or held.scales is not scales:
            held = self._value = Packed(self.codes, self.scales, self.bits, self.group, self.inputs)
        return held

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        self._value = None
        before = {name: getattr(self, name) for name in ("codes", "scales")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, held in before.items():
            moved = getattr(self, name)
            if moved.dtype != held.dtype:
                setattr(self, name, held.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"{self.value.shape}, bits={self.bits}, group={self.group}"


class QuantizedExperts(nn.Module):
    """E feed-forward networks with quantised weights: (x_TD, routing) -> y_TD, as `Experts`, without gradients.

    gate_up   (E, G, D) packed; down (E, D, F) packed. They are multiplied in x's dtype, or nearly (docs/native.md).
    gate_up_bias (E, G) and down_bias (E, D), not quantised, or None.
    backend   "auto": the native kernels where they are (a CPU, float32 and bfloat16), else the plain loop. "native":
              those kernels or an error. "grouped" and "reference": the plain loop.

    Where autograd is asked for a gradient through it, the forward pass is a HandfulError: there is none to give.
    """

    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        gate_up: Packed,
        down: Packed,
        *,
        activation: Activation | str = "swiglu",
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ConfigError(f"experts backend {backend!r}: one of {', '.join(BACKENDS)}")
        three = len(gate_up.shape) == len(down.shape) == 3
        if not three or gate_up.shape != (down.shape[0], _first_rows(down.shape[2], activation), down.shape[1]):
            raise ConfigError(
                f"gate_up is {gate_up.shape} and down {down.shape}: they must be (experts, rows, width) and "
                f"(experts, width, hidden), for {activation}"
            )
        self.count = gate_up.shape[0]
        self.activation = activation
        self.backend = backend
        self.gate_up = PackedWeight(gate_up)
        self.down = PackedWeight(down)
        self.register_buffer("gate_up_bias", gate_up_bias)
        self.register_buffer("down_bias", down_bias)

    @classmethod
    def pack(cls, experts: Experts, bits: int = 4, group: int = 32, name: str = "experts") -> QuantizedExperts:
        """Quantise experts; their biases are shared, not copied. ConfigError as `handful.quantize.pack`; `name` is
        what it calls them."""
        quantized = cls(
            pack(experts.gate_up, bits, group, f"{name}.gate_up"),
            pack(experts.down, bits, group, f"{name}.down"),
            activation=experts.activation,
            gate_up_bias=None if experts.gate_up_bias is None else experts.gate_up_bias.detach(),
            down_bias=None if experts.down_bias is None else experts.down_bias.detach(),
            backend=experts.backend,
        )
        return quantized.train(experts.training)

    def biases(self, expert: int) -> tuple[Tensor | None, Tensor | None]:
        """One expert's biases, or None for each where there are none."""
        if self.gate_up_bias is None or self.down_bias is None:
            return None, None
        return self.gate_up_bias[expert], self.down_bias[expert]

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_fits(x_TD, routing, self.count, self.gate_up.inputs)
        _refuse_gradients("experts", x_TD, routing.weights_TK)
        dtype = compute_dtype(x_TD)
        if self.backend == "native" and not available():
            raise HandfulError(f"experts backend 'native': {native_error()}")
        if self.backend == "native" or (self.backend == "auto" and available() and takes(x_TD)):
            packed = self.gate_up.value, self.down.value
            biases = _cast(self.gate_up_bias, dtype), _cast(self.down_bias, dtype)
            return quantized_experts(x_TD, routing, *packed, *biases, self.activation)
        with torch.autocast(x_TD.device.type, enabled=False):
            return _loop(x_TD.to(dtype), routing, self)

    def weights_for_kernels(self, inputs: int, dtype: torch.dtype) -> ExpertsWeights | None:
        """The weights, if one operation is to apply them to few tokens of `inputs` numbers in plain inference."""
        modules = self._modules
        first, second = modules["gate_up"], modules["down"]
        assert isinstance(first, PackedWeight)
        assert isinstance(second, PackedWeight)
        if not available() or self.backend not in ("auto", "native") or first.inputs != inputs:
            return None
        up, down, kind = first.value, second.value, (second.inputs, second.bits, second.group)
        if (first.bits, first.group) != (second.bits, second.group):
            return None
        biases = _cast(self.gate_up_bias, dtype), _cast(self.down_bias, dtype)
        return ExpertsWeights(up.codes, up.scales, down.codes, down.scales, *biases, self.activation, *kind)

    def extra_repr(self) -> str:
        return f"{self.count} experts, activation={self.activation}, backend={self.backend}"


class QuantizedLinear(nn.Module):
    """A linear layer with a quantised weight: x (..., I) -> (..., O), as `nn.Linear`, without gradients.

    packed   (O, I) packed; it is multiplied in x's dtype.
    weight   the same, unpacked at every reading, in the dtype of the weight that was packed or that the module was
             turned to since. For code that reads a weight instead of calling the layer; calling it is quicker.
    bias     (O,), not quantised, or None.

    Where autograd is asked for a gradient through it, the forward pass is a HandfulError: there is none to give.
    """

    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.packed = PackedWeight(packed)
        self.dtype = dtype
        self.register_buffer("bias", bias)

    @classmethod
    def pack(cls, linear: nn.Linear, bits: int = 4, group: int = 32, name: str = "linear") -> QuantizedLinear:
        """Quantise a linear layer; its bias is shared, not copied. ConfigError as `handful.quantize.pack`; `name` is
        what it calls the layer."""
        packed = pack(linear.weight, bits, group, f"{name}.weight")
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(packed, bias, dtype=linear.weight.dtype).train(linear.training)

    @property
    def in_features(self) -> int:
        return self.packed.inputs

    @property
    def out_features(self) -> int:
        return self.packed.codes.shape[0]

    @property
    def weight(self) -> Tensor:
        return unpack(self.packed.value, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if plain_inference(x):
            given = self.for_kernels(x.shape[:-1].numel(), x.shape[-1], x.dtype)
            if given is not None:
                return linear(x, *given)
        _refuse_gradients("linear layers", x)
        dtype = compute_dtype(x)
        if x.shape[-1:] != (self.in_features,):
            raise ConfigError(f"linear was given x of shape {tuple(x.shape)}: its last size must be {self.in_features}")
        if available() and takes(x):
            return linear(x.to(dtype), self.packed.value, _cast(self.bias, dtype))
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), unpack(self.packed.value, dtype), _cast(self.bias, dtype))

    def for_kernels(self, tokens: int, inputs: int, dtype: torch.dtype) -> tuple[Packed, Tensor | None] | None:
        """Weight and bias, if our kernels are to multiply so many tokens by them in plain inference."""
        packed = self._modules["packed"]  # self.packed takes ten times as long
        assert isinstance(packed, PackedWeight)
        if not available() or packed.inputs != inputs:
            return None
        bias = self._buffers["bias"]
        return packed.value, bias if bias is None else _cast(bias, dtype)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        # What a turn to another dtype would have made of the weight.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.codes.device)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]


def quantize_model(model: nn.Module, bits: int = 4, group: int = 32, skip: Sequence[str] = ()) -> QuantizationReport:
    """Replace every Experts and every nn.Linear in a model by its quantised twin, in place, one after another.

    Nothing else is touched: routers, norms, embeddings and biases stay as they are. So does a weight that another
    module holds too (a tied output layer), for a quantised copy would stand beside it and save nothing, and a subclass
    of Linear or Experts, whose forward pass may differ. The report says so, with a row for every tensor.

    skip   names of modules or weights to leave as they are; `*` stands for anything ("head", "layers.0", "*.attn.*").

    ConfigError, before anything is replaced, for other bits (8, 4) or groups (32, 128), a name in `skip` that matches
    nothing, one that splits an Experts, and a weight that cannot be quantised (see `handful.quantize.check_weight`).
    """
    check_format(bits, group)
    rows = _survey(model, skip)
    chosen = _choose(model, {row.name: row.reason for row in rows})
    for path in chosen:
        for key in weights_of(model.get_submodule(path)):
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
    but for values that cannot be quantised."""
    return _choose(model, {row.name: row.reason for row in _survey(model, skip)})


def twin(
    module: nn.Module, packed: Mapping[str, Packed], biases: Mapping[str, Tensor], dtype: torch.dtype
) -> QuantizedExperts | QuantizedLinear:
    """The twin of an Experts or nn.Linear that may be on the meta device, of weights that are packed already.

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


def weights_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights by which a module is quantised; of its own class alone, not of a subclass."""
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
        if isinstance(module, PackedWeight):
            reason = "quantised already"
        elif key in weights_of(module) and any(_matches(name, pattern) for name in names[which] for pattern in skip):
            reason = "skipped, as asked"
        elif len(owners[which]) > 1:
            reason = f"tied: also {names[which][1]}"
        elif key.endswith("bias"):
            reason = "bias"
        elif key not in weights_of(module):
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
        names = [f"{path}.{key}" if path else key for key in weights_of(module)]
        # A name that is not there is a second name of a tied weight.
        left = [name for name in names if reasons.get(name, "tied") is not None]
        if len(left) == len(names):
            continue
        if left:
            wanted = next(name for name in names if name not in left)
            raise ConfigError(f"{wanted} cannot be quantised without {left[0]} ({reasons.get(left[0], 'tied')})")
        if not path:
            kind = type(module).__name__
            raise ConfigError(f"model is itself of {kind}, with nothing to put its twin into: Quantized{kind}.pack it")
        chosen.append(path)
    return chosen


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern is a tensor's name, or that of a module above it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _loop(x_TD: Tensor, routing: Routing, experts: QuantizedExperts) -> Tensor:
    """`reference`, with one expert's weights unpacked at a time, and only of those that have something to do."""
    kept_TK = torch.ones_like(routing.experts_TK, dtype=torch.bool)
    if routing.dropped_TK is not None:
        kept_TK = ~routing.dropped_TK
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=accumulate, device=x_TD.device)
    gate_up, down = experts.gate_up.value, experts.down.value
    for e in routing.experts_TK[kept_TK].unique().tolist():
        if not 0 <= e < experts.count:
            raise RoutingError(f"routing names expert {e}: there are {experts.count}, counted from 0")
        token_n, slot_n = (kept_TK & (routing.experts_TK == e)).nonzero(as_tuple=True)
        gate_up_bias, down_bias = (_cast(bias, x_TD.dtype) for bias in experts.biases(e))
        h_nG = F.linear(x_TD[token_n], unpack(_one(gate_up, e), x_TD.dtype), gate_up_bias)
        out_nD = F.linear(activate(h_nG, experts.activation), unpack(_one(down, e), x_TD.dtype), down_bias)
        weight_n1 = routing.weights_TK[token_n, slot_n].unsqueeze(1)
        y_TD = y_TD.index_add(0, token_n, (out_nD * weight_n1).to(accumulate))
    return y_TD.to(x_TD.dtype)


def _one(packed: Packed, expert: int) -> Packed:
    return replace(packed, codes=packed.codes[expert], scales=packed.scales[expert])


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def _refuse_gradients(what: str, *inputs: Tensor) -> None:
    """HandfulError where autograd would be left without a gradient: it would go on without one and say nothing."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise HandfulError(
            f"quantised {what} give no gradient: run the model under torch.no_grad() or torch.inference_mode(), "
            "or train it before it is quantised"
        )
