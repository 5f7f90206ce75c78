"""What a request asks of the routers, and what each MoE layer is told of it for the tokens of a forward pass.

Legend: T tokens · E experts · K experts per token
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from handful.config import ModelConfig
from handful.errors import ConfigError
from handful.observe import Recording
from handful.routing import Choice, Limits, Piecewise, Told

__all__ = ["Missing", "MissingLoss", "RoutingOptions", "RoutingPlan", "told"]


@dataclass(frozen=True, kw_only=True)
class MissingLoss:
    """Nats per token of a text that was held out, without the experts that are missing and with them, and of how many
    tokens."""

    without: float
    whole: float
    tokens: int


@dataclass(eq=False)
class Missing:
    """Experts that are not to be had for now, such as those of a rank that has gone: the routers choose among the
    others.

    experts   of each MoE layer that lacks some, by its number, which: sorted.
    off       of each MoE layer, in order, True for those, (E,); None: the layer has all.
    of        experts of all layers together.
    loss      what it costs, once it was measured.
    """

    experts: Mapping[int, tuple[int, ...]]
    off: Sequence[Tensor | None]
    of: int
    loss: MissingLoss | None = None

    @property
    def count(self) -> int:
        return sum(map(len, self.experts.values()))

    @staticmethod
    def among(config: ModelConfig, experts: Mapping[int, Sequence[int]]) -> Missing:
        assert config.router is not None
        off = []
        for layer in config.moe_layers:
            off_E = torch.zeros(config.router.experts, dtype=torch.bool)
            off_E[list(experts.get(layer, ()))] = True
            off.append(off_E if experts.get(layer) else None)
        named = {layer: tuple(sorted(some)) for layer, some in experts.items() if some}
        return Missing(named, off, config.router.experts * len(config.moe_layers))


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingOptions:
    """What a request asks of the routers.

    record       its routing is told in its deltas.
    replay       the experts of its first tokens, prompt and made ones, as another request's were recorded; to the same
                 bits where the model, the tokens and the passes are the same. It has `top_k` experts a token.
    experts_off  experts that it is to do without, by the number of their layer.
    top_k        experts a token; None: K, which is also the most.
    whole        computed with all experts, also with those that are `Missing`, however long that takes.
    """

    record: bool = False
    replay: Recording | None = None
    experts_off: Mapping[int, Sequence[int]] = field(default_factory=dict)
    top_k: int | None = None
    whole: bool = False

    @property
    def changes(self) -> bool:
        """Whether the model may compute something else than it would unasked."""
        return self.replay is not None or any(self.experts_off.values()) or self.top_k is not None or self.whole

    def plan(self, config: ModelConfig) -> RoutingPlan:
        """What each MoE layer is to be told. ConfigError for what this model cannot do."""
        router = config.router
        moe_layers = config.moe_layers
        if router is None or not moe_layers:
            raise ConfigError("routing: the model is dense, and has no router")
        E, K = router.experts, router.top_k
        if self.top_k is not None and not 1 <= self.top_k <= K:
            raise ConfigError(f"top_k_experts = {self.top_k}: from 1 to the model's own {K}")
        top_k = E if router.choice == "expert" else self.top_k or K
        needed = 1 if router.choice == "expert" else top_k
        for layer, off in self.experts_off.items():
            if layer not in moe_layers:
                raise ConfigError(f"experts_off: layer {layer} has no experts; those that have: {_ranges(moe_layers)}")
            if any(not 0 <= expert < E for expert in off):
                raise ConfigError(f"experts_off: layer {layer} has experts 0 to {E - 1}")
            if E - len(set(off)) < needed:
                left = E - len(set(off))
                raise ConfigError(f"experts_off: layer {layer} would have {left} of {E} experts: it takes {needed}")
        if self.replay is not None:
            _check_replay(self.replay, len(moe_layers), E, top_k)
        limits = [self._limits(self.experts_off.get(layer, ()), E) for layer in moe_layers]
        return RoutingPlan(top_k, self.replay, limits, self.whole)

    def _limits(self, off: Sequence[int], experts: int) -> Limits | None:
        if not off:
            return None if self.top_k is None else Limits(top_k=self.top_k)
        off_E = torch.zeros(experts, dtype=torch.bool)
        off_E[list(off)] = True
        return Limits(off_E, self.top_k)


def _check_replay(replay: Recording, layers: int, experts: int, top_k: int) -> None:
    if len(replay) != layers:
        raise ConfigError(f"replay: a routing of {len(replay)} MoE layers; the model has {layers}")
    for experts_TK, dropped_TK in zip(replay.experts_TK, replay.dropped_TK, strict=True):
        if experts_TK.shape[1] != top_k or len(experts_TK) != replay.tokens:
            raise ConfigError(f"replay: {experts_TK.shape[1]} experts a token; the request takes {top_k}")
        if not experts_TK.numel():
            continue
        low, high = (int(bound) for bound in experts_TK.aminmax())
        if low < 0 or high >= experts:
            raise ConfigError(f"replay: names expert {low if low < 0 else high}; there are {experts}, counted from 0")
        sorted_TK = experts_TK.long() if dropped_TK is None else experts_TK.long().masked_fill(dropped_TK, -1)
        sorted_TK = sorted_TK.sort(-1).values
        if bool(((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)).any()):
            raise ConfigError("replay: names an expert twice for one token")


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order, runs of them as "3 to 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """A request's options, for the MoE layers of one model, in order. top_k: experts that a token of it has."""

    top_k: int
    replay: Recording | None
    limits: Sequence[Limits | None]
    whole: bool = False

    def pieces(
        self, layer: int, start: int, count: int, off_E: Tensor | None = None
    ) -> list[tuple[int, Choice | Limits | None]]:
        """What the MoE layer of this place is told of tokens start up to start + count of the request's sequence, where
        some experts are missing. What is replayed, and a token that would be left with too few, has them."""
        again = 0 if self.replay is None else min(max(0, self.replay.tokens - start), count)
        pieces: list[tuple[int, Choice | Limits | None]] = []
        if self.replay is not None and again:
            pieces.append((again, self.replay.part(start, start + again)[layer]))
        if again < count:
            pieces.append((count - again, self._without(self.limits[layer], off_E)))
        return pieces

    def _without(self, limits: Limits | None, off_E: Tensor | None) -> Limits | None:
        if off_E is None or self.whole:
            return limits
        own_E = None if limits is None else limits.off_TE
        both_E = off_E if own_E is None else off_E | own_E
        top_k = None if limits is None else limits.top_k
        return limits if int((~both_E).sum()) < self.top_k else Limits(both_E, top_k)


def told(
    parts: Sequence[tuple[RoutingPlan | None, int, int]], layers: int, missing: Missing | None = None
) -> list[Told | None] | None:
    """What each of the MoE layers is told of a batch; None: nothing is.

    parts    of each sequence what it asks (None: nothing), how many of its tokens passed before, how many are in it.
    missing  the experts that are not to be had.
    """
    if missing is None and all(plan is None for plan, _, _ in parts):
        return None
    found: list[Told | None] = []
    for layer in range(layers):
        off_E = None if missing is None else missing.off[layer]
        unasked = None if off_E is None else Limits(off_E)
        pieces: list[tuple[int, Choice | Limits | None]] = []
        for plan, start, count in parts:
            for length, what in [(count, unasked)] if plan is None else plan.pieces(layer, start, count, off_E):
                if what is unasked and pieces and pieces[-1][1] is unasked:
                    pieces[-1] = pieces[-1][0] + length, unasked
                else:
                    pieces.append((length, what))
        found.append(pieces[0][1] if len(pieces) == 1 else Piecewise(tuple(pieces)))
    return found
