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

from handful import kernels
from handful.config import Activation, RouterConfig
from handful.errors import ConfigError, RoutingError
from handful.experts import Experts, FeedForward, begin
from handful.kernels import with_kernel
from handful.routing import Choice, Limits, Piecewise, Routing, Told

__all__ = ["MoE", "NotCausalWarning", "Router"]


class UntrainableWarning(UserWarning):
    """No gradient of what the model is for can reach the router."""


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
        # A model that is being loaded has no memory yet, and its router has learnt.
        if config.top_k == 1 and config.normalize and config.choice == "token" and not self.weight.is_meta:
            warnings.warn(
                "router.normalize = True with top_k = 1: every weight is 1, and no gradient of the loss reaches the "
                "router; set normalize=False",
                UntrainableWarning,
                stacklevel=2,
            )
        limited = config.capacity_factor or config.eval_capacity_factor or config.sequence_capacity
        if config.drop_order == "choice" and limited:
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

    @with_kernel(kernels.route)
    def forward(
        self,
        x_TD: Tensor,
        sequence: int | None = None,
        *,
        choice: Told | None = None,
        real_T: Tensor | None = None,
    ) -> Routing:
        """Route T tokens.

        sequence   how many tokens in a row are one sequence, whose share of an expert `sequence_capacity` limits; None:
                   all T are.
        choice     the experts to take, and what to drop, whatever the scores say; or the `Limits` to choose within. The
                   weights are made from the scores as ever, with their gradients: the same router gives the same
                   weights. `Piecewise`: another for each run of tokens, where each token is routed for itself.
        real_T     False for padding, which takes no place before an expert and is dropped; None: all are real.
        """
        if isinstance(choice, Piecewise):
            return self._piece_by_piece(x_TD, choice, real_T)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self._logits(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)))
            scores_TE = logits_TE.softmax(-1) if self.config.score == "softmax" else logits_TE.sigmoid()
            if isinstance(choice, Choice | Routing):
                return self._chosen(logits_TE, scores_TE, choice, real_T)
            top_k, off_TE = self.within(choice, len(x_TD), x_TD.device)
            if self.config.choice == "expert":
                return self._experts_choose(logits_TE, scores_TE, real_T, top_k, off_TE)
            return self._tokens_choose(logits_TE, scores_TE, sequence, real_T, top_k, off_TE)

    def _piece_by_piece(self, x_TD: Tensor, choice: Piecewise, real_T: Tensor | None) -> Routing:
        if not self.config.independent:
            raise RoutingError("choice is Piecewise: this router's tokens compete for places, and are routed together")
        counts = [count for count, _ in choice.pieces]
        if sum(counts) != len(x_TD):
            raise RoutingError(f"choice is of {sum(counts)} tokens: there are {len(x_TD)}")
        real = [None] * len(counts) if real_T is None else real_T.split(counts)
        pieces = zip(x_TD.split(counts), choice.pieces, real, strict=True)
        return Routing.joined([self(x_XD, choice=told, real_T=real_X) for x_XD, (_, told), real_X in pieces])

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

    def _tokens_choose(
        self,
        logits_TE: Tensor,
        scores_TE: Tensor,
        sequence: int | None,
        real_T: Tensor | None,
        top_k: int,
        off_TE: Tensor | None,
    ) -> Routing:
        experts_TK = self.best(scores_TE, top_k, off_TE)
        weights_TK = self._weights(scores_TE.gather(1, experts_TK))
        dropped_TK = self._drop(experts_TK, weights_TK, sequence, real_T)
        return Routing(logits_TE, scores_TE, experts_TK, weights_TK * self.config.scale, dropped_TK, real_T)

    @torch.no_grad()
    def best(self, scores_TE: Tensor, top_k: int, off_TE: Tensor | None) -> Tensor:
        """The experts that tokens choose, (T, top_k), best first. Selection has no gradient: only the weights of what
        was chosen do."""
        cfg = self.config
        select_TE = scores_TE if self.balance_bias is None else scores_TE + self.balance_bias
        if off_TE is not None:
            select_TE = select_TE.masked_fill(off_TE, -math.inf)
        if cfg.top_groups < cfg.groups:
            select_TE = _limit_groups(select_TE, cfg.groups, cfg.top_groups, cfg.group_score, top_k)
        return select_TE.topk(top_k, dim=-1).indices

    def _weights(self, weights_TK: Tensor) -> Tensor:
        # Sigmoid scores can all be next to nothing; softmax's chosen ones sum to at least 1/E.
        return weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20) if self.config.normalize else weights_TK

    def _chosen(self, logits_TE: Tensor, scores_TE: Tensor, choice: Choice | Routing, real_T: Tensor | None) -> Routing:
        experts_TK, _ = self.forced_experts(choice, len(scores_TE), scores_TE.device)
        assert experts_TK is not None
        low, high = (int(bound) for bound in experts_TK.aminmax()) if len(scores_TE) else (0, 0)
        if low < 0 or high >= self.config.experts:
            wrong = low if low < 0 else high
            raise RoutingError(f"choice names expert {wrong}: there are {self.config.experts}, counted from 0")
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.config.choice == "expert" and choice.dropped_TK is not None:
            weights_TK = weights_TK.masked_fill(choice.dropped_TK, 0)
        dropped_TK = choice.dropped_TK
        if real_T is not None:
            padding_TK = ~real_T.unsqueeze(1).expand_as(experts_TK)
            dropped_TK = padding_TK if dropped_TK is None else dropped_TK | padding_TK
        weights_TK = self._weights(weights_TK) * self.config.scale
        return Routing(logits_TE, scores_TE, experts_TK, weights_TK, dropped_TK, real_T)

    def forced_experts(
        self, choice: Choice | Routing | None, tokens: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """The experts to take, (T, K), and which to drop. RoutingError unless they are of as many tokens; whether they
        exist is not looked at."""
        if choice is None:
            return None, None
        experts_TK = choice.experts_TK.to(device=device, dtype=torch.int64)
        by_experts = self.config.choice == "expert"
        least, most = (self.config.experts,) * 2 if by_experts else (1, self.config.top_k)
        if experts_TK.dim() != 2 or len(experts_TK) != tokens or not least <= experts_TK.shape[1] <= most:
            right = f"{(tokens, most)}" + ("" if least == most else ", or of fewer experts")
            raise RoutingError(f"choice.experts_TK has shape {tuple(experts_TK.shape)}: it must be {right}")
        return experts_TK, choice.dropped_TK

    @torch.no_grad()
    def _drop(
        self, experts_TK: Tensor, weights_TK: Tensor, sequence: int | None, real_T: Tensor | None
    ) -> Tensor | None:
        cfg = self.config
        dropped_TK = None
        if real_T is not None:
            dropped_TK = ~real_T.unsqueeze(1).repeat(1, experts_TK.shape[1])
        if cfg.random_second and self.training and experts_TK.shape[1] > 1:
            dropped_TK = torch.zeros_like(experts_TK, dtype=torch.bool) if dropped_TK is None else dropped_TK
            dropped_TK[:, 1] |= torch.rand_like(weights_TK[:, 1]) > 2 * weights_TK[:, 1]
        factor = cfg.capacity_factor if self.training else cfg.eval_capacity_factor
        T, K = experts_TK.shape
        queue_TK, capacity = experts_TK, cfg.sequence_capacity
        if capacity is not None:
            # Every sequence has a queue of its own before each expert.
            first_T = torch.arange(T, device=experts_TK.device) // (sequence or T) * cfg.experts
            queue_TK = experts_TK + first_T.unsqueeze(1)
        elif factor is not None:
            # Rounded first: 1.1 · 25 · 4 / 10 is 11.000000000000002 to a computer, and its ceiling would be 12.
            tokens = T if real_T is None else int(real_T.sum())
            capacity = math.ceil(round(factor * tokens * K / cfg.experts, 6))
        else:
            return dropped_TK
        full_TK = _over_capacity(queue_TK, dropped_TK, capacity, cfg.drop_order == "choice")
        return full_TK if dropped_TK is None else full_TK | dropped_TK

    def within(self, limits: Limits | None, tokens: int, device: torch.device) -> tuple[int, Tensor | None]:
        """How many experts a token takes, and which it may not, (T, E). RoutingError for limits of another shape, and
        where a token is left with fewer experts than it takes."""
        E, K = self.config.experts, self.config.top_k
        if limits is None:
            return K, None
        top_k = K if limits.top_k is None else limits.top_k
        if not 1 <= top_k <= K:
            raise RoutingError(f"top_k = {top_k}: from 1 to the router's own {K}")
        if limits.off_TE is None:
            return top_k, None
        off_TE = limits.off_TE.to(device)
        if off_TE.dtype != torch.bool or off_TE.shape not in ((E,), (tokens, E)):
            found = f"{str(off_TE.dtype)[6:]} of shape {tuple(off_TE.shape)}"
            raise RoutingError(f"off_TE is {found}: it must be bool of {(tokens, E)} or {(E,)}")
        least = int((~off_TE).sum(-1).min()) if off_TE.numel() else E
        needed = 1 if self.config.choice == "expert" else top_k
        if least < needed:
            raise RoutingError(f"without its experts that are off a router has {least} of {E}: it takes {needed}")
        return top_k, off_TE.expand(tokens, E)

    def _experts_choose(
        self, logits_TE: Tensor, scores_TE: Tensor, real_T: Tensor | None, top_k: int, off_TE: Tensor | None
    ) -> Routing:
        T, E = scores_TE.shape
        select_TE = scores_TE.detach()
        if real_T is not None:
            T = int(real_T.sum())
            select_TE = select_TE.masked_fill(~real_T.unsqueeze(1), -math.inf)
        capacity = min(T, max(1, round(T * top_k / E)))
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        if off_TE is not None:
            select_TE = select_TE.masked_fill(off_TE, -math.inf)
        chosen_TE.scatter_(0, select_TE.topk(capacity, dim=0).indices, True)
        if off_TE is not None:
            chosen_TE &= ~off_TE
        weights_TE = self._weights(scores_TE * chosen_TE)
        experts_TE = torch.arange(E, device=scores_TE.device).expand_as(scores_TE)
        return Routing(logits_TE, scores_TE, experts_TE, weights_TE * self.config.scale, ~chosen_TE, real_T)


def _limit_groups(select_TE: Tensor, groups: int, top_groups: int, score: str, top_k: int) -> Tensor:
    """Rule out the experts outside each token's best groups (DeepSeek-V2's device limit, V3's node limit).

    Where experts are off (-inf), further groups come in until a token has `top_k` experts to choose from.
    """
    select_TGe = select_TE.view(len(select_TE), groups, select_TE.shape[1] // groups)
    on_TG = (select_TGe != -math.inf).sum(-1)
    best_TGs = select_TGe.topk(1 if score == "max" else 2, dim=-1).values
    score_TG = best_TGs.masked_fill(best_TGs == -math.inf, 0).sum(-1).masked_fill(on_TG == 0, -math.inf)
    order_TG = score_TG.argsort(dim=-1, descending=True, stable=True)
    on_TG = on_TG.gather(1, order_TG)
    in_TG = (torch.arange(groups, device=on_TG.device) < top_groups) | (on_TG.cumsum(-1) - on_TG < top_k)
    best_TG = torch.zeros_like(in_TG).scatter_(1, order_TG, in_TG)
    return select_TGe.masked_fill(~best_TG.unsqueeze(-1), -math.inf).flatten(1)


def _over_capacity(queue_TK: Tensor, dropped_TK: Tensor | None, capacity: int, choices_first: bool) -> Tensor:
    """True for the assignments that come after the first `capacity` ones of their queue.

    They are served token by token, or, with `choices_first`, all first choices before any second. Assignments in
    `dropped_TK` take no place.
    """
    queue_N = queue_TK.t().flatten() if choices_first else queue_TK.flatten()
    if dropped_TK is not None:
        # An extra queue holds those that are already out.
        out_N = dropped_TK.t().flatten() if choices_first else dropped_TK.flatten()
        queue_N = queue_N.masked_fill(out_N, -1)
    sorted_N, order_N = queue_N.sort(stable=True)
    start_N = torch.searchsorted(sorted_N, sorted_N)  # where each assignment's queue begins among the sorted ones
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device) - start_N
    full_N = place_N >= capacity
    return full_N.view(queue_TK.t().shape).t() if choices_first else full_N.view(queue_TK.shape)


class MoE(nn.Module):
    """A drop-in feed-forward layer of E experts: x (..., D) -> (y (..., D), Routing).

    width          D, the model's width.
    expert_width   F, an expert's hidden width.
    router         a RouterConfig: how many experts, how many per token, how chosen and weighted.
    activation     "swiglu", "geglu", "swiglu_clamped" (gated: three matrices an expert), "relu", "gelu" (two).
    shared_width   hidden width of the shared experts, which every token uses; 0: none.
    shared_gate    multiply their output by a learned sigmoid gate.
    backend        who multiplies: "auto", "native", "grouped" or "reference" (see `handful.experts`).

    The Routing's T tokens are x's leading dimensions, flattened; the last of them is a sequence's tokens. Add
    `handful.balance` losses of it to your own loss.
    """

    def __init__(
        self,
        width: int,
        expert_width: int,
        router: RouterConfig,
        *,
        activation: Activation = "swiglu",
        bias: bool = False,
        shared_width: int = 0,
        shared_gate: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if shared_gate and not shared_width:
            raise ConfigError("shared_gate = True: needs shared_width above 0")
        self.router = Router(width, router)
        self.experts = Experts(router.experts, width, expert_width, activation=activation, bias=bias, backend=backend)
        self.shared = FeedForward(width, shared_width, activation) if shared_width else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared_gate else None

    def forward(self, x: Tensor, choice: Told | None = None, *, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """y and the routing.

        choice   as in `Router.forward`.
        mask     False for tokens that are padding, of x's shape without its width: they take no expert's capacity, no
                 loss or load counts them, and no expert computes them. None: there is none.
        """
        width = self.router.weight.shape[1]
        if x.shape[-1] != width:
            raise RoutingError(f"MoE input has width {x.shape[-1]}: it must be {width}")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise RoutingError(
                f"mask is {str(mask.dtype)[6:]} of shape {tuple(mask.shape)}: it must be bool of {tuple(x.shape[:-1])}"
            )
        x_TD = x.reshape(-1, width)
        real_T = None if mask is None else mask.reshape(-1)
        routing = self.router(x_TD, x.shape[-2] if x.dim() > 1 else None, choice=choice, real_T=real_T)
        experts_TD = begin(self.experts, x_TD, routing)  # tokens of experts that are elsewhere travel meanwhile
        shared_TD = self._shared(x_TD)
        y_TD = experts_TD() if shared_TD is None else experts_TD() + shared_TD
        return y_TD.view(x.shape), routing

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        shared_TD: Tensor = self.shared(x_TD)
        return shared_TD if self.shared_gate is None else shared_TD * self.shared_gate(x_TD).sigmoid()
