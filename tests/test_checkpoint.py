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
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from handful import checkpoint, safetensors_file
from handful.checkpoint import check_tensors, point, read_json, read_tensors, shards, write_file, write_folder
from handful.errors import CheckpointError, ConfigError
from handful.lazy_tensors import Entry, Tensors

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
    read: list[tuple[str, int]] = []
    fill = safetensors_file._File.fill

    def spy(file: Any, out: Tensor, start: int) -> None:
        read.append((file.path.name, out.nbytes))
        fill(file, out, start)

    monkeypatch.setattr(safetensors_file._File, "fill", spy)
    tensors = read_tensors(folder)
    check_tensors({"a": (2, 3), "b": (4,)}, tensors)
    assert tensors.entry("b").dtype == torch.bfloat16
    assert read == []
    assert torch.equal(tensors["a"], A)
    assert torch.equal(tensors.entry("a").read(1), A[1])
    assert read == [("one.safetensors", 24), ("one.safetensors", 12)]


@pytest.mark.parametrize("chunk", [8, 12, 1 << 22])
def test_a_tensor_is_read_into_any_dtype_and_any_layout(
    folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "CHUNK", chunk)
    tensors = read_tensors(folder)
    assert tensors.entry("a").read(dtype=torch.float64).equal(A.double())
    whole = torch.zeros(3, 2, 2)
    tensors.entry("a").fill(whole[:, :, 1].t(), None)
    assert whole[:, :, 1].t().equal(A)
    assert whole[:, :, 0].count_nonzero() == 0
    # One that is in memory is as it is, or in another dtype.
    held = Tensors.of({"a": A}).entry("a")
    assert held.read().data_ptr() == A.data_ptr()
    assert held.read(1, torch.bfloat16).equal(A[1].bfloat16())


def test_what_is_read_later_is_of_the_file_that_was_opened(folder: Path) -> None:
    tensors = read_tensors(folder)
    write_folder(folder, {"one.safetensors": {"a": A + 1}})
    assert torch.equal(tensors["a"], A)
    assert torch.equal(read_tensors(folder / "one.safetensors")["a"], A + 1)


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    tensors = read_tensors(folder)
    os.truncate(folder / "one.safetensors", (folder / "one.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"one\.safetensors: truncated while it was read"):
        _ = tensors["a"]


# ---------------------------------------------------------------------------------------------------------------------
# The format, and shards.


ALL = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    state = {f"{dtype}": torch.arange(7).to(dtype) for dtype in ALL}
    state |= {"t": A.t(), "none": torch.empty(0, 5), "one": torch.tensor(3.0), "naïve\n": B}
    write_file(tmp_path / "ours.safetensors", state)
    theirs = load_file(tmp_path / "ours.safetensors")
    assert same(theirs, state)
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "theirs.safetensors", {"some": "words"})
    assert same(read_tensors(tmp_path / "theirs.safetensors"), state)
    # Every tensor begins at a multiple of its item's size.
    text = (tmp_path / "ours.safetensors").read_bytes()
    length = struct.unpack("<Q", text[:8])[0]
    header = json.loads(text[8 : 8 + length])
    begins = {name: 8 + length + header[name]["data_offsets"][0] for name in state}
    assert all(begins[name] % t.element_size() == 0 for name, t in state.items())


def test_a_dtype_that_the_format_has_not(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/a\.safetensors: cannot be written: tensor 'c' is torch\.complex64"):
        write_file(tmp_path / "a.safetensors", {"c": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "a.safetensors").exists()


def test_shards_are_as_large_as_they_may_be(tmp_path: Path) -> None:
    state = {name: torch.full((n,), float(n)) for name, n in {"a": 2, "b": 3, "c": 1, "d": 9, "e": 1}.items()}
    files = shards(state, 20)
    assert {name: list(content) for name, content in files.items() if name.endswith("safetensors")} == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d"],  # larger than a shard may be, and alone
        "model-00004-of-00004.safetensors": ["e"],
    }
    index = files["model.safetensors.index.json"]
    assert index["metadata"] == {"total_size": 4 * 16}
    assert index["weight_map"] == {
        name: f"model-0000{i}-of-00004.safetensors" for name, i in zip("abcde", (1, 1, 2, 3, 4), strict=True)
    }
    write_folder(tmp_path / "model", files)
    assert same(read_tensors(tmp_path / "model"), state)
    assert list(shards(state, 64)) == list(shards({}, 1)) == ["model.safetensors"]
    with pytest.raises(ConfigError, match=r"^max_shard_bytes = 0: at least 1$"):
        shards(state, 0)


def test_tensors_are_made_one_at_a_time_when_they_are_written(tmp_path: Path) -> None:
    """And those that are stacks of matrices that are made for it."""
    alive: list[int] = []
    made: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def entry(value: float) -> Entry:
        def fill(out: Tensor, part: int | None) -> None:
            assert part is not None
            made.add(out)
            alive.append(len(made))
            out.fill_(value + part)

        return Entry(torch.float32, (3, 2, 2), fill)

    write_file(tmp_path / "a.safetensors", Tensors({"x": entry(0), "y": entry(10)}))
    assert max(alive) <= 2
    assert len(alive) == 6
    assert read_tensors(tmp_path / "a.safetensors")["y"][:, 0, 0].tolist() == [10, 11, 12]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals.


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

    monkeypatch.setattr(checkpoint, "write_tensors", counted(safetensors_file.write_tensors))
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
    with pytest.raises(CheckpointError, match=r"cannot be written: File exists$"):
        write_folder(tmp_path / "file" / "model", {"a.json": {}})
    with pytest.raises(CheckpointError, match=r"cannot be written: File exists$"):
        write_file(tmp_path / "file" / "a.json", {})
    with pytest.raises(CheckpointError, match=r"cannot be pointed at one: No such file or directory$"):
        point(tmp_path / "nowhere" / "model", "one")


def test_a_failed_write_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    write_folder(path, {"model.safetensors": {"a": A}})

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"model: cannot be written: No space left on device$"):
        write_folder(path, {"model.safetensors": {"a": A + 1}})
    with pytest.raises(CheckpointError, match=r"b\.safetensors: cannot be written: No space left on device$"):
        write_file(tmp_path / "b.safetensors", {"a": A})
    assert same(read_tensors(path), {"a": A})
    assert [file.name for file in tmp_path.iterdir()] == ["model"]  # and nothing half-written takes the last bytes


def test_a_folder_that_could_not_give_way_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    write_folder(path, {"a.json": 1})
    real, calls = os.rename, 0

    def second_fails(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_folder(path, {"a.json": 2})
    assert (path / "a.json").read_text() == "1\n"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_json_is_written_for_people(tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", {"step": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "step": 1\n}\n'
    assert json.loads((tmp_path / "a.json").read_text()) == {"step": 1}
