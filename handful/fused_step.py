"""All layers of a decoding step as one operation, as long as their modules stay what they were when it was planned.

To ask some tens of modules what they are takes longer than a small layer's maths, and so does handing their weights
over one layer after the other. A plan remembers what was found and how to find the weights again. It keeps none of them
alive, and before it is run it makes sure that all is as it was: modules, their attributes, hooks, and weights' dtypes.
Numbers may change: the weights of this moment are taken.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from handful.positions import Span
from handful.quantize import Packed

__all__ = ["Plan"]


class Plan:
    """A decoder's layers as one operation.

    layers   its blocks.
    halves   of each, the operands of its attention that do not change from step to step, those of its second half, and
             whether that is a mixture.
    """

    def __init__(self, layers: nn.Module, halves: Sequence[tuple[Sequence[Any], Sequence[Any], bool]]) -> None:
        numbers, tensors = [float(len(halves))], list[Tensor]()
        for attention, feed, routes in halves:
            _write([*attention, routes, *feed], numbers, tensors)
        self._layers, self._numbers = len(halves), torch.tensor(numbers, dtype=torch.float64)
        modules = [*layers.modules()]
        # While these live, nothing else has their ids.
        self._modules = [*map(weakref.ref, modules)]
        own = [module.__dict__ for module in modules]
        self._attributes = [_attributes(of) for of in own]
        self._was, weights = self._state(modules)
        places = {id(weight): place for place, weight in enumerate(weights) if weight is not None}
        # One that is no module's own, such as a bias that was turned to another dtype, cannot be found again.
        self.usable = all(id(tensor) in places for tensor in tensors)
        self._places = [places[id(tensor)] for tensor in tensors] if self.usable else []

    def operands(self, layers: nn.Module, span: Span) -> tuple[Any, ...] | None:
        """Of `torch.ops.handful.layers`, without x; None if something has changed."""
        modules = [module() for module in self._modules]
        if modules[0] is not layers or None in modules:
            return None
        try:
            state, weights = self._state(cast(list[nn.Module], modules))
            if state != self._was:
                return None
        except (KeyError, RuntimeError, TypeError, ValueError):  # it lacks what it had, or has what does not compare
            return None
        caches, count = span.caches, self._layers
        held = [cache.keys_values[layer] for layer in range(count) for cache in caches]
        lengths = [cache.held(layer) for layer in range(count) for cache in caches]
        keys, values = zip(*held, strict=True)
        return [weights[i] for i in self._places], self._numbers, *span.rope, [*keys], [*values], lengths

    def _state(self, modules: Sequence[nn.Module]) -> tuple[list[Any], list[Tensor | None]]:
        """What the modules are: classes, attributes, hooks, children, names and dtypes of weights; and the weights."""
        own = [module.__dict__ for module in modules]
        children = [of["_modules"].values() for of in own]
        held = [of["_parameters"] for of in own] + [of["_buffers"] for of in own]
        weights = [*chain.from_iterable(map(dict.values, held))]
        state = [
            [*map(type, modules)],
            [*map(len, own)],
            [attributes(of) for attributes, of in zip(self._attributes, own, strict=True)],
            [of["_forward_hooks"] or of["_forward_pre_hooks"] or None for of in own],
            [*map(id, chain.from_iterable(children))],
            [*chain.from_iterable(held)],
            [None if weight is None else weight.dtype for weight in weights],
        ]
        return state, weights


def _attributes(own: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """What gives a module's plain attributes: not weights, nor what is made of them and would keep them alive."""
    return operator.itemgetter(*(name for name, value in own.items() if not isinstance(value, dict | Tensor | Packed)))


def _write(operands: Iterable[Any], numbers: list[float], tensors: list[Tensor]) -> None:
    """Operands as csrc/fused_layers.cpp reads them."""
    for value in operands:
        if value is None or isinstance(value, Tensor):
            numbers.append(value is not None)
            if value is not None:
                tensors.append(value)
        elif isinstance(value, str):
            numbers += [len(value), *value.encode("ascii")]
        elif isinstance(value, list | tuple):
            numbers.append(len(value))
            _write(value, numbers, tensors)
        else:
            numbers.append(float(value))
