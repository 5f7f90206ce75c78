"""Several modules as one operation, for few tokens in inference: who may be passed by, and what is taken from them.

A layer of a decoding step is some tens of modules, views and questions, which can take longer than its maths. Attention
and the feed-forward half of a layer are an operation each (csrc/fused_layers.cpp), with the bits of the modules that it
stands for. These are the user's, who may hook into any of them, replace it, or turn it to another dtype between two
steps: so nothing is kept, and what they hold is looked up in every step.

Legend: D model width · T tokens · E experts · K experts per token
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from handful.config import RouterConfig
from handful.experts.native import OneToken, explained, plain_inference, router_rules
from handful.quantize import Packed

__all__ = [
    "ExpertsWeights",
    "Maps",
    "Operation",
    "attend_layer",
    "feed_forward_layer",
    "is_bare",
    "kernel_map",
    "maps_of",
    "moe_layer",
    "nobody_looks",
    "norm_of",
    "weights_of",
]

M = TypeVar("M", bound=nn.Module)

# What dense networks can be activated by in one operation.
ACTIVATIONS = frozenset({"swiglu", "geglu", "gelu", "relu"})


class Maps(NamedTuple):
    """Linear maps of one kind: weights, or codes with scales."""

    weights: list[Tensor]
    scales: list[Tensor]
    biases: list[Tensor | None]
    bits: int
    group: int


class ExpertsWeights(NamedTuple):
    """The weights of E experts, or codes with scales (bits = 0: none), and of what width they are within."""

    gate_up: Tensor
    gate_up_scales: Tensor | None
    down: Tensor
    down_scales: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    hidden: int
    bits: int
    group: int


# ---------------------------------------------------------------------------------------------------------------------
# Who may be passed by.


def nobody_looks(x: Tensor) -> bool:
    """Whether x may pass several modules at once: in plain inference, nothing traced, and no hook that is on all."""
    return plain_inference(x) and not (_has_any_global_hook() or torch.compiler.is_compiling())


def is_bare(module: object, kind: type[M]) -> TypeGuard[M]:
    """Whether calling a module does what `kind` says and no more: no subclass, no hook, no forward of its own."""
    if type(module) is not kind:
        return False
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _offers(module: Any, name: str) -> bool:
    """Whether a module's own class, no base of it, has a method, and calling the module does what that class says."""
    kind = type(module)
    return name in kind.__dict__ and is_bare(module, kind)


def norm_of(module: Any) -> tuple[Tensor, float] | None:
    """Weight and epsilon of an RMSNorm, if our kernels are to stand for it."""
    return module.norm_for_kernels() if _offers(module, "norm_for_kernels") else None


def kernel_map(
    module: Any, tokens: int, inputs: int, dtype: torch.dtype
) -> tuple[Tensor | Packed, Tensor | None] | None:
    """Weight and bias of a linear map of `inputs` numbers, if our kernels are to stand for it."""
    return module.for_kernels(tokens, inputs, dtype) if _offers(module, "for_kernels") else None


def weights_of(module: Any, inputs: int, dtype: torch.dtype) -> ExpertsWeights | None:
    """The weights of experts of `inputs` numbers, if our kernels are to stand for them and all are there."""
    return module.weights_for_kernels(inputs, dtype) if _offers(module, "weights_for_kernels") else None


def maps_of(maps: Iterable[tuple[object, int]], tokens: int, dtype: torch.dtype) -> Maps | None:
    """Linear maps, each with the width of what it is given, if our kernels are to stand for all and they are alike."""
    weights: list[Tensor] = []
    scales: list[Tensor] = []
    biases: list[Tensor | None] = []
    bits = group = 0
    for module, inputs in maps:
        found = kernel_map(module, tokens, inputs, dtype)
        if found is None:
            return None
        weight, bias = found
        if type(weight) is Packed:
            if weights and (weight.bits != bits or weight.group != group):
                return None
            bits, group = weight.bits, weight.group
            weights.append(weight.codes)
            scales.append(weight.scales)
        elif bits:
            return None
        else:
            assert isinstance(weight, Tensor)
            weights.append(weight)
        biases.append(bias)
    return Maps(weights, scales, biases, bits, group)


# ---------------------------------------------------------------------------------------------------------------------
# The operations. No gradients.


class Operation(NamedTuple):
    """An operation of ours, and all that it is given but x (..., D)."""

    name: Callable[..., Any]
    given: tuple[Any, ...]

    def of(self, x: Tensor) -> Any:
        try:
            return self.name(x, *self.given)
        except RuntimeError as error:
            raise explained(error) from None


def attend_layer(norm: tuple[Tensor, float], maps: Maps, given: OneToken, residual_scale: float) -> Operation:
    """x + residual_scale · attention of the normed x, for one new token of each sequence: of x (..., D) the same.

    maps   q, k, v and o; the first three have biases or none has.
    """
    weights, scales, biases, bits, group = maps
    three = [bias for bias in biases[:3] if bias is not None]
    return Operation(
        torch.ops.handful.attend_layer.default,
        (*norm, weights, scales, three, biases[3], bits, group, *given.arguments(), residual_scale),
    )


def moe_layer(
    norm: tuple[Tensor, float],
    router: tuple[Tensor, Tensor | None, Tensor | None],
    chosen_TK: Tensor | None,
    dropped_TK: Tensor | None,
    config: RouterConfig,
    experts: ExpertsWeights,
    shared: Maps | None,
    shared_gate: Tensor | Packed | None,
    residual_scale: float,
) -> Operation:
    """x + residual_scale · the mixture of the normed x: of x (..., D) the same, and what `native.route` returns.

    router       weight, bias and balance bias.
    shared       gate_up and down of the shared experts; their activation is the experts'. shared_gate: its weight.
    """
    weights, scales, _, bits, group = shared or _NO_MAPS
    gate: tuple[Tensor | None, Tensor | None, int, int]
    if isinstance(shared_gate, Packed):
        gate = shared_gate.codes, shared_gate.scales, shared_gate.bits, shared_gate.group
    else:
        gate = shared_gate, None, 0, 0
    return Operation(
        torch.ops.handful.moe_layer.default,
        (
            *norm, *router, chosen_TK, dropped_TK, *router_rules(config), *experts, weights, scales, bits, group, *gate,
            residual_scale,
        ),
    )  # fmt: skip


_NO_MAPS = Maps([], [], [], 0, 0)


def feed_forward_layer(norm: tuple[Tensor, float], maps: Maps, activation: str, residual_scale: float) -> Operation:
    """x + residual_scale · a dense network of the normed x: of x (..., D) the same. maps: its gate_up and down."""
    weights, scales, _, bits, group = maps
    return Operation(
        torch.ops.handful.feed_forward_layer.default,
        (*norm, weights, scales, bits, group, activation, residual_scale),
    )
