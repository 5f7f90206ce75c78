"""How even the load of the experts is, over the last tokens that a server passed.

Legend: T tokens · E experts · K experts per token · L MoE layers
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from handful.config import ModelConfig
from handful.routing import Routing

__all__ = ["LoadWatch"]

HALF_LIFE = 8192  # tokens after which an assignment counts half
PASSES, TOKENS = 64, 4096  # that wait to be counted together: one by one they would cost as much as a small layer


class LoadWatch:
    """Counts computed assignments by expert, for each MoE layer; an engine's `on_routing`, in its thread."""

    def __init__(self, config: ModelConfig) -> None:
        self.layers = config.moe_layers
        experts = config.router.experts if config.router is not None else 0
        self._counts_LE = torch.zeros(len(self.layers), experts, dtype=torch.float64)
        self._waiting: list[list[Tensor]] = []
        self._tokens = 0
        self._lock = threading.Lock()

    def __call__(self, jobs: Sequence[Any], new: Sequence[int], routings: Sequence[Routing]) -> None:
        if not self.layers:
            return
        with self._lock:
            self._waiting.append([_computed(routing) for routing in routings])
            self._tokens += sum(new)
            if len(self._waiting) >= PASSES or self._tokens >= TOKENS:
                self._count()

    def _count(self) -> None:
        if not self._tokens:
            return
        self._counts_LE *= 0.5 ** (self._tokens / HALF_LIFE)
        for counts_E, passes in zip(self._counts_LE, zip(*self._waiting, strict=True), strict=True):
            chosen_N = torch.cat(passes).cpu()
            counts_E += chosen_N.bincount(minlength=len(counts_E))
        self._waiting, self._tokens = [], 0

    def counts(self) -> dict[int, Tensor]:
        """Assignments by expert, (E,) float64, for each MoE layer by its number; older ones count less."""
        with self._lock:
            self._count()
            return {layer: counts_E.clone() for layer, counts_E in zip(self.layers, self._counts_LE, strict=True)}


def _computed(routing: Routing) -> Tensor:
    """The experts of its assignments that were computed, (N,)."""
    if routing.dropped_TK is None:
        return routing.experts_TK.flatten()
    return routing.experts_TK[~routing.dropped_TK]
