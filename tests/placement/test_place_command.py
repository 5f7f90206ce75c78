"""`handful place`: from files of loads and routings to a placement, its table, its traffic and what moving costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import Call, calling, mistake, moe, routing_of

from handful.families.io import save
from handful.model import Decoder
from handful.observe import Recorder, Recording
from handful.placement import read_load

KNOWN = [600, 560, 120, 120, 20, 10, 10, 10]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return calling(monkeypatch, capsys)


def test_from_a_file_of_loads(call: Call, tmp_path: Path) -> None:
    """Written, read again as what was before, with a device that is gone; the table has a row for each layer."""
    (tmp_path / "load.json").write_text(json.dumps({"load": [KNOWN, [1] * 8]}))
    out = tmp_path / "placement.json"
    first = call("place", tmp_path / "load.json", "--devices", "8", "--slots", "2", "--out", out)
    assert first.code == 0
    assert "1.280" in first.out  # greedy 232 of 181.25
    assert "1.085" in first.out  # ours, 196.67
    written = json.loads(out.read_text())
    assert [len(layer["experts"]) for layer in written["layers"]] == [8, 8]
    again = ["--devices", "8", "--slots", "2", "--dead", "7", "--before", out, "--json"]
    second = call("place", tmp_path / "load.json", *again)
    found = json.loads(second.out)
    assert found["slots"] == [2] * 7 + [0]
    for layer in found["layers"]:
        assert layer["experts"][7] == []
        assert layer["published"] is None
        assert 0 < layer["moved"] <= 10
        assert layer["bound"] <= layer["equal"] * (1 + 1e-9)
        assert 1 - 1e-9 <= layer["split"] <= layer["equal"] * (1 + 1e-9)


def test_loads_of_a_routing_and_of_an_inspection(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.add([routing_of([[0, 2], [1, 2]], 3, torch.ones(2, 2)), routing_of([[0, 1], [1, 0]], 3, torch.ones(2, 2))])
    recorder.recording().save(tmp_path / "routing.safetensors")
    assert read_load(tmp_path / "routing.safetensors") == [[1, 1, 2], [2, 2, 0]]
    layers = [{"experts": [{"load": 0.75}, {"load": 0.25}]}]
    (tmp_path / "inspect.json").write_text(json.dumps({"sides": [{"layers": layers}]}))
    assert read_load(tmp_path / "inspect.json") == [[0.75, 0.25]]


def test_mistakes(call: Call, tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text(json.dumps({"load": [[1, 2, 3]]}))
    (tmp_path / "other.json").write_text("{}")
    load = tmp_path / "load.json"
    assert "devices; 3 experts do not fit" in mistake(call("place", load, "--devices", "2", "--slots", "1"))
    assert "neither inspect.json" in mistake(call("place", tmp_path / "other.json", "--devices", "2", "--slots", "2"))
    assert "dead = 2: a device from 0 to 1" in mistake(
        call("place", load, "--devices", "2", "--slots", "3", "--dead", "2")
    )
    wrong = call("place", load, "--devices", "2", "--slots", "3", "--before", tmp_path / "other.json")
    assert "no placement that handful place wrote" in mistake(wrong)


def recorded(folder: Path, experts: int = 8, layers: int = 2) -> Path:
    """A routing whose tokens go to 0-3 or to 4-7."""
    draw = torch.Generator().manual_seed(0)
    half = torch.randint(2, (400,), generator=draw)
    chosen = [
        torch.stack([torch.randperm(experts // 2, generator=draw)[:2] + experts // 2 * int(h) for h in half])
        for _ in range(layers)
    ]
    weights = [torch.ones(400, 2).half() for _ in range(layers)]
    Recording([one.to(torch.uint8) for one in chosen], weights, [None] * layers).save(folder / "routing.safetensors")
    return folder / "routing.safetensors"


def model(folder: Path) -> Path:
    """Two layers of 8 experts of 3 · 16 · 12 numbers."""
    save(Decoder(moe({"experts": 8})), folder / "model")
    return folder / "model"


def test_near_each_other(call: Call, tmp_path: Path) -> None:
    file = recorded(tmp_path)
    base = ["place", file, "--devices", "4", "--slots", "2", "--nodes", "2"]
    assert "a routing of generate" not in call(*base).err
    found = json.loads(call(*base, "--near", "0.1", "--json").out)
    for layer in found["layers"]:
        dealt, alone, made = layer["crossings"]
        assert made["nodes"] == pytest.approx(0.5, abs=0.04)
        assert made["nodes"] <= alone["nodes"]
        assert made["devices"] <= dealt["devices"]
    shown = call(*base, "--near", "0.1", "--model", model(tmp_path))
    assert shown.code == 0
    assert "0.53 / 0.84 / 0.47" in shown.out
    assert "bytes" in shown.out


def test_moving_is_priced(call: Call, tmp_path: Path) -> None:
    """An expert is 3 · 16 · 12 numbers of 2 bytes: 1152; the room for three of each of two layers is 6912 bytes."""
    (tmp_path / "load.json").write_text(json.dumps({"load": [KNOWN[::-1]] * 2}))
    (tmp_path / "even.json").write_text(json.dumps({"load": [[1] * 8] * 2}))
    out = tmp_path / "before.json"
    room = ["--devices", "4", "--nodes", "2", "--memory", "6912", "--model", str(model(tmp_path))]
    first = json.loads(call("place", tmp_path / "even.json", *room, "--out", out, "--json").out)
    assert first["slots"] == [3] * 4
    assert first["moves"] is None
    links = ["--link", "1MB/s", "--node-link", "100kB/s,1ms", "--before", str(out), "--step-time", "0.5"]
    found = json.loads(call("place", tmp_path / "load.json", *room, *links, "--json").out)
    moved = found["moves"]
    assert moved["bytes"] == 1152 * (moved["experts"] - moved["unheld"])
    assert moved["seconds"] > 0
    assert moved["steps"] >= 1
    assert sum(link["experts"] for link in moved["links"]) == moved["experts"]
    told = call("place", tmp_path / "load.json", *room, *links)
    assert f"it has paid after {moved['steps']:,} steps" in told.out
    assert "moving never pays" in call("place", tmp_path / "even.json", *room, *links).out


def test_a_cluster_of_a_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text(json.dumps({"load": [KNOWN]}))
    cluster = tmp_path / "cluster.toml"
    cluster.write_text("[[nodes]]\ndevices = 4\nslots = 2\n[[nodes]]\ndevices = 2\nslots = [4, 3]\ndead = [1]\n")
    found = json.loads(call("place", tmp_path / "load.json", "--topology", cluster, "--json").out)
    assert (found["slots"], found["nodes"]) == ([2, 2, 2, 2, 4, 0], [0, 0, 0, 0, 1, 1])
    gone = call("place", tmp_path / "load.json", "--topology", cluster, "--dead-node", "1", "--json")
    assert json.loads(gone.out)["slots"] == [2, 2, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--slots", "2"], "devices: how many there are, or --topology"),
        (["--devices", "4"], "slots, memory: exactly one of them"),
        (["--devices", "4", "--slots", "2", "--nodes", "3"], "nodes = 3: a number that divides"),
        (["--devices", "4", "--memory", "1GB"], "the bytes of an expert are not known"),
        (["--devices", "4", "--slots", "2", "--link", "fast"], "link = 'fast': bytes a second"),
        (["--devices", "4", "--slots", "2", "--near", "0.1"], "near = 0.1: a routing of generate"),
        (["--devices", "4", "--slots", "2", "--step-time", "0"], "step-time = 0.0: seconds, above 0"),
        (["--devices", "4", "--slots", "2", "--model", "mixtral"], "32 layers of 8 experts; the load has 1 of 3"),
        (["--topology", "cluster.toml", "--slots", "2"], "slots: the file of --topology says that"),
        (["--topology", "cluster.toml"], "topology = 'cluster.toml'"),
    ],
)
def test_options_that_do_not_fit(options: list[str], said: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text(json.dumps({"load": [[1, 2, 3]]}))
    assert said in mistake(call("place", tmp_path / "load.json", *options))
