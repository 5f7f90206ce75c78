"""The decoder: a stack of blocks (`block.py`) between an embedding and an output layer.

    tokens ─► embed ─► [ x + attention(norm x) ─► x + feed-forward or MoE (norm x) ] × layers ─► norm ─► head ─► logits

Legend: B batch · S new tokens · T = B·S · D width · V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from handful import fused
from handful.attention import RMSNorm
from handful.block import Block
from handful.config import ModelConfig
from handful.errors import ConfigError, RoutingError
from handful.experts import Linear
from handful.experts.linear import linear
from handful.kernels import with_kernel
from handful.moe import MoE
from handful.origin import Origin
from handful.positions import KVCache, KVCaches, Span
from handful.routing import Routing, Told
from handful.text import Tokenizer

__all__ = ["Decoder", "KVCache"]


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

    @with_kernel(fused.step)
    def forward(
        self,
        tokens_BS: Tensor,
        cache: KVCache | KVCaches | None = None,
        *,
        padding_B: Tensor | None = None,
        routing: Sequence[Told | None] | None = None,
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
        x_BSD, routings = self.hidden_states(tokens_BS, cache, padding_B=padding_B, routing=routing)
        return self.logits(x_BSD), routings

    def logits(self, x_BSD: Tensor) -> Tensor:
        """The output layer: (..., D) of `hidden_states` -> (..., V)."""
        if self.head is None:
            return linear(x_BSD, self.embed.weight)
        out: Tensor = self.head(x_BSD)
        return out

    def hidden_states(
        self,
        tokens_BS: Tensor,
        cache: KVCache | KVCaches | None = None,
        *,
        padding_B: Tensor | None = None,
        routing: Sequence[Told | None] | None = None,
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
        replayed = iter(routing or ())
        choices = [next(replayed) if routing and isinstance(block.ffn, MoE) else None for block in self.layers]
        x_BSD, routings = self.through_layers(x_BSD, span, choices)
        if cache is not None:
            cache.advance(S)
        # The logits are divided by it; so is what they are made of, for all who make them.
        return x_BSD if self.config.logits_scale == 1 else x_BSD / self.config.logits_scale, routings

    @with_kernel(fused.layers)
    def through_layers(self, x_BSD: Tensor, span: Span, choices: Sequence[Told | None]) -> tuple[Tensor, list[Routing]]:
        """x through all layers and the last norm, and the MoE layers' routings."""
        routings = []
        for block, choice in zip(self.layers, choices, strict=True):
            if self.activation_checkpoint and self.training and not span.caches:
                x_BSD, routing = checkpoint(block, x_BSD, span, choice, use_reentrant=False)
            else:
                x_BSD, routing = block(x_BSD, span, choice)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_BSD), routings

    @property
    def output_weight(self) -> Tensor:
        """The output layer's weight, (V, D): the input embedding's when they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE layers, in order: `moe_layers[i]` made `routings[i]`."""
        return [block.ffn for block in self.layers if isinstance(block.ffn, MoE)]
