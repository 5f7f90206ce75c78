"""Experts on ranks are the experts: the same bits whatever the placement, and an end of every wait.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import ACTIVATIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_made import packed, ranks_in_threads
from torch import nn

from handful.errors import ConfigError, HandfulError, RankLostError, RoutingError
from handful.experts import Experts
from handful.experts.expert_file import PackFile
from handful.experts.link import Link, LinkError, RefusedError, accept, greet, welcome
from handful.experts.quantized import QuantizedExperts
from handful.experts.remote import Owners, RanksAsked, RanksMap, RemoteExperts
from handful.experts.store import Store
from handful.kernels.extension import available
from handful.routing import Routing

F32, BF16 = torch.float32, torch.bfloat16
BACKEND = "native" if available() else "reference"
BACKENDS = ["native", "reference"] if available() else ["reference"]
D, F = 40, 24


def layer_of(experts: int, dtype: torch.dtype = F32, **options: Any) -> Experts:
    found = Experts(experts, D, F, **options).to(dtype)
    for bias in (found.gate_up_bias, found.down_bias):
        if bias is not None:
            nn.init.normal_(bias)
    return found


def routing_of(T: int, experts: int, top_k: int, drop: float = 0.0, taste: float = 1.0) -> Routing:
    scores_TE = torch.rand(T, experts).pow(torch.linspace(1, taste, experts))
    weights_TK, experts_TK = scores_TE.topk(top_k)
    return Routing(scores_TE, scores_TE, experts_TK, weights_TK, torch.rand(T, top_k) < drop if drop else None)


# ---------------------------------------------------------------------------------------------------------------------
# The same bits.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bits"), [(F32, 0), (BF16, 0), (F32, 8), (BF16, 8), (F32, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_ranks_give_the_bits_of_one_process(
    tmp_path: Path, dtype: torch.dtype, bits: int, bias: bool, backend: str
) -> None:
    whole = layer_of(12, dtype, bias=bias, backend=backend)
    layout = packed(tmp_path / "experts.pack", [whole], bits)
    right = QuantizedExperts.pack(whole, bits, 32) if bits else whole
    placements: list[list[list[int]]] = [
        [[0]] * 12,
        [[e % 3] for e in range(12)],
        [[0, 1, 2], [2], [1, 0], *[[e % 3, (e + 1) % 3] for e in range(3, 12)]],
    ]
    # One token, some, many on few experts (tiles) and on all, more than are computed at a time, half dropped, none.
    calls = [(torch.randn(T, D).to(dtype), routing_of(T, 12, 3, drop, taste)) for T, drop, taste in
             ((1, 0, 1), (7, 0, 4), (200, 0, 9), (900, 0, 1), (40, 0.5, 1), (0, 0, 1))]  # fmt: skip
    options: dict[str, Any] = {"top_k": 3, "activation": "swiglu", "backend": backend}
    with ranks_in_threads(tmp_path / "experts.pack", (12, 5, 3), **options) as (links, _), torch.no_grad():
        for copies in placements:
            ranks = RanksAsked(RanksMap(tuple(links), (Owners(copies),)))
            remote = RemoteExperts(ranks, 0, layout, activation="swiglu", backend=backend)
            for x_TD, routing in calls:
                assert torch.equal(remote(x_TD, routing), right(x_TD, routing))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(st.integers(1, 20))
    ranks = draw(st.integers(1, 5))
    copies = st.lists(st.integers(0, ranks - 1), min_size=1, max_size=ranks, unique=True)
    placement = [draw(copies) for _ in range(experts)]
    shares = [[draw(st.floats(0, 1)) for _ in own] for own in placement]
    top_k = draw(st.integers(1, experts))
    return {
        "experts": experts, "top_k": top_k, "ranks": ranks, "placement": placement,
        "shares": shares if draw(st.booleans()) else None,
        "tokens": draw(st.sampled_from([0, 1, 2, 5, 33, 300])), "drop": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "taste": draw(st.sampled_from([0.0, 1.0, 50.0])), "dtype": draw(st.sampled_from([F32, BF16])),
        "activation": draw(st.sampled_from(ACTIVATIONS)), "seed": draw(st.integers(0, 999)),
    }  # fmt: skip


@settings(max_examples=60)
@given(case=cases())
def test_any_placement_gives_the_same_bits(tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]) -> None:
    """All tokens to one rank, none to some, copies with shares of nothing."""
    torch.manual_seed(case["seed"])
    path = tmp_path_factory.mktemp("ranks") / "experts.pack"
    experts, top_k, activation = case["experts"], case["top_k"], case["activation"]
    whole = layer_of(experts, case["dtype"], activation=activation, backend=BACKEND)
    layout = packed(path, [whole])
    routing = routing_of(case["tokens"], experts, top_k, case["drop"], case["taste"])
    x_TD = torch.randn(case["tokens"], D).to(case["dtype"])
    slots = [min(experts, top_k + r) for r in range(case["ranks"])]
    with (
        ranks_in_threads(path, slots, top_k=top_k, activation=activation, backend=BACKEND) as (links, _),
        torch.no_grad(),
    ):
        ranks = RanksAsked(RanksMap(tuple(links), (Owners(case["placement"], case["shares"]),)))
        remote = RemoteExperts(ranks, 0, layout, activation=activation, backend=BACKEND)
        for _ in range(2):  # at the second time an expert's tokens are dealt from another copy on
            assert torch.equal(remote(x_TD, routing), whole(x_TD, routing))
    path.unlink()


def test_copies_share_as_they_are_told() -> None:
    """An expert's tokens are dealt to its copies by their shares, to within one, whatever their number."""
    owners = Owners([[0, 1], [2], [1, 2, 0]], [[0.25, 0.75], [1.0], [0.5, 0.0, 0.5]])
    for tokens in (1, 2, 7, 400):
        for turn in range(3):
            rank_N = owners.of(np.array([tokens, tokens, tokens]), turn)
            first, second, third = rank_N.reshape(3, tokens)
            assert abs((first == 1).sum() - 0.75 * tokens) <= 1
            assert (second == 2).all()
            assert abs((third == 1).sum() - 0.5 * tokens) <= 1
            assert not (third == 2).any()
    assert np.array_equal(owners.of(np.array([3, 1, 2]), 5), owners.of(np.array([3, 1, 2]), 5))
    for turn in range(9):
        assert len(set(owners.of(np.array([50, 0, 0]), turn, split=False).tolist())) == 1
    # An expert's only token, call after call.
    alone = [int(owners.of(np.array([1, 0, 0]), turn)[0]) for turn in range(100)]
    assert abs(sum(alone) - 75) <= 2
    assert len(owners.of(np.array([0, 0, 0]))) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong.


def remote_of(links: Sequence[Link], layout: Any, copies: Sequence[Sequence[int]]) -> RemoteExperts:
    ranks = RanksAsked(RanksMap(tuple(links), (Owners(copies),)))
    return RemoteExperts(ranks, 0, layout, activation="swiglu", backend=BACKEND)


def test_a_rank_that_goes_ends_the_wait(tmp_path: Path) -> None:
    """And what is still on its way of that call is no answer to the next one."""
    whole = layer_of(6, backend=BACKEND)
    layout = packed(tmp_path / "experts.pack", [whole])
    x_TD, routing = torch.randn(9, D), routing_of(9, 6, 2)
    with (
        ranks_in_threads(tmp_path / "experts.pack", (6, 6), top_k=2, activation="swiglu", backend=BACKEND) as (
            links,
            _,
        ),
        torch.no_grad(),
    ):
        ours, theirs = socket.socketpair()
        silent = Link(ours)
        remote = remote_of([*links, silent], layout, [[e % 3] for e in range(6)])
        threading.Timer(0.2, silent.close).start()
        began = time.monotonic()
        with pytest.raises(RankLostError, match="link: "):
            remote(x_TD, routing)
        assert 0.1 < time.monotonic() - began < 5
        assert remote.ranks.map is not None
        assert remote.ranks.map.gone
        assert silent.waited > 0.1
        with pytest.raises(RankLostError):  # at once
            remote(x_TD, routing)
        remote.ranks.map = RanksMap(tuple(links), (Owners([[e % 2] for e in range(6)]),))
        for _ in range(3):
            assert torch.equal(remote(x_TD, routing), whole(x_TD, routing))
        theirs.close()
        silent.release()


def test_what_a_rank_cannot_do_is_told(tmp_path: Path) -> None:
    whole = layer_of(6, backend=BACKEND)
    layout = packed(tmp_path / "experts.pack", [whole])
    x_TD, routing = torch.randn(9, D), routing_of(9, 6, 2)
    with (
        ranks_in_threads(tmp_path / "experts.pack", (3, 3), top_k=2, activation="swiglu", backend=BACKEND) as found,
        torch.no_grad(),
    ):
        links, stores = found
        remote = remote_of(links, layout, [[e % 2] for e in range(6)])
        stores[1].close()
        for _ in range(2):
            with pytest.raises(HandfulError, match=r"the store of these experts is closed"):
                remote(x_TD, routing)
        assert remote.ranks.map is not None
        assert not remote.ranks.map.gone
        remote.ranks.map = RanksMap(tuple(links), (Owners([[0]] * 6),))
        assert torch.equal(remote(x_TD, routing), whole(x_TD, routing))
        links[0].ask(99, 0, 1, torch.randn(1, D), np.array([[6, -1]], np.int32))
        with pytest.raises(HandfulError, match="call names expert 6: there are 6"):
            links[0].answer(99, 1, D)
    with pytest.raises(RoutingError):
        remote(torch.randn(9, D + 1), routing)
    grown = torch.randn(9, D, requires_grad=True)
    with pytest.raises(HandfulError, match="no gradient"):
        remote(grown, routing)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n" + bytes(100),
        bytes(100),
        b"HfL1" + bytes([1, 9]) + bytes(100),  # no such dtype
        b"HfL1" + bytes([1, 0]) + bytes(30) + b"\xff" * 60,  # as many bytes as there are none
    ],
)
def test_what_is_no_frame_ends_the_link(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours)
    theirs.sendall(said)
    with pytest.raises(LinkError):
        link.next_call(1, D)
    assert link.gone
    link.release()
    theirs.close()


def test_who_does_not_know_the_secret_is_refused() -> None:
    def meet(secret: bytes) -> tuple[list[Any], list[Any]]:
        ours, theirs = socket.socketpair()
        there: list[Any] = []

        def connect() -> None:
            try:
                greet(theirs, secret, 7)
                there.append("in")
            except RefusedError as error:
                there.append(str(error))

        thread = threading.Thread(target=connect)
        thread.start()
        here: list[Any] = []
        try:
            here.append(welcome(ours, b"right"))
            accept(ours)
        except LinkError as error:
            here.append(str(error))
        ours.close()
        thread.join(10)
        theirs.close()
        return here, there

    assert meet(b"right") == ([7], ["in"])
    here, there = meet(b"wrong")
    assert here == ["link: whoever connected does not know the secret"]
    assert there == ["token: not the secret that the other side was started with"]


# ---------------------------------------------------------------------------------------------------------------------
# Experts that a rank holds.


def test_what_is_held_stays(tmp_path: Path) -> None:
    whole = [layer_of(10, backend=BACKEND) for _ in range(2)]
    packed(tmp_path / "experts.pack", whole)
    file = PackFile(tmp_path / "experts.pack")
    with Store(file, 9 * file.layout.record_bytes, top_k=3, read_ahead=False) as store:
        assert store.holdable == 6
        held = [(0, 1), (0, 2), (1, 9), (1, 0), (0, 7)]
        store.hold(held)
        assert store.wait_held(10)

        def there() -> set[tuple[int, int]]:
            return {(i, e) for i, places in enumerate(store.places()) for e, where in enumerate(places) if where == "m"}

        assert there() == set(held)
        for layer in (0, 1, 0, 1):
            for e in range(10):
                with store.busy:
                    assert [expert for ready in store.fetch(layer, [e]) for expert, _ in ready] == [e]
        assert there() >= set(held)
        assert len(there()) == 9
        store.hold([(0, 3), (0, 7), (1, 5)])
        assert store.wait_held(10)
        for e in range(10):
            with store.busy:
                list(store.fetch(0, [e]))
        assert there() >= {(0, 3), (0, 7), (1, 5)}
        assert not there() >= set(held)
        with pytest.raises(ConfigError, match="hold: 7 experts; there is room for 6"):
            store.hold([(0, e) for e in range(7)])
        store.hold([])
        assert store.wait_held(10)
    file = PackFile(tmp_path / "experts.pack")
    with Store(file, 20 * file.layout.record_bytes, top_k=3) as store:  # all of them
        assert store.holdable == 20
        store.hold([(i, e) for i in range(2) for e in range(10)])
        assert store.wait_held(10)
        assert store.places() == ["m" * 10] * 2


def test_holding_beside_calls_changes_no_bit(tmp_path: Path) -> None:
    """One thread computes while another changes what is held, as often as it can."""
    whole = layer_of(10, backend=BACKEND)
    layout = packed(tmp_path / "experts.pack", [whole])
    calls = [(torch.randn(T, D), routing_of(T, 10, 3)) for T in (1, 4, 30) * 20]
    options: dict[str, Any] = {"top_k": 3, "activation": "swiglu", "backend": BACKEND}
    with ranks_in_threads(tmp_path / "experts.pack", (7,), **options) as (links, stores), torch.no_grad():
        remote = remote_of(links, layout, [[0]] * 10)
        done = threading.Event()
        changes = []

        def change() -> None:
            draw = np.random.default_rng(0)
            while not done.is_set():
                stores[0].hold([(0, int(e)) for e in draw.permutation(10)[: draw.integers(0, 5)]])
                if draw.random() < 0.5:
                    assert stores[0].wait_held(10)
                changes.append(1)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for x_TD, routing in calls:
                assert torch.equal(remote(x_TD, routing), whole(x_TD, routing))
        finally:
            done.set()
            thread.join(10)
        assert len(changes) > 10
        assert stores[0].wait_held(10)
