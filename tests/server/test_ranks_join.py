"""Ranks of other computers: joining, being refused, and being cut off from the network."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh
import httpx
import pytest
from serving import chat_model
from serving_ranks import COMPLETIONS, asked, running, whole

from handful.cluster.start import of_torchrun
from handful.families.io import save

EXPERTS = 16
NAMESPACE, HERE, THERE = f"handful{os.getpid()}", "10.97.46.1", "10.97.46.2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny"
    save(chat_model(router={"experts": EXPERTS, "top_k": 2}, context=20_000), path)
    return path


def free_port(after: int = 1) -> int:
    """One after which so many others are free."""
    while True:
        with contextlib.ExitStack() as stack:
            port = int(stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                for other in range(port + 1, port + 1 + after):
                    stack.enter_context(socket.create_server(("127.0.0.1", other)))
                return port


@contextlib.contextmanager
def joined(port: int, folder: Path, *options: str) -> Iterator[None]:
    process = fresh.Process("-m", "handful", "join", f"127.0.0.1:{port}", str(folder), *options)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_a_rank_joins_and_leaves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets its part while requests go on as before, whose bits do not change."""
    monkeypatch.setenv("HANDFUL_RANK_TOKEN", "the secret")
    port = free_port()
    with running(folder, "--rank-port", str(port), "--no-measure", "--on-loss", "wait", ranks=1) as ranks:
        right = [ranks.post(**asked(number))["choices"] for number in range(4)]
        with joined(port, folder, "--ranks", "2"):
            state = ranks.until(lambda state: len(state["ranks"]) == 3 and whole(state))
            assert [rank["rank"] for rank in state["ranks"]] == [0, 1, 2]
            assert all(sum(map(len, rank["experts"].values())) > 0 for rank in state["ranks"])
            assert [ranks.post(**asked(number))["choices"] for number in range(4)] == right
            assert all(rank["assignments"] > 0 for rank in ranks.state()["ranks"])
        ranks.until(lambda state: len(state["ranks"]) == 1 and state["settled"])
        assert [ranks.post(**asked(number))["choices"] for number in range(4)] == right


def test_who_must_not_join_is_told_why(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANDFUL_RANK_TOKEN", "the secret")
    port = free_port()
    with running(folder, "--rank-port", str(port), "--no-measure", ranks=1) as ranks:
        other = tmp_path / "other"
        save(chat_model(router={"experts": EXPERTS, "top_k": 2}, context=64, expert_width=24), other)
        for model, token, why in (
            (other, "the secret", "the rank's pack is of other weights, or of another format"),
            (folder, "a guess", "token: not the secret that the other side was started with"),
        ):
            environment = os.environ | {"HANDFUL_RANK_TOKEN": token}
            ended = fresh.python("-m", "handful", "join", f"127.0.0.1:{port}", str(model), env=environment)
            assert ended.returncode == 1
            assert why in ended.stderr.replace("\n", " ")
        assert "somebody was not let in" in ranks.said()
        assert len(ranks.state()["ranks"]) == 1


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[None]:
    """Another computer, as far as its network goes: a namespace at the other end of a cable."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces are root's to make")
    try:
        ip("netns", "add", NAMESPACE)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        ip("link", "add", "hf0", "type", "veth", "peer", "name", "hf1", "netns", NAMESPACE)
        ip("addr", "add", f"{HERE}/24", "dev", "hf0")
        ip("link", "set", "hf0", "up")
        ip("-n", NAMESPACE, "addr", "add", f"{THERE}/24", "dev", "hf1")
        ip("-n", NAMESPACE, "link", "set", "hf1", "up")
        ip("-n", NAMESPACE, "link", "set", "lo", "up")
        yield
    finally:
        ip("netns", "del", NAMESPACE)  # and with it the cable


def test_a_rank_is_cut_off(folder: Path, network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody hangs: it is out within two seconds, and one of them again when the network is back."""
    monkeypatch.setenv("HANDFUL_RANK_TOKEN", "the secret")
    port = free_port()
    options = ("--host", HERE, "--no-auth", "--rank-port", str(port), "--no-measure")
    command = [sys.executable, "-m", "handful", "join", f"{HERE}:{port}", str(folder)]
    with running(folder, *options, ranks=1) as ranks:
        right = ranks.post(**asked(1))["choices"]
        there = subprocess.Popen(["ip", "netns", "exec", NAMESPACE, *command], stderr=subprocess.DEVNULL)
        try:
            ranks.until(lambda state: len(state["ranks"]) == 2 and whole(state))
            assert ranks.post(**asked(1))["choices"] == right
            for _ in range(2):
                thread, lines, _ = ranks.stream(600)
                ip("-n", NAMESPACE, "link", "set", "hf1", "down")
                began = time.monotonic()
                ranks.post(**asked(1))
                ranks.until(lambda state: state["gone"] == [1])
                assert time.monotonic() - began < 6
                thread.join(60)
                assert lines[-2:] == ["data: [DONE]", ""]
                ranks.until(lambda state: state["settled"])
                assert ranks.post(**asked(1))["choices"] == right
                ip("-n", NAMESPACE, "link", "set", "hf1", "up")
                ranks.until(lambda state: len(state["ranks"]) == 2 and whole(state))
                assert ranks.post(**asked(1))["choices"] == right
        finally:
            there.kill()
            there.wait()


def test_what_torchrun_says() -> None:
    environment = {"RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29399", "WORLD_SIZE": "2"}
    assert of_torchrun(environment) == (1, "node0", 29400)
    assert of_torchrun({}) is None
    assert of_torchrun({"RANK": "1"}) is None


@contextlib.contextmanager
def node(number: int, port: int, folder: Path, *options: str, said: Path) -> Iterator[None]:
    """One of two nodes of torchrun, which it ends as its user does."""
    of_torchrun = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
    of_torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *of_torchrun, "-m", "handful", "serve", str(folder)]
    with said.open("w") as file:
        process = subprocess.Popen([*command, "--ranks", "1", *options], stdout=file, stderr=file)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_torchrun_starts_two_nodes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same line on both: the first one's process is the server, the other one's joins it."""
    monkeypatch.setenv("HANDFUL_RANK_TOKEN", "the secret")
    port = free_port(3)  # after torchrun's: where ranks join, their links, HTTP
    options = ("--port", str(port + 3), "--no-measure")
    url, logs = f"http://127.0.0.1:{port + 3}", [tmp_path / "node0", tmp_path / "node1"]
    state: Any = None
    with (
        node(0, port, folder, *options, said=logs[0]),
        node(1, port, folder, *options, said=logs[1]),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        end = time.monotonic() + 90
        while state is None or not (len(state["ranks"]) == 2 and whole(state)):
            assert time.monotonic() < end, (state, [log.read_text() for log in logs])
            with contextlib.suppress(httpx.TransportError):
                answer = client.get("/ranks")
                state = answer.json() if answer.status_code == 200 else None
            time.sleep(0.1)
        answer = client.post(COMPLETIONS, json=asked(1, max_tokens=40))
        assert answer.status_code == 200
        assert "degraded" not in answer.json()
        assert all(rank["assignments"] > 0 for rank in client.get("/ranks").json()["ranks"])
        pids = [int(rank["pid"]) for rank in state["ranks"]]
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, pids
        time.sleep(0.05)
