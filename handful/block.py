"""One layer of a decoder: attention, and a feed-forward network or an MoE.

    x ─► x + attention(norm x) ─► x + feed-forward or MoE (norm x)

Which kind of attention it is, `attention.py` alone knows.

Legend: B batch · S new tokens · D width
"""

from __future__ import annotations

from torch import Tensor, nn

from handful.attention import RMSNorm, make_attention
from handful.config import ModelConfig
from handful.experts import FeedForward
from handful.moe import MoE
from handful.positions import Span
from handful.routing import Routing, Told

__all__ = ["Block"]


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
                shared_width=config.shared_width,
                shared_gate=config.shared_gate,
                backend=backend,
            )
        else:
            self.ffn = FeedForward(config.width, config.ffn, config.activation)

    def forward(self, x_BSD: Tensor, span: Span, choice: Told | None = None) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.scaled(self.attn(self.attn_norm(x_BSD), span))
        y_BSD, routing = self.feed(self.ffn_norm(x_BSD), span, choice)
        return x_BSD + self.scaled(y_BSD), routing

    def feed(self, x_BSD: Tensor, span: Span, choice: Told | None) -> tuple[Tensor, Routing | None]:
        """The network's output, and an MoE's routing."""
        if isinstance(self.ffn, MoE):
            return self.ffn(x_BSD, choice, mask=span.real_BS)  # type: ignore[no-any-return]
        return self.ffn(x_BSD), None

    def scaled(self, y_BSD: Tensor) -> Tensor:
        return y_BSD if self.residual_scale == 1 else y_BSD * self.residual_scale
