"""Experts and linear layers whose weights are held in 8 or 4 bits: for inference.

On a CPU the native kernels multiply the codes as they are. Elsewhere weights are unpacked first, of experts those of
the chosen ones alone, one after another.

Legend: T tokens · D model width · E experts · F an expert's hidden width · G = 2·F gate and up rows (F without a
gate) · I inputs · O outputs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handful.config import Activation
from handful.errors import ConfigError, HandfulError
from handful.experts.backends import BACKENDS, check_backend
from handful.experts.layer import Experts
from handful.experts.weights import ExpertWeights, check_fits, compute_dtype, first_rows
from handful.kernels import operations
from handful.kernels.extension import DTYPES, available
from handful.quantize import Packed, pack, unpack
from handful.routing import Routing

__all__ = ["PackedWeight", "QuantizedExperts", "QuantizedLinear"]


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
    """E feed-forward networks with quantized weights: (x_TD, routing) -> y_TD, as `Experts`, without gradients.

    gate_up   (E, G, D) packed; down (E, D, F) packed. They are multiplied in x's dtype, or nearly (docs/native.md).
    gate_up_bias (E, G) and down_bias (E, D), not quantized, or None.
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
        check_backend(backend)
        three = len(gate_up.shape) == len(down.shape) == 3
        if not three or gate_up.shape != (down.shape[0], first_rows(down.shape[2], activation), down.shape[1]):
            raise ConfigError(
                f"gate_up is {gate_up.shape} and down {down.shape}: they must be (experts, rows, width) and "
                f"(experts, width, hidden), for {activation}"
            )
        if (gate_up.bits, gate_up.group) != (down.bits, down.group):
            raise ConfigError(
                f"gate_up has {gate_up.bits} bits in groups of {gate_up.group} and down {down.bits} in groups of "
                f"{down.group}: they must be alike"
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
        """Quantize experts; their biases are shared, not copied. ConfigError as `handful.quantize.pack`; `name` is
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

    @property
    def weights(self) -> ExpertWeights:
        """As the backends take them."""
        packed = self.gate_up.value, self.down.value
        return ExpertWeights.packed(*packed, self.gate_up_bias, self.down_bias, self.activation)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_fits(x_TD, routing, self.count, self.gate_up.inputs)
        _refuse_gradients("experts", x_TD, routing.weights_TK)
        return BACKENDS[self.backend](x_TD, routing, self.weights)

    def extra_repr(self) -> str:
        return f"{self.count} experts, activation={self.activation}, backend={self.backend}"


class QuantizedLinear(nn.Module):
    """A linear layer with a quantized weight: x (..., I) -> (..., O), as `nn.Linear`, without gradients.

    packed   (O, I) packed; it is multiplied in x's dtype.
    weight   the same, unpacked at every reading, in the dtype of the weight that was packed or that the module was
             turned to since. For code that reads a weight instead of calling the layer; calling it is quicker.
    bias     (O,), not quantized, or None.

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
        """Quantize a linear layer; its bias is shared, not copied. ConfigError as `handful.quantize.pack`; `name` is
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
        _refuse_gradients("linear layers", x)
        dtype = compute_dtype(x)
        if x.shape[-1:] != (self.in_features,):
            raise ConfigError(f"linear was given x of shape {tuple(x.shape)}: its last size must be {self.in_features}")
        bias = self.bias if self.bias is None or self.bias.dtype == dtype else self.bias.to(dtype)
        if available() and x.is_cpu and x.dtype in DTYPES and dtype in DTYPES:
            return operations.linear(x.to(dtype), self.packed.value, bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), unpack(self.packed.value, dtype), bias)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        # What a turn to another dtype would have made of the weight.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.codes.device)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]


def _refuse_gradients(what: str, *inputs: Tensor) -> None:
    """HandfulError where autograd would be left without a gradient: it would go on without one and say nothing."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise HandfulError(
            f"quantized {what} give no gradient: run the model under torch.no_grad() or torch.inference_mode(), "
            "or train it before it is quantized"
        )
