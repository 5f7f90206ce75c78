"""The mixture-of-experts layer: a router picks a handful of experts for every token and blends their outputs.

    x_TD ──► Router ──► Routing ──► Experts(x_TD, routing) ──► y_TD

One router class covers the published ones; which is which is a row of values in `config.py`.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · C an expert's capacity
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handful.config import Activation, RouterConfig
from handful.errors import ConfigError, RoutingError
from handful.experts import Experts, FeedForward
from handful.routing import Routing

__all__ = ["MoE", "NotCausalWarning", "Router"]


class NotCausalWarning(UserWarning):
    """The router lets later tokens change what happens to earlier ones: for training studies, not for generation."""


class Router(nn.Module):
    """Scores experts for every token and chooses: x_TD -> Routing.

    The maths is float32 whatever the model's dtype (float64 stays float64): a rounding error here changes which expert
    a token goes to. `balance_bias` is a buffer that selection alone sees; no gradient reaches it (`balance.py`).
    """

    def __init__(self, width: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        E = config.experts
        self.weight = nn.Parameter(torch.randn(E, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(E)) if config.logits_bias else None
        # Zero, as in Shazeer et al.: every expert starts with the same noise, softplus(0) = 0.69.
        self.noise_weight = nn.Parameter(torch.zeros(E, width)) if config.noisy_top_k else None
        self.balance_bias: Tensor | None
        self.register_buffer("balance_bias", torch.zeros(E) if config.balance_bias else None)
        if config.choice == "expert":
            warnings.warn("expert choice looks at later tokens: not causal", NotCausalWarning, stacklevel=2)
        if config.drop_order == "choice" and (config.capacity_factor or config.eval_capacity_factor):
            warnings.warn(
                "drop_order = 'choice' lets a later token's first choice push out an earlier token: not causal",
                NotCausalWarning,
                stacklevel=2,
            )

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        # `.to(bfloat16)` passes the balance bias by: steps of 0.001 would be lost, and other experts chosen.
        bias = self.balance_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None and self.balance_bias is not None and self.balance_bias.dtype != bias.dtype:
            self.balance_bias = bias.to(self.balance_bias.device)
        return self

    def forward(self, x_TD: Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self._logits(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)))
            scores_TE = logits_TE.softmax(-1) if self.config.score == "softmax" else logits_TE.sigmoid()
            if self.config.choice == "expert":
                return self._experts_choose(logits_TE, scores_TE)
            return self._tokens_choose(logits_TE, scores_TE)

    def _logits(self, x_TD: Tensor) -> Tensor:
        noisy = self.training
        if noisy and self.config.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.config.jitter, 1 + self.config.jitter)
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        logits_TE = F.linear(x_TD, self.weight.to(x_TD.dtype), bias)
        if noisy and self.noise_weight is not None:
            size_TE = F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype)))
            logits_TE = logits_TE + torch.randn_like(logits_TE) * size_TE
        return logits_TE

    def _tokens_choose(self, logits_TE: Tensor, scores_TE: Tensor) -> Routing:
        cfg = self.config
        # Selection has no gradient: only the weights of what was chosen do.
        with torch.no_grad():
            select_TE = scores_TE if self.balance_bias is None else scores_TE + self.balance_bias
            if cfg.top_groups < cfg.groups:
                select_TE = _limit_groups(select_TE, cfg.groups, cfg.top_groups, cfg.group_score)
            experts_TK = select_TE.topk(cfg.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if cfg.normalize:
            # Sigmoid scores can all be next to nothing; softmax's chosen ones sum to at least 1/E.
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        dropped_TK = self._drop(experts_TK, weights_TK)
        return Routing(logits_TE, scores_TE, experts_TK, weights_TK * cfg.scale, dropped_TK)

    @torch.no_grad()
    def _drop(self, experts_TK: Tensor, weights_TK: Tensor) -> Tensor | None:
        cfg = self.config
        dropped_TK = None
        if cfg.random_second and self.training:
            dropped_TK = torch.zeros_like(experts_TK, dtype=torch.bool)
            dropped_TK[:, 1] = torch.rand_like(weights_TK[:, 1]) > 2 * weights_TK[:, 1]
        factor = cfg.capacity_factor if self.training else cfg.eval_capacity_factor
        if factor is None:
            return dropped_TK
        T, K = experts_TK.shape
        # Rounded first: 1.1 · 25 · 4 / 10 is 11.000000000000002 to a computer, and its ceiling would be 12.
        capacity = math.ceil(round(factor * T * K / cfg.experts, 6))
        full_TK = _over_capacity(experts_TK, dropped_TK, cfg.experts, capacity, cfg.drop_order == "choice")
        return full_TK if dropped_TK is None else full_TK | dropped_TK

    def _experts_choose(self, logits_TE: Tensor, scores_TE: Tensor) -> Routing:
        cfg = self.config
        T, E = scores_TE.shape
        capacity = min(T, max(1, round(T * cfg.top_k / E)))
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        chosen_TE.scatter_(0, scores_TE.detach().topk(capacity, dim=0).indices, True)
        weights_TE = scores_TE * chosen_TE
        if cfg.normalize:
            weights_TE = weights_TE / (weights_TE.sum(-1, keepdim=True) + 1e-20)
        experts_TE = torch.arange(E, device=scores_TE.device).expand(T, E)
        return Routing(logits_TE, scores_TE, experts_TE, weights_TE * cfg.scale, ~chosen_TE)


def _limit_groups(select_TE: Tensor, groups: int, top_groups: int, score: str) -> Tensor:
    """Rule out the experts outside each token's best groups (DeepSeek-V2's device limit, V3's node limit)."""
    select_TGe = select_TE.view(len(select_TE), groups, select_TE.shape[1] // groups)
    score_TG = select_TGe.amax(-1) if score == "max" else select_TGe.topk(2, dim=-1).values.sum(-1)
    best_TG = torch.zeros_like(score_TG, dtype=torch.bool)
    best_TG.scatter_(1, score_TG.topk(top_groups, dim=-1).indices, True)
    return select_TGe.masked_fill(~best_TG.unsqueeze(-1), -math.inf).flatten(1)


def _over_capacity(
    experts_TK: Tensor, dropped_TK: Tensor | None, experts: int, capacity: int, choices_first: bool
) -> Tensor:
    """True for the assignments that come after their expert's first `capacity` ones.

    They are served token by token, or, with `choices_first`, all first choices before any second. Assignments in
    `dropped_TK` take no place.
    """
    queue_N = experts_TK.t().flatten() if choices_first else experts_TK.flatten()
    if dropped_TK is not None:
        # An extra expert's queue holds those that are already out.
        out_N = dropped_TK.t().flatten() if choices_first else dropped_TK.flatten()
        queue_N = queue_N.masked_fill(out_N, experts)
    sorted_N, order_N = queue_N.sort(stable=True)
    start_N = torch.searchsorted(sorted_N, sorted_N)  # where each assignment's expert begins in the sorted queue
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device) - start_N
    full_N = place_N >= capacity
    return full_N.view(experts_TK.t().shape).t() if choices_first else full_N.view(experts_TK.shape)


class MoE(nn.Module):
    """A drop-in feed-forward layer of E experts: x (..., D) -> (y (..., D), Routing).

    width          D, the model's width.
    hidden         F, an expert's hidden width.
    router         a RouterConfig: how many experts, how many per token, how chosen and weighted.
    activation     "swiglu", "geglu", "swiglu_clamped" (gated: three matrices an expert), "relu", "gelu" (two).
    shared_hidden  hidden width of the shared experts, which every token uses; 0: none.
    shared_gate    multiply their output by a learned sigmoid gate.
    backend        who multiplies: "auto", "native", "grouped" or "reference" (see `handful.experts`).

    The Routing's T tokens are x's leading dimensions, flattened. Add `handful.balance` losses of it to your own loss.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        router: RouterConfig,
        *,
        activation: Activation = "swiglu",
        bias: bool = False,
        shared_hidden: int = 0,
        shared_gate: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if shared_gate and not shared_hidden:
            raise ConfigError("shared_gate = True: needs shared_hidden above 0")
        self.router = Router(width, router)
        self.experts = Experts(router.experts, width, hidden, activation=activation, bias=bias, backend=backend)
        self.shared = FeedForward(width, shared_hidden, activation) if shared_hidden else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared_gate else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        width = self.router.weight.shape[1]
        if x.shape[-1] != width:
            raise RoutingError(f"MoE input has width {x.shape[-1]}: it must be {width}")
        x_TD = x.reshape(-1, width)
        routing = self.router(x_TD)
        y_TD = self.experts(x_TD, routing)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate is not None:
                shared_TD = shared_TD * self.shared_gate(x_TD).sigmoid()
            y_TD = y_TD + shared_TD
        return y_TD.view(x.shape), routing
