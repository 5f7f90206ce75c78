"""Experts on other ranks: (x_TD, routing) -> y_TD, as `Experts`.

    routing ─► who has which ─► each token once to each rank that has one of its experts ─┐
                                 rows of all ranks, put in the routing's order ◄───────────┘ ─► weighted, summed ─► y_TD

No placement changes a bit: an assignment's row depends on its expert and token alone, and rows are summed in the
routing's order when all are there.

Legend: T tokens · D model width · E experts · K experts per token · N = assignments · C copies
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handful.errors import HandfulError, RankLostError
from handful.experts.backends import check_backend
from handful.experts.expert_file import FLOATS, Layout
from handful.experts.link import Link, LinkError
from handful.experts.native import native_sum
from handful.experts.no_compile import no_compile
from handful.experts.reference import reference_sum
from handful.experts.weights import check_fits, compute_dtype
from handful.kernels.extension import DTYPES, available
from handful.routing import Routing

__all__ = ["Owners", "RanksAsked", "RanksMap", "RemoteExperts"]

GOLDEN = 0.6180339887498949  # of steps of this size on a circle none comes near another for long

Ints = NDArray[np.int64]


class Owners:
    """Who computes the experts of a layer.

    copies   of each expert the ranks that have it, at least one, by their place in `RanksMap.links`.
    shares   of each expert, in the same order, which share of its tokens each of them gets; None: equal ones.
    """

    def __init__(self, copies: Sequence[Sequence[int]], shares: Sequence[Sequence[float]] | None = None) -> None:
        most = max(map(len, copies))
        self.copies_EC = np.array([[*own, *[own[-1]] * (most - len(own))] for own in copies], np.int64)
        parts = shares or [[1 / len(own)] * len(own) for own in copies]
        # Up to where on a circle's first turn each copy's part goes; of the last one to the end.
        upto_EC = np.ones((len(copies), most))
        for upto_C, part in zip(upto_EC, parts, strict=True):
            ends = np.cumsum(part) / (sum(part) or 1.0)
            upto_C[: len(part) - 1] = ends[:-1]
        self._upto_EC = upto_EC[:, :-1]

    def of(self, counts_E: Ints, turn: int = 0, *, split: bool = True) -> Ints:
        """The rank of each assignment, (N,), in the order of a routing's plan, of which expert e has counts_E[e]: the
        tokens of an expert are dealt to its copies by their shares, as evenly as can be.

        turn    of one call after another, so that an expert's only token does not always go to the same copy.
        split   False: all of an expert's tokens go to one copy, another in another turn.
        """
        expert_N = np.repeat(np.arange(len(counts_E)), counts_E)
        if self._upto_EC.shape[1] == 0:
            return self.copies_EC[expert_N, 0]  # type: ignore[no-any-return]
        first_N = np.repeat(np.cumsum(counts_E) - counts_E, counts_E)
        # Points that are spread over the circle whatever their number, so that each copy gets of any of them its share.
        at_N = np.zeros(len(expert_N))
        if split:
            at_N = ((np.arange(len(expert_N)) - first_N) + 0.5) / np.repeat(counts_E, counts_E)
        at_N = (at_N + GOLDEN * (turn + expert_N)) % 1.0
        return self.copies_EC[expert_N, (at_N[:, None] >= self._upto_EC[expert_N]).sum(1)]  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class RanksMap:
    """Which rank has which expert now: the links to all ranks, and the owners of every layer's experts. missing: what
    those who choose experts are told of those that are not there; for the map's maker to say."""

    links: tuple[Link, ...]
    layers: tuple[Owners, ...]
    missing: Any = None

    @property
    def gone(self) -> bool:
        return any(link.gone for link in self.links)


@dataclass
class RanksAsked:
    """What all of a model's layers share: the map, which is only exchanged between two passes, and a number for each
    call."""

    map: RanksMap | None = None  # before the first pass
    calls: int = 0
    turns: dict[int, int] = field(default_factory=dict)

    def next_turn(self, layer: int) -> int:
        turn = self.turns[layer] = self.turns.get(layer, -1) + 1
        return turn

    def collect(self, number: int, asked: Mapping[int, Link], take: Callable[[int, Link], None]) -> None:
        """Take the answers of all that were asked in the order in which they come. RankLostError as soon as one has
        gone; what a rank could not compute is raised when all have answered."""
        left = {link.sock.fileno(): (rank, link) for rank, link in asked.items()}
        poll, failed = select.poll(), None
        for number_of in left:
            poll.register(number_of, select.POLLIN)
        while left:
            ready = poll.poll(0)
            if not ready:
                began = time.perf_counter()
                ready = poll.poll()
                waited = time.perf_counter() - began
                for _, link in left.values():
                    link.waited += waited
            for number_of, _ in ready:
                rank, link = left.pop(number_of)
                poll.unregister(number_of)
                try:
                    take(rank, link)
                except LinkError as error:
                    raise RankLostError(str(error)) from None
                except HandfulError as error:
                    failed = error
        if failed is not None:
            raise failed


class RemoteExperts(nn.Module):
    """E feed-forward networks on ranks: (x_TD, routing) -> y_TD, as `Experts`, without gradients.

    backend   as of `OffloadedExperts`, whose bits these are; the ranks' must be the same.

    RankLostError where a rank goes meanwhile. One thread at a time may call the modules of one `RanksAsked`.
    """

    def __init__(
        self, ranks: RanksAsked, layer: int, layout: Layout, *, activation: str, backend: str = "auto"
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.ranks = ranks
        self.layer = layer
        self.count = layout.experts
        self.layout = layout
        self.activation = activation
        self.backend = backend
        self.width = next(field.shape[0] for field in layout.fields if field.name == "down")

    @no_compile
    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return self.begin(x_TD, routing)()

    def begin(self, x_TD: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """Send the tokens on their way; what is returned waits for their rows, and gives the output."""
        check_fits(x_TD, routing, self.count, self.width)
        if torch.is_grad_enabled() and (x_TD.requires_grad or routing.weights_TK.requires_grad):
            raise HandfulError(
                "experts on ranks give no gradient: run the model under torch.no_grad() or torch.inference_mode()"
            )
        ranks, current = self.ranks, self.ranks.map
        if current is None:
            raise RankLostError("ranks: none is there yet")
        ranks.calls += 1
        number, plan, T, D = ranks.calls, routing.plan(), *x_TD.shape
        # A row of our kernels has the same bits whatever rows are beside it; of torch's products it has not.
        split = self._uses_kernels(x_TD.dtype, compute_dtype(x_TD))
        turn = ranks.next_turn(self.layer)
        rank_N = current.layers[self.layer].of(plan.counts_E.numpy(), turn, split=split)
        rank_TK = np.full(routing.experts_TK.shape, -1, np.int64)
        rank_TK.reshape(-1)[plan.order_N.numpy()] = rank_N
        experts_TK = routing.experts_TK.numpy().astype(np.int32)
        places: dict[int, Ints] = {}  # of each rank's rows among all
        try:
            for rank in np.unique(rank_N).tolist():
                own_TK = rank_TK == rank
                tokens = np.flatnonzero(own_TK.any(1))
                own_x = x_TD if len(tokens) == T else x_TD[torch.from_numpy(tokens)]
                chosen = np.where(own_TK[tokens], experts_TK[tokens], np.int32(-1))
                current.links[rank].ask(number, self.layer, T, own_x, np.ascontiguousarray(chosen))
                places[rank] = np.flatnonzero(rank_N == rank)
        except LinkError as error:
            raise RankLostError(str(error)) from None

        def finish() -> Tensor:
            rows: list[Tensor] = []

            def take(rank: int, link: Link) -> None:
                found = link.answer(number, len(places[rank]), D)
                if not rows:
                    rows.append(torch.empty(len(rank_N), D, dtype=found.dtype))
                rows[0][torch.from_numpy(places[rank])] = found

            ranks.collect(number, {rank: current.links[rank] for rank in places}, take)
            return self._sum(rows[0] if rows else x_TD.new_empty(0, D), x_TD, routing)

        return finish

    def _sum(self, rows_ND: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
        dtype = compute_dtype(x_TD)
        if self._uses_kernels(x_TD.dtype, dtype):
            return native_sum(rows_ND.float(), routing, dtype)
        return reference_sum(rows_ND, routing, dtype)

    def _uses_kernels(self, *dtypes: torch.dtype) -> bool:
        """As the ranks decide it."""
        held = () if self.layout.bits else (FLOATS[self.layout.dtype],)
        fits = all(dtype in DTYPES for dtype in (*dtypes, *held))
        return self.backend == "native" or (self.backend == "auto" and available() and fits)

    def extra_repr(self) -> str:
        return f"{self.count} experts, {self.layout.format}, activation={self.activation}, backend={self.backend}"
