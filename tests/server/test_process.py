"""`handful serve` as a process: signals, ports, kills, and what it says when it cannot start."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import fresh
import httpx
import pytest
from builders import Call, calling, dense, mistake, tiny_data, training
from builders import moe as mixture
from serving import Running, chat_model

from handful.config import ModelConfig
from handful.errors import ConfigError, MissingExtraError
from handful.families.io import save
from handful.runs import newest_run
from handful.train import train

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a long context, so that an answer takes a while."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    model = chat_model(context=100_000)
    save(model, path)
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return calling(monkeypatch, capsys)


def test_it_shows_its_page(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the browser that the user's environment names."""
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\necho $1 > {tmp_path}/shown.part && mv {tmp_path}/shown.part {tmp_path}/shown\n")
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    running = Running(folder, "--open")
    end = time.monotonic() + 20
    while not (tmp_path / "shown").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert (tmp_path / "shown").read_text().strip() == running.url
    assert f"the page {running.url} shows" in running.said().replace("\n", " ")
    assert httpx.get(running.url).headers["content-type"].startswith("text/html")
    running.send(signal.SIGTERM)
    running.process.wait(20)


def test_the_first_signal_drains_and_the_second_ends_at_once(folder: Path) -> None:
    running = Running(folder, "--json")
    thread, lines, _ = running.stream(1500)
    with httpx.Client(base_url=running.url) as client:
        assert client.get("/ready").status_code == 200
        running.send(signal.SIGTERM)
        end = time.monotonic() + 10
        while client.get("/ready").status_code == 200:
            assert time.monotonic() < end
        refused = client.post(COMPLETIONS, json={"prompt": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert client.get("/health").status_code == 200
    thread.join(60)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert sum(line.startswith("data: ") for line in lines) > 500
    ended = running.process.wait(20)
    assert ended.returncode == 0
    assert json.loads(ended.stdout) == {"model": "tiny", "url": running.url, "context": 100_000}
    assert "ending after 1 open requests; once more: at once" in ended.stderr
    assert "Traceback" not in ended.stderr

    running = Running(folder)
    thread, lines, _ = running.stream(90_000)
    running.send(signal.SIGINT)
    while "ending after" not in running.said():
        time.sleep(0.01)
    began = time.monotonic()
    running.send(signal.SIGTERM)
    ended = running.process.wait(20)
    assert time.monotonic() - began < 2
    assert ended.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in ended.stderr
    thread.join(20)
    assert lines[-1].startswith("broken")


def test_killed_and_started_again_on_its_port(folder: Path) -> None:
    """A key from the environment; a second server on the port is one clear line."""
    running = Running(folder, "--api-key", "k")
    port = int(running.url.rpartition(":")[2])
    key = {"Authorization": "Bearer k"}
    assert httpx.get(f"{running.url}/v1/models", headers=key).json()["data"][0]["id"] == "tiny"
    second = fresh.python("-m", "handful", "serve", str(folder), "--port", str(port))
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == f"error port = {port}: in use; name another by --port\n"
    held = httpx.Client(base_url=running.url, headers=key)
    held.get("/health")
    running.process.kill()
    running.process.wait()
    running = Running(folder, "--api-key", "k", port=port)
    assert httpx.get(f"{running.url}/v1/models").status_code == 401
    held.close()
    running.send(signal.SIGTERM)
    assert running.process.wait(20).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# What it says when it cannot start.


def test_mistakes(folder: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HANDFUL_API_KEY", raising=False)
    assert mistake(call("serve")) == (
        "no run in 'runs': train one (make demo, or handful compare --out runs/demo), or name a model"
    )
    assert mistake(call("serve", folder, "--host", "0.0.0.0")).startswith("host = '0.0.0.0': others can reach it")
    assert mistake(call("serve", folder, "--host", "nowhere.invalid", "--no-auth")) == (
        "host = 'nowhere.invalid': no address of this computer"
    )
    assert mistake(call("serve", folder, "--host", "203.0.113.7", "--no-auth", "--port", "0")).startswith(
        "host = '203.0.113.7': "
    )
    assert mistake(call("serve", folder, "--max-body", "much")).startswith("max_body = 'much': a size")
    assert mistake(call("serve", folder, "--port", "0", "--max-sequences", "0")) == "max_sequences = 0: at least 1"
    assert "nowhere" in mistake(call("serve", "nowhere", "--port", "0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert mistake(call("serve", folder, "--port", port)) == f"port = {port}: in use; name another by --port"


def test_the_newest_run_is_served(tmp_path: Path) -> None:
    """Of a comparison a mixture of experts; what has no checkpoint yet is none."""
    data = tiny_data(tmp_path)
    runs = tmp_path / "runs"
    vocab = data.tokenizer.vocab_size

    def made(name: str, model: ModelConfig, second: int) -> None:
        list(train(model, training(steps=2), data, runs / name))
        os.utime((runs / name / "model" / "config.json").resolve(), (second, second))

    made("old/moe", mixture(vocab=vocab), 1000)
    made("demo/moe/seed-0", mixture(vocab=vocab), 2000)
    made("demo/dense-active/seed-0", dense(vocab=vocab), 3000)
    assert newest_run(runs) == runs / "demo/moe/seed-0"
    (runs / "begun").mkdir()
    (runs / "begun" / "run.json").write_text("{}")
    assert newest_run(runs) == runs / "demo/moe/seed-0"
    made("alone", dense(vocab=vocab), 4000)
    assert newest_run(runs) == runs / "alone"
    with pytest.raises(ConfigError, match="no run in"):
        newest_run(tmp_path / "nowhere")


@pytest.fixture
def without_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )


def test_packages_are_asked_for_by_name(without_uvicorn: None) -> None:
    import handful.server

    with pytest.raises(
        MissingExtraError, match=r"^handful serve needs the package 'uvicorn': pip install 'handful-moe\[server\]'$"
    ):
        importlib.reload(handful.server)


def test_help_names_every_option(call: Call) -> None:
    ended = call("serve", "--help")
    assert ended.code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", ended.out)
    for option in ("--host", "--port", "--memory", "--quant", "--api-key", "--no-auth", "--max-sequences", "--queue"):
        assert option in plain
