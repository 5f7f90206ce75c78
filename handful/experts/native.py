"""Experts by our own C++ kernels, on CPU: one operation, no Python per expert, no copy of a weight.

csrc/experts.cpp and csrc/experts_backward.cpp say how; they choose among AVX2, AVX-512 and AMX at run time and use
torch's threads. Products are in float32, or in bfloat16 with float32 sums; the same bits come out for any number of
threads. Quantised weights (handful/quantize.py) have a forward pass only.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · G = 2·F gate and up
rows (F without a gate) · I inputs, O outputs of a linear map
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from handful.errors import ConfigError, HandfulError, RoutingError
from handful.machine import native_error
from handful.quantize import Packed
from handful.routing import Routing

if TYPE_CHECKING:
    from handful.experts.layer import Experts

__all__ = ["available", "linear", "native", "quantized_experts", "takes"]

DTYPES = (torch.float32, torch.bfloat16)
PANEL = 32  # assignments of one expert that the kernels lay side by side (kPanel in csrc/kernels.h)

_registered = False


def available() -> bool:
    """Whether the kernels are there: `handful.machine.native_error()` says why not. Loads them at the first call.

    Raises ConfigError if HANDFUL_ISA names a level that this computer does not have.
    """
    if native_error() is not None:
        return False
    _register()
    return True


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products of x are computed in: x's own dtype, or autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels, where they are there, can multiply x and weights: on CPU, in float32 and bfloat16."""
    dtypes = (compute_dtype(x), x.dtype, *(weight.dtype for weight in weights))
    return x.device.type == "cpu" and all(dtype in DTYPES for dtype in dtypes)


def native(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Apply the experts by the kernels. HandfulError where they are not there, or for a dtype they do not take."""
    if not experts.has_native:
        raise HandfulError(f"experts backend 'native': {native_error()}")
    if not takes(x_TD, experts.gate_up, experts.down):
        raise ConfigError(
            f"experts backend 'native' was given x of {_name(x_TD)} and weights of {_name(experts.gate_up)}: "
            "it takes float32 and bfloat16 on cpu"
        )
    inputs = (x_TD, routing.weights_TK, experts.gate_up, experts.down, experts.gate_up_bias, experts.down_bias)
    arguments = (
        *_tokens(x_TD, routing),
        experts.gate_up.contiguous(),
        experts.down.contiguous(),
        _whole(experts.gate_up_bias),
        _whole(experts.down_bias),
        experts.activation,
        compute_dtype(x_TD) == torch.bfloat16,
    )
    y_TD: Tensor
    try:
        if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs):
            y_TD, _ = torch.ops.handful.experts_forward(*arguments)
        else:
            y_TD = torch.ops.handful.experts(*arguments)
    except RuntimeError as error:
        raise _explained(error) from None
    return y_TD


def quantized_experts(
    x_TD: Tensor,
    routing: Routing,
    gate_up: Packed,
    down: Packed,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Apply experts whose weights are quantised, gate_up (E, G, D) and down (E, D, F) alike; no gradients."""
    try:
        y_TD: Tensor = torch.ops.handful.experts_quantized(
            *_tokens(x_TD, routing),
            gate_up.codes,
            gate_up.scales,
            down.codes,
            down.scales,
            _whole(gate_up_bias),
            _whole(down_bias),
            activation,
            down.inputs,
            down.bits,
            down.group,
            compute_dtype(x_TD) == torch.bfloat16,
        )
    except RuntimeError as error:
        raise _explained(error) from None
    return y_TD


def linear(x_TI: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias for float32 or bfloat16 x (..., I) and weight (O, I): (..., O) in x's dtype; no gradients."""
    x_TI, lead = x_TI.reshape(-1, x_TI.shape[-1]).contiguous(), x_TI.shape[:-1]
    try:
        if isinstance(weight, Packed):
            if x_TI.shape[1] != weight.inputs:
                raise ConfigError(f"linear was given x of width {x_TI.shape[1]}: its weight takes {weight.inputs}")
            y_TO = torch.ops.handful.linear_quantized(
                x_TI, weight.codes, weight.scales, _whole(bias), weight.bits, weight.group
            )
        else:
            y_TO = torch.ops.handful.linear(x_TI, weight.contiguous(), _whole(bias))
    except RuntimeError as error:
        raise _explained(error) from None
    out: Tensor = y_TO.view(*lead, y_TO.shape[-1])
    return out


def _tokens(x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dropped_TK = None if routing.dropped_TK is None else routing.dropped_TK.contiguous()
    return (
        x_TD.contiguous(),
        routing.experts_TK.long().contiguous(),
        routing.weights_TK.float().contiguous(),
        dropped_TK,
    )


def _whole(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _name(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} on {value.device.type}"


def _explained(error: RuntimeError) -> Exception:
    """The kernels' own complaint, in one line and without its place in the source, as an error of ours."""
    line = re.sub(r"^\w+, [\w./]+:\d+, ", "", str(error).splitlines()[0])
    return RoutingError(line) if line.startswith("routing names") else HandfulError(line)


# ---------------------------------------------------------------------------------------------------------------------
# What torch must know of the operation: its gradients, and its shapes for torch.compile.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.bf16 = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, grad_y: Tensor | None, grad_kept: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 10
    *tensors, kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    for_parameters = any(needs[4:8])
    x, weights, gate_up, down, gate_up_bias, down_bias = torch.ops.handful.experts_backward(
        grad_y.contiguous(), *tensors, kept, ctx.activation, ctx.bf16, needs[0], for_parameters
    )

    def of(grad: Tensor, index: int) -> Tensor | None:
        return grad.to(tensors[index].dtype) if needs[index] else None

    return (
        of(x, 0),
        None,
        of(weights, 2),
        None,
        of(gate_up, 4),
        of(down, 5),
        of(gate_up_bias, 6),
        of(down_bias, 7),
        None,
        None,
    )


def _fake_experts(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16 if others[-1] else torch.float32)


def _fake_forward(
    x: Tensor, experts: Tensor, weights: Tensor, dropped: Tensor | None, gate_up: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    assignments, (count, rows, _) = experts.numel(), gate_up.shape
    # Each expert may leave its last panel unfilled, as long as there are assignments enough.
    panels = assignments // PANEL + torch.sym_min(assignments, count)
    y = _fake_experts(x, *others)
    return y, y.new_empty((panels, rows, PANEL))


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    dropped: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    kept: Tensor,
    activation: str,
    bf16: bool,
    for_x: bool,
    for_parameters: bool,
) -> tuple[Tensor, ...]:
    def like(value: Tensor, wanted: bool) -> Tensor:
        return torch.empty_like(value) if wanted else value.new_empty((0,) * value.dim())

    def bias_like(bias: Tensor | None) -> Tensor:
        shape = bias.shape if bias is not None and for_parameters else (0, 0)
        return x.new_empty(shape, dtype=torch.float32)

    return (
        like(x, for_x),
        torch.empty_like(weights),
        like(gate_up, for_parameters),
        like(down, for_parameters),
        bias_like(gate_up_bias),
        bias_like(down_bias),
    )


def _fake_linear(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _register() -> None:
    global _registered
    if _registered:
        return
    torch.library.register_fake("handful::experts", _fake_experts)
    torch.library.register_fake("handful::experts_forward", _fake_forward)
    torch.library.register_fake("handful::experts_backward", _fake_backward)
    torch.library.register_fake("handful::experts_quantized", _fake_experts)
    torch.library.register_fake("handful::linear", _fake_linear)
    torch.library.register_fake("handful::linear_quantized", _fake_linear)
    torch.library.register_autograd("handful::experts_forward", _backward, setup_context=_setup)
    _registered = True
