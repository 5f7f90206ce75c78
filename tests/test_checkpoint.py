"""Checkpoints are written whole or not at all, and refused with file and tensor named when they are not whole."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from handful import checkpoint
from handful.checkpoint import check_tensors, point, read_json, read_tensors, write_file, write_folder
from handful.errors import CheckpointError

A = torch.arange(6, dtype=torch.float32).reshape(2, 3)
B = torch.ones(4, dtype=torch.bfloat16)


def same(found: Any, expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards."""
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    files = {"one.safetensors": {"a": A}, "two.safetensors": {"b": B}, "model.safetensors.index.json": index}
    write_folder(tmp_path / "model", files)
    return tmp_path / "model"


# ---------------------------------------------------------------------------------------------------------------------
# Round trips.


def test_folder_of_every_kind_of_content(tmp_path: Path) -> None:
    state = {"a": A, "b": B, "n": torch.tensor(7), "none": torch.empty(0, 3), "scalar": torch.tensor(1.5)}
    files = {"model.safetensors": state, "trainer.json": {"step": 3}, "tokenizer.json": b"{}", "events": "é\n"}
    write_folder(tmp_path / "deep" / "step-3", files)
    assert same(read_tensors(tmp_path / "deep" / "step-3"), state)
    assert read_json(tmp_path / "deep" / "step-3" / "trainer.json") == {"step": 3}
    assert (tmp_path / "deep" / "step-3" / "tokenizer.json").read_bytes() == b"{}"
    assert (tmp_path / "deep" / "step-3" / "events").read_text(encoding="utf-8") == "é\n"
    assert sorted(os.listdir(tmp_path / "deep")) == ["step-3"]


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.randn(3, 4, 5)
    state = {"row": whole[1, :2], "turned": whole[0].t(), "grown": whole[2].requires_grad_()}
    write_file(tmp_path / "views.safetensors", state)
    assert same(read_tensors(tmp_path / "views.safetensors"), {name: t.detach() for name, t in state.items()})


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write_file(tmp_path / "none.safetensors", {})
    assert dict(read_tensors(tmp_path / "none.safetensors")) == {}


def test_shards_are_read_through_the_index(folder: Path) -> None:
    tensors = read_tensors(folder)
    assert same(tensors, {"a": A, "b": B})
    assert (tensors.shape("a"), tensors.where("b"), len(tensors)) == ((2, 3), folder / "two.safetensors", 2)


def test_reading_is_lazy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Spy:
        def __init__(self, path: Path) -> None:
            self.inner = safe_open(path, framework="pt")

        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(self.inner, name)

    monkeypatch.setattr(checkpoint, "_open", Spy)
    tensors = read_tensors(folder)
    check_tensors({"a": (2, 3), "b": (4,)}, tensors)
    assert set(asked) == {"keys", "get_slice"}
    assert torch.equal(tensors["a"], A)
    assert asked[-1] == "get_tensor"


# ---------------------------------------------------------------------------------------------------------------------
# Refusals.


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_truncated_anywhere_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    write_file(file, {"a": A, "b": B})
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or malformed"):
        read_tensors(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_header_is_refused_or_changes_no_more_than_it_says(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    write_file(file, {"a": A, "b": B})
    content = bytearray(file.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    refused = ""
    try:
        tensors = read_tensors(tmp_path)
        check_tensors({"a": (2, 3), "b": (4,)}, tensors)
        # A spelling that means the same, or another dtype of the same size.
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"a": (2, 3), "b": (4,)}
    except CheckpointError as error:
        refused = str(error)
    assert not refused or "model.safetensors" in refused


def broken(change: Callable[[Path], object], message: str, name: str) -> Any:
    return pytest.param(change, message, id=name)


def index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        broken(lambda f: os.remove(f / "two.safetensors"), r"two\.safetensors: no such file", "missing shard"),
        broken(lambda f: index(f, "{"), r"index\.json: not JSON", "index cut off"),
        broken(lambda f: index(f, "[1]"), r"index\.json: must hold a JSON object", "index a list"),
        broken(lambda f: index(f, "{}"), r"index\.json: no weight_map", "no map"),
        broken(lambda f: index(f, '{"weight_map": {"a": 1}}'), r"weight_map\['a'\] = 1: must name", "not a name"),
        broken(
            lambda f: index(f, '{"weight_map": {"a": "../one.safetensors"}}'),
            r"weight_map\['a'\] = '\.\./one\.safetensors': must name",
            "a way out",
        ),
        broken(
            lambda f: index(f, '{"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}'),
            r"two\.safetensors: tensor 'c' is missing",
            "tensor not in its shard",
        ),
        broken(shutil.rmtree, r"model: no such checkpoint folder", "no folder"),
        broken(empty, r"model: no model\.safetensors and no", "empty folder"),
    ],
)
def test_broken_shards_are_refused(folder: Path, change: Callable[[Path], object], message: str) -> None:
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(folder)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "disguised.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        read_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="malformed"):
        read_tensors(tmp_path / "disguised.safetensors")
    assert not (tmp_path / "exploded").exists()


def test_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint folder"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors: no such file"):
        read_tensors(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match=r"nowhere\.json: no such file"):
        read_json(tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"a": (2, 3)}, r"two\.safetensors: unexpected tensor 'b'$"),
        ({}, r"one\.safetensors: unexpected tensor 'a' \(and 1 more\)"),
        ({"a": (2, 3), "b": (4,), "c": ()}, r"one\.safetensors, two\.safetensors: tensor 'c' is missing$"),
        ({"a": (2, 3), "b": (4,), "c": (), "d": ()}, r"tensor 'c' is missing \(and 1 more\)"),
        ({"a": (3, 2), "b": (4,)}, r"one\.safetensors: tensor 'a' has shape \[2, 3\]: must be \[3, 2\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, expected: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_tensors(expected, read_tensors(folder))


def test_a_plain_mapping_is_checked_too() -> None:
    check_tensors({"a": (2, 3)}, {"a": A, "b": B}, ignored={"b"})
    with pytest.raises(CheckpointError, match=r"the model: tensor 'a' has shape \[2, 3\]: must be \[6\]"):
        check_tensors({"a": (6,)}, {"a": A}, source="the model")


# ---------------------------------------------------------------------------------------------------------------------
# Kills and full disks.


class Killed(BaseException):
    """Like a kill: nothing may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Die instead of the `at`-th operation that touches the disk, counted from 0."""
    count = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > at:
                raise Killed
            return operation(*args, **kwargs)

        return run

    monkeypatch.setattr(checkpoint, "save_file", counted(save_file))
    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "model"
    old, new = {"a": A}, {"a": A + 1, "b": B}
    outcomes = []
    for at in range(20):
        write_folder(path, {"model.safetensors": old, "trainer.json": {"step": 1}})
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, at)
            try:
                write_folder(path, {"model.safetensors": new, "trainer.json": {"step": 2}})
            except Killed:
                finished = False
            else:
                finished = True
        # Between the two renames both wait under hidden names, whole.
        standing = path if path.exists() else tmp_path / ".old-model"
        step = read_json(standing / "trainer.json")["step"]
        assert same(read_tensors(standing), {1: old, 2: new}[step])
        outcomes.append((path.exists(), step))
        write_folder(path, {"model.safetensors": new})
        assert same(read_tensors(path), new)
        assert os.listdir(tmp_path) == ["model"]
        if finished:
            break
    gap = outcomes.index((False, 1))
    assert finished
    assert set(outcomes[:gap]) == {(True, 1)}
    assert set(outcomes[gap + 1 :]) == {(True, 2)}


@pytest.mark.parametrize("content", ["new", b"new", {"step": 2}])
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "run.json"
    for at in range(4):
        write_file(path, "old")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, at)
            try:
                write_file(path, content)
            except Killed:
                assert path.read_text() == "old" if at < 2 else path.read_text() != "old"
            else:
                assert at == 3


def test_a_link_moves_in_one_rename(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_folder(tmp_path / name, {"name.json": {"name": name}})
    point(tmp_path / "model", "one")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 0)
        with pytest.raises(Killed):
            point(tmp_path / "model", "two")
    assert read_json(tmp_path / "model" / "name.json") == {"name": "one"}
    point(tmp_path / "model", "two")
    assert read_json(tmp_path / "model" / "name.json") == {"name": "two"}


WRITER = """
import sys, torch
from pathlib import Path
from handful.checkpoint import point, write_folder
run = Path(sys.argv[1])
for step in range(1, 10**6):
    state = {f"w{i}": torch.full((300, 200), float(step)) for i in range(5)}
    write_folder(run / f"step-{step}", {"model.safetensors": state, "trainer.json": {"step": step}})
    point(run / "model", f"step-{step}")
    print(step, flush=True)
"""


def test_a_real_kill_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(5):
            writer.stdout.readline()
        time.sleep(0.02)
        writer.send_signal(signal.SIGKILL)
    step = read_json(tmp_path / "model" / "trainer.json")["step"]
    assert step >= 5
    assert same(read_tensors(tmp_path / "model"), {f"w{i}": torch.full((300, 200), float(step)) for i in range(5)})
    for folder in tmp_path.glob("step-*"):  # every folder that has its name is whole
        assert set(read_tensors(folder)) == {f"w{i}" for i in range(5)}


def test_what_the_disk_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*File exists"):
        write_folder(tmp_path / "file" / "model", {"a.json": {}})
    with pytest.raises(CheckpointError, match=r"cannot be written: .*File exists"):
        write_file(tmp_path / "file" / "a.json", {})
    with pytest.raises(CheckpointError, match=r"cannot be pointed at one: .*No such file"):
        point(tmp_path / "nowhere" / "model", "one")


def test_a_failed_write_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    write_folder(path, {"model.safetensors": {"a": A}})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"model: cannot be written: .*No space left on device"):
        write_folder(path, {"model.safetensors": {"a": A + 1}})
    assert same(read_tensors(path), {"a": A})


def test_json_is_written_for_people(tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", {"step": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "step": 1\n}\n'
    assert json.loads((tmp_path / "a.json").read_text()) == {"step": 1}
