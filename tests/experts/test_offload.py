"""Offloaded experts are the experts: the same bits with any memory, whatever the disk does, and nothing left behind.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_made import packed as packed_into
from ranks_made import record_of
from torch import Tensor, nn

from handful.errors import CheckpointError, ConfigError, HandfulError, RoutingError
from handful.experts import Experts, expert_file
from handful.experts.expert_file import PAGE, Layout, PackFile, write_pack
from handful.experts.native import native_in_parts
from handful.experts.offload import OffloadedExperts
from handful.experts.quantized import QuantizedExperts
from handful.experts.readahead import Read, Reader
from handful.experts.store import Store
from handful.kernels.extension import available, gemv_max_tokens
from handful.routing import Routing

F32, BF16 = torch.float32, torch.bfloat16
BACKEND = "native" if available() else "reference"
BACKENDS = ["native", "reference"] if available() else ["reference"]
E, K, D, F = 12, 3, 40, 24


def layers(
    count: int = 2, dtype: torch.dtype = F32, experts: int = E, width: int = D, hidden: int = F, **kwargs: Any
) -> list[Experts]:
    torch.manual_seed(1)
    found = [Experts(experts, width, hidden, **kwargs).to(dtype) for _ in range(count)]
    for layer in found:
        for bias in (layer.gate_up_bias, layer.down_bias):
            if bias is not None:
                nn.init.normal_(bias)
    return found


def packed(folder: Path, layers: Sequence[Experts], bits: int = 0, group: int = 32) -> Path:
    packed_into(folder / "experts.pack", layers, bits, group)
    return folder / "experts.pack"


def opened(path: Path, slots: int, *, top_k: int = K, direct: bool = True, **kwargs: Any) -> Store:
    file = PackFile(path, direct=direct)
    kwargs.setdefault("read_ahead", True)
    return Store(file, slots * file.layout.record_bytes, top_k=top_k, **kwargs)


def routing_of(T: int, experts: int = E, top_k: int = K, drop: float = 0.0, taste: float = 1.0) -> Routing:
    scores_TE = torch.rand(T, experts).pow(torch.linspace(1, taste, experts))
    weights_TK, experts_TK = scores_TE.topk(top_k)
    return Routing(scores_TE, scores_TE, experts_TK, weights_TK, torch.rand(T, top_k) < drop if drop else None)


def naming(experts_TK: list[list[int]]) -> Routing:
    """A routing of these experts, of equal weights."""
    chosen_TK = torch.tensor(experts_TK)
    scores_TE = torch.zeros(len(chosen_TK), E).scatter_(1, chosen_TK, 1.0)
    return Routing(scores_TE, scores_TE, chosen_TK, torch.ones(chosen_TK.shape))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("handful-reader")]


def open_files(path: Path) -> int:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith(str(path)) for link in links if link.is_symlink())


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    if threads():  # held by a circle, as of an error's traceback
        gc.collect()
    assert threads() == []


# ---------------------------------------------------------------------------------------------------------------------
# The same bits.

FORMATS = [(F32, 0, 32), (BF16, 0, 32), (F32, 8, 32), (F32, 8, 128), (F32, 4, 32), (BF16, 4, 128)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bits", "group"), FORMATS)
def test_any_memory_gives_the_same_bits(
    tmp_path: Path, dtype: torch.dtype, bits: int, group: int, bias: bool, backend: str
) -> None:
    whole = layers(2, dtype, bias=bias, backend=backend)
    path = packed(tmp_path, whole, bits, group)
    right = [QuantizedExperts.pack(layer, bits, group) for layer in whole] if bits else whole
    # One token; few an expert (streams); some many and some few (tiles and streams); half of them dropped; none.
    calls = [(torch.randn(T, D).to(dtype), routing_of(T, drop=drop, taste=4)) for T, drop in
             ((1, 0), (7, 0), (60, 0), (40, 0.5), (1, 0), (0, 0))]  # fmt: skip
    with torch.no_grad():
        for slots, policy in ((K, "lru"), (K + 2, "next-use"), (E, "next-use"), (E + 5, "next-use"), (2 * E, "lru")):
            with opened(path, slots, policy=policy) as store:
                for x_TD, routing in calls:
                    for i in range(2):
                        stored = OffloadedExperts(store, i, activation="swiglu", backend=backend)
                        y_TD = stored(x_TD, routing)
                        assert y_TD.dtype == dtype
                        assert y_TD.equal(right[i](x_TD, routing)), (slots, len(x_TD))


def test_few_tokens_whose_experts_are_all_there_are_one_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits and the counts of the other way, and only then."""
    whole = layers(1, backend=BACKEND)
    parts: list[int] = []

    def counted(x_TD: Tensor, *others: Any) -> Tensor:
        parts.append(len(x_TD))
        return native_in_parts(x_TD, *others)

    monkeypatch.setattr("handful.experts.offload.native_in_parts", counted)
    with torch.no_grad(), opened(packed(tmp_path, whole), E, policy="lru") as store:
        stored = OffloadedExperts(store, 0, activation="swiglu")

        def in_parts(routing: Routing) -> bool:
            parts.clear()
            x_TD = torch.randn(routing.tokens, D)
            assert stored(x_TD, routing).equal(whole[0](x_TD, routing))
            return parts == [routing.tokens] or not available()  # the plain loop knows no other way

        def at_once(routing: Routing) -> bool:
            in_parts(routing)
            return not parts

        assert in_parts(naming([[0, 1, 2]]))
        assert at_once(naming([[2, 0, 1]]))
        assert at_once(naming([[1, 2, 0], [0, 1, 2]]))
        assert in_parts(naming([[0, 1, 3]]))
        stats = store.stats()
        assert (stats.total("hits"), stats.total("misses")) == (3 + 3 + 2, 3 + 1)
        # More tokens than the kernels read as a stream, and those of which some are dropped, go the other way.
        assert in_parts(naming([[0, 1, 2]] * (gemv_max_tokens() + 1)))
        some = naming([[0, 1, 2]] * 2)
        assert in_parts(replace(some, dropped_TK=torch.tensor([[True, False, False]] * 2)))
        with pytest.raises(RoutingError, match="expert -1"):
            stored(torch.randn(1, D), replace(naming([[0, 0, 1]]), experts_TK=torch.tensor([[-1, 0, 1]])))


@pytest.mark.parametrize(("slots", "large"), [(E, True), (2 * E, False)])
def test_memory_that_is_read_into_again_and_again_is_in_large_pages(
    tmp_path: Path, slots: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice: list[int] = []

    class Watched(mmap.mmap):
        def madvise(self, option: int, *others: int) -> None:
            advice.append(option)

    monkeypatch.setattr("handful.experts.store.mmap.mmap", Watched)
    with opened(packed(tmp_path, layers(2)), slots):
        assert advice == ([mmap.MADV_HUGEPAGE] if large else [])


@pytest.mark.parametrize("activation", ["geglu", "swiglu_clamped", "relu", "gelu"])
def test_other_activations(tmp_path: Path, activation: Any) -> None:
    whole = layers(1, activation=activation, bias=True, backend=BACKEND)
    x_TD, routing = torch.randn(9, D), routing_of(9)
    with torch.no_grad(), opened(packed(tmp_path, whole), 4) as store:
        assert OffloadedExperts(store, 0, activation=activation)(x_TD, routing).equal(whole[0](x_TD, routing))


@pytest.mark.skipif(not available(), reason="how the kernels cut tokens")
def test_tokens_are_cut_as_they_are_with_all_experts_there(tmp_path: Path) -> None:
    # At most 256 assignments an expert at a time, 9,600 tokens of two of 75, in parts that are even.
    whole = layers(1, experts=75, width=8, hidden=8, backend="native")
    x_TD, routing = torch.randn(9640, 8), routing_of(9640, 75, 2)
    assert torch.ops.handful.experts_step(9640, 75, 2) == 4820
    with torch.no_grad(), opened(packed(tmp_path, whole), 20, top_k=2) as store:
        assert OffloadedExperts(store, 0, activation="swiglu")(x_TD, routing).equal(whole[0](x_TD, routing))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_mixed_dtypes_are_those_of_experts(tmp_path: Path, backend: str) -> None:
    whole = layers(1, bias=True, backend=backend)
    x_TD, routing = torch.randn(9, D), routing_of(9)
    for bits in (4, 0):
        right = QuantizedExperts.pack(whole[0], bits) if bits else whole[0]
        with torch.no_grad(), opened(packed(tmp_path, whole, bits), 5) as store:
            stored = OffloadedExperts(store, 0, activation="swiglu", backend=backend)
            if bits or backend == "native":
                assert stored(x_TD.bfloat16(), routing).equal(right(x_TD.bfloat16(), routing))
            with torch.autocast("cpu", dtype=BF16):
                y_TD, right_TD = stored(x_TD, routing), right(x_TD, routing)
                assert y_TD.dtype == right_TD.dtype
                assert y_TD.equal(right_TD)


def test_float64_goes_through_the_plain_loop(tmp_path: Path) -> None:
    whole = layers(1, torch.float64, backend="reference")
    x_TD, routing = torch.randn(9, D, dtype=torch.float64), routing_of(9)
    with torch.no_grad(), opened(packed(tmp_path, whole), 4) as store:
        assert OffloadedExperts(store, 0, activation="swiglu")(x_TD, routing).equal(whole[0](x_TD, routing))
        if available():
            with pytest.raises(ConfigError, match="takes float32 and bfloat16"):
                OffloadedExperts(store, 0, activation="swiglu", backend="native")(x_TD, routing)


@pytest.mark.skipif(not available(), reason="the kernels' own operations")
def test_the_operation_writes_the_rows_of_experts_that_are_there_alone() -> None:
    whole = layers(1)[0]
    routing = naming([[0, 1, 2], [5, 1, 0]])
    empty = torch.full((6, D), torch.nan)
    given = (torch.randn(2, D), routing.experts_TK, None)
    weights = (whole.gate_up.detach()[:2], None, whole.down.detach()[:2], None, None, None, "swiglu", F, 0, 0, False)
    places_E = torch.full((E,), -1)
    places_E[1], places_E[5] = 0, 1
    assert torch.ops.handful.experts_rows(empty, *given, places_E, *weights) == 3
    # Rows are by expert: 0 twice, 1 twice, 2, 5.
    assert empty.isnan().any(1).tolist() == [True, True, False, False, True, False]
    for wrong, said in ((torch.full((E,), 2), "places names matrix 2: there are 2"), (places_E[:5], "names expert 5")):
        with pytest.raises(RuntimeError, match=said):
            torch.ops.handful.experts_rows(empty, *given, wrong, *weights)
    with pytest.raises(RuntimeError, match="rows is not a contiguous matrix"):
        torch.ops.handful.experts_rows(empty[:5], *given, places_E, *weights)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


def test_the_least_memory_is_one_tokens_experts_of_a_layer(tmp_path: Path) -> None:
    path = packed(tmp_path, layers(1))
    size = PackFile(path).layout.record_bytes
    with pytest.raises(ConfigError, match=rf"= {K * size - 1:,} bytes: the 3 experts .* at least {K * size:,}"):
        Store(PackFile(path), K * size - 1, top_k=K)
    with Store(PackFile(path), K * size, top_k=K) as store:
        assert store.slots == K
    with Store(PackFile(path), 10**9, top_k=K) as store:  # no more than there are
        assert store.slots == E


def test_wrong_calls_are_one_line(tmp_path: Path) -> None:
    x_TD, routing = torch.randn(2, D), routing_of(2)
    with opened(packed(tmp_path, layers(1)), 5) as store:
        stored = OffloadedExperts(store, 0, activation="swiglu")
        with pytest.raises(HandfulError, match="offloaded experts give no gradient"):
            stored(x_TD.clone().requires_grad_(), routing)
        with pytest.raises(RoutingError, match="experts were given x of shape"):
            stored(x_TD[:, 1:], routing)
        for backend in BACKENDS:
            other = OffloadedExperts(store, 0, activation="swiglu", backend=backend)
            with pytest.raises(RoutingError, match=f"routing names expert {E}: there are {E}"):
                other(x_TD, Routing(routing.scores_TE, routing.scores_TE, routing.experts_TK + E, routing.weights_TK))
        with pytest.raises(ConfigError, match="experts backend 'none'"):
            OffloadedExperts(store, 0, activation="swiglu", backend="none")
        with pytest.raises(ConfigError, match="policy = 'none'"):
            opened(store.pack.path, 5, policy="none")
        assert stored(x_TD, routing).shape == (2, D)
    with pytest.raises(HandfulError, match=r"experts\.pack: the store of these experts is closed"):
        stored(x_TD, routing)


# ---------------------------------------------------------------------------------------------------------------------
# The file.


def test_records_are_pages_and_hold_what_was_given(tmp_path: Path) -> None:
    whole = layers(2, BF16, bias=True)
    file = PackFile(packed(tmp_path, whole, 4))
    layout = file.layout
    assert file.path.stat().st_size == layout.nbytes
    assert layout.record_bytes % PAGE == layout.start % PAGE == 0
    assert (layout.bits, layout.group, layout.dtype, layout.format) == (4, 32, "bfloat16", "int4/32")
    assert layout.layers == ("layers.0", "layers.1")
    buffer = torch.zeros(layout.record_bytes + PAGE, dtype=torch.uint8)
    record = buffer[-buffer.data_ptr() % PAGE :][: layout.record_bytes]
    for layer, expert in ((1, 5), (0, 0), (1, E - 1)):
        file.read(layer, expert, record.numpy().data)
        for field in layout.fields:
            assert expert_file.view(record, field).equal(record_of(whole, 4, 32)(layer, expert)[field.name]), field.name
    file.close()
    with pytest.raises(CheckpointError, match=r"layers\.0 expert 3: the pack is closed"):
        file.read(0, 3, record.numpy().data)


def damaged(path: Path, at: int, value: bytes) -> Path:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(value)
    return path


def test_what_is_no_pack_is_refused(tmp_path: Path) -> None:
    whole = layers(1)
    with pytest.raises(CheckpointError, match="no such file"):
        PackFile(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        PackFile(tmp_path)
    for at, value, said in (
        (0, b"SAFE", "not a pack of experts"),
        (8, b"\x07", "a pack of version 7: this reads 3; make it again"),
        (12, b"\xff\xff\xff\x7f", "a description of 2147483647 bytes"),
        (16, b"[", "its description is no pack's"),
        (30, b"#", "its description's checksum is wrong"),
    ):
        with pytest.raises(CheckpointError, match=said):
            PackFile(damaged(packed(tmp_path, whole), at, value))
    path = packed(tmp_path, whole)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(CheckpointError, match=f"truncated: {size - 1} bytes, must be {size}"):
        PackFile(path)
    assert open_files(path) == 0


@pytest.mark.parametrize("value", [b"\x01", b"\xff"])
def test_a_damaged_record_is_named_when_it_is_needed(tmp_path: Path, value: bytes) -> None:
    path = packed(tmp_path, layers(2))
    layout = PackFile(path).layout
    damaged(path, layout.start + (E + 4) * layout.record_bytes + 77, value)
    x_TD = torch.randn(1, D)
    with opened(path, 6, read_ahead=False) as store:
        stored = [OffloadedExperts(store, i, activation="swiglu") for i in range(2)]
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"experts\.pack: layers\.1 expert 4: damaged"):
                stored[1](x_TD, naming([[3, 4, 5]]))
        stored[0](x_TD, naming([[3, 4, 5]]))
        stored[1](x_TD, naming([[3, 6, 5]]))


def test_pages_in_another_order_are_noticed(tmp_path: Path) -> None:
    path = packed(tmp_path, layers(1))
    layout = PackFile(path).layout
    data = path.read_bytes()
    first, second = (data[layout.start + i * PAGE : layout.start + (i + 1) * PAGE] for i in range(2))
    assert layout.record_bytes >= 2 * PAGE
    damaged(path, layout.start, second + first)
    with (
        opened(path, 4) as store,
        pytest.raises(CheckpointError, match=r"layers\.0 expert 0: damaged"),
    ):
        OffloadedExperts(store, 0, activation="swiglu")(torch.randn(1, D), naming([[0, 1, 2]]))


def test_damage_done_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = packed(tmp_path, layers(1))
    with opened(path, 3) as store:
        stored = OffloadedExperts(store, 0, activation="swiglu")
        stored(torch.randn(1, D), naming([[0, 1, 2]]))
        damaged(path, store.layout.start + 100, b"\x00\x01\x02")
        stored(torch.randn(1, D), naming([[0, 1, 2]]))  # it is in memory
        stored(torch.randn(1, D), naming([[3, 4, 5]]))
        with pytest.raises(CheckpointError, match=r"layers\.0 expert 0: damaged"):
            stored(torch.randn(1, D), naming([[0, 1, 2]]))


def test_a_disk_that_is_full_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = layers(1)
    path = packed(tmp_path, whole)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"experts\.pack: cannot be written: File too large \(it has [\d,]+ b"
        ):
            packed(tmp_path, whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["experts.pack"]
    written = 0

    def full(file: int, data: memoryview, at: int) -> int:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwrite(file, data, at)

    monkeypatch.setattr(expert_file, "pwrite", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        packed(tmp_path, whole)
    assert [p.name for p in tmp_path.iterdir()] == ["experts.pack"]
    assert path.read_bytes() == before
    # Bytes are written in whatever pieces the system takes.
    monkeypatch.setattr(expert_file, "pwrite", lambda file, data, at: os.pwrite(file, data[:1000], at))
    path.unlink()
    packed(tmp_path, whole)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["experts.pack"]


def test_packing_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    whole = layers(1)
    record = record_of(whole, 0, 32)

    def stopped(layer: int, expert: int) -> dict[str, Tensor]:
        if expert == 3:
            raise KeyboardInterrupt
        return record(layer, expert)

    layout: Layout = PackFile(packed(tmp_path, whole)).layout
    done: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        write_pack(tmp_path / "other.pack", layout, stopped, lambda *progress: done.append(progress))
    size = layout.record_bytes
    assert done == [((i + 1) * size, E * size) for i in range(3)]
    assert [p.name for p in tmp_path.iterdir()] == ["experts.pack"]


# ---------------------------------------------------------------------------------------------------------------------
# Disks that fail.


def run(store: Store, calls: int = 12) -> None:
    stored = [OffloadedExperts(store, i, activation="swiglu") for i in range(len(store.layout.layers))]
    with torch.no_grad():
        for i in range(calls):
            stored[i % len(stored)](torch.randn(1, D), naming([[i % E, (i * 5 + 1) % E, (i * 7 + 2) % E]]))


@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_are_continued(tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The record is larger than a page: direct reads may stop anywhere, and go on at a page's beginning.
    whole = layers(1, width=64, hidden=48, backend=BACKEND)
    piece = 5000 if direct else 999
    monkeypatch.setattr(expert_file, "preadv", lambda file, into, at: os.preadv(file, [into[0][:piece]], at))
    if direct:  # which the system itself would not take
        monkeypatch.setattr(expert_file, "preadv", lambda file, into, at: min(piece, os.preadv(file, into, at)))
    x_TD, routing = torch.randn(5, 64), routing_of(5)
    with torch.no_grad(), opened(packed(tmp_path, whole), 4, direct=direct) as store:
        assert store.layout.record_bytes > 3 * PAGE
        assert OffloadedExperts(store, 0, activation="swiglu")(x_TD, routing).equal(whole[0](x_TD, routing))


def test_an_error_of_the_disk_is_told_where_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = layers(1, backend=BACKEND)
    x_TD = torch.randn(1, D)
    with torch.no_grad(), opened(packed(tmp_path, whole), 5) as store:
        stored = OffloadedExperts(store, 0, activation="swiglu")
        stored(x_TD, naming([[0, 1, 2]]))
        bad = store.layout.start + 7 * store.layout.record_bytes

        def fail(file: int, into: list[memoryview], at: int) -> int:
            if at == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return os.preadv(file, into, at)

        monkeypatch.setattr(expert_file, "preadv", fail)
        for _ in range(8):  # a slot lost each time would leave none
            with pytest.raises(CheckpointError, match=r"layers\.0 expert 7: cannot be read: Input/output error$"):
                stored(x_TD, naming([[1, 7, 8]]))
        monkeypatch.undo()
        routing = naming([[1, 7, 8]])
        assert stored(x_TD, routing).equal(whole[0](x_TD, routing))


@pytest.mark.parametrize("direct", [True, False])
def test_a_pack_that_is_cut_while_in_use(tmp_path: Path, direct: bool) -> None:
    path = packed(tmp_path, layers(1))
    with opened(path, 4, direct=direct) as store:
        run(store, 3)
        os.truncate(path, store.layout.start + 6 * store.layout.record_bytes - 100)
        stored = OffloadedExperts(store, 0, activation="swiglu")
        with pytest.raises(CheckpointError, match=r"layers\.0 expert (5|9): truncated while in use"):
            stored(torch.randn(1, D), naming([[5, 9, 4]]))
        stored(torch.randn(1, D), naming([[2, 3, 4]]))


def test_a_pack_that_is_deleted_or_replaced_while_in_use_is_read_on(tmp_path: Path) -> None:
    whole = layers(1, backend=BACKEND)
    path = packed(tmp_path, whole)
    x_TD, routing = torch.randn(8, D), routing_of(8)
    with torch.no_grad(), opened(path, 3) as store:
        path.unlink()
        path.write_bytes(b"something else")
        assert OffloadedExperts(store, 0, activation="swiglu")(x_TD, routing).equal(whole[0](x_TD, routing))


# ---------------------------------------------------------------------------------------------------------------------
# Reading ahead.


def settled(store: Store) -> None:
    """Wait until nothing is being read."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with store._reader.cond:
            held = len(store._free) + len(store._slot) + len(store._guess)
            if held == store.slots and not store._reads and all(read.done for read in store._guess.values()):
                return
        time.sleep(0.001)
    raise AssertionError("reads that do not end, or a slot that is lost")


def guessing(experts: list[int]) -> Callable[[Tensor], Routing]:
    return lambda x_TD: naming([experts])


def test_a_right_guess_is_there_when_it_is_needed(tmp_path: Path) -> None:
    with torch.no_grad(), opened(packed(tmp_path, layers(2)), 12) as store:
        store.guess_with(1, guessing([4, 5, 6]))
        stored = [OffloadedExperts(store, i, activation="swiglu") for i in range(2)]
        stored[0](torch.randn(1, D), naming([[0, 1, 2]]))
        settled(store)
        read = store.stats().total("bytes_read")
        stored[1](torch.randn(1, D), naming([[4, 5, 7]]))
        settled(store)
        stats = store.stats()
        assert stats.guesses == 3
        assert (stats.layers["layers.1"].ahead, stats.layers["layers.1"].misses) == (2, 3)
        assert stats.total("bytes_read") - read == stats.expert_bytes  # of expert 7 alone
        stored[1](torch.randn(1, D), naming([[4, 5, 7]]))
        assert store.stats().layers["layers.1"].hits == 3
        store.reset()
        assert store.stats().hit_rate == 1.0
        assert store.stats().guesses == 0


def test_wrong_guesses_cost_nobody_a_place(tmp_path: Path) -> None:
    with torch.no_grad(), opened(packed(tmp_path, layers(2)), 10, policy="lru") as store:
        stored = [OffloadedExperts(store, i, activation="swiglu") for i in range(2)]
        assert store.capacity == 7
        for chosen in ([0, 1, 2], [3, 4, 5], [6, 0, 1]):
            stored[0](torch.randn(1, D), naming([chosen]))
        before = dict(store._slot)
        assert len(before) == store.capacity
        store.guess_with(1, guessing([9, 10, 11]))
        for chosen in ([0, 1, 2], [3, 4, 5], [6, 0, 1]):
            stored[0](torch.randn(1, D), naming([chosen]))
            settled(store)
            assert store._slot == before
        assert list(store._guess) == [(1, 9), (1, 10), (1, 11)]
        store.guess_with(1, guessing([1, 2, 3]))  # no room for more, until those before are known to be wrong
        stored[0](torch.randn(1, D), naming([[0, 1, 2]]))
        assert list(store._guess) == [(1, 9), (1, 10), (1, 11)]
        stored[1](torch.randn(1, D), naming([[0, 4, 5]]))
        assert not store._guess
        settled(store)


def test_guessing_pauses_while_it_is_wrong_and_goes_on_when_it_is_right(tmp_path: Path) -> None:
    with torch.no_grad(), opened(packed(tmp_path, layers(2)), 12) as store:
        layer = OffloadedExperts(store, 0, activation="swiglu")
        draw = random.Random(0)

        def calls(count: int, right: bool) -> int:
            before = store.stats().guesses
            for _ in range(count):
                guess = draw.sample(range(E), K)
                store.guess_with(1, guessing(guess))
                layer(torch.randn(1, D), naming([[0, 1, 2]]))
                settled(store)
                list(store.fetch(1, guess if right else [e for e in range(E) if e not in guess][:K]))
            return store.stats().guesses - before

        # Each wrong guess takes a 32nd of the trust, and 44 of them three quarters.
        assert calls(40, right=False) > 40
        assert store._trust < 0.25
        assert 0 < calls(32, right=False) <= 2 * K  # at one call of 16
        calls(400, right=True)
        assert store._trust > 0.25
        assert calls(16, right=True) > 16


def test_a_guess_that_cannot_be_read_is_told_to_who_needs_it_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed(tmp_path, layers(2))
    layout = PackFile(path).layout
    damaged(path, layout.start + (E + 4) * layout.record_bytes, b"\xff\xff\xff")
    with torch.no_grad(), opened(path, 12) as store:
        store.guess_with(1, guessing([3, 4, 5]))
        stored = [OffloadedExperts(store, i, activation="swiglu") for i in range(2)]
        for _ in range(3):
            stored[0](torch.randn(1, D), naming([[0, 1, 2]]))
            settled(store)
            stored[1](torch.randn(1, D), naming([[3, 5, 6]]))
        with pytest.raises(CheckpointError, match=r"layers\.1 expert 4: damaged"):
            stored[1](torch.randn(1, D), naming([[3, 4, 5]]))


def test_a_guess_on_its_way_is_hurried_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = layers(2, backend=BACKEND)
    gate = threading.Event()

    def slow(file: int, into: list[memoryview], at: int) -> int:
        if threading.current_thread().name.startswith("handful") and at >= second:
            gate.wait(20)
        return os.preadv(file, into, at)

    with torch.no_grad(), opened(packed(tmp_path, whole), 12, readers=1) as store:
        second = store.layout.start + E * store.layout.record_bytes
        monkeypatch.setattr(expert_file, "preadv", slow)
        store.guess_with(1, guessing([4, 5, 6]))
        stored = [OffloadedExperts(store, i, activation="swiglu") for i in range(2)]
        stored[0](torch.randn(1, D), naming([[0, 1, 2]]))
        threading.Timer(0.1, gate.set).start()
        x_TD, routing = torch.randn(1, D), naming([[4, 6, 8]])  # 4 is on its way, 6 has not begun, 8 is no guess
        assert stored[1](x_TD, routing).equal(whole[1](x_TD, routing))
        layer = store.stats().layers["layers.1"]
        assert (layer.ahead, layer.misses) == (2, 3)
        assert layer.wait_seconds > 0.05


@pytest.mark.parametrize("slots", [K, K + 1, K + 2, 9, 17, 30])
@pytest.mark.parametrize("policy", ["lru", "next-use"])
def test_no_deadlock_and_no_slot_lost(tmp_path: Path, slots: int, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random calls and guesses, reads of random length of which some fail: every output is right or an error."""
    whole = layers(3, backend=BACKEND)
    draw = random.Random(slots)

    def fickle(file: int, into: list[memoryview], at: int) -> int:
        time.sleep(draw.random() * 4e-4)
        if draw.random() < 0.01:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(file, into, at)

    path = packed(tmp_path, whole)
    monkeypatch.setattr(expert_file, "preadv", fickle)
    done: list[str] = []

    def use() -> None:
        with torch.no_grad(), opened(path, slots, policy=policy) as store:
            for i in range(3):
                store.guess_with(i, lambda x_TD: naming([draw.sample(range(E), K)]))
            stored = [OffloadedExperts(store, i, activation="swiglu") for i in range(3)]
            for call in range(90):
                T = 1 if call % 9 else 20
                x_TD, routing = torch.randn(T, D), naming([draw.sample(range(E), K) for _ in range(T)])
                try:
                    assert stored[call % 3](x_TD, routing).equal(whole[call % 3](x_TD, routing))
                    done.append("right")
                except CheckpointError:
                    done.append("error")
            settled(store)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(60)
    assert len(done) == 90
    assert done.count("right") > 30


# ---------------------------------------------------------------------------------------------------------------------
# The end.


def interrupted(store: Store, name: str, count: int) -> None:
    """Let a policy be stopped by Ctrl-C, once, when it was asked `count` times."""
    policy = store._policy
    whole, left = getattr(policy, name), iter(range(count))

    def stop(*given: Any) -> Any:
        if next(left, None) is None:
            delattr(policy, name)
            raise KeyboardInterrupt
        return whole(*given)

    setattr(policy, name, stop)


def test_ctrl_c_leaves_a_store_that_works_and_closes(tmp_path: Path) -> None:
    whole = layers(1, backend=BACKEND)
    path = packed(tmp_path, whole)
    x_TD, routing = torch.randn(30, D), routing_of(30)
    with torch.no_grad():
        store = opened(path, 4)
        stored = OffloadedExperts(store, 0, activation="swiglu")
        for stop in range(4):
            lists = store.fetch(0, list(range(E)))
            for _ in range(stop):
                next(lists)
            with pytest.raises(KeyboardInterrupt):
                lists.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
            assert stored(x_TD, routing).equal(whole[0](x_TD, routing))
        settled(store)
        # In the middle of a change: what it has half done must not be believed.
        for name in ("add", "evict", "use"):
            for count in range(3):
                interrupted(store, name, count)
                with pytest.raises(KeyboardInterrupt):
                    stored(x_TD, routing)
                assert stored(x_TD, routing).equal(whole[0](x_TD, routing)), (name, count)
        settled(store)
        store.close()
        store.close()
    assert threads() == []
    assert open_files(path) == 0


def test_close_in_the_middle_of_reads_waits_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path, layers(2))
    ended: list[int] = []

    def slow(file: int, into: list[memoryview], at: int) -> int:
        time.sleep(0.05)
        count = os.preadv(file, into, at)
        ended.append(at)
        return count

    with torch.no_grad(), opened(path, 16) as store:
        store.guess_with(1, guessing([4, 5, 6]))
        OffloadedExperts(store, 0, activation="swiglu")(torch.randn(1, D), naming([[0, 1, 2]]))
        monkeypatch.setattr(expert_file, "preadv", slow)
        list(store.fetch(0, [3]))
        store.fetch(0, [4, 5])
    assert threads() == []
    assert open_files(path) == 0
    before = len(ended)
    time.sleep(0.1)
    assert len(ended) == before


def test_a_store_that_nobody_holds_gives_everything_back(tmp_path: Path) -> None:
    path = packed(tmp_path, layers(1))
    store = opened(path, 4)
    run(store, 3)
    assert len(threads()) > 0
    assert open_files(path) == 1
    del store
    gc.collect()
    assert threads() == []
    assert open_files(path) == 0


def test_a_reader_reads_what_is_needed_before_what_is_guessed() -> None:
    order: list[int] = []
    gate = threading.Event()

    def load(layer: int, expert: int, slot: int) -> None:
        gate.wait(20)
        order.append(expert)

    reader = Reader(load, 1)
    reads = [Read((0, i), i, lambda read: None) for i in range(6)]
    reader.submit(reads[0])
    while reader._needed:
        time.sleep(0.001)
    for i in (1, 2, 3):
        reader.submit(reads[i], guess=True)
    reader.submit(reads[4])
    reader.hurry(reads[3])
    assert reader.cancel(reads[2])
    assert not reader.cancel(reads[0])
    gate.set()
    reader.wait(lambda: all(reads[i].done for i in (0, 1, 3, 4)))
    assert order == [0, 4, 3, 1]
    reader.stop()


def test_half_of_the_threads_are_kept_for_what_is_needed() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def load(layer: int, expert: int, slot: int) -> None:
        begun.append(expert)
        gate.wait(20)

    reader = Reader(load, 4)
    reads = [Read((0, i), i, lambda read: None) for i in range(8)]
    for read in reads[:5]:
        reader.submit(read, guess=True)
    while len(begun) < 2:
        time.sleep(0.001)
    for read in reads[5:]:
        reader.submit(read)
    while len(begun) < 4:
        time.sleep(0.001)
    time.sleep(0.02)
    assert sorted(begun) == [0, 1, 5, 6]
    gate.set()
    reader.wait(lambda: all(read.done for read in reads))
    reader.stop()


def test_a_guess_that_came_true_does_not_wait_for_other_guesses() -> None:
    gate, begun = threading.Event(), threading.Event()

    def load(layer: int, expert: int, slot: int) -> None:
        if expert == 1:
            begun.set()
        gate.wait(20)

    reader = Reader(load, 2)  # one of which may read guesses
    reads = [Read((0, i), i, lambda read: None) for i in range(2)]
    for read in reads:
        reader.submit(read, guess=True)
    while reader._guessing == 0:
        time.sleep(0.001)
    time.sleep(0.02)
    assert not begun.is_set()
    reader.hurry(reads[1])
    assert begun.wait(10)
    gate.set()
    reader.wait(lambda: all(read.done for read in reads))
    reader.stop()
