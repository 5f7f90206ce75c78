"""The decoder: attention, block, KV cache, and a stack of them.

    tokens ─► embed ─► [ x + attention(norm x) ─► x + feed-forward or MoE (norm x) ] × layers ─► norm ─► head ─► logits

Attention here is grouped-query attention. Another kind is another class with `Attention`'s signature, chosen in
`make_attention`: nothing else knows which it is.

Legend: B batch · S new tokens · P cached tokens before them · T = B·S · D width · H heads · J key-value heads ·
d head width · V vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from handful.config import ModelConfig
from handful.errors import ConfigError
from handful.experts import FeedForward
from handful.moe import MoE
from handful.routing import Routing
from handful.text import Tokenizer

__all__ = ["Attention", "Block", "Decoder", "KVCache"]


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the weight's dtype: under autocast the input is bfloat16 and the weight float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps).to(x.dtype)


class KVCache:
    """Keys and values of past tokens, for every layer: what decoding one more token needs.

    Room for `capacity` tokens is taken at once. `length` is how many are held; all sequences of the batch are as long.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.layers, batch, config.n_kv_heads, capacity, config.d_head)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, k_BJSd: Tensor, v_BJSd: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values after the `length` held ones; returns all of the layer's. The decoder, once all
        layers have done this, moves `length` on."""
        end = self.length + k_BJSd.shape[2]
        self.keys[layer, :, :, self.length : end] = k_BJSd
        self.values[layer, :, :, self.length : end] = v_BJSd
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE: x_BSD -> (B, S, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, J, d, D = config.heads, config.n_kv_heads, config.d_head, config.width
        self.heads, self.kv_heads, self.head_dim = H, J, d
        self.qk_norm = config.qk_norm
        self.q = nn.Linear(D, H * d, bias=config.qkv_bias)
        self.k = nn.Linear(D, J * d, bias=config.qkv_bias)
        self.v = nn.Linear(D, J * d, bias=config.qkv_bias)
        self.o = nn.Linear(H * d, D, bias=config.o_bias)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm(H * d if full else d, eps=config.norm_eps)
            self.k_norm = RMSNorm(J * d if full else d, eps=config.norm_eps)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, layer: int) -> Tensor:
        B, S, _ = x_BSD.shape
        q, k, v = self.q(x_BSD), self.k(x_BSD), self.v(x_BSD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSHd, k_BSJd = q.view(B, S, self.heads, self.head_dim), k.view(B, S, self.kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q_BSHd, k_BSJd = self.q_norm(q_BSHd), self.k_norm(k_BSJd)
        q_BHSd = rotate(q_BSHd, rope).transpose(1, 2)
        k_BJSd = rotate(k_BSJd, rope).transpose(1, 2)
        v_BJSd = v.view(B, S, self.kv_heads, self.head_dim).transpose(1, 2)
        past = 0
        if cache is not None:
            past = cache.length
            k_BJSd, v_BJSd = cache.append(layer, k_BJSd, v_BJSd)
        # A single new token sees everything; new tokens after cached ones need the shifted triangle spelled out.
        mask = None
        if past and S > 1:
            mask = torch.ones(S, past + S, dtype=torch.bool, device=x_BSD.device).tril(diagonal=past)
        out_BHSd = F.scaled_dot_product_attention(
            q_BHSd,
            k_BJSd,
            v_BJSd,
            attn_mask=mask,
            is_causal=not past and S > 1,
            enable_gqa=self.heads != self.kv_heads,
        )
        out: Tensor = self.o(out_BHSd.transpose(1, 2).reshape(B, S, -1))
        return out


def make_attention(config: ModelConfig) -> Attention:
    """The attention that the config asks for; ConfigError names a kind that can be counted (`cost.py`) but not run."""
    if config.mla is not None:
        raise ConfigError("model.mla: multi-head latent attention can be counted but not run")
    if config.sinks:
        raise ConfigError("model.sinks = true: attention sinks can be counted but not run")
    return Attention(config)


def rope_table(config: ModelConfig, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each (S, 1, r/2) float32, of the angles by which RoPE turns positions start..end (r: rotary_dim)."""
    r = config.rotary_dim
    inverse = config.rope_theta ** -(torch.arange(0, r, 2, device=device, dtype=torch.float32) / r)
    angle = torch.arange(start, end, device=device, dtype=torch.float32)[:, None] * inverse
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def rotate(x_BSHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + r/2) of each head's leading r dimensions (RoPE, arXiv:2104.09864, half-split)."""
    cos, sin = (t.to(x_BSHd.dtype) for t in rope)
    half = cos.shape[-1]
    first, second, rest = x_BSHd.split([half, half, x_BSHd.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class Block(nn.Module):
    """One layer: attention and then a feed-forward network or an MoE, each on the normed stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int, backend: str) -> None:
        super().__init__()
        self.layer = layer
        self.attn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attn = make_attention(config)
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
        self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None
    ) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), rope, cache, self.layer)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoE):
            y_BSD, routing = self.ffn(normed_BSD)
            return x_BSD + y_BSD, routing
        return x_BSD + self.ffn(normed_BSD), None


class Decoder(nn.Module):
    """A decoder-only language model: tokens_BS -> (logits_BSV, one Routing per MoE layer, in order).

    backend                who multiplies the experts (see `handful.experts`).
    activation_checkpoint  attribute: in training keep only block inputs for the backward pass, compute the rest again.
    tokenizer              attribute: the tokenizer of its checkpoint, None for a model that was not loaded.
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.activation_checkpoint = False
        self.tokenizer: Tokenizer | None = None
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config, i, backend) for i in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights scaled by fan-in, so that every width starts alike; what joins the stream, by depth too."""
        for name, p in self.named_parameters():
            if name.endswith(("bias", "noise_weight")):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)
            else:
                std = p.shape[-1] ** -0.5
                if name.endswith(("attn.o.weight", "down", "down.weight")):
                    std *= (2 * self.config.layers) ** -0.5
                p.normal_(0.0, std)

    def forward(self, tokens_BS: Tensor, cache: KVCache | None = None) -> tuple[Tensor, list[Routing]]:
        """Logits for every position, in the weights' dtype (autocast's under autocast). With a cache the tokens follow
        those that it holds. ConfigError if they would not fit."""
        x_BSD, routings = self.hidden(tokens_BS, cache)
        return F.linear(x_BSD, self.embed.weight) if self.head is None else self.head(x_BSD), routings

    def hidden(self, tokens_BS: Tensor, cache: KVCache | None = None) -> tuple[Tensor, list[Routing]]:
        """What the output layer is given, (B, S, D), and the routings: `forward` without the logits."""
        S = tokens_BS.shape[1]
        past = 0 if cache is None else cache.length
        if cache is not None and past + S > cache.capacity:
            raise ConfigError(f"cache holds {past} tokens of at most {cache.capacity}: {S} more do not fit")
        x_BSD = self.embed(tokens_BS)
        rope = rope_table(self.config, past, past + S, tokens_BS.device)
        routings = []
        for block in self.layers:
            if self.activation_checkpoint and self.training and cache is None:
                x_BSD, routing = checkpoint(block, x_BSD, rope, None, use_reentrant=False)
            else:
                x_BSD, routing = block(x_BSD, rope, cache)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += S
        return self.norm(x_BSD), routings

    @property
    def output_weight(self) -> Tensor:
        """The output layer's weight, (V, D): the input embedding's when they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE layers, in order: `moe_layers[i]` made `routings[i]`."""
        return [block.ffn for block in self.layers if isinstance(block.ffn, MoE)]
