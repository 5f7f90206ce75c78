"""The encoder-decoder of T5 (arXiv:1910.10683) with MoE layers: what Switch Transformers are (arXiv:2101.03961).

    inputs ──► embed ─► encoder: [ attention ─► feed-forward or MoE ] × layers ─► encoded
                                                                                    │
    outputs ─► embed ─► decoder: [ attention ─► cross-attention to encoded ─► feed-forward or MoE ] × layers ─► logits

Every part reads the normed stream and is added to it. Positions enter as a bias on attention's scores, one per head and
distance, which all layers of a stack share. The outputs begin with `config.start`; a position's logits are of the
output that follows it.

Legend: B batch · S input tokens · O new output tokens · P output tokens, held ones and new · D width · H heads ·
d head width · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handful.attention import RMSNorm
from handful.config import EncoderDecoderConfig
from handful.errors import ConfigError
from handful.experts import FeedForward
from handful.moe import MoE
from handful.origin import Origin
from handful.routing import Routing
from handful.text import Tokenizer

__all__ = ["Encoded", "EncoderDecoder", "OutputCache"]

# What a hidden position's score becomes. Not -inf, so that a row of nothing but padding gives numbers; and no less than
# bfloat16 holds, in which autocast multiplies.
HIDDEN = torch.finfo(torch.bfloat16).min

KeysValues = tuple[Tensor, Tensor]
Crossed = tuple[KeysValues, Tensor | None]  # what cross-attention looks at, and its bias


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the encoder made of the inputs: x_BSD, which of them are no padding (None: all), and its routings."""

    x_BSD: Tensor
    mask_BS: Tensor | None
    routings: list[Routing]


class OutputCache:
    """What decoding one more output needs, for every layer of the decoder: keys and values of the outputs so far, and
    those of the encoded inputs, which the first call with this cache computes.

    Room for `capacity` outputs is taken at once. `length` is how many are held.
    """

    def __init__(
        self,
        config: EncoderDecoderConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.decoder_layers, batch, config.heads, capacity, config.d_head)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.crossed: list[KeysValues] = []
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, new: KeysValues) -> KeysValues:
        """Store a layer's keys and values of the new outputs after the `length` held ones; returns all of the layer's.
        The model, once all layers have done this, moves `length` on."""
        end = self.length + new[0].shape[2]
        self.keys[layer, :, :, self.length : end], self.values[layer, :, :, self.length : end] = new
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def bucket(distance: Tensor, buckets: int, max_distance: int, *, both_ways: bool) -> Tensor:
    """The bucket of each distance (position looked at minus position looking): T5's.

    The first half of the buckets hold one distance each, the others ever more of them, and the last all from
    `max_distance` on. With `both_ways` half of all buckets are for what lies ahead; else everything ahead is in the
    first, as nobody looks there.
    """
    ahead = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        ahead = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    single = buckets // 2
    # Float32 whatever the model's dtype, and in this order: a distance at an edge must fall where T5 has it.
    share = torch.log(distance.clamp(min=1).float() / single) / math.log(max_distance / single)
    wide = (single + (share * (buckets - single)).long()).clamp(max=buckets - 1)
    return ahead + torch.where(distance < single, distance, wide)


def hide(bias: Tensor, hidden: Tensor) -> Tensor:
    """A bias with which nobody looks where `hidden` is true."""
    return bias.masked_fill(hidden, max(HIDDEN, torch.finfo(bias.dtype).min))


class T5Attention(nn.Module):
    """T5's attention: scores are not divided by anything (the weights are that much smaller), but have a bias."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.d_head
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)

    def keys_values(self, x_BSD: Tensor) -> KeysValues:
        """Of what is looked at, each (B, H, S, d)."""
        return self._split(self.k(x_BSD)), self._split(self.v(x_BSD))

    def forward(self, x_BOD: Tensor, looked_at: KeysValues, bias: Tensor | None) -> Tensor:
        """x looks at keys and values: (B, O, D). The bias, which spreads to (B, H, O, S), is added to the scores."""
        q_BHOd = self._split(self.q(x_BOD))
        keys, values = (t.to(q_BHOd.dtype) for t in looked_at)
        bias = None if bias is None else bias.to(q_BHOd.dtype)
        out_BHOd = F.scaled_dot_product_attention(q_BHOd, keys, values, attn_mask=bias, scale=1.0)
        out: Tensor = self.o(out_BHOd.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        B, S, inner = x.shape
        return x.view(B, S, self.heads, inner // self.heads).transpose(1, 2)


class T5Block(nn.Module):
    """One layer: attention, in a decoder cross-attention too, and a feed-forward network or an MoE."""

    def __init__(self, config: EncoderDecoderConfig, *, cross: bool, moe: bool, backend: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attn = T5Attention(config)
        if cross:
            self.cross_norm = RMSNorm(config.width, eps=config.norm_eps)
            self.cross = T5Attention(config)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn: MoE | FeedForward
        if moe:
            self.ffn = MoE(config.width, config.ffn, config.router, activation=config.activation, backend=backend)
        else:
            self.ffn = FeedForward(config.width, config.ffn, config.activation)

    def forward(
        self, x_BOD: Tensor, bias: Tensor, layer: int, cache: OutputCache | None, crossed: Crossed | None
    ) -> tuple[Tensor, Routing | None]:
        normed_BOD = self.attn_norm(x_BOD)
        looked_at = self.attn.keys_values(normed_BOD)
        if cache is not None:
            looked_at = cache.append(layer, looked_at)
        x_BOD = x_BOD + self.attn(normed_BOD, looked_at, bias)
        if crossed is not None:
            x_BOD = x_BOD + self.cross(self.cross_norm(x_BOD), *crossed)
        normed_BOD = self.ffn_norm(x_BOD)
        if isinstance(self.ffn, MoE):
            y_BOD, routing = self.ffn(normed_BOD)
            return x_BOD + y_BOD, routing
        return x_BOD + self.ffn(normed_BOD), None


class Stack(nn.Module):
    """The blocks of the encoder or of the decoder, the position bias that they share, and the norm after them."""

    def __init__(self, config: EncoderDecoderConfig, moe: Sequence[bool], *, decoder: bool, backend: str) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder
        self.position = nn.Embedding(config.buckets, config.heads)
        self.layers = nn.ModuleList(T5Block(config, cross=decoder, moe=is_moe, backend=backend) for is_moe in moe)
        self.norm = RMSNorm(config.width, eps=config.norm_eps)

    @property
    def blocks(self) -> list[T5Block]:
        return [block for block in self.layers if isinstance(block, T5Block)]

    def bias(self, past: int, new: int) -> Tensor:
        """What the scores of `new` tokens after `past` held ones are given, (1, H, new, past + new)."""
        at = torch.arange(past + new, device=self.position.weight.device)
        distance_OP = at - at[past:].unsqueeze(1)
        bucket_OP = bucket(distance_OP, self.config.buckets, self.config.max_distance, both_ways=not self.decoder)
        bias_1HOP: Tensor = self.position(bucket_OP).permute(2, 0, 1).unsqueeze(0)
        return hide(bias_1HOP, distance_OP > 0) if self.decoder else bias_1HOP

    def forward(
        self, x_BOD: Tensor, bias: Tensor, cache: OutputCache | None = None, crossed: Sequence[Crossed] = ()
    ) -> tuple[Tensor, list[Routing]]:
        """x through all layers and the norm, and the routings. `crossed` are each decoder layer's."""
        routings = []
        for layer, block in enumerate(self.layers):
            x_BOD, routing = block(x_BOD, bias, layer, cache, crossed[layer] if crossed else None)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_BOD), routings


class EncoderDecoder(nn.Module):
    """An encoder-decoder language model: (inputs_BS, outputs_BO) -> (logits_BOV, one Routing per MoE layer).

    The routings are the encoder's, in order, and then the decoder's. Every MoE layer routes padding too, as the public
    checkpoints do. `encode` and `decode` are the two halves; `generate` goes on from them.

    backend     who multiplies the experts (see `handful.experts`).
    tokenizer   attribute: the tokenizer of its checkpoint, None for a model that was not loaded.
    origin      attribute: what else its checkpoint says, likewise.
    """

    def __init__(self, config: EncoderDecoderConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.origin: Origin | None = None
        self.embed = nn.Embedding(config.vocab, config.width)
        encoder_moe = [config.encoder_is_moe(i) for i in range(config.encoder_layers)]
        decoder_moe = [config.decoder_is_moe(i) for i in range(config.decoder_layers)]
        self.encoder = Stack(config, encoder_moe, decoder=False, backend=backend)
        self.decoder = Stack(config, decoder_moe, decoder=True, backend=backend)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights scaled by fan-in; queries smaller by the root that scores are not divided by, embeddings of
        size 1 (T5's)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)
            elif name == "embed.weight":
                p.normal_(0.0, 1.0)
            elif name.endswith("position.weight"):
                p.normal_(0.0, self.config.width**-0.5)
            else:
                score = self.config.d_head**-0.5 if name.endswith("q.weight") else 1.0
                p.normal_(0.0, score * p.shape[-1] ** -0.5)

    def forward(
        self, inputs_BS: Tensor, outputs_BO: Tensor, *, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """Logits for every output position, in the weights' dtype (autocast's under autocast).

        mask_BS   true for inputs, false for padding, which nobody looks at; None: there is none. ConfigError if its
                  shape is not the inputs'.
        """
        encoded = self.encode(inputs_BS, mask_BS)
        logits_BOV, routings = self.decode(outputs_BO, encoded)
        return logits_BOV, [*encoded.routings, *routings]

    def encode(self, inputs_BS: Tensor, mask_BS: Tensor | None = None) -> Encoded:
        """The encoder's half of `forward`."""
        if mask_BS is not None and mask_BS.shape != inputs_BS.shape:
            raise ConfigError(
                f"mask_BS has shape {tuple(mask_BS.shape)}: it must be the inputs' {tuple(inputs_BS.shape)}"
            )
        x_BSD = self.embed(inputs_BS)
        bias = self.encoder.bias(0, inputs_BS.shape[1])
        if mask_BS is not None:
            mask_BS = mask_BS.bool()
            bias = hide(bias, ~mask_BS[:, None, None, :])
        x_BSD, routings = self.encoder(x_BSD, bias)
        return Encoded(x_BSD, mask_BS, routings)

    def decode(
        self, outputs_BO: Tensor, encoded: Encoded, cache: OutputCache | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """The decoder's half of `forward`: logits and the decoder's routings. With a cache, which serves one `encoded`
        alone, the outputs follow those that it holds. ConfigError if they would not fit.

        A router's `sequence_capacity` counts the tokens of one call: decoding token by token drops none.
        """
        new, past = outputs_BO.shape[1], 0 if cache is None else cache.length
        if cache is not None and past + new > cache.capacity:
            raise ConfigError(f"cache holds {past} outputs of at most {cache.capacity}: {new} more do not fit")
        crossed = [] if cache is None else cache.crossed
        if not crossed:
            crossed += [block.cross.keys_values(encoded.x_BSD) for block in self.decoder.blocks]
        cross_bias = None
        if encoded.mask_BS is not None:
            hidden_B11S = ~encoded.mask_BS[:, None, None, :]
            cross_bias = hide(torch.zeros_like(hidden_B11S, dtype=encoded.x_BSD.dtype), hidden_B11S)
        bias = self.decoder.bias(past, new)
        x_BOD, routings = self.decoder(self.embed(outputs_BO), bias, cache, [(kv, cross_bias) for kv in crossed])
        if cache is not None:
            cache.length += new
        if self.head is not None:
            return self.head(x_BOD), routings
        return F.linear(x_BOD * self.config.width**-0.5, self.embed.weight), routings

    @torch.inference_mode()
    def generate(self, inputs_BS: Tensor, max_tokens: int, *, mask_BS: Tensor | None = None) -> Tensor:
        """The most probable outputs, one after another, in evaluation mode: (B, at most max_tokens), without the start
        token. A row ends with the stop token and is filled up with the start token; all being done ends it.

        ConfigError for max_tokens below 1."""
        if max_tokens < 1:
            raise ConfigError(f"max_tokens = {max_tokens}: at least 1")
        self.eval()
        batch, weight = len(inputs_BS), self.embed.weight
        encoded = self.encode(inputs_BS, mask_BS)
        cache = OutputCache(self.config, batch, max_tokens, dtype=weight.dtype, device=weight.device)
        done_B = torch.zeros(batch, dtype=torch.bool, device=weight.device)
        made = [torch.full((batch,), self.config.start, device=weight.device)]
        while len(made) <= max_tokens and not done_B.all():
            logits_B1V, _ = self.decode(made[-1].unsqueeze(1), encoded, cache)
            made.append(logits_B1V[:, -1].argmax(-1).masked_fill(done_B, self.config.start))
            done_B = done_B | (made[-1] == self.config.stop)
        return torch.stack(made[1:], dim=1)

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE layers, the encoder's and then the decoder's: `moe_layers[i]` made `routings[i]`."""
        blocks = [*self.encoder.blocks, *self.decoder.blocks]
        return [block.ffn for block in blocks if isinstance(block.ffn, MoE)]
