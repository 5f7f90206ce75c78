"""The decoder: blocks of attention and a feed-forward network or an MoE, and a stack of them.

    tokens ─► embed ─► [ x + attention(norm x) ─► x + feed-forward or MoE (norm x) ] × layers ─► norm ─► head ─► logits

Which kind of attention it is, `attention.py` alone knows.

Legend: B batch · S new tokens · T = B·S · D width · V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from handful.attention import RMSNorm, attend_at_once, make_attention
from handful.config import ModelConfig
from handful.errors import ConfigError, RoutingError
from handful.experts import FeedForward, Linear
from handful.experts.at_once import Operation, is_bare, nobody_looks
from handful.experts.layer import feed_at_once, multiply
from handful.moe import Mixing, MoE, mix_at_once
from handful.origin import Origin
from handful.positions import KVCache, KVCaches, Span
from handful.routing import Choice, Routing
from handful.text import Tokenizer

__all__ = ["Block", "Decoder", "KVCache"]


class Block(nn.Module):
    """One layer: attention and then a feed-forward network or an MoE, each on the normed stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int, backend: str) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.attn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attn = make_attention(config, layer)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn: MoE | FeedForward
        if config.is_moe(layer) and config.router is not None:
            self.ffn = MoE(
                config.width,
                config.expert_width,
                config.router,
                activation=config.activation,
                bias=config.expert_bias,
                shared_hidden=config.shared_width,
                shared_gate=config.shared_gate,
                backend=backend,
            )
        else:
            self.ffn = FeedForward(config.width, config.ffn, config.activation)

    def forward(
        self, x_BSD: Tensor, span: Span, choice: Choice | Routing | None = None
    ) -> tuple[Tensor, Routing | None]:
        # Few tokens in inference: each half is one operation, as long as nobody looks into it.
        alone, ffn, norm = nobody_looks(x_BSD), self.ffn, self.ffn_norm
        attend = self._attend(x_BSD, span) if alone else None
        x_BSD = x_BSD + self._scaled(self.attn(self.attn_norm(x_BSD), span)) if attend is None else attend.of(x_BSD)
        feed = self._feed(x_BSD, choice) if alone and span.real_BS is None else None
        if isinstance(feed, Mixing):
            x_BSD, *made = feed.operation.of(x_BSD)
            return x_BSD, feed.routing(*made)
        if feed is not None:
            return feed.of(x_BSD), None
        if isinstance(ffn, MoE):
            y_BSD, routing = ffn(norm(x_BSD), choice, mask=span.real_BS)
            return x_BSD + self._scaled(y_BSD), routing
        return x_BSD + self._scaled(ffn(norm(x_BSD))), None

    def at_once(
        self, x_BSD: Tensor, span: Span, choice: Choice | Routing | None
    ) -> tuple[Operation, Operation | Mixing] | None:
        """The operations that stand for the two halves, where both have one; for any x like this one."""
        attend = self._attend(x_BSD, span)
        feed = None if attend is None else self._feed(x_BSD, choice)
        return None if attend is None or feed is None else (attend, feed)

    def _attend(self, x_BSD: Tensor, span: Span) -> Operation | None:
        own = self._modules  # self.attn takes ten times as long
        return attend_at_once(own["attn"], own["attn_norm"], x_BSD, span, self.residual_scale)

    def _feed(self, x_BSD: Tensor, choice: Choice | Routing | None) -> Operation | Mixing | None:
        ffn, norm = self._modules["ffn"], self._modules["ffn_norm"]
        if isinstance(ffn, MoE):
            return mix_at_once(ffn, norm, x_BSD, choice, self.residual_scale)
        return feed_at_once(ffn, norm, x_BSD, self.residual_scale)

    def _scaled(self, y_BSD: Tensor) -> Tensor:
        return y_BSD if self.residual_scale == 1 else y_BSD * self.residual_scale


def _run(layers: Sequence[tuple[Operation, Operation | Mixing]], x_BSD: Tensor) -> tuple[Tensor, list[Routing]]:
    """x through both operations of all layers, and their routings."""
    made = []
    for attend, feed in layers:
        x_BSD = attend.of(x_BSD)
        if isinstance(feed, Mixing):
            x_BSD, *rest = feed.operation.of(x_BSD)
            made.append((feed, rest))
        else:
            x_BSD = feed.of(x_BSD)
    return x_BSD, [feed.routing(*rest) for feed, rest in made]


class Decoder(nn.Module):
    """A decoder-only language model: tokens_BS -> (logits_BSV, one Routing per MoE layer, in order).

    backend                who multiplies the experts (see `handful.experts`).
    activation_checkpoint  attribute: in training keep only block inputs for the backward pass, compute the rest again.
    tokenizer              attribute: the tokenizer of its checkpoint, None for a model that was not loaded.
    origin                 attribute: what else its checkpoint says, likewise.
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.activation_checkpoint = False
        self.tokenizer: Tokenizer | None = None
        self.origin: Origin | None = None
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config, i, backend) for i in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = None if config.tied else Linear(config.width, config.vocab, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights scaled by fan-in, so that every width starts alike; what joins the stream, by depth too."""
        for name, p in self.named_parameters():
            if name.endswith(("bias", "noise_weight", "sinks")):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)
            else:
                std = p.shape[-1] ** -0.5
                if name.endswith(("attn.o.weight", "down", "down.weight")):
                    std *= (2 * self.config.layers) ** -0.5
                p.normal_(0.0, std)

    def forward(
        self,
        tokens_BS: Tensor,
        cache: KVCache | KVCaches | None = None,
        *,
        padding_B: Tensor | None = None,
        routing: Sequence[Choice | Routing] | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Logits for every position, in the weights' dtype (autocast's under autocast).

        cache       the tokens follow those that it holds; `KVCaches`: of several sequences, whose tokens lie one after
                    the other in a batch of one.
        padding_B   how many tokens at the front of each sequence are padding, whose logits mean nothing. A cache
                    remembers it from the call that it was empty for.
        routing     the experts that every MoE layer is to take for these T = B·S tokens, in order: a recorded routing
                    (`observe.Recording`), replayed. The weights are made anew from the scores, with gradients.

        ConfigError if the tokens do not fit into the cache, RoutingError for a routing of other layers or tokens.
        """
        x_BSD, routings = self.hidden(tokens_BS, cache, padding_B=padding_B, routing=routing)
        return self.logits(x_BSD), routings

    def logits(self, x_BSD: Tensor) -> Tensor:
        """The output layer: (..., D) of `hidden` -> (..., V)."""
        if self.head is None:
            return multiply(x_BSD, self.embed.weight, None)
        out: Tensor = self.head(x_BSD)
        return out

    def hidden(
        self,
        tokens_BS: Tensor,
        cache: KVCache | KVCaches | None = None,
        *,
        padding_B: Tensor | None = None,
        routing: Sequence[Choice | Routing] | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """What the output layer is given, (B, S, D), and the routings: `forward` without the logits."""
        S = tokens_BS.shape[1]
        if cache is None:
            span = Span.of(self.config, S, None, padding_B, tokens_BS.device)
        else:
            if padding_B is not None:
                if isinstance(cache, KVCaches) or cache.length:
                    raise ConfigError("padding_B: only with the first tokens of a cache, or without one")
                cache.padding_B = padding_B
            span = cache.span(self.config, S)
        x_BSD = self.embed(tokens_BS)
        if self.config.embedding_scale != 1:
            x_BSD = x_BSD * self.config.embedding_scale
        if routing is not None and len(routing) != len(self.moe_layers):
            raise RoutingError(f"routing is of {len(routing)} MoE layers: the model has {len(self.moe_layers)}")
        blocks: list[Any] = list(self.layers)
        replayed = iter(routing or ())
        choices = [next(replayed, None) if routing and isinstance(block.ffn, MoE) else None for block in blocks]
        ready = self._at_once(blocks, x_BSD, span, choices)
        x_BSD, routings = self._each(blocks, x_BSD, span, choices) if ready is None else _run(ready, x_BSD)
        if cache is not None:
            cache.advance(S)
        x_BSD = self.norm(x_BSD)
        # The logits are divided by it; so is what they are made of, for all who make them.
        return x_BSD if self.config.logits_scale == 1 else x_BSD / self.config.logits_scale, routings

    def _each(
        self, blocks: Sequence[nn.Module], x_BSD: Tensor, span: Span, choices: Sequence[Choice | Routing | None]
    ) -> tuple[Tensor, list[Routing]]:
        """x through one layer after another, and their routings."""
        routings = []
        for block, choice in zip(blocks, choices, strict=True):
            if self.activation_checkpoint and self.training and span.cache is None and not span.parts:
                x_BSD, made = checkpoint(block, x_BSD, span, choice, use_reentrant=False)
            else:
                x_BSD, made = block(x_BSD, span, choice)
            if made is not None:
                routings.append(made)
        return x_BSD, routings

    def _at_once(
        self, blocks: Sequence[nn.Module], x_BSD: Tensor, span: Span, choices: Sequence[Choice | Routing | None]
    ) -> list[tuple[Operation, Operation | Mixing]] | None:
        """The operations of all layers, where each half of each has one: nobody is called between them who could change
        a later layer. Asked in a row, the modules answer more quickly than between two operations, which leave the
        processor's caches full of weights."""
        if not span.decodes or not nobody_looks(x_BSD):
            return None
        ready = []
        for block, choice in zip(blocks, choices, strict=True):
            halves = block.at_once(x_BSD, span, choice) if is_bare(block, Block) else None
            if halves is None:
                return None
            ready.append(halves)
        return ready

    @property
    def output_weight(self) -> Tensor:
        """The output layer's weight, (V, D): the input embedding's when they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE layers, in order: `moe_layers[i]` made `routings[i]`."""
        return [block.ffn for block in self.layers if isinstance(block.ffn, MoE)]
