"""Experts on several ranks give what one process gives: the same bits, and the same gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import F64, Case, case, distance
from gang import MOST, Gang
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_made import packed
from torch import Tensor

from handful.errors import ConfigError
from handful.experts import Experts
from handful.experts.expert_file import PackFile
from handful.experts.offload import OffloadedExperts
from handful.experts.parallel import Layout, ParallelExperts, dealt
from handful.experts.quantized import QuantizedExperts
from handful.experts.store import Store
from handful.kernels.extension import available
from handful.placement import Topology, exchange
from handful.ranks import ALONE, Ranks

needs_kernels = pytest.mark.skipif(not available(), reason="no kernels here")


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    made = Gang()
    yield made
    made.close()


def twin(of: Case, backend: str, dtype: torch.dtype) -> Experts:
    found = copy.deepcopy(of.experts).to(dtype)
    found.backend = backend
    return found


def layer(
    ranks: Ranks, of: Case, experts: Any, cuts: Sequence[int], held: Any, shares: Any, dtype: torch.dtype, learn: bool
) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """One rank's part of a pass: its tokens are those between two cuts."""
    first, end = cuts[ranks.rank], cuts[ranks.rank + 1]
    module = ParallelExperts(experts, Layout(of.routing.experts, held, shares), ranks)
    mine = of.routing.rows(first, end)
    x_TD = of.x_TD[first:end].to(dtype)
    weights_TK = mine.weights_TK.to(torch.promote_types(dtype, torch.float32))
    ranks.sent_R[:] = [0] * ranks.size
    if not learn:
        with torch.no_grad():
            return module(x_TD, replace(mine, weights_TK=weights_TK)), {}, list(ranks.sent_R)
    x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    y_TD = module(x_TD, replace(mine, weights_TK=weights_TK))
    y_TD.backward(of.up_TD[first:end].to(y_TD.dtype))
    assert x_TD.grad is not None
    assert weights_TK.grad is not None
    gradients = {"x": x_TD.grad, "weights": weights_TK.grad}
    for name, parameter in module.local.named_parameters():
        gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return y_TD.detach(), gradients, list(ranks.sent_R)


def alone(of: Case, experts: Any, dtype: torch.dtype, learn: bool) -> tuple[Tensor, dict[str, Tensor]]:
    x_TD = of.x_TD.to(dtype).clone().requires_grad_(learn)
    weights_TK = of.routing.weights_TK.to(torch.promote_types(dtype, torch.float32)).clone().requires_grad_(learn)
    with torch.set_grad_enabled(learn):
        y_TD = experts(x_TD, replace(of.routing, weights_TK=weights_TK))
    if not learn:
        return y_TD, {}
    y_TD.backward(of.up_TD.to(y_TD.dtype))
    found = {"x": x_TD, "weights": weights_TK, **dict(experts.named_parameters())}
    return y_TD.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in found.items()}


def together(gradients: list[dict[str, Tensor]], held: list[list[int]], experts: int) -> dict[str, Tensor]:
    """The gradients of all ranks as one process has them; those of copies are added."""
    found = {name: torch.cat([own[name] for own in gradients]) for name in ("x", "weights")}
    for name in gradients[0].keys() - found.keys():
        shape = next(own[name].shape[1:] for own in gradients)
        whole = torch.zeros(experts, *shape, dtype=gradients[0][name].dtype)
        for own, numbers in zip(gradients, held, strict=True):
            whole[numbers] += own[name]
        found[name] = whole
    return found


def cuts_of(tokens: int, size: int, draw: Any) -> list[int]:
    inner = sorted(draw(st.lists(st.integers(0, tokens), min_size=size - 1, max_size=size - 1)))
    return [0, *inner, tokens]


@st.composite
def spread(draw: st.DrawFn) -> dict[str, Any]:
    """A layer, its tokens cut among ranks, its experts placed on them with copies."""
    E, size = draw(st.integers(1, 9)), draw(st.integers(1, MOST))
    T = draw(st.sampled_from([0, 1, 3, 20, 70]))
    of = case(
        T, E, draw(st.integers(1, min(E, 4))), draw(st.integers(1, 40)), draw(st.integers(1, 20)),
        load=draw(st.sampled_from(["even", "skewed", "one"])), drop=draw(st.sampled_from([0.0, 0.3, 1.0])),
        bias=draw(st.booleans()), seed=draw(st.integers(0, 10**6)),
    )  # fmt: skip
    held: list[list[int]] = [[] for _ in range(size)]
    for e in range(E):
        for rank in draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=draw(st.sampled_from([1, size])))):
            held[rank].append(e)
    shares = None
    if draw(st.booleans()):
        shares = [[draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in own] for own in held]
        for e in range(E):
            asked = [(rank, own.index(e)) for rank, own in enumerate(held) if e in own]
            if not any(shares[rank][i] for rank, i in asked):
                shares[asked[-1][0]][asked[-1][1]] = 1.0
    hosts = sorted(draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)))
    return {
        "of": of, "size": size, "cuts": cuts_of(T, size, draw), "held": held, "shares": shares, "hosts": hosts,
        "two_level": draw(st.booleans()),
    }  # fmt: skip


def run(gang: Gang, spread: dict[str, Any], experts: Any, dtype: torch.dtype, learn: bool) -> list[Any]:
    arguments = (spread["of"], experts, spread["cuts"], spread["held"], spread["shares"], dtype, learn)
    found: list[Any] = gang.run(
        layer, *arguments, size=spread["size"], hosts=spread["hosts"], two_level=spread["two_level"]
    )
    return found


# ---------------------------------------------------------------------------------------------------------------------


@needs_kernels
@settings(max_examples=60)
@given(spread(), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_bits_are_those_of_one_process(gang: Gang, spread: dict[str, Any], dtype: torch.dtype, learn: bool) -> None:
    """Whatever the ranks, their tokens, the placement, its copies and the way."""
    experts = twin(spread["of"], "native", dtype)
    want, _ = alone(spread["of"], copy.deepcopy(experts), dtype, learn)
    found = run(gang, spread, experts, dtype, learn)
    assert torch.equal(torch.cat([y for y, _, _ in found]), want)


@needs_kernels
@settings(max_examples=20)
@given(spread(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([8, 4]))
def test_quantized_bits_are_those_of_one_process(
    gang: Gang, spread: dict[str, Any], dtype: torch.dtype, bits: int
) -> None:
    packed = QuantizedExperts.pack(twin(spread["of"], "native", dtype), bits)
    want, _ = alone(spread["of"], packed, dtype, learn=False)
    found = run(gang, spread, packed, dtype, learn=False)
    assert torch.equal(torch.cat([y for y, _, _ in found]), want)


def from_disk(
    ranks: Ranks, of: Case, path: Path, cuts: Sequence[int], held: Any, dtype: torch.dtype, slots: int
) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """`layer` whose ranks read their experts from a pack, into so few slots."""
    file = PackFile(path)
    K = of.routing.top_k
    with Store(file, max(slots, K) * file.layout.record_bytes, top_k=K, read_ahead=False) as store:
        experts = OffloadedExperts(store, 0, activation=of.experts.activation)
        return layer(ranks, of, experts, cuts, held, None, dtype, learn=False)


@needs_kernels
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_bits_are_those_of_one_process(gang: Gang, tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    of = case(50, 6, 3, 64, 32, load="skewed", drop=0.2, bias=True)
    experts = twin(of, "native", dtype)
    packed(tmp_path / "experts.pack", [experts], bits)
    want, _ = alone(of, QuantizedExperts.pack(experts, bits) if bits else experts, dtype, learn=False)
    held = [[0, 1, 5], [2], [1, 3, 4]]
    found = gang.run(from_disk, of, tmp_path / "experts.pack", [0, 20, 20, 50], held, dtype, 2, size=3)
    assert torch.equal(torch.cat([y for y, _, _ in found]), want)


@settings(max_examples=60)
@given(spread(), st.sampled_from(["reference", "grouped", "native"]))
def test_every_gradient_is_that_of_one_process(gang: Gang, spread: dict[str, Any], backend: str) -> None:
    if backend == "native" and not available():
        return
    dtype = torch.float32 if backend == "native" else F64
    want, gradients = alone(spread["of"], twin(spread["of"], "reference", F64), F64, learn=True)
    found = run(gang, spread, twin(spread["of"], backend, dtype), dtype, learn=True)
    bound = 1e-12 if dtype == F64 else 2e-5
    assert distance(torch.cat([y for y, _, _ in found]), want) <= bound
    own = together([g for _, g, _ in found], spread["held"], spread["of"].routing.experts)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert distance(own[name], gradient) <= bound, name


def test_reference_bits_without_copies(gang: Gang) -> None:
    of = case(40, 6, 2, 8, 5, load="skewed")
    want, _ = alone(of, twin(of, "reference", F64), F64, learn=False)
    held = [[4, 0], [], [1, 2, 3, 5]]
    found = gang.run(layer, of, twin(of, "reference", F64), [0, 7, 30, 40], held, None, F64, False, size=3)
    assert torch.equal(torch.cat([y for y, _, _ in found]), want)


# ---------------------------------------------------------------------------------------------------------------------
# What travels.


def test_bytes_by_hand(gang: Gang) -> None:
    """Two tokens on rank 0: one with both experts on rank 1, one with one of them."""
    of = case(2, 3, 2, 4, 3)
    of.routing = replace(of.routing, experts_TK=torch.tensor([[1, 2], [0, 1]]))
    args = (of, twin(of, "reference", F64), [0, 2, 2], [[0], [1, 2]], None, F64, False)
    (_, _, there), (_, _, back) = gang.run(layer, *args, size=2)
    assert there == [0, 2 * (4 * 8 + 2 * 4)]  # each token once: its numbers, and its experts' places
    assert back == [3 * 4 * 8, 0]  # a row for each assignment


def test_a_token_crosses_to_a_host_once(gang: Gang) -> None:
    """Four experts on the two ranks of another host: one crossing, where without two levels there are two."""
    of = case(6, 4, 4, 5, 3)
    args = (of, twin(of, "reference", F64), [0, 6, 6, 6, 6], [[], [], [0, 1], [2, 3]], None, F64, False)
    straight = gang.run(layer, *args, size=4, hosts=[0, 0, 1, 1])
    row = 5 * 8 + 4 * 4
    assert straight[0][2] == [0, 0, 6 * row, 6 * row]
    row += 4  # where it is from
    handed = gang.run(layer, *args, size=4, hosts=[0, 0, 1, 1], two_level=True)
    assert handed[0][2] == [0, 0, 6 * row, 0]
    assert handed[2][2][3] == 6 * row  # on to the other rank of its host
    assert torch.equal(handed[0][0], straight[0][0])


@settings(max_examples=25)
@given(spread(), st.booleans())
def test_what_travels_is_what_is_counted_before(gang: Gang, spread: dict[str, Any], learn: bool) -> None:
    """`handful.placement.exchange`, link by link, to the byte; forward and backward."""
    of, size = spread["of"], spread["size"]
    found = run(gang, spread, twin(of, "reference", torch.float32), torch.float32, learn)
    layout = Layout(of.routing.experts, spread["held"], spread["shares"])
    parts = [of.routing.rows(first, end) for first, end in itertools.pairwise(spread["cuts"])]
    rank_TK = torch.cat([layout.rank_S[layout.places(part).long().clamp_min(0)] for part in parts])
    home_T = torch.arange(size).repeat_interleave(torch.tensor(spread["cuts"]).diff())
    hosts = [sorted(set(spread["hosts"])).index(host) for host in spread["hosts"]]
    levels = 2 if spread["two_level"] and len(set(hosts)) > 1 else 1
    counted = exchange(
        rank_TK, home_T, Topology(nodes=tuple(hosts), slots=(1,) * size), levels=levels,
        dropped_TK=~of.routing.computed_TK,
    )  # fmt: skip
    D = of.x_TD.shape[1]
    want = counted.forward(D, 4) + (counted.backward(D, 4) if learn else 0)
    assert [sent for _, _, sent in found] == want.tolist()


def test_shares_decide_which_copy_computes() -> None:
    layout = Layout(2, [[0, 1], [0], [0]], [[0.5, 1.0], [0.25], [0.25]])
    of = case(40, 2, 1, 3, 3)
    routing = replace(of.routing, experts_TK=torch.zeros(40, 1, dtype=torch.int64))
    assert layout.places(routing).flatten().bincount().tolist() == [20, 0, 10, 10]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes.


@pytest.mark.parametrize(
    ("held", "wrong"),
    [
        ([[0], [1, 3]], "rank 1 has expert 3: there are 3"),
        ([[0, 0], [1, 2]], "rank 0 has an expert twice"),
        ([[0], [1]], "expert 2 is on no rank"),
    ],
)
def test_a_placement_that_is_none(held: list[list[int]], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        Layout(3, held)


def test_a_placement_of_other_ranks() -> None:
    with pytest.raises(ConfigError, match="of 2 ranks; there are 1"):
        ParallelExperts(Experts(3, 4, 4), Layout(3, dealt(3, 2)), ALONE)


def test_dealt() -> None:
    assert dealt(7, 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert dealt(1, 3) == [[], [], [0]]
