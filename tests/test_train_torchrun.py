"""`handful train` as people start it on several ranks: processes of torchrun, one of which is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from builders import Call, calling, of_kind, read_lines, write_text

SETTINGS = """
[data]
vocab = 300
[model]
width = 16
heads = 2
layers = 2
experts = 5
top_k = 2
expert_width = 12
[train]
context = 16
batch = 6
steps = {steps}
dtype = "float32"
eval_every = 0
eval_tokens = 64
checkpoint_every = {checkpoint_every}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path / "text")
    return tmp_path


@pytest.fixture
def alone(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """A command in this process, in the folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HANDFUL_CACHE", str(folder / "cache"))
    return calling(monkeypatch, capsys)


class Started:
    """A command, and the ranks that torchrun started for it."""

    def __init__(self, folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.mark = f"HANDFUL_TEST={folder}-{time.monotonic_ns()}"
        name, _, value = self.mark.partition("=")
        environment = {
            **os.environ, "HANDFUL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", name: value, **(env or {}),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments], env=environment, cwd=folder, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def ranks(self) -> dict[int, int]:
        """Process by rank."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                values = entry.read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            rank = [value for value in values if value.startswith("RANK=")]
            if self.mark in values and rank:
                found[int(rank[0].removeprefix("RANK="))] = int(entry.parent.name)
        return found

    def end(self, timeout: float = 120) -> tuple[int, str]:
        """Its exit status, and all that it said."""
        said, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, said

    def kill(self) -> None:
        for pid in [*self.ranks().values(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def started(folder: Path, *arguments: str, **options: Any) -> Iterator[Started]:
    command = Started(folder, *arguments, **options)
    try:
        yield command
    finally:
        command.kill()


def settings(folder: Path, steps: int = 6, checkpoint_every: int = 2) -> str:
    (folder / "train.toml").write_text(SETTINGS.format(steps=steps, checkpoint_every=checkpoint_every))
    return "train.toml"


def train(folder: Path, out: str, *more: str, **options: Any) -> Any:
    """`handful train` of the settings on the text, begun."""
    return started(folder, "handful", "train", "train.toml", "--data", "text", "--out", out, *more, **options)


def losses(folder: Path, out: str) -> list[float]:
    return [event["loss"] for event in of_kind("step", read_lines(folder / out / "events.jsonl"))]


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 90) -> None:
    until = time.monotonic() + timeout
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.002)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


# ---------------------------------------------------------------------------------------------------------------------


def test_ranks_of_this_computer(folder: Path, alone: Call) -> None:
    settings(folder)
    assert alone("train", "train.toml", "--data", "text", "--out", "one").code == 0
    with train(folder, "three", "--ranks", "3") as command:
        status, said = command.end()
    assert status == 0, said
    assert "3 ranks on 1 host, 1 thread each: experts of a layer 1+2+2; all else on every rank (DDP over gloo)" in said
    assert said.count("three/report.html") == 1  # one rank speaks
    assert "of the time: waiting for the slowest rank's experts" in said
    assert losses(folder, "three") == pytest.approx(losses(folder, "one"), rel=2e-5)


def test_ranks_that_are_killed(folder: Path, alone: Call) -> None:
    """One, and after a while the first, which keeps the run. Each time all begin again from the last checkpoint, and
    they end where one process does."""
    settings(folder, steps=60, checkpoint_every=4)
    assert alone("train", "train.toml", "--data", "text", "--out", "one").code == 0
    with train(folder, "run", "--ranks", "3") as command:
        for rank, after in ((2, 12), (0, 45)):
            wait_for(lambda after=after: lines(folder / "run/events.jsonl") > after, command.process)  # type: ignore[misc]
            os.kill(command.ranks()[rank], signal.SIGKILL)
        status, said = command.end()
    assert status == 0, said
    assert losses(folder, "run") == pytest.approx(losses(folder, "one"), rel=1e-3)
    events = read_lines(folder / "run/events.jsonl")
    assert [event["step"] for event in of_kind("step", events)] == list(range(1, 61))
    assert len(of_kind("start", events)) == 1


def test_ranks_that_are_killed_while_all_save(folder: Path) -> None:
    settings(folder, steps=40, checkpoint_every=1)
    saving = folder / "run/checkpoints"
    with train(folder, "run", "--ranks", "2") as command:
        for rank, after in ((1, 2), (0, 12)):
            some = f"step-{after:06d}"
            wait_for(lambda some=some: (saving / some).exists() and any(saving.glob(".new-*")), command.process)  # type: ignore[misc]
            os.kill(command.ranks()[rank], signal.SIGKILL)
        status, said = command.end()
    assert status == 0, said
    assert [event["step"] for event in of_kind("step", read_lines(folder / "run/events.jsonl"))] == list(range(1, 41))
    assert not list(saving.glob(".new-*"))


def test_ctrl_c(folder: Path) -> None:
    settings(folder, steps=100_000)
    with train(folder, "run", "--ranks", "2") as command:
        wait_for(lambda: lines(folder / "run/events.jsonl") > 6, command.process)
        command.process.send_signal(signal.SIGINT)
        status, said = command.end(60)
    assert status == 130, said
    assert "Traceback" not in said
    ended = read_lines(folder / "run/events.jsonl")[-1]
    assert ended["event"] == "interrupted"
    assert (folder / "run/model").resolve().name == f"step-{ended['step']:06d}"


def test_a_mistake_is_told_once(folder: Path) -> None:
    settings(folder)
    with train(folder, "run", "--ranks", "2", "--top-k", "9") as command:
        status, said = command.end()
    assert status == 1
    assert len(said.splitlines()) == 1, said
    with train(folder, "run", "--ranks", "0") as command:
        assert command.end() == (1, "error ranks = 0: at least 1\n")


def test_hosts_that_are_left_go_on(folder: Path) -> None:
    """Two agents of torchrun as on two hosts. One is gone with its rank: the other goes on alone."""
    settings(folder, steps=60, checkpoint_every=5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host = [
        "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id",
        "job", "--rdzv-endpoint", f"127.0.0.1:{port}", "--monitor-interval", "0.1", "--max-restarts", "3",
        "--rdzv-conf", "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2",
        "-m", "handful", "train", "train.toml", "--data", "text", "--out", "run",
    ]  # fmt: skip
    with started(folder, *host) as first:
        time.sleep(1)  # which keeps the store
        with started(folder, *host) as second:
            wait_for(lambda: lines(folder / "run/events.jsonl") > 12, first.process)
            assert len(first.ranks()) == len(second.ranks()) == 1
            second.kill()
        status, said = first.end()
    assert status == 0, said
    events = read_lines(folder / "run/events.jsonl")
    assert [event["step"] for event in of_kind("step", events)] == list(range(1, 61))
