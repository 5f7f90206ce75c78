"""What the routers of a transformers model chose, recorded by hooks: the watching half of the plug-in.

Legend: T tokens · E experts · K experts per token · C what a router gives a token, E numbers if all is well
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handful.errors import ConfigError, RoutingError
from handful.routing import Routing

__all__ = ["Watch"]


class Watch:
    """The routing of every experts module of a model at each of its forward passes: see `handful.transformers.watch`.

    layers   the experts modules, by name; passes: the modules whose forward passes hold theirs, the model among them.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], passes: Iterable[nn.Module], tokens: int
    ) -> None:
        if tokens < 1:
            raise ConfigError(f"tokens = {tokens}: at least 1")
        self.tokens = tokens
        self.forgotten = 0  # forward passes that are no longer kept
        self.scores: dict[str, str] = {}
        self._model = model
        self._steps: deque[dict[str, Routing]] = deque()
        self._now: dict[str, list[Routing]] = {}  # of the forward pass under way
        self._given: dict[str, tuple[Any, ...]] = {}  # what a module beside these experts gave that may be a routing
        self._open: list[nn.Module] = []  # the models whose forward pass has begun and not ended
        self.layers = tuple(layers)
        self._hooks = []
        for name, experts in layers.items():
            self._hooks.append(experts.register_forward_pre_hook(self._on_experts(name), with_kwargs=True))
            for beside in model.get_submodule(name.rpartition(".")[0]).children():
                if beside is not experts:
                    self._hooks.append(beside.register_forward_hook(self._on_beside(name)))
        # Between a beginning and an end of one of these: a layer that is computed anew in a backward pass is not.
        for module in passes:
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end, always_call=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks away; what was seen stays."""
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def steps(self) -> list[dict[str, Routing]]:
        """The routings of each kept forward pass, oldest first, by the name of the experts module."""
        return list(self._steps)

    def routings(self) -> dict[str, Routing]:
        """One routing for each experts module: those of all kept forward passes, one after another."""
        return {name: _joined([step[name] for step in self._steps if name in step]) for name in self._seen()}

    def _seen(self) -> list[str]:
        return [name for name in self.layers if any(name in step for step in self._steps)]

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # After a Ctrl-C those that were open have no end: one that begins again was left that way.
        if module is self._model or module in self._open:
            self._open.clear()
        if not self._open:
            self._now.clear()
            self._given.clear()
        self._open.append(module)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._open.pop()
        if self._open:
            return
        if output is not None and self._now:  # None: it ended in an error
            self._steps.append({name: _joined(routings) for name, routings in self._now.items()})
            while len(self._steps) > 1 and sum(map(_tokens, self._steps)) > self.tokens:
                self._steps.popleft()
                self.forgotten += 1
        self._now.clear()
        self._given.clear()

    def _on_beside(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], object], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if self._open and isinstance(output, tuple) and any(_is_index(value) for value in output):
                self._given[name] = output

        return keep

    def _on_experts(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._open:
                _, experts_TK, weights_TK = (*args, *kwargs.values())
                self._now.setdefault(name, []).append(self._routing(name, module.num_experts, experts_TK, weights_TK))

        return see

    @torch.no_grad()
    def _routing(self, name: str, count: int, experts_TK: Tensor, weights_TK: Tensor) -> Routing:
        given = self._given.pop(name, ())
        if not any(_is_index(v) and v.shape == experts_TK.shape and torch.equal(v, experts_TK) for v in given):
            raise RoutingError(f"{name}: no module beside these experts gave the routing that they were given")
        shapes = f"{tuple(experts_TK.shape)} by {name}'s router, there are {count} experts"
        logits_TC = given[0]
        if not isinstance(logits_TC, Tensor) or logits_TC.numel() != len(experts_TK) * count:
            what = tuple(logits_TC.shape) if isinstance(logits_TC, Tensor) else type(logits_TC).__name__
            raise RoutingError(f"logits {what} were given with experts {shapes}: they must be (tokens, experts)")
        logits_TE = _kept(logits_TC).view(-1, count).float()
        experts_TK, weights_TK = _kept(experts_TK).long(), _kept(weights_TK)
        if len(logits_TE) and bool((logits_TE >= 0).all() & ((logits_TE.sum(-1) - 1).abs() < 1e-5).all()):
            # Probabilities (Gemma 4's router gives them): their logarithms are the logits less a constant.
            logits_TE, kind = logits_TE.clamp_min(1e-30).log(), "softmax"
        else:
            kind = _score(logits_TE, experts_TK, weights_TK) or self.scores.get(name, "unknown")
        self.scores[name] = kind
        return Routing(logits_TE, SCORES.get(kind, _softmax)(logits_TE), experts_TK, weights_TK)


def _softmax(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
}


def _score(logits_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> str | None:
    """Which scores the weights are proportional to, "unknown" for none of them; None where these cannot tell."""
    across = 1 if experts_TK.shape[1] > 1 else 0  # with one expert per token: over tokens
    if experts_TK.shape[across] < 2 or not len(experts_TK):
        return None
    tolerance = 1e-4 if weights_TK.dtype in (torch.float32, torch.float64) else 1e-2
    share_TK = F.normalize(weights_TK.float(), p=1, dim=across)
    errors = []
    for kind, score in SCORES.items():
        ours_TK = F.normalize(score(logits_TE).gather(1, experts_TK), p=1, dim=across)
        errors.append((float((ours_TK - share_TK).abs().max()), kind))
    (least, kind), (second, _), *_ = sorted(errors)
    if least > tolerance:
        return "unknown"
    return kind if second > 4 * least else None


def _is_index(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)


def _kept(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _tokens(step: dict[str, Routing]) -> int:
    return max(routing.tokens for routing in step.values())


def _joined(routings: list[Routing]) -> Routing:
    if len(routings) == 1:
        return routings[0]
    names = ("logits_TE", "scores_TE", "experts_TK", "weights_TK")
    return Routing(*(torch.cat([getattr(routing, name) for routing in routings]) for name in names))
