"""What torch must know of the operations: their gradients, and their shapes for torch.compile.

Legend: as in `handful.kernels.operations`
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["register"]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.bf16, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, grad_y: Tensor | None, grad_kept: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 11
    *tensors, kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    for_parameters = any(needs[4:8])
    x, weights, gate_up, down, gate_up_bias, down_bias = torch.ops.handful.experts_backward(
        grad_y.contiguous(), *tensors, kept, ctx.activation, ctx.bf16, needs[0], for_parameters
    )

    def of(grad: Tensor, index: int) -> Tensor | None:
        return grad.to(tensors[index].dtype) if needs[index] else None

    found = of(x, 0), None, of(weights, 2), None, of(gate_up, 4), of(down, 5), of(gate_up_bias, 6), of(down_bias, 7)
    return *found, None, None, None


def _fake_experts(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16 if others[-1] else torch.float32)


def _fake_forward(
    panel: int, x: Tensor, experts: Tensor, weights: Tensor, dropped: Tensor | None, gate_up: Tensor, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, bf16: bool, whole: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assignments, (count, rows, _) = experts.numel(), gate_up.shape
    # Each expert may leave its last panel unfilled, as long as there are assignments enough.
    panels = assignments // panel + torch.sym_min(assignments, count)
    y = x.new_empty(x.shape, dtype=torch.bfloat16 if bf16 and not whole else torch.float32)
    return y, y.new_empty((panels, rows, panel), dtype=torch.bfloat16 if bf16 else torch.float32)


def _fake_backward(
    grad_y: Tensor, x: Tensor, experts: Tensor, weights: Tensor, dropped: Tensor | None, gate_up: Tensor, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, kept: Tensor, activation: str, bf16: bool, for_x: bool,
    for_parameters: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    def like(value: Tensor, wanted: bool) -> Tensor:
        return torch.empty_like(value) if wanted else value.new_empty((0,) * value.dim())

    def bias_like(bias: Tensor | None) -> Tensor:
        shape = bias.shape if bias is not None and for_parameters else (0, 0)
        return x.new_empty(shape, dtype=torch.float32)

    matrices = like(gate_up, for_parameters), like(down, for_parameters)
    return like(x, for_x), torch.empty_like(weights), *matrices, bias_like(gate_up_bias), bias_like(down_bias)


def _fake_linears(x: Tensor, weights: Sequence[Tensor], *others: Any) -> list[Tensor]:
    return [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]


def _fake_route(
    x: Tensor, weight: Tensor, bias: Tensor | None, balance_bias: Tensor | None, chosen: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (tokens, _), experts, top_k = x.shape, weight.shape[0], others[4]
    scores = x.new_empty((tokens, experts), dtype=torch.float32)
    weights = x.new_empty((tokens, top_k), dtype=torch.float32)
    return scores, torch.empty_like(scores), weights.new_empty(weights.shape, dtype=torch.int64), weights


def _fake_moe_layer(
    x: Tensor, norm: Tensor, norm_eps: float, router: Tensor, bias: Tensor | None, balance_bias: Tensor | None,
    chosen: Tensor | None, dropped: Tensor | None, *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x_TD = x.reshape(-1, x.shape[-1])
    return torch.empty_like(x), *_fake_route(x_TD, router, bias, balance_bias, chosen, *others)


def _fake_prefill_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    width = q.shape[3] if v.dtype == torch.int8 else v.shape[3]  # rows in 8 bits: of as many numbers as q
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1] * width))


def _fake_like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def register(panel: int) -> None:
    """Tell torch, once, after the extension is loaded.

    panel   assignments of one expert that the kernels lay side by side.
    """
    torch.library.register_fake("handful::experts", _fake_experts)
    torch.library.register_fake("handful::experts_forward", functools.partial(_fake_forward, panel))
    torch.library.register_fake("handful::experts_backward", _fake_backward)
    torch.library.register_fake("handful::experts_quantized", _fake_experts)
    torch.library.register_fake("handful::linears", _fake_linears)
    torch.library.register_fake("handful::rms_norm", _fake_like_first)
    torch.library.register_fake("handful::decode_attention", _fake_like_first)
    torch.library.register_fake("handful::prefill_attention", _fake_prefill_attention)
    torch.library.register_fake("handful::route", _fake_route)
    torch.library.register_fake("handful::attend_layer", _fake_like_first)
    torch.library.register_fake("handful::moe_layer", _fake_moe_layer)
    torch.library.register_fake("handful::feed_forward_layer", _fake_like_first)
    torch.library.register_autograd("handful::experts_forward", _backward, setup_context=_setup)
