"""A decoding step as one operation, as long as the modules stay what they were when it was planned.

To ask some tens of modules what they are takes longer than a small layer's maths, and so does handing their weights
over one layer after the other. A plan remembers what was found and how to find the weights again. It keeps none of them
alive, and before it is run it makes sure that all is as it was: modules, their attributes, hooks, and weights' dtypes.
Numbers may change: the weights of this moment are taken.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from typing import Any, cast

import torch
from torch import Tensor, nn

from handful.experts.quantized import PackedWeight
from handful.positions import Span
from handful.quantize import Packed

__all__ = ["Plan", "Plans"]


class Plan:
    """A decoder's step as one operation.

    layers     how many it has.
    operands   what does not change from step to step, as csrc/fused_layers.cpp reads it.
    decoder    the module that all was taken from, with all that is in it; methods: those of its own that are passed by.
    """

    def __init__(self, layers: int, operands: Iterable[Any], decoder: nn.Module, methods: Sequence[str]) -> None:
        numbers, tensors = list[float](), list[Tensor]()
        _write(operands, numbers, tensors)
        self._layers, self._numbers = layers, torch.tensor(numbers, dtype=torch.float64)
        every = [*decoder.modules()]
        # While these live, nothing else has their ids.
        self._modules = [*map(weakref.ref, every)]
        self._methods = operator.attrgetter(*methods)
        self._attributes = [_attributes(module.__dict__) for module in every]
        self._parents, with_parameters, with_buffers = (
            [i for i, module in enumerate(every) if module.__dict__[kind]]
            for kind in ("_modules", "_parameters", "_buffers")
        )
        # Which of the modules, or of None behind them, the parents' children are.
        number = {module: i for i, module in enumerate(every)}
        children = chain.from_iterable(every[i].__dict__["_modules"].values() for i in self._parents)
        self._children = operator.itemgetter(*(number.get(child, -1) for child in children), -1)
        self._holders = [*((i, "_parameters") for i in with_parameters), *((i, "_buffers") for i in with_buffers)]
        self._called = [i for i, module in enumerate(every) if not isinstance(module, nn.ModuleList | PackedWeight)]
        self._was, weights = self._state(every)
        places = {id(weight): place for place, weight in enumerate(weights) if weight is not None}
        # One that is no module's own, such as a bias that was turned to another dtype, cannot be found again.
        self.usable = all(id(tensor) in places for tensor in tensors)
        self._places = [places[id(tensor)] for tensor in tensors] if self.usable else []

    def operands(self, span: Span, weights: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Of `torch.ops.handful.decoder_step`, without the tokens."""
        caches, count = span.caches, self._layers
        held = [cache.keys_values[layer] for layer in range(count) for cache in caches]
        lengths = [cache.held(layer) for layer in range(count) for cache in caches]
        keys, values = zip(*held, strict=True)
        return [weights[i] for i in self._places], self._numbers, *span.rope, [*keys], [*values], lengths

    def weights(self, decoder: nn.Module) -> list[Tensor | None] | None:
        """Those of this moment; None if something has changed."""
        every = [module() for module in self._modules]
        if every[0] is not decoder or None in every:
            return None
        try:
            state, weights = self._state(cast(list[nn.Module], every))
            return weights if state == self._was else None
        except (KeyError, RuntimeError, TypeError, ValueError):  # it lacks what it had, or has what does not compare
            return None

    def _state(self, modules: Sequence[nn.Module]) -> tuple[list[Any], list[Tensor | None]]:
        """What the modules are: classes, attributes, hooks, children, names and dtypes of weights; and the weights."""
        own = [module.__dict__ for module in modules]
        held = [own[i][kind] for i, kind in self._holders]
        weights = [*chain.from_iterable(map(dict.values, held))]
        children = chain.from_iterable(map(dict.values, [own[i]["_modules"] for i in self._parents]))
        state = [
            self._methods(type(modules[0])),
            [*map(type, modules)],
            [*map(len, own)],
            [attributes(of) for attributes, of in zip(self._attributes, own, strict=True)],
            [own[i]["_forward_hooks"] or own[i]["_forward_pre_hooks"] or None for i in self._called],
            [*children, None] == [*self._children([*modules, None])],
            [*chain.from_iterable(held)],
            [*map(getattr, weights, repeat("dtype"), repeat(None))],
        ]
        return state, weights


class Plans(dict[int, Plan]):
    """A decoder's, each for so many tokens. They are of this process's modules: copies and pickles have none."""

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        return Plans, ()


def _attributes(own: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """What gives a module's plain attributes: not weights, nor what is made of them and would keep them alive."""
    plain = (name for name, value in own.items() if not isinstance(value, dict | Tensor | Packed))
    return operator.itemgetter(*(name for name in plain if name not in _EVERY_MODULE_S))


# What every module holds that its forward does not look at.
_EVERY_MODULE_S = frozenset(vars(nn.Module())) - {"training"}


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
