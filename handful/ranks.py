"""The processes that a model is spread over, and what they send each other (torch.distributed, started by torchrun).

A process that is alone is a rank too: everything here is then done without a word to anybody.

Legend: R ranks · X bytes of a row
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from handful.errors import ConfigError, RankLostError, first_line

__all__ = ["ALONE", "Ranks", "join", "start_ranks", "under_torchrun"]

T = TypeVar("T")

RESTARTS = 3
PATIENCE = timedelta(minutes=10)  # of a collective: a rank may be writing, or reading its data


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of a group, as one of them sees them.

    rank       this one's number.
    hosts      the host of every rank, by a number; ranks of one host follow each other.
    two_level  what goes to several ranks of another host crosses to it once, and is handed on there.
    group      of torch.distributed; None: this process is alone.
    sent_R     bytes of tokens and rows that this rank's experts have sent to each other one, without the counts before.
    """

    rank: int = 0
    hosts: tuple[int, ...] = (0,)
    two_level: bool = False
    group: dist.ProcessGroup | None = None
    sent_R: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if list(self.hosts) != sorted(self.hosts):
            raise ConfigError(f"hosts = {self.hosts}: ranks of one host must follow each other")
        self.sent_R.extend([0] * (self.size - len(self.sent_R)))

    @property
    def size(self) -> int:
        return len(self.hosts)

    def sends(self, counts: Sequence[int], row_bytes: int) -> None:
        """Count rows that go to each rank."""
        for rank, count in enumerate(counts):
            if rank != self.rank:
                self.sent_R[rank] += count * row_bytes

    def share(self, count: int) -> slice:
        """This rank's part of so many things, as even as can be; it may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """The largest of all ranks', in place."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            with _lost():
                dist.all_reduce(value, how, group=self.group)
        return value

    def any(self, value: bool) -> bool:
        """Whether it is true of some rank."""
        return bool(self.max(torch.tensor(int(value))))

    def gathered(self, values_TX: Tensor) -> Tensor:
        """The rows of all ranks, one rank's after the other, on each."""
        if self.group is None:
            return values_TX
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(values_TX)
        rows = self.sum(counts).tolist()
        send = values_TX.contiguous().repeat(self.size, *[1] * (values_TX.dim() - 1))
        out = values_TX.new_empty(sum(rows), *values_TX.shape[1:])
        with _lost():
            dist.all_to_all_single(out, send, rows, [len(values_TX)] * self.size, group=self.group)
        return out

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """On rank 0 before it begins on the others, who find what is done."""
        if self.rank:
            self.first(None)
        yield
        if not self.rank:
            self.first(None)

    def first(self, value: T) -> T:
        """What rank 0 says, on each."""
        if self.group is None:
            return value
        told: list[Any] = [value]
        with _lost():
            dist.broadcast_object_list(told, group=self.group, group_src=0)
        found: T = told[0]
        return found

    def counts(self, sent_RX: Tensor) -> Tensor:
        """A row of int64 for each rank, and theirs for this one."""
        if self.group is None:
            return sent_RX
        received_RX = torch.empty_like(sent_RX)
        with _lost():
            dist.all_to_all_single(received_RX, sent_RX.contiguous(), group=self.group)
        return received_RX

    def exchange(self, rows_NX: Tensor, sent: Sequence[int], received: Sequence[int]) -> Callable[[], Tensor]:
        """Send rows of bytes (N, X), the first `sent[0]` to rank 0 and so on. What is returned waits for what comes,
        rank 0's first."""
        if self.group is None:
            return lambda: rows_NX
        out_MX = rows_NX.new_empty(sum(received), rows_NX.shape[1])
        sending = rows_NX.contiguous()
        with _lost():
            work = dist.all_to_all_single(
                out_MX, sending, list(received), list(sent), group=self.group, async_op=True
            )  # fmt: skip

        def wait(sending: Tensor = sending) -> Tensor:  # what is sent lives as long as this
            with _lost():
                work.wait()
            return out_MX

        return wait


ALONE = Ranks()


@contextmanager
def _lost() -> Iterator[None]:
    """Gloo's word for a peer that is gone, as an error of ours; it names its own source then."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and "onnection" not in str(error):
            raise
        raise RankLostError(f"another rank is gone: {first_line(error)[:200]}") from None


def start_ranks(count: int) -> int:
    """Run this command without its --ranks on so many ranks of this computer, as `torchrun --nproc-per-node` would.
    Returns the exit status.

    A rank that is lost ends all; they begin again, up to RESTARTS times. ConfigError for a number below 1.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if count < 1:
        raise ConfigError(f"ranks = {count}: at least 1")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it says in pages what a rank says in a line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=RESTARTS, monitor_interval=0.1,
    )  # fmt: skip
    given, left = sys.argv[1:], []
    while given:
        word = given.pop(0)
        if word == "--ranks":
            given.pop(0)
        elif not word.startswith("--ranks="):
            left.append(word)
    try:
        elastic_launch(config, sys.executable)("-m", "handful", *left)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)  # the rank has said why
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def under_torchrun() -> bool:
    """Whether torchrun started this process, as one of several or of one."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def _generation(store: Store, rank: int, size: int) -> str:
    """A name that ranks which are alive now agree on. torchrun's store outlives ranks: under the names of lost ones,
    new ones would find their addresses there, and wait for them."""
    own = uuid.uuid4().hex
    if rank:
        store.set(f"handful/asks/{rank}", own)
        name = store.get(f"handful/answer/{own}").decode()  # waits
        store.set(f"handful/{name}/{rank}", "knows")
        return name
    answered: dict[int, str] = {}
    while True:
        for other in range(1, size):
            if not store.check([f"handful/asks/{other}"]):
                continue
            asks = store.get(f"handful/asks/{other}").decode()
            if answered.get(other) != asks:  # a lost one's question may still be there, and is answered too
                answered[other] = asks
                store.set(f"handful/answer/{asks}", own)
        if all(store.check([f"handful/{own}/{other}"]) for other in range(1, size)):
            return own
        time.sleep(0.01)


@contextmanager
def join(*, two_level: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun started, met by all of them; this process alone where it did not."""
    if not under_torchrun():
        yield ALONE
        return
    if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's, whatever the computer has
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    store = PrefixStore(_generation(store, rank, size), store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, f"{os.environ.get('GROUP_RANK', '0')} {socket.gethostname()}")
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        ranks = Ranks(dist.get_rank(), tuple(numbers[name] for name in names), two_level, dist.new_group())
        yield ranks
    finally:
        dist.destroy_process_group()
