"""Ranks for tests: processes that met over gloo once, and do together what they are told.

    gang.run(function, *arguments, size=3, hosts=(0, 0, 1))   -> what each of the first three returned

A function is given its `Ranks` first. It stands at the top of a test file, as it goes to the processes by its name.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from handful.ranks import Ranks

MOST = 4
_SERVER = multiprocessing.get_context("forkserver")  # which tests/fresh.py has told what to import


class Gang:
    """Up to four ranks, each a process with one thread."""

    def __init__(self) -> None:
        self._start()
        atexit.register(self.close)

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(MOST):
            ours, theirs = _SERVER.Pipe()
            store = str(Path(self._folder.name, "store"))
            process = _SERVER.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        size: int = MOST,
        hosts: Sequence[int] | None = None,
        two_level: bool = False,
    ) -> list[Any]:
        """What each rank returned; what one raised is raised, with its traceback."""
        task = function, arguments, tuple(hosts or [0] * size), two_level
        for pipe in self._pipes[:size]:
            pipe.send(task)
        answers = [pipe.recv() if pipe.poll(120) else (False, "no answer") for pipe in self._pipes[:size]]
        wrong = [f"rank {rank}: {value}" for rank, (fine, value) in enumerate(answers) if not fine]
        if wrong:  # those that wait for the one that raised would wait for long
            self.close()
            self._start()
        assert not wrong, "\n".join(wrong)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=MOST)
    groups = {size: dist.new_group(list(range(size))) for size in range(2, MOST + 1)}
    while True:
        try:
            function, arguments, hosts, two_level = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(Ranks(rank, hosts, two_level, groups.get(len(hosts))), *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
