"""Routing, seen: how even the load is, who works with whom; and recorded, to be looked at or replayed.

Legend: T tokens · E experts · K experts per token · L MoE layers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from handful.checkpoint import read_tensors, write_file
from handful.errors import CheckpointError, RoutingError
from handful.routing import Choice, Routing

__all__ = [
    "LoadStats",
    "Recorder",
    "Recording",
    "coactivation",
    "collapsed",
    "dead",
    "dropped",
    "entropy",
    "expert_load",
    "kept",
    "max_vio",
    "stats",
    "touched",
    "used",
]


def expert_load(routing: Routing) -> Tensor:
    """(E,) the share of the T·K assignments that chose each expert; sums to 1."""
    return routing.chosen_E / routing.chosen_E.sum().clamp_min(1)


def max_vio(load_E: Tensor) -> float:
    """(max load - mean load) / mean load: 0 is perfectly even, E/K - 1 the worst that top-K routing can do."""
    return float(load_E.max() * len(load_E) / load_E.sum() - 1)


def entropy(load_E: Tensor) -> float:
    """The load's entropy as a share of an even load's: 1 is even, 0 all on one expert (or there is only one)."""
    share_E = load_E / load_E.sum()
    if len(share_E) < 2:
        return 0.0
    bits = -(share_E * share_E.clamp_min(1e-30).log()).sum() / torch.log(torch.tensor(float(len(share_E))))
    return float(bits)


def dead(load_E: Tensor, floor: float = 0.01) -> int:
    """How many experts get less than `floor` of an even share."""
    return int((load_E * len(load_E) < floor * load_E.sum()).sum())


def collapsed(load_E: Tensor, top_k: int) -> str | None:
    """Why a layer's load is a collapse, in words; None when it is not one.

    It takes two together. Experts are dead, a tenth of them at least; and the router keeps choosing few: its load is no
    more spread than an even one over half of the experts, or more than half of all tokens choose one expert although
    an even share would be less than half of that. Uneven alone is not collapsed, nor are a few dead among many in use.
    """
    experts = len(load_E)
    if experts < 2:
        return None
    idle, spread, busiest = dead(load_E), experts ** entropy(load_E), float(load_E.max() / load_E.sum()) * top_k
    few = []
    if spread < experts / 2:
        few.append(f"the load is as uneven as with {spread:.0f} of {experts} experts in even use")
    if busiest > 0.5 and top_k / experts < 0.25:
        few.append(f"one expert is chosen by {busiest:.0%} of all tokens")
    if idle < max(1, experts / 10) or not few:
        return None
    return ", ".join([f"{idle} of {experts} experts are dead", *few])


def kept(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> float:
    """The share of the assignments of `before` that `after` has too: the experts of the same tokens, in any order."""
    same = sum(len(set(one) & set(other)) for one, other in zip(before, after, strict=True))
    return same / max(1, sum(map(len, before)))


def touched(experts_TK: Sequence[Sequence[int]]) -> list[int]:
    """How many different experts the first 1, 2, … T tokens went to together. -1 is none."""
    seen = {-1}
    return [len(seen := seen | set(experts_K)) - 1 for experts_K in experts_TK]


def dropped(routing: Routing) -> float:
    """The share of real tokens' assignments that were not computed because their expert was full."""
    return 0.0 if routing.dropped_TK is None else float(routing.mean(routing.dropped_TK.float()).mean())


def used(routing: Routing) -> Tensor:
    """(T, E) True where an expert computed a token."""
    used_TE = torch.zeros(routing.tokens, routing.experts, device=routing.experts_TK.device)
    return used_TE.scatter_add_(1, routing.experts_TK, routing.computed_TK.float()) > 0


def coactivation(routing: Routing) -> Tensor:
    """(E, E) how many tokens both experts of a pair computed (dropped ones left out); the diagonal: each expert's."""
    used_TE = used(routing).float()
    return used_TE.T @ used_TE


@dataclass(frozen=True)
class LoadStats:
    """The load of every MoE layer over some steps, in plain values."""

    load: list[list[float]]
    max_vio: list[float]
    dead: list[int]
    entropy: list[float]
    dropped: list[float]


def stats(load_LE: Tensor, dropped_L: Sequence[float]) -> LoadStats:
    """Summarise per-layer loads (counts or shares, (L, E)) and dropped shares."""
    share_LE = load_LE / load_LE.sum(-1, keepdim=True)
    return LoadStats(
        load=[[round(v, 6) for v in row] for row in share_LE.tolist()],
        max_vio=[max_vio(row) for row in share_LE],
        dead=[dead(row) for row in share_LE],
        entropy=[entropy(row) for row in share_LE],
        dropped=list(dropped_L),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Recorded.


class Recording(Sequence[Choice]):
    """The chosen experts and their weights, for T tokens and every MoE layer, as few bytes as they need.

    experts_TK   one tensor for each layer: uint8, or int16 from 257 experts on.
    weights_TK   one for each layer: float16. They are there to be looked at; a replay makes them anew.
    dropped_TK   one for each layer where some were dropped, else None.
    tokens_T     the tokens themselves, if they were given: int32.

    It is a sequence of one `Choice` for each layer, which `Decoder.forward(..., routing=recording)` takes. So is
    `recording.part(start, end)` for some of the tokens.
    """

    def __init__(
        self,
        experts_TK: Sequence[Tensor],
        weights_TK: Sequence[Tensor],
        dropped_TK: Sequence[Tensor | None],
        tokens_T: Tensor | None = None,
    ) -> None:
        self.experts_TK, self.weights_TK, self.dropped_TK = list(experts_TK), list(weights_TK), list(dropped_TK)
        self.tokens_T = tokens_T

    def __len__(self) -> int:
        return len(self.experts_TK)

    def __getitem__(self, layer: int) -> Choice:  # type: ignore[override]
        return Choice(self.experts_TK[layer].long(), self.dropped_TK[layer])

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.experts_TK[0]) if self.experts_TK else 0

    def part(self, start: int, end: int) -> Recording:
        """That of tokens start..end."""
        return Recording(
            [t[start:end] for t in self.experts_TK],
            [t[start:end] for t in self.weights_TK],
            [None if t is None else t[start:end] for t in self.dropped_TK],
            None if self.tokens_T is None else self.tokens_T[start:end],
        )

    @classmethod
    def joined(cls, parts: Sequence[Recording]) -> Recording:
        """One after the other; the tokens are not kept."""
        if len(parts) == 1:
            return parts[0]
        dropped_TK: list[Tensor | None] = []
        for layer in range(len(parts[0])):
            none = all(part.dropped_TK[layer] is None for part in parts)
            dropped_TK.append(None if none else torch.cat([part._dropped(layer) for part in parts]))
        return cls(
            [torch.cat(found) for found in zip(*(part.experts_TK for part in parts), strict=True)],
            [torch.cat(found) for found in zip(*(part.weights_TK for part in parts), strict=True)],
            dropped_TK,
        )

    def _dropped(self, layer: int) -> Tensor:
        dropped_TK = self.dropped_TK[layer]
        return torch.zeros_like(self.experts_TK[layer], dtype=torch.bool) if dropped_TK is None else dropped_TK

    def save(self, path: str | Path) -> None:
        """Write it as a safetensors file: `layers.0.experts`, `layers.0.weights`, … and `tokens`."""
        tensors = {"tokens": self.tokens_T} if self.tokens_T is not None else {}
        for layer in range(len(self)):
            tensors[f"layers.{layer}.experts"] = self.experts_TK[layer]
            tensors[f"layers.{layer}.weights"] = self.weights_TK[layer]
            dropped_TK = self.dropped_TK[layer]
            if dropped_TK is not None:
                tensors[f"layers.{layer}.dropped"] = dropped_TK
        write_file(path, tensors)

    @classmethod
    def read(cls, path: str | Path) -> Recording:
        """A file that `save` wrote. CheckpointError for one that is malformed."""
        found = read_tensors(path)
        layers = sum(name.endswith(".experts") for name in found)
        wanted = {f"layers.{i}.{kind}" for i in range(layers) for kind in ("experts", "weights")}
        optional = {"tokens", *(f"layers.{i}.dropped" for i in range(layers))}
        for name in [*sorted(wanted - set(found)), *sorted(set(found) - wanted - optional)]:
            raise CheckpointError(f"{path}: tensor {name!r} is {'missing' if name in wanted else 'unexpected'}")
        shape = found.shape("layers.0.experts") if layers else (0, 0)
        for name in found:
            right = shape[:1] if name == "tokens" else (shape[0], found.shape(f"{name.rpartition('.')[0]}.experts")[-1])
            if found.shape(name) != right or len(right) != (1 if name == "tokens" else 2):
                raise CheckpointError(f"{path}: tensor {name!r} has shape {list(found.shape(name))}: of no recording")
        return cls(
            [found[f"layers.{i}.experts"] for i in range(layers)],
            [found[f"layers.{i}.weights"] for i in range(layers)],
            [found.get(f"layers.{i}.dropped") for i in range(layers)],
            found.get("tokens"),
        )


class Recorder:
    """Collects the routings of one sequence, or of a batch, pass after pass. Nothing is computed before it is asked."""

    def __init__(self) -> None:
        self._passes: list[list[Routing]] = []

    def add(self, routings: Sequence[Routing], start: int = 0, end: int | None = None) -> None:
        """One forward pass's routings, or those of its tokens start..end."""
        if self._passes and len(self._passes[0]) != len(routings):
            raise RoutingError(f"routings of {len(routings)} MoE layers: those before were of {len(self._passes[0])}")
        self._passes.append([r.rows(start, r.tokens if end is None else end) for r in routings])

    @property
    def tokens(self) -> int:
        """That passed so far."""
        return sum(routings[0].tokens for routings in self._passes if routings)

    def recording(self, tokens: Sequence[int] | None = None) -> Recording:
        """All of it so far. tokens: the T tokens that passed."""
        layers = list(zip(*self._passes, strict=True))
        dropped = [any(r.dropped_TK is not None for r in layer) for layer in layers]
        return Recording(
            [torch.cat([_small(r.experts_TK, r.experts) for r in layer]) for layer in layers],
            [torch.cat([r.weights_TK.detach().half().cpu() for r in layer]) for layer in layers],
            [
                torch.cat([~r.computed_TK for r in layer]).cpu() if some else None
                for layer, some in zip(layers, dropped, strict=True)
            ],
            None if tokens is None else torch.tensor(list(tokens), dtype=torch.int32),
        )


def _small(experts_TK: Tensor, experts: int) -> Tensor:
    return experts_TK.to(torch.uint8 if experts <= 256 else torch.int16).cpu()
