"""Experts on other ranks: tokens travel to those that hold their experts, and rows come back: (x_TD, routing) -> y_TD.

    x_TD ─► to each rank that has some of a token's experts, once ─► its experts' rows ─┐
    y_TD ◄─ weighted and summed at home, in the routing's order ◄─ a row an assignment ◄┘

An expert's row depends on the expert and the token alone, and rows are summed at home as in one process: so no bit of
the output depends on how many ranks there are or on which expert is where. Attention and routers are each rank's own.

With `two_level` a token crosses to another host once, to the rank there that has its home's place in the host, which
hands it on; rows come back by the same way.

Legend: T tokens of this rank · M tokens that came here · N assignments · K experts per token · E experts · D width
· R ranks · S places of experts on all ranks · C copies of an expert
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from handful.errors import ConfigError
from handful.experts.layer import Experts
from handful.experts.native import native_rows, native_rows_with_gradients, native_sum, uses_native
from handful.experts.no_compile import no_compile
from handful.experts.offload import OffloadedExperts
from handful.experts.quantized import QuantizedExperts
from handful.experts.reference import reference_sum
from handful.experts.weights import ExpertWeights, check_fits, compute_dtype
from handful.quantize import Packed
from handful.ranks import Ranks
from handful.routing import Routing

__all__ = ["Layout", "ParallelExperts", "dealt"]


def dealt(experts: int, ranks: int) -> list[list[int]]:
    """Experts dealt to the ranks in order, as evenly as can be, without copies."""
    return [list(range(experts * rank // ranks, experts * (rank + 1) // ranks)) for rank in range(ranks)]


class Layout:
    """Which rank has which of a layer's experts, and which copy is asked.

    held    the experts of every rank, each at most once on one.
    shares  of each of them, the share of its expert's tokens that this copy is asked for; None: equal ones.

    `primary` is the first rank that has each expert: whose copy is saved, and counted.

    ConfigError where an expert is nowhere, or twice on one rank.
    """

    def __init__(
        self, experts: int, held: Sequence[Sequence[int]], shares: Sequence[Sequence[float]] | None = None
    ) -> None:
        self.experts, self.held = experts, [list(own) for own in held]
        for rank, own in enumerate(self.held):
            wrong = [e for e in own if not 0 <= e < experts]
            if wrong or len(set(own)) < len(own):
                what = f"has expert {wrong[0]}: there are {experts}" if wrong else "has an expert twice"
                raise ConfigError(f"placement: rank {rank} {what}")
        places: list[list[int]] = [[] for _ in range(experts)]
        for place, expert in enumerate(e for own in self.held for e in own):
            places[expert].append(place)
        nowhere = [e for e, own in enumerate(places) if not own]
        if nowhere:
            raise ConfigError(f"placement: expert {nowhere[0]} is on no rank")
        self.expert_S = torch.tensor([e for own in self.held for e in own])
        self.rank_S = torch.tensor([rank for rank, own in enumerate(self.held) for _ in own])
        self.copies_E = torch.tensor([len(own) for own in places])
        self.primary = [int(self.rank_S[own[0]]) for own in places]
        self.place_EC = nn.utils.rnn.pad_sequence([torch.tensor(own) for own in places], True, -1)
        flat = [1.0] * len(self.expert_S) if shares is None else [float(share) for own in shares for share in own]
        share_S = torch.tensor(flat, dtype=torch.float64)
        if len(share_S) != len(self.expert_S) or bool((share_S < 0).any()):
            raise ConfigError("shares: one from 0 for each expert of each rank")
        share_EC = nn.utils.rnn.pad_sequence([share_S[own] for own in places], True)
        nobody = (share_EC.sum(1) == 0).nonzero().flatten().tolist()
        if nobody:
            raise ConfigError(f"shares: those of expert {nobody[0]} are all 0")
        self.until_EC = (share_EC / share_EC.sum(1, keepdim=True)).cumsum(1)

    def places(self, routing: Routing) -> Tensor:
        """Where each assignment is computed, (T, K) int32; -1 where it was dropped. The tokens of an expert with copies
        are split in runs by their shares: a rank asks each copy for its share of the rank's own tokens."""
        plan = routing.plan()
        expert_N = routing.experts_TK.flatten()[plan.order_N]
        copy_N = torch.zeros_like(expert_N)
        if self.place_EC.shape[1] > 1:
            counts_N = plan.counts_E[expert_N]
            number_N = torch.arange(len(expert_N)) - (plan.offsets_E[expert_N] - counts_N)
            part_N = (number_N + 0.5) / counts_N.double()
            copy_N = (part_N.unsqueeze(1) >= self.until_EC[expert_N]).sum(1).minimum(self.copies_E[expert_N] - 1)
        place_TK = torch.full((routing.tokens * routing.top_k,), -1, dtype=torch.int32)
        place_TK[plan.order_N] = self.place_EC[expert_N, copy_N].int()
        return place_TK.view(routing.tokens, routing.top_k)


# ---------------------------------------------------------------------------------------------------------------------
# Travelling.


@dataclass(frozen=True, eq=False)
class Hop:
    """One exchange of rows: which are sent, those to rank 0 first, and in what order those are put that came."""

    ranks: Ranks
    from_N: Tensor
    sent: list[int]
    received: list[int]
    order_M: Tensor | None = None

    def start(self, *rows: Tensor) -> Callable[[], list[Tensor]]:
        """Send rows of several tensors, side by side; what is returned waits for those that come."""
        parts = [_as_bytes(part[self.from_N]) for part in rows]
        bytes_NX = torch.cat(parts, 1)
        self.ranks.sends(self.sent, bytes_NX.shape[1])
        wait = self.ranks.exchange(bytes_NX, self.sent, self.received)

        def arrived() -> list[Tensor]:
            came_MX = wait()
            if self.order_M is not None:
                came_MX = came_MX[self.order_M]
            came = came_MX.split([part.shape[1] for part in parts], 1)
            return [_from_bytes(bytes_MX, part) for bytes_MX, part in zip(came, rows, strict=True)]

        return arrived

    def back(self, grad_MD: Tensor, count: int) -> Tensor:
        """The gradient of `count` rows that these were taken from."""
        if self.order_M is not None:
            grad_MD = torch.empty_like(grad_MD).index_copy_(0, self.order_M, grad_MD)
        bytes_MX = _as_bytes(grad_MD)
        self.ranks.sends(self.received, bytes_MX.shape[1])
        grad_ND = _from_bytes(self.ranks.exchange(bytes_MX, self.received, self.sent)(), grad_MD)
        return grad_ND.new_zeros(count, *grad_ND.shape[1:]).index_add_(0, self.from_N, grad_ND)


def _as_bytes(rows: Tensor) -> Tensor:
    """Rows as bytes, which gloo sends whatever they are."""
    return rows.detach().contiguous().flatten(1).view(torch.uint8)


def _from_bytes(bytes_MX: Tensor, like: Tensor) -> Tensor:
    """Rows like those that they were sent as. A view of bytes begins where it may."""
    own_MX = bytes_MX.clone(memory_format=torch.contiguous_format)
    return own_MX.view(like.dtype).view(len(bytes_MX), *like.shape[1:])


class Clock:
    """How long this rank's experts computed, forward and backward: the others wait for the slowest."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        if self._began is not None:
            self.seconds += time.perf_counter() - self._began
        self._began = None


class _Travel(Function):
    """Rows through a hop, which brought `came`. Gradients go back by the same way: torch's collectives lose them.

    inner   the experts are behind it in a backward pass.
    """

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, hop: Hop, came_MD: Tensor, clock: Clock, inner: bool) -> Tensor:
        ctx.hop, ctx.count, ctx.clock, ctx.inner = hop, len(rows_ND), clock, inner
        return came_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None, None]:
        # In a backward pass the experts compute between the last hop of rows and the first of tokens.
        ctx.clock.stop()
        grad_ND = ctx.hop.back(grad_MD.contiguous(), ctx.count)
        if ctx.inner:
            ctx.clock.start()
        return grad_ND, None, None, None, None


class _Sum(Function):
    """Rows weighted and summed, with the bits of one process."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, weights_TK: Tensor, routing: Routing, dtype: torch.dtype, native: bool
    ) -> Tensor:
        ctx.save_for_backward(rows_ND, weights_TK)
        ctx.routing = routing
        return (native_sum if native else reference_sum)(rows_ND, routing, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows_ND, weights_TK = ctx.saved_tensors
        plan = ctx.routing.plan()
        grad_ND = grad_TD[plan.token_N].to(torch.promote_types(rows_ND.dtype, weights_TK.dtype))
        grad_weights_TK = torch.zeros_like(weights_TK).flatten()
        grad_weights_TK[plan.order_N] = (grad_ND * rows_ND).sum(1).to(weights_TK.dtype)
        weights_N1 = weights_TK.flatten()[plan.order_N].unsqueeze(1)
        return (grad_ND * weights_N1).to(rows_ND.dtype), grad_weights_TK.view_as(weights_TK), None, None, None


class ParallelExperts(nn.Module):
    """E experts, of which this rank holds some: (x_TD, routing) -> y_TD, as the experts that it is made of.

    experts   all E, of which those of this rank are taken; or offloaded ones, whose disk has all.
    layout    who has which.
    ranks     who they are. All must call it, each with its own tokens, of which it may have none.

    `native` experts give the bits that they give in one process for the tokens of all ranks together. Others do where
    no expert has copies, and else up to rounding: torch's products depend on how many tokens pass together.
    Gradients are those of one process up to rounding; a copy's are of its own tokens alone (`handful.train_ranks`).
    """

    def __init__(self, experts: nn.Module, layout: Layout, ranks: Ranks) -> None:
        super().__init__()
        if len(layout.held) != ranks.size:
            raise ConfigError(f"placement: of {len(layout.held)} ranks; there are {ranks.size}")
        self.layout, self.ranks, self.clock = layout, ranks, Clock()
        self.numbers = layout.held[ranks.rank]
        self.local = _taken(experts, self.numbers)
        self.backend = str(experts.backend)
        self.width = _width(experts)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return self.begin(x_TD, routing)()

    @no_compile
    def begin(self, x_TD: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """Send the tokens off; what is returned waits for those of others, computes, and gives y."""
        check_fits(x_TD, routing, self.layout.experts, self.width)
        way = _Way(self.layout, self.ranks, x_TD, routing)
        return lambda: self._finish(way, x_TD, routing)

    def _finish(self, way: _Way, x_TD: Tensor, routing: Routing) -> Tensor:
        dtype = compute_dtype(x_TD)
        x_MD, here = way.there(x_TD, self.clock)
        self.clock.start()
        rows_ND = self._rows(x_MD, here, way.tokens)
        self.clock.stop()
        rows_ND = way.home(rows_ND, here, self.clock)
        native = uses_native(self.backend, x_TD, _weights(self.local))
        y_TD: Tensor = _Sum.apply(rows_ND, routing.weights_TK, routing, dtype if native else x_TD.dtype, native)  # type: ignore[no-untyped-call]
        return y_TD

    def _rows(self, x_MD: Tensor, here: Routing, tokens: int) -> Tensor:
        """A row for each assignment that is computed here, by expert, earlier tokens first."""
        local, plan = self.local, here.plan()
        native = uses_native(self.backend, x_MD, _weights(local))
        grads = torch.is_grad_enabled() and (x_MD.requires_grad or any(p.requires_grad for p in local.parameters()))
        if not self.numbers:
            return x_MD[plan.token_N].float() if native else x_MD[plan.token_N]
        if isinstance(local, OffloadedExperts):
            return local.rows(x_MD, here, tokens)
        if native and not grads:
            place_of = {e: place for place, e in enumerate(self.numbers)}
            weights = _weights(local)
            return native_rows(x_MD, here, weights, lambda chosen, _: [[(e, place_of[e]) for e in chosen]], tokens)
        # One expert for each row: with gradients, and for torch's backends.
        place_E = torch.full((self.layout.experts,), -1)
        place_E[self.numbers] = torch.arange(len(self.numbers))
        place_N = place_E[here.experts_TK.flatten()[plan.order_N]]
        x_ND, one = x_MD[plan.token_N], _one_each(place_N, len(self.numbers), x_MD)
        if native:
            return native_rows_with_gradients(x_ND, one, _weights(local))
        rows_ND: Tensor = local(x_ND, one)
        return rows_ND

    def extra_repr(self) -> str:
        return f"{len(self.numbers)} of {self.layout.experts} experts, rank {self.ranks.rank} of {self.ranks.size}"


def _one_each(expert_N: Tensor, count: int, like: Tensor) -> Routing:
    """A routing of rows that each go to one expert, with weight 1."""
    scores = torch.zeros((), dtype=torch.float32).expand(len(expert_N), count)
    weights_N1 = torch.ones(len(expert_N), 1, dtype=torch.promote_types(like.dtype, torch.float32))
    return Routing(scores, scores, expert_N.unsqueeze(1), weights_N1)


def _taken(experts: nn.Module, numbers: Sequence[int]) -> nn.Module:
    """A module of some of a module's experts."""
    if isinstance(experts, OffloadedExperts):
        return experts
    index = torch.tensor(list(numbers), dtype=torch.int64)
    if isinstance(experts, QuantizedExperts):

        def some(packed: Packed) -> Packed:
            return replace(packed, codes=packed.codes[index], scales=packed.scales[index])

        biases = [None if b is None else b[index] for b in (experts.gate_up_bias, experts.down_bias)]
        return QuantizedExperts(
            some(experts.gate_up.value), some(experts.down.value), activation=experts.activation,
            gate_up_bias=biases[0], down_bias=biases[1], backend=experts.backend,
        ).train(experts.training)  # fmt: skip
    if not isinstance(experts, Experts):
        raise ConfigError(f"experts of {type(experts).__name__}: cannot be spread over ranks")
    for name, whole in list(experts.named_parameters(recurse=False)):
        part = nn.Parameter(whole.detach()[index.to(whole.device)].clone(), requires_grad=whole.requires_grad)
        setattr(experts, name, part)
    experts.count = len(numbers)
    return experts


def _weights(local: nn.Module) -> ExpertWeights:
    found = local.slots if isinstance(local, OffloadedExperts) else local.weights
    assert isinstance(found, ExpertWeights)
    return found


def _width(experts: nn.Module) -> int:
    return experts.width if isinstance(experts, OffloadedExperts) else _weights(experts).width


# ---------------------------------------------------------------------------------------------------------------------
# The way of one call's tokens and rows.


class _Way:
    """There and back for one call's tokens. `tokens`: of all ranks together."""

    def __init__(self, layout: Layout, ranks: Ranks, x_TD: Tensor, routing: Routing) -> None:
        self.layout, self.ranks = layout, ranks
        self.two_level = ranks.two_level and len(set(ranks.hosts)) > 1
        self.place_TK = layout.places(routing)
        plan = routing.plan()
        self.rank_N = self._rank_of(self.place_TK.flatten()[plan.order_N])  # of the sorted assignments
        to_TR = self._goes_to(self.place_TK)
        if self.two_level:
            to_TR = self._by_gateway(to_TR)
        self.first, self.tokens = self._hop(to_TR, routing.tokens)
        where_TK = self.place_TK
        if self.two_level:
            where_TK = torch.cat([where_TK, torch.full((routing.tokens, 1), ranks.rank, dtype=torch.int32)], 1)
        self.arrived = self.first.start(x_TD, where_TK)

    def there(self, x_TD: Tensor, clock: Clock) -> tuple[Tensor, Routing]:
        """The tokens that came to this rank, and which of its experts each is for."""
        came = self.arrived()
        x_MD, where_M = _moved(x_TD, self.first, came, clock, inner=False), came[1]
        if not self.two_level:  # they come from their homes
            homes_M = torch.arange(self.ranks.size).repeat_interleave(torch.tensor(self.first.received))
            where_M = torch.cat([where_M, homes_M.int().unsqueeze(1)], 1)
        self.passed_M = where_M  # the places and homes of what came here, to stay or to be handed on
        if self.two_level:
            to_MR = self._goes_to(where_M[:, :-1])
            here_R = torch.tensor(self.ranks.hosts) == self.ranks.hosts[self.ranks.rank]
            second, _ = self._hop(to_MR & here_R, 0)
            came = second.start(x_MD, where_M)()
            # In the order of their homes, as if they had come straight.
            order_M = came[1][:, -1].argsort(stable=True)
            came = [part[order_M] for part in came]
            x_MD, where_M = _moved(x_MD, replace(second, order_M=order_M), came, clock, inner=False), came[1]
        self.home_M = where_M[:, -1].long()
        place_MK = where_M[:, :-1].long()
        mine_MK = (place_MK >= 0) & (self._rank_of(place_MK) == self.ranks.rank)
        experts_MK = self.layout.expert_S[place_MK.clamp_min(0)].masked_fill(~mine_MK, 0)
        scores = torch.zeros(()).expand(len(experts_MK), self.layout.experts)
        return x_MD, Routing(scores, scores, experts_MK, torch.ones(experts_MK.shape), ~mine_MK)

    def home(self, rows_ND: Tensor, here: Routing, clock: Clock) -> Tensor:
        """The rows of this rank's own tokens, sorted as its routing has them."""
        size, rank = self.ranks.size, self.ranks.rank
        home_N = self.home_M[here.plan().token_N]
        if self.two_level:
            # To the gateways, and from there home; by home, and by the rank that computed.
            gateway_R = torch.tensor([self._gateway(home, self.ranks.hosts[rank]) for home in range(size)])
            from_N = (gateway_R[home_N] * size + home_N).argsort(stable=True)
            sent = _bincount(gateway_R[home_N], size)
            place_MK = self.passed_M[:, :-1]
            rank_MK = self._rank_of(place_MK)
            home_MK = self.passed_M[:, -1:].long().expand_as(place_MK)
            there_MK = (place_MK >= 0) & (torch.tensor(self.ranks.hosts)[rank_MK] == self.ranks.hosts[rank])
            # What comes: of each rank of this host the rows of one home after the other.
            key = (rank_MK * size + home_MK)[there_MK].sort().values
            hop = Hop(self.ranks, from_N, sent, _bincount(key // size, size))
            rows_ND = _moved(rows_ND, hop, hop.start(rows_ND)(), clock, inner=True)
            home_N = key % size
        from_N, sent = home_N.argsort(stable=True), _bincount(home_N, size)
        order_N = self.rank_N.argsort(stable=True)
        order_N = torch.empty_like(order_N).index_copy_(0, order_N, torch.arange(len(order_N)))
        by_rank = self.rank_N
        if self.two_level:
            hosts = [self._gateway(rank, self.ranks.hosts[r]) for r in range(size)]
            by_rank = torch.tensor(hosts)[self.rank_N]
        hop = Hop(self.ranks, from_N, sent, _bincount(by_rank, size), order_N)
        return _moved(rows_ND, hop, hop.start(rows_ND)(), clock, inner=True)

    def _rank_of(self, place: Tensor) -> Tensor:
        return self.layout.rank_S[place.long().clamp_min(0)]

    def _goes_to(self, place_TK: Tensor) -> Tensor:
        """(T, R): whether some of a token's experts are on a rank."""
        rank_TK = self._rank_of(place_TK).masked_fill(place_TK < 0, self.ranks.size)
        to = torch.zeros(len(place_TK), self.ranks.size + 1, dtype=torch.bool)
        return to.scatter_(1, rank_TK, True)[:, :-1]

    def _gateway(self, home: int, host: int) -> int:
        """The rank of a host that hands on what comes from a rank, and takes back what goes to it."""
        hosts = self.ranks.hosts
        there = [rank for rank, other in enumerate(hosts) if other == host]
        return there[(home - hosts.index(hosts[home])) % len(there)]

    def _by_gateway(self, to_TR: Tensor) -> Tensor:
        found = torch.zeros_like(to_TR)
        for host in set(self.ranks.hosts):
            there_R = torch.tensor(self.ranks.hosts) == host
            found[:, self._gateway(self.ranks.rank, host)] = (to_TR & there_R).any(1)
        return found

    def _hop(self, to_TR: Tensor, tokens: int) -> tuple[Hop, int]:
        """A hop of tokens to ranks, and how many all ranks have together, of which this one has `tokens`."""
        sent_R = to_TR.sum(0)
        received_RX = self.ranks.counts(torch.stack([sent_R, torch.full_like(sent_R, tokens)], 1))
        from_N = to_TR.t().nonzero()[:, 1]
        return Hop(self.ranks, from_N, sent_R.tolist(), received_RX[:, 0].tolist()), int(received_RX[:, 1].sum())


def _moved(rows: Tensor, hop: Hop, came: list[Tensor], clock: Clock, *, inner: bool) -> Tensor:
    found: Tensor = _Travel.apply(rows, hop, came[0], clock, inner)  # type: ignore[no-untyped-call]
    return found


def _bincount(values: Tensor, size: int) -> list[int]:
    found: list[int] = values.bincount(minlength=size).tolist()
    return found
