"""A decoding step as few operations: who may be passed by, and what is taken from them.

A block of a decoding step is some tens of modules, views and questions, which can take longer than its maths. Each of
its halves is one operation (csrc/README.md), with the bits of the modules that it stands for; and where every block has
both, the step is one, from tokens to logits. The modules are the user's, who may hook into any of them, replace it, or
turn it to another dtype between two steps: what a plan remembers (`fused_step.py`) is compared with what they are in
every step.

Legend: B batch · S new tokens · T = B·S · D width · E experts · K experts per token · F an expert's hidden width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from handful.attention import Attention, RMSNorm
from handful.block import Block
from handful.config import GATED
from handful.experts.dense import FeedForward
from handful.experts.layer import Experts
from handful.experts.linear import Linear
from handful.experts.quantized import PackedWeight, QuantizedExperts, QuantizedLinear
from handful.experts.weights import ExpertWeights
from handful.fused_step import Plan, Plans
from handful.kernels.dispatch import as_written, is_unmodified, unobserved, unwatched
from handful.kernels.extension import (
    DTYPES,
    ROUTER_KERNEL_MAX_TOKENS,
    available,
    infers_on_cpu,
    prefers_native,
    translate_error,
)
from handful.kernels.forwards import CACHED, decode_operands, routes
from handful.kernels.operations import DecodeAttention, RouterRules
from handful.moe import MoE, Router
from handful.positions import KVCache, KVCaches, Span
from handful.quantize import Packed
from handful.routing import Limits, Piecewise, Routing, Told

__all__ = ["layers", "step"]

# Whose modules are passed by.
KINDS = (
    Attention, Block, Experts, FeedForward, Linear, MoE, QuantizedExperts, QuantizedLinear, RMSNorm, Router,
    nn.Embedding, nn.Linear,
)  # fmt: skip
METHODS = ("forward", "hidden_states", "through_layers", "logits")  # and which of a decoder's own

# What dense networks are activated by in one operation.
ACTIVATIONS = frozenset({"swiglu", "geglu", "gelu", "relu"})


def step(
    decoder: Any,
    tokens_BS: Tensor,
    cache: KVCache | KVCaches | None = None,
    *,
    padding_B: Tensor | None = None,
    routing: Sequence[Told | None] | None = None,
) -> Any:
    """`Decoder.forward` of one new token of each sequence, as it was planned when the one before passed the blocks."""
    if torch.compiler.is_compiling():
        return NotImplemented
    plans, count = _plans_of(decoder), tokens_BS.numel()
    if count not in plans or cache is None or padding_B is not None or routing is not None:
        return NotImplemented
    if not infers_on_cpu(tokens_BS) or tokens_BS.dtype != torch.int64 or not unwatched(KINDS):
        return NotImplemented
    plan = plans[count]
    weights = plan.weights(decoder)
    if weights is None or not plan.usable:
        return NotImplemented
    new = tokens_BS.shape[1]
    span = cache.span(decoder.config, new)
    if not span.decodes or any(held.dtype not in CACHED for held in span.caches):
        return NotImplemented
    operands = plan.operands(span, weights)
    logits_TV, *made = Operation(torch.ops.handful.decoder_step.default, operands).run(tokens_BS.contiguous())
    cache.advance(new)
    routings = [Routing.of_kernel(*made[i : i + 4]) for i in range(0, len(made), 4)]
    return logits_TV.view(*tokens_BS.shape, -1), routings


def layers(decoder: Any, x_BSD: Tensor, span: Span, choices: Sequence[Told | None]) -> Any:
    """`Decoder.through_layers` of few tokens: each half of a block as one operation, where it has one.

    Blocks are looked at in a row, up to one that has a half without: they answer more quickly so than between
    operations, which leave the processor's caches full of weights. Who is called there may change all that follow.
    """
    tokens = x_BSD.shape[:-1].numel()
    if not (span.decodes or tokens <= ROUTER_KERNEL_MAX_TOKENS) or not available() or not unobserved(x_BSD, KINDS):
        return NotImplemented
    plannable = span.decodes and all(choice is None for choice in choices)
    if plannable and (plan := _plans_of(decoder).get(tokens)) is not None:
        plannable = plan.weights(decoder) is None  # otherwise the same would come out again
    routings, left, fusible = [], list(zip(decoder.layers, choices, strict=True)), True
    while left:
        ready: list[Halves] = []
        for block, choice in left:
            attention = feed = None
            if fusible and is_unmodified(block, Block):
                attention = attention_half(block, x_BSD, tokens, span)
                feed = attention and feed_half(block, x_BSD, tokens, span, choice)
            ready.append((attention, feed))
            if feed is None:
                break
        if plannable and len(ready) == len(decoder.layers) and ready[-1][1] is not None:
            _plan(decoder, x_BSD, tokens, ready)
        plannable = False
        for (block, choice), halves in zip(left, ready, strict=False):
            x_BSD, routing = _run(block, x_BSD, tokens, span, choice, halves, fusible)
            if routing is not None:
                routings.append(routing)
        del left[: len(ready)]
        fusible = bool(left) and unobserved(x_BSD, KINDS)
    return decoder.norm(x_BSD), routings


def _plan(decoder: Any, x_BSD: Tensor, tokens: int, halves: Sequence[Halves]) -> None:
    """Plan the next steps of so many tokens, whose layers have these halves."""
    own, config, (width, dtype) = decoder._modules, decoder.config, (x_BSD.shape[-1], x_BSD.dtype)
    embedding, norm = embedding_weight(own["embed"], dtype), norm_operands(own["norm"])
    head = output_layer(own.get("head"), embedding, tokens, width, dtype)
    if embedding is None or norm is None or head is None:
        return
    # A method of a subclass's, or of the instance's own, is to be called.
    if not all(as_written(type(decoder), name) and name not in decoder.__dict__ for name in METHODS):
        return
    given: list[Any] = [config.embedding_scale, embedding, len(halves)]
    for attention, feed in halves:
        assert attention is not None
        assert feed is not None
        fixed = [value for name, value in zip(ATTENTION, attention.operands, strict=True) if name not in CHANGING]
        given += [*fixed, feed.routes, *feed.operation.operands]
    given += [*norm, config.logits_scale, head.weights, head.scales, head.bits, head.group]
    _plans_of(decoder)[tokens] = Plan(len(halves), given, decoder, METHODS)


def _plans_of(decoder: Any) -> Plans:
    """What is planned for a decoder, which lasts as long as it does."""
    plans: Plans | None = decoder.__dict__.get("_plans")
    if plans is None:
        plans = decoder.__dict__["_plans"] = Plans()
    return plans


def _run(
    block: Any, x_BSD: Tensor, tokens: int, span: Span, choice: Told | None, halves: Halves, fusible: bool
) -> tuple[Tensor, Routing | None]:
    attention, feed = halves
    if attention is not None:
        x_BSD = attention.run(x_BSD)
    elif fusible and is_unmodified(block, Block):
        x_BSD = x_BSD + block.scaled(block.attn(block.attn_norm(x_BSD), span))
        feed = feed_half(block, x_BSD, tokens, span, choice) if unobserved(x_BSD, KINDS) else None
    else:
        return block(x_BSD, span, choice)  # type: ignore[no-any-return]
    if feed is not None:
        return feed.run(x_BSD)
    y_BSD, routing = block.feed(block.ffn_norm(x_BSD), span, choice)
    return x_BSD + block.scaled(y_BSD), routing


# ---------------------------------------------------------------------------------------------------------------------
# The operations, without gradients. What each takes has the schema's names, in the schema's order.


class Operation(NamedTuple):
    """An operation of the extension, and all that it is given but x (..., D)."""

    call: Callable[..., Any]
    operands: tuple[Any, ...]

    def run(self, x: Tensor) -> Any:
        try:
            return self.call(x, *self.operands)
        except RuntimeError as error:
            raise translate_error(error) from None


class Feed(NamedTuple):
    """The operation of a block's second half, what its routing drops, and whether there is one."""

    operation: Operation
    dropped_TK: Tensor | None
    routes: bool

    def run(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        made = self.operation.run(x)
        if not self.routes:
            return made, None
        x, logits_TE, scores_TE, experts_TK, weights_TK = made
        return x, Routing(logits_TE, scores_TE, experts_TK, weights_TK, self.dropped_TK)


# Of a block; None for a half whose modules must be called.
Halves = tuple[Operation | None, Feed | None]


class NormOperands(NamedTuple):
    norm: Tensor
    norm_eps: float


class AttentionProjections(NamedTuple):
    """Of q, k, v and o. The first three have biases or none has."""

    weights: list[Tensor]
    scales: list[Tensor]
    biases: list[Tensor]
    o_bias: Tensor | None
    bits: int
    group: int


# By name, what `attention_half` gives; and what of it changes from step to step.
ATTENTION = (*NormOperands._fields, *AttentionProjections._fields, *DecodeAttention._fields, "residual_scale")
CHANGING = frozenset({"cos", "sin", "keys", "values", "lengths"})


class FeedForwardWeights(NamedTuple):
    """Of gate_up and down."""

    weights: list[Tensor]
    scales: list[Tensor]
    bits: int
    group: int
    activation: str


class RouterOperands(NamedTuple):
    """chosen: the experts to take whatever the scores say."""

    router: Tensor
    router_bias: Tensor | None
    balance_bias: Tensor | None
    chosen: Tensor | None
    dropped: Tensor | None


class SharedExperts(NamedTuple):
    """gate_up and down of the shared experts, whose activation is the experts', and the weight of their gate."""

    shared: Sequence[Tensor] = ()
    shared_scales: Sequence[Tensor] = ()
    shared_bits: int = 0
    shared_group: int = 0
    shared_gate: Tensor | None = None
    shared_gate_scales: Tensor | None = None
    gate_bits: int = 0
    gate_group: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# The halves of a block, for any x like the given one that is `unobserved`.


def attention_half(block: nn.Module, x_BSD: Tensor, tokens: int, span: Span) -> Operation | None:
    """x + scale · attn(attn_norm(x)) for one new token of each sequence; None where the modules must be called."""
    attention = block._modules["attn"]
    if not span.decodes or not is_unmodified(attention, Attention):
        return None
    norm, own, D = norm_operands(block._modules["attn_norm"]), attention._modules, x_BSD.shape[-1]
    maps = [(own.get("q"), D), (own.get("k"), D), (own.get("v"), D), (own.get("o"), attention.inner)]
    linears = linear_operands(maps, tokens, x_BSD.dtype)
    if norm is None or linears is None:
        return None
    biases = [bias for bias in linears.biases[:3] if bias is not None]
    q_norm = k_norm = None
    if attention.qk_norm != "none":
        q_norm, k_norm = norm_operands(own["q_norm"]), norm_operands(own["k_norm"])
        if q_norm is None or k_norm is None:
            return None
    decode = decode_operands(attention, span, q_norm and q_norm.norm, k_norm and k_norm.norm)
    if decode is None or len(biases) not in (0, 3):
        return None
    projections = AttentionProjections(
        linears.weights, linears.scales, biases, linears.biases[3], linears.bits, linears.group
    )
    operands = (*norm, *projections, *decode, block.residual_scale)
    return Operation(torch.ops.handful.attend_layer.default, operands)


def feed_half(block: nn.Module, x_BSD: Tensor, tokens: int, span: Span, choice: Told | None) -> Feed | None:
    """x + scale · ffn(ffn_norm(x)) of few tokens, and the routing; None where the modules must be called."""
    ffn, norm = block._modules["ffn"], norm_operands(block._modules["ffn_norm"])
    if norm is None or span.real_BS is not None:
        return None
    if is_unmodified(ffn, MoE):
        return _mixture(ffn, norm, x_BSD, tokens, choice, block.residual_scale)
    weights = feed_forward_weights(ffn, tokens, x_BSD.shape[-1], x_BSD.dtype)
    if weights is None:
        return None
    operands = (*norm, *weights, block.residual_scale)
    return Feed(Operation(torch.ops.handful.feed_forward_layer.default, operands), None, False)


def _mixture(
    moe: MoE, norm: NormOperands, x: Tensor, tokens: int, choice: Told | None, residual_scale: Any
) -> Feed | None:
    own, width = moe._modules, x.shape[-1]
    router = own.get("router")
    if isinstance(choice, Limits | Piecewise) or not is_unmodified(router, Router) or not routes(router, x, tokens):
        return None
    experts, weight_ED = expert_weights(own.get("experts"), width, x.dtype), router._parameters["weight"]
    if experts is None or weight_ED is None or weight_ED.shape != (experts.experts, width):
        return None
    shared = _shared_experts(moe, experts.activation, tokens, width, x.dtype)
    if shared is None:
        return None
    chosen_TK, dropped_TK = router.forced_experts(choice, tokens, x.device)
    if chosen_TK is not None and chosen_TK.shape[1] != router.config.top_k:
        return None
    if dropped_TK is not None and (chosen_TK is None or dropped_TK.shape != chosen_TK.shape):
        return None
    routed = RouterOperands(weight_ED, router.bias, router._buffers.get("balance_bias"), chosen_TK, dropped_TK)
    operands = (*norm, *routed, *RouterRules.of(router.config), *experts, *shared, residual_scale)
    return Feed(Operation(torch.ops.handful.moe_layer.default, operands), dropped_TK, True)


def _shared_experts(moe: MoE, activation: str, tokens: int, width: int, dtype: torch.dtype) -> SharedExperts | None:
    if moe.shared is None:
        return SharedExperts()
    weights = feed_forward_weights(moe.shared, tokens, width, dtype)
    if weights is None or weights.activation != activation:
        return None
    shared = SharedExperts(*weights[:4])
    gate = moe.shared_gate
    if gate is None:
        return shared
    if is_unmodified(gate, nn.Linear):  # torch's to multiply
        same = gate.bias is None and gate.weight.dtype == dtype
        return shared._replace(shared_gate=gate.weight) if same else None
    found = linear_operand(gate, tokens, width, dtype)
    if found is None or found[1] is not None or not isinstance(found[0], Packed):
        return None
    packed = found[0]
    return SharedExperts(*shared[:4], packed.codes, packed.scales, packed.bits, packed.group)


# ---------------------------------------------------------------------------------------------------------------------
# What is taken from modules. `module.weight` takes ten times as long as a look into its `_parameters`.


def norm_operands(module: object) -> NormOperands | None:
    """Of a norm, if our kernels are to stand for it."""
    if not is_unmodified(module, RMSNorm):
        return None
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in DTYPES:
        return None
    return NormOperands(weight, module.eps or 0.0)


def embedding_weight(module: object, dtype: torch.dtype) -> Tensor | None:
    """Of an embedding, if a token's row is all that it gives."""
    if not is_unmodified(module, nn.Embedding) or module.max_norm is not None:
        return None
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dtype == dtype else None


def output_layer(
    head: object, embedding: Tensor | None, tokens: int, inputs: int, dtype: torch.dtype
) -> LinearOperands | None:
    """The map to logits; head None: by the embedding's weight."""
    if head is None:
        if embedding is None or not prefers_native(embedding, tokens, dtype):
            return None
        return LinearOperands([embedding], [], [], 0, 0)
    found = linear_operands([(head, inputs)], tokens, dtype)
    return found if found is not None and found.biases == [None] else None


def linear_operand(
    module: object, tokens: int, inputs: int, dtype: torch.dtype
) -> tuple[Tensor | Packed, Tensor | None] | None:
    """Weight and bias of a linear map of `inputs` numbers, if our kernels are to multiply so many tokens by them."""
    if is_unmodified(module, Linear):
        weight = module._parameters.get("weight")
        if weight is None or "bias" not in module._parameters or not prefers_native(weight, tokens, dtype):
            return None
        return weight, module._parameters["bias"]
    if is_unmodified(module, QuantizedLinear):
        packed, bias = module._modules["packed"], module._buffers["bias"]
        if not isinstance(packed, PackedWeight) or packed.inputs != inputs:
            return None
        return packed.value, bias if bias is None or bias.dtype == dtype else bias.to(dtype)
    return None


class LinearOperands(NamedTuple):
    """Linear maps of one kind: weights, or codes with scales (bits = 0: none)."""

    weights: list[Tensor]
    scales: list[Tensor]
    biases: list[Tensor | None]
    bits: int
    group: int


def linear_operands(maps: Sequence[tuple[object, int]], tokens: int, dtype: torch.dtype) -> LinearOperands | None:
    """Of linear maps, each with the width of its input, if our kernels are to stand for all and they are alike."""
    weights: list[Tensor] = []
    scales: list[Tensor] = []
    biases: list[Tensor | None] = []
    bits = group = 0
    for module, inputs in maps:
        found = linear_operand(module, tokens, inputs, dtype)
        if found is None:
            return None
        weight, bias = found
        if isinstance(weight, Packed):
            if weights and (weight.bits != bits or weight.group != group):
                return None
            bits, group = weight.bits, weight.group
            weights.append(weight.codes)
            scales.append(weight.scales)
        elif bits:
            return None
        else:
            weights.append(weight)
        biases.append(bias)
    return LinearOperands(weights, scales, biases, bits, group)


def feed_forward_weights(module: object, tokens: int, inputs: int, dtype: torch.dtype) -> FeedForwardWeights | None:
    """Of a dense network, if one operation is to stand for it."""
    if not is_unmodified(module, FeedForward) or module.activation not in ACTIVATIONS:
        return None
    first = linear_operand(module._modules.get("gate_up"), tokens, inputs, dtype)
    if first is None:
        return None
    hidden = first[0].shape[0] // (2 if module.activation in GATED else 1)
    maps = [(module._modules.get("gate_up"), inputs), (module._modules.get("down"), hidden)]
    found = linear_operands(maps, tokens, dtype)
    if found is None or any(bias is not None for bias in found.biases):
        return None
    return FeedForwardWeights(found.weights, found.scales, found.bits, found.group, module.activation)


def expert_weights(module: object, inputs: int, dtype: torch.dtype) -> ExpertWeights | None:
    """The weights of experts of `inputs` numbers, if our kernels are to stand for them and all are there."""
    if is_unmodified(module, Experts):
        gate_up, down = module._parameters.get("gate_up"), module._parameters.get("down")
        if gate_up is None or down is None or gate_up.dtype not in DTYPES or down.dtype not in DTYPES:
            return None
        biases = module.gate_up_bias, module.down_bias
        weights = ExpertWeights(gate_up, None, down, None, *biases, module.activation, down.shape[2])
        fits = gate_up.shape[2] == inputs
    elif is_unmodified(module, QuantizedExperts):
        weights, fits = module.weights.with_biases_in(dtype), module.gate_up.inputs == inputs
    else:
        return None
    return weights if fits and module.backend in ("auto", "native") else None
