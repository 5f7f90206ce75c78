"""Experts on disk, of which as many are in memory as a budget allows: (x_TD, routing) -> y_TD, as `Experts`.

    routing ─► needed ─┬─ in a slot ────────────────────► multiplied at once ─┐
                       └─ not ─► read into another's slot ─► multiplied then ─┴─► weighted, summed ─► y_TD

A budget changes no bit: an assignment's output depends on its expert and token alone, and outputs are summed in the
routing's order when all are there.

Legend: T tokens · D model width · E experts · K experts per token
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from handful.config import GATED
from handful.errors import HandfulError
from handful.experts.backends import check_backend
from handful.experts.native import native_in_parts, native_in_slots, native_rows, uses_native
from handful.experts.no_compile import no_compile
from handful.experts.reference import reference, reference_rows
from handful.experts.store import Store
from handful.experts.weights import ExpertWeights, check_fits, compute_dtype
from handful.kernels.extension import gemv_max_tokens
from handful.routing import Routing

__all__ = ["OffloadedExperts"]


class OffloadedExperts(nn.Module):
    """E feed-forward networks in a store: (x_TD, routing) -> y_TD, as `Experts`, on a CPU and without gradients.

    backend   "auto": the native kernels where they are (float32 and bfloat16), else the plain loop. "native": those
              kernels or an error. "grouped" and "reference": the plain loop.

    The bits are those of `Experts`, or of `QuantizedExperts` of the same bits and group, with the same backend; where
    the plain loop runs, of "reference", which "auto" is there too.
    """

    def __init__(self, store: Store, layer: int, *, activation: str, backend: str = "auto") -> None:
        super().__init__()
        check_backend(backend)
        self.store = store
        self.layer = layer
        self.count = store.layout.experts
        self.activation = activation
        self.backend = backend
        shapes = {field.name: field.shape for field in store.layout.fields}
        self.width = shapes["down"][0]
        self.hidden = shapes["gate_up"][0] // (2 if activation in GATED else 1)

    # A traced graph cannot wait for a disk.
    @no_compile
    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        check_fits(x_TD, routing, self.count, self.width)
        if torch.is_grad_enabled() and (x_TD.requires_grad or routing.weights_TK.requires_grad):
            raise HandfulError(
                "offloaded experts give no gradient: run the model under torch.no_grad() or torch.inference_mode()"
            )
        if x_TD.device.type != "cpu":
            raise HandfulError(f"offloaded experts compute on the cpu: they were given x on {x_TD.device.type}")
        with self.store.busy:
            slots = self.slots
            self.store.called(self.layer, routing)
            if uses_native(self.backend, x_TD, slots):
                y_TD = self._from_slots(x_TD, routing, slots)
                return native_in_parts(x_TD, routing, slots, self._fetch) if y_TD is None else y_TD
            return reference(x_TD, routing, slots, self._fetch)

    def rows(self, x_TD: Tensor, routing: Routing, tokens: int) -> Tensor:
        """The experts' outputs alone, neither weighted nor summed, as `native_rows` gives them, or where the plain loop
        runs `reference_rows`: of a call of so many tokens, some of which these are."""
        check_fits(x_TD, routing, self.count, self.width)
        with self.store.busy:
            slots = self.slots
            self.store.called(self.layer, routing, tokens)
            if uses_native(self.backend, x_TD, slots):
                return native_rows(x_TD, routing, slots, self._fetch, tokens)
            return reference_rows(x_TD, routing, slots, self._fetch)

    @property
    def slots(self) -> ExpertWeights:
        """The store's slots as the backends take experts. HandfulError once the store is closed."""
        layout = self.store.layout
        tensors: Any = {name: self.store.field(name) for name in ExpertWeights._fields[:6]}
        return ExpertWeights(
            **tensors, activation=self.activation, hidden=self.hidden, bits=layout.bits, group=layout.group
        )

    def _from_slots(self, x_TD: Tensor, routing: Routing, slots: ExpertWeights) -> Tensor | None:
        """The output for few tokens whose experts are all in memory; None if they are not."""
        if not 0 < len(x_TD) <= gemv_max_tokens() or routing.dropped_TK is not None:
            return None
        if slots.bits and slots.down_bias is not None and slots.down_bias.dtype != compute_dtype(x_TD):
            return None
        there = self.store.there(self.layer, routing.experts_TK.flatten().tolist())
        if there is None:
            return None
        self.store.guess(self.layer + 1, x_TD)
        return native_in_slots(x_TD, torch.tensor(there).view(routing.experts_TK.shape), routing.weights_TK, slots)

    def _fetch(self, chosen: Sequence[int], x_TD: Tensor) -> Iterator[list[tuple[int, int]]]:
        lists = self.store.fetch(self.layer, chosen)
        self.store.guess(self.layer + 1, x_TD)
        return lists

    def extra_repr(self) -> str:
        layout = self.store.layout
        return f"{self.count} experts, {layout.format}, activation={self.activation}, backend={self.backend}"
