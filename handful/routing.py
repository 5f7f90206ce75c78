"""What a router decided for a batch of tokens: one immutable value that experts obey and everything else reads.

Legend: T tokens · E experts · K experts per token · N = T·K assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from handful.errors import RoutingError

__all__ = ["Choice", "Limits", "Piecewise", "Routing", "SortedAssignments", "Told"]


@dataclass(frozen=True, eq=False)
class Choice:
    """The experts of T tokens, chosen before: what a router is told to choose again (`observe.Recording`).

    experts_TK   the chosen experts, at most as many for each token as the router takes.
    dropped_TK   True where an assignment was not computed; None: all were.
    """

    experts_TK: Tensor
    dropped_TK: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Limits:
    """What a router is told to do with less: without some experts, or with fewer of them a token.

    off_TE   True for an expert that a token may not go to: (T, E), or (E,) for all tokens alike; None: none is off.
    top_k    experts per token; None: as many as the router takes, which is also the most.
    """

    off_TE: Tensor | None = None
    top_k: int | None = None


@dataclass(frozen=True, eq=False)
class Piecewise:
    """What a router is told of one run of tokens after another, such as those of several sequences.

    pieces   how many tokens, and what of them; None: the router chooses as ever.
    """

    pieces: tuple[tuple[int, Choice | Routing | Limits | None], ...]


@dataclass(frozen=True, eq=False)
class SortedAssignments:
    """A routing's computed assignments in the order of experts: sort once, use in every matrix product.

    order_N     positions in the flattened (T, K) assignments, grouped by expert, earlier tokens first; dropped
                assignments are left out, so N can be below T·K.
    token_N     the token of each.
    counts_E    assignments per expert; offsets_E is their running sum: expert e owns rows offsets[e] - counts[e] up
                to offsets[e].
    """

    order_N: Tensor
    token_N: Tensor
    counts_E: Tensor
    offsets_E: Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    """The chosen experts and their weights, for each of T tokens.

    logits_TE    what the router's linear map gave (with any training noise), float32.
    scores_TE    softmax or sigmoid of the logits: what the weights are made from.
    experts_TK   the chosen experts, best first.
    weights_TK   what their outputs are multiplied by.
    dropped_TK   True where an assignment is not computed (the expert was full); None: all are. A router with
                 `choice="expert"` lists every expert for every token and drops those that did not choose the token.
    real_T       False for tokens that are padding: nothing of theirs is computed, and no loss or load counts them;
                 None: all are real.

    RoutingError if their shapes do not fit together.
    """

    logits_TE: Tensor
    scores_TE: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    dropped_TK: Tensor | None = None
    real_T: Tensor | None = None

    def __post_init__(self) -> None:
        if self.experts_TK.dim() != 2 or self.scores_TE.dim() != 2 or len(self.scores_TE) != len(self.experts_TK):
            raise RoutingError(
                f"routing.experts_TK has shape {tuple(self.experts_TK.shape)} and scores_TE "
                f"{tuple(self.scores_TE.shape)}: they must be (tokens, top_k) and (tokens, experts)"
            )
        for name, like in (("logits_TE", "scores_TE"), ("weights_TK", "experts_TK"), ("dropped_TK", "experts_TK")):
            value, right = getattr(self, name), tuple(getattr(self, like).shape)
            if value is not None and value.shape != right:
                raise RoutingError(f"routing.{name} has shape {tuple(value.shape)}: it must be {right} like {like}")
        if self.real_T is not None and self.real_T.shape != (self.tokens,):
            raise RoutingError(f"routing.real_T has shape {tuple(self.real_T.shape)}: it must be ({self.tokens},)")

    @staticmethod
    def of_kernel(logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Routing:
        """What a kernel made, whose shapes fit: to look at them takes longer than a small layer."""
        routing = object.__new__(Routing)
        made = {"logits_TE": logits_TE, "scores_TE": scores_TE, "experts_TK": experts_TK, "weights_TK": weights_TK}
        routing.__dict__.update(made, dropped_TK=None, real_T=None)
        return routing

    @staticmethod
    def joined(routings: Sequence[Routing]) -> Routing:
        """One after the other. Where a token has fewer experts than another, the rest of its places is dropped."""
        K = max(routing.top_k for routing in routings)
        experts, weights, dropped = [], [], []
        for routing in routings:
            missing = 0, K - routing.top_k
            experts.append(F.pad(routing.experts_TK, missing))
            weights.append(F.pad(routing.weights_TK, missing))
            dropped.append(F.pad(~routing.computed_TK, missing, value=True))
        some_dropped = any(routing.dropped_TK is not None or routing.top_k < K for routing in routings)
        padded = [routing.real_T for routing in routings if routing.real_T is not None]
        assert len(padded) in (0, len(routings)), "padding of some sequences alone"
        return Routing(
            torch.cat([routing.logits_TE for routing in routings]),
            torch.cat([routing.scores_TE for routing in routings]),
            torch.cat(experts),
            torch.cat(weights),
            torch.cat(dropped) if some_dropped else None,
            torch.cat(padded) if padded else None,
        )

    def rows(self, start: int, end: int) -> Routing:
        """That of tokens start..end."""
        if start == 0 and end == self.tokens:
            return self
        parts = (self.logits_TE, self.scores_TE, self.experts_TK, self.weights_TK, self.dropped_TK, self.real_T)
        return Routing(*(None if part is None else part[start:end] for part in parts))  # type: ignore[arg-type]

    def of_top(self, top_k: int) -> Routing:
        """With the first `top_k` experts of each token alone."""
        if top_k == self.top_k:
            return self
        dropped_TK = None if self.dropped_TK is None else self.dropped_TK[:, :top_k]
        if dropped_TK is not None and not dropped_TK.any():
            dropped_TK = None
        chosen = self.experts_TK[:, :top_k], self.weights_TK[:, :top_k], dropped_TK
        return Routing(self.logits_TE, self.scores_TE, *chosen, self.real_T)

    @property
    def tokens(self) -> int:
        return self.experts_TK.shape[0]

    @property
    def experts(self) -> int:
        return self.scores_TE.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts_TK.shape[1]

    def plan(self) -> SortedAssignments:
        """Sort the assignments by expert; computed once. RoutingError for an expert that does not exist."""
        return self._plan

    @cached_property
    def _plan(self) -> SortedAssignments:
        experts_N = self.experts_TK.flatten()
        if self.dropped_TK is not None:
            kept_N = (~self.dropped_TK.flatten()).nonzero().squeeze(1)
            sorted_N, by_expert_N = experts_N[kept_N].sort(stable=True)
            order_N = kept_N[by_expert_N]
        else:
            sorted_N, order_N = experts_N.sort(stable=True)
        # On a GPU these two reads would stall the queue; there the kernel's own bounds checks stand in.
        if sorted_N.numel() and sorted_N.device.type == "cpu":
            low, high = int(sorted_N[0]), int(sorted_N[-1])
            if low < 0 or high >= self.experts:
                wrong = low if low < 0 else high
                raise RoutingError(f"routing names expert {wrong}: there are {self.experts}, counted from 0")
        offsets_E = torch.searchsorted(sorted_N, torch.arange(self.experts, device=sorted_N.device), right=True)
        counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
        return SortedAssignments(order_N, order_N // self.top_k, counts_E, offsets_E)

    @cached_property
    def chosen_E(self) -> Tensor:
        """Assignments that each expert was chosen for, before any were dropped, as float32. What balance looks at."""
        counts_E = torch.zeros(self.experts, device=self.experts_TK.device)
        return counts_E.index_add_(0, self.experts_TK.flatten(), self.counted_TK.flatten())

    @property
    def computed_TK(self) -> Tensor:
        """False for each assignment that was dropped: bool."""
        dropped_TK = self.dropped_TK
        return torch.ones_like(self.experts_TK, dtype=torch.bool) if dropped_TK is None else ~dropped_TK

    @property
    def counted_TK(self) -> Tensor:
        """1 for each assignment of a real token, whether or not it was dropped, 0 for padding's: float32."""
        ones_TK = torch.ones(self.experts_TK.shape, device=self.experts_TK.device)
        return ones_TK if self.real_T is None else ones_TK * self.real_T.unsqueeze(1)

    def mean(self, value_TX: Tensor) -> Tensor:
        """The mean over real tokens of a number or a row for each token, without its first dimension; 0 of none."""
        if self.real_T is not None:
            value_TX = value_TX[self.real_T]
        return value_TX.mean(0) if len(value_TX) else value_TX.sum(0)


Told = Choice | Routing | Limits | Piecewise  # what a router may be told of its choice
