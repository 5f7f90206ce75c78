"""`org/name` is fetched from a hub: what is needed, once, and on from where it broke. This hub is the test's own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fresh
import pytest
from builders import moe

from handful.families.io import load, save
from handful.model import Decoder

COMMIT = "0" * 39 + "1"
CHILD = """
import sys
from handful.errors import HandfulError
from handful.families.io import load
try:
    print(float(load(sys.argv[1]).embed.weight.detach().double().sum()))
except HandfulError as error:
    print(error)
"""


class Hub:
    """Serves a folder as the repository org/name, with ranges.

    asked   (method, file, range) of every request for a file.
    cut     a file and how many of its bytes are sent, once, before the connection is closed.
    stall   the same, with the connection left open.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, str]] = []
        self.cut: tuple[str, int] | None = None
        self.stall: tuple[str, int] | None = None
        self.stalled = threading.Event()
        self.let_go = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = self.path.split("?")[0]
                if "/resolve/" in path:
                    hub.asked.append((self.command, path.rpartition("/")[2], self.headers.get("Range", "")))
                if path.startswith("/api/models/org/name"):
                    sizes = {str(p.relative_to(hub.folder)): p.stat().st_size for p in hub.folder.rglob("*")}
                    files = [{"type": "file", "path": p, "size": n, "oid": p} for p, n in sizes.items() if "." in p]
                    siblings = [{"rfilename": file["path"]} for file in files]
                    info = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
                    said = json.dumps(files if "/tree/" in path else info).encode()
                    self.give(200, said, body, {"Content-Type": "application/json"})
                    return
                file = hub.folder / path.removeprefix(f"/org/name/resolve/{COMMIT}/")
                if not path.startswith("/org/name/resolve/") or not file.is_file():
                    self.give(404, b"", body, {"X-Error-Code": "RepoNotFound"})
                    return
                content = file.read_bytes()
                extra = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                if start:
                    extra["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.give(206 if start else 200, content[start:], body, extra, file.name)

            def give(self, status: int, content: bytes, body: bool, extra: dict[str, str], name: str = "") -> None:
                self.send_response(status)
                for key, value in extra.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if not body:
                    return
                if hub.stall is not None and hub.stall[0] == name:
                    self.wfile.write(content[: hub.stall[1]])
                    self.wfile.flush()
                    hub.stalled.set()
                    hub.let_go.wait(60)
                    self.close_connection = True
                    return
                if hub.cut is not None and hub.cut[0] == name:
                    content, hub.cut = content[: hub.cut[1]], None
                    self.close_connection = True
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self, cache: Path, **changes: str) -> dict[str, str]:
        address = f"http://127.0.0.1:{self.server.server_port}"
        kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        return {
            **kept,
            "HF_ENDPOINT": address,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "0",  # libraries that other tests import may have set it
            **changes,
        }


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with a model of 26 MB, and the same again in forms that nobody needs."""
    folder = tmp_path / "repository"
    model = Decoder(moe(vocab=400_000))
    save(model, folder)
    (folder / "original").mkdir()
    for name in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "run.py"):
        (folder / name).write_bytes(b"never wanted")
    found = Hub(folder)
    yield found
    found.let_go.set()
    found.server.shutdown()
    found.server.server_close()


def child(environment: dict[str, str], name: str = "org/name") -> subprocess.CompletedProcess[str]:
    return fresh.python("-c", CHILD, name, env=environment)


def test_what_is_needed_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    right = f"{float(load(hub.folder).embed.weight.detach().double().sum())}\n"
    run = child(hub.environment(tmp_path / "cache"))
    assert run.stdout == right, run.stderr
    fetched = {name for method, name, _ in hub.asked if method == "GET"}
    assert fetched == {"config.json", "model.safetensors"}
    assert "config.json" in run.stderr or "Fetching" in run.stderr or "Download" in run.stderr  # its bars
    hub.asked.clear()
    assert child(hub.environment(tmp_path / "cache")).stdout == right
    assert "model.safetensors" not in {name for method, name, _ in hub.asked if method == "GET"}
    # Offline the cache is all there is, and asks nobody.
    hub.asked.clear()
    offline = hub.environment(tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert child(offline).stdout == right
    assert hub.asked == []
    said = child(offline, "org/other").stdout
    assert said.startswith("org/other: no such folder, and it cannot be downloaded: ")
    assert said.count("\n") == 1


def test_a_name_that_the_hub_has_not(hub: Hub, tmp_path: Path) -> None:
    said = child(hub.environment(tmp_path / "cache"), "org/none").stdout
    assert said.startswith("org/none: no such folder, and it cannot be downloaded: ")
    assert said.count("\n") == 1


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cut = ("model.safetensors", 15_000_000)  # huggingface_hub puts 10 MB at a time on the disk
    run = child(hub.environment(tmp_path / "cache"))
    assert run.stdout == f"{float(load(hub.folder).embed.weight.detach().double().sum())}\n", run.stderr
    ranges = [begin for method, name, begin in hub.asked if (method, name) == ("GET", "model.safetensors")]
    assert ranges == ["", f"bytes={10 << 20}-"]


def test_a_killed_download_keeps_its_whole_files(hub: Hub, tmp_path: Path) -> None:
    shutil.rmtree(hub.folder)
    save(Decoder(moe()), hub.folder, max_shard_bytes=10_000)
    shards = {file.name for file in hub.folder.glob("*.safetensors")}
    assert len(shards) == 4
    hub.stall = ("model-00003-of-00004.safetensors", 100)
    environment = hub.environment(tmp_path / "cache", HF_HUB_DISABLE_PROGRESS_BARS="1")
    first = fresh.Process("-c", CHILD, "org/name", env=environment)
    while len(list((tmp_path / "cache").rglob("snapshots/*/*"))) < 5 or not hub.stalled.is_set():
        assert first.poll() is None, first.wait()
        time.sleep(0.02)
    first.kill()
    assert first.wait().returncode == -signal.SIGKILL
    hub.stall = None
    hub.asked.clear()
    run = child(environment)
    assert run.stdout == f"{float(load(hub.folder).embed.weight.detach().double().sum())}\n", run.stderr
    assert {name for method, name, _ in hub.asked if method == "GET"} == {"model-00003-of-00004.safetensors"}
    said = "org/name: no such folder here; looking for it on the Hugging Face Hub\n"
    assert run.stderr == said  # and no bars where they are not wanted
