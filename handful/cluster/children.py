"""Processes of ours, which are started again when they die and do not outlive us."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["Child", "die_with_parent", "options_of"]

ENOUGH = 10.0  # seconds of life after which a process is started again at once
MOST = 8.0  # seconds that are waited before one that keeps dying is started again
OPTIONS = "HANDFUL_CHILD"
PR_SET_PDEATHSIG = 1


class Child:
    """A Python module as a process, with options that nobody else sees. It begins when `tend` is first called.

    threads  that it computes with.
    fds      that it inherits.
    """

    def __init__(self, module: str, options: dict[str, Any], threads: int, fds: Sequence[int] = ()) -> None:
        self.module, self.options, self.threads, self.fds = module, options, threads, tuple(fds)
        self.process: subprocess.Popen[bytes] | None = None
        self.deaths = 0  # one soon after the other
        self._began = self._next = 0.0

    def tend(self) -> int | None:
        """Start it if it does not run, and its time has come. The exit status of one that has ended since the last
        call; None: none has."""
        ended = None if self.process is None else self.process.poll()
        if ended is not None:
            self.process = None
            now = time.monotonic()
            self.deaths = 1 if now - self._began > ENOUGH else self.deaths + 1
            self._next = now + min(MOST, 0.25 * (1 << min(self.deaths, 10)) - 0.5)
        if self.process is None and time.monotonic() >= self._next:
            self._start()
        return ended

    def _start(self) -> None:
        environment = os.environ | {
            OPTIONS: json.dumps({**self.options, "parent": os.getpid()}),
            "OMP_NUM_THREADS": str(self.threads),
        }
        # A group of its own: Ctrl-C is the parent's to hear, which tells who is to end and how.
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            env=environment,
            pass_fds=self.fds,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._began = time.monotonic()

    def signal(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.process.send_signal(number)

    def end(self, seconds: float = 5.0) -> None:
        """End it, if need be by force."""
        if self.process is None:
            return
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


def options_of() -> dict[str, Any]:
    """In a child: its options, which leave the environment."""
    found: dict[str, Any] = json.loads(os.environ.pop(OPTIONS))
    die_with_parent(found["parent"])
    return found


def die_with_parent(parent: int) -> None:
    """End this process when its parent has ended, however it did."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if sys.platform != "linux":
        threading.Thread(target=watch, daemon=True).start()
