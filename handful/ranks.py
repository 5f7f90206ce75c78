"""The processes that a model is spread over, and what they send each other (torch.distributed, started by torchrun).

A process that is alone is a rank too: everything here is then done without a word to anybody.

Legend: R ranks · X bytes of a row
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from handful.errors import ConfigError, RankError, first_line

__all__ = ["ALONE", "Ranks", "join", "under_torchrun"]

T = TypeVar("T")

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
    """Gloo's word for a peer that is gone, as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"another rank is gone: {first_line(error)[:200]}") from None


def under_torchrun() -> bool:
    """Whether torchrun started this process, as one of several or of one."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


@contextmanager
def join(*, two_level: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun started, met by all of them; this process alone where it did not."""
    if not under_torchrun():
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, f"{os.environ.get('GROUP_RANK', '0')} {socket.gethostname()}")
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        ranks = Ranks(dist.get_rank(), tuple(numbers[name] for name in names), two_level, dist.new_group())
        yield ranks
    finally:
        dist.destroy_process_group()
