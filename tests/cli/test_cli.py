"""The command line: every verb, one document on stdout for `--json`, mistakes told in one line.

Most tests call `main` in this process; what belongs to a process (exit, pipes, what is imported) gets one of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Call, Ended, calling, document, mistake, of_kind, read_lines, write_text
from serving import chat_model

from handful import __version__
from handful.cli import main
from handful.config_io import to_dict
from handful.data import Batches, load_data
from handful.evaluate import batch_loss
from handful.families.io import load, save
from handful.machine import Measured
from handful.model import Decoder
from handful.observe import Recording
from handful.presets import PRESETS
from handful.text import load_tokenizer

VERBS = [
    "compare",
    "train",
    "upcycle",
    "generate",
    "chat",
    "serve",
    "eval",
    "presets",
    "cost",
    "plan",
    "doctor",
    "verify",
]

SETTINGS = """
[data]
source = "text"
vocab = 300
[model]
width = 16
layers = 2
heads = 2
experts = 4
expert_width = 8
[train]
steps = 4
batch = 4
context = 16
eval_tokens = 128
eval_every = 2
checkpoint_every = 2
dtype = "float32"
"""


@pytest.fixture
def handful(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`handful …` as it is called from a shell, with a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    return calling(monkeypatch, capsys)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, the settings of a tiny model and, in `run`, its training."""
    home = tmp_path_factory.mktemp("cli")
    write_text(home / "text")
    (home / "tiny.toml").write_text(SETTINGS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("HANDFUL_CACHE", str(home / "cache"))
        patch.setattr(sys, "argv", ["handful", "train", "tiny.toml", "--out", "run"])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return home


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HANDFUL_CACHE", str(home / "cache"))
    return home


# ---------------------------------------------------------------------------------------------------------------------
# Help, version, usage.


def test_alone_it_lists_the_verbs_and_says_where_to_start(handful: Call) -> None:
    result = handful()
    text = result.out + result.err
    assert all(f" {verb} " in text for verb in VERBS)
    assert "Start with: handful compare" in text
    assert handful("--help").code == 0
    assert "Start with: handful compare" in handful("-h").out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verbs_help_shows_an_example(verb: str, handful: Call) -> None:
    result = handful(verb, "--help")
    assert (result.code, result.err) == (0, "")
    assert f"Example: handful {verb} " in " ".join(result.out.split())
    assert "--json" in result.out


def test_brackets_in_help_are_shown(handful: Call) -> None:
    assert "A TOML file: [model], [train], [data]." in handful("train", "--help").out


def test_version(handful: Call) -> None:
    assert handful("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nope"], "nope"),
        (["cost"], "model"),
        (["cost", "mixtral", "--rank", "8"], "--rank"),
        (["cost", "mixtral", "--ranks", "0"], "--ranks"),
        (["cost", "mixtral", "--context", "long"], "--context"),
        (["train", "--steps", "1.5"], "--steps"),
        (["compare", "--seeds", "0"], "--seeds"),
        (["compare", "--minutes", "0"], "--minutes"),
        (["generate", "run"], "prompt"),
    ],
)
def test_wrong_usage(arguments: list[str], names: str, handful: Call) -> None:
    result = handful(*arguments)
    assert (result.code, result.out) == (2, "")
    assert names in result.err.lower()
    assert "Traceback" not in result.err


def test_an_interruption_is_130(handful: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("handful.cost"), "cost", pressed)  # `handful.cost` is the function
    result = handful("cost", "mixtral")
    assert result.code == 130
    assert result.err == "interrupted: nothing was begun that is kept; the same command starts anew\n"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "Start with: handful compare"),
        (["generate", "--help"], "Go on from a prompt"),
        (["cost", "mixtral"], "46,702,792,704"),
        (["cost", "mixtrel"], ""),
    ],
)
def test_what_needs_no_torch(arguments: list[str], shown: str) -> None:
    code = (
        f"import sys; from handful.cli import main; sys.argv = ['handful', *{arguments}]\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown in " ".join(result.stdout.split())
    assert result.stdout.splitlines()[-1] == "False False"


def test_a_mistake_in_a_process_of_its_own() -> None:
    result = subprocess.run([sys.executable, "-m", "handful", "cost", "a[red]b"], capture_output=True, text=True)
    known = ", ".join(PRESETS)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error 'a[red]b': no such file or folder, and no preset: {known}\n"


# ---------------------------------------------------------------------------------------------------------------------
# cost and doctor.


def test_the_price_of_a_preset(handful: Call) -> None:
    found = document(handful("cost", "mixtral", "--json"))
    assert (found["model"], found["note"]) == ("mixtral", PRESETS["mixtral"].source)
    assert found["total_parameters"]["incl_all_embeddings"] == 46_702_792_704  # Mixtral's published checkpoint
    result = handful("cost", "mixtral")
    assert result.code == 0
    assert result.out.startswith("computes like a 12.9 B dense model, holds like a 46.7 B one\n")
    assert "46,702,792,704" in result.out
    assert result.err == f"{PRESETS['mixtral'].source}\n"


def test_a_preset_without_a_published_decoder_says_what_is_priced(handful: Call) -> None:
    result = handful("cost", "switch", "--json")
    note = document(result)["note"]
    assert note == f"{PRESETS['switch'].source}: no published decoder; this is the small model with its router"
    assert result.err == f"{note}\n"


def test_context_ranks_and_dtype(handful: Call) -> None:
    plain = document(handful("cost", "mixtral", "--json"))
    asked = document(
        handful("cost", "mixtral", "--json", "--context", "8192", "--ranks", "8", "--dtype", "float32"),
    )
    assert (plain["context"], plain["ranks"], plain["dtype"]) == (32768, 1, "bfloat16")
    assert (asked["context"], asked["ranks"], asked["dtype"]) == (8192, 8, "float32")
    assert asked["bytes"]["weights"] == 2 * plain["bytes"]["weights"]
    assert asked["flops"]["prefill"] < plain["flops"]["prefill"]
    assert "sent between 8 ranks per token" in handful("cost", "mixtral", "--ranks", "8").out
    assert "ranks" not in handful("cost", "mixtral").out


def test_the_price_of_a_run_its_checkpoint_and_its_config(handful: Call, at_home: Path) -> None:
    run, folder, file = (
        document(handful("cost", path, "--json")) for path in ("run", "run/model", "run/model/config.json")
    )
    assert run["note"] is None
    start = of_kind("start", read_lines(at_home / "run/events.jsonl"))[0]
    assert run["total_parameters"]["incl_all_embeddings"] == start["parameters"]["total"]
    assert {**run, "model": ""} == {**folder, "model": ""} == {**file, "model": ""}


def test_a_price_that_there_is_not(handful: Call, at_home: Path) -> None:
    assert mistake(handful("cost", "mixtrel")).startswith("'mixtrel': no such file or folder, and no preset: switch, ")
    assert mistake(handful("cost", "./nowhere/at/all")) == "./nowhere/at/all: no such folder"
    assert mistake(handful("cost", "text")).startswith("text: holds no checkpoint (config.json)")
    assert "tiny.toml" in mistake(handful("cost", "tiny.toml"))
    assert "float8" in mistake(handful("cost", "mixtral", "--dtype", "float8"))


def test_debug_shows_where() -> None:
    command = [sys.executable, "-m", "handful", "--debug", "cost", "mixtrel"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert "handful.errors.ConfigError: 'mixtrel': no such file or folder" in result.stderr.splitlines()[-1]


TINY_LAYER = {"width": 8, "hidden": 8, "experts": 4, "top_k": 2}


def test_doctor(handful: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Measured(read_bytes_per_second=12.5e9, float32_flops=99.5e9, bfloat16_flops=1.25e12)
    monkeypatch.setattr("handful.machine.measure", lambda: rates)
    monkeypatch.setattr("handful.experts.selection.TIMED", (("decoding", 1, dict(TINY_LAYER)),))
    result = handful("doctor", "--json")
    found = document(result)
    assert result.err == ""
    assert [(row["dtype"], row["picked"]) for row in found["timed"]] == [
        (dtype, found["experts"][dtype]["backend"]) for dtype in ("float32", "bfloat16")
    ]
    assert found["experts"]["float16"]["backend"] == "reference"
    assert (found["handful"], found["measured"]) == (__version__, vars(rates))
    assert found["machine"]["cores"] >= 1
    result = handful("doctor")
    assert (result.code, result.err) == (0, "")
    for value in (__version__, "12.5 GB/s", "99.5 GFLOP/s", "1.25 TFLOP/s"):
        assert value in result.out


# ---------------------------------------------------------------------------------------------------------------------
# train.


def test_train_and_go_on(handful: Call, at_home: Path, tmp_path: Path) -> None:
    result = handful("train", "tiny.toml", "--out", tmp_path / "run", "--top-k", "1", "--seed", "3", "--json")
    found = document(result)
    events = read_lines(tmp_path / "run/events.jsonl")
    assert "held-out loss" in result.err
    assert (found["event"], found["step"], found["loss"]) == ("end", 4, events[-1]["loss"])
    assert Path(found["model"], "config.json").exists()
    assert Path(found["report"]).stat().st_size > 1000
    asked = json.loads((tmp_path / "run/run.json").read_text("utf-8"))
    assert (asked["model"]["router"]["top_k"], asked["model"]["router"]["normalize"]) == (1, False)
    assert (asked["train"]["seed"], asked["train"]["steps"]) == (3, 4)

    # A run that was killed after its second step: it goes on from there, to the same end.
    for path in (tmp_path / "run/checkpoints/step-000004").iterdir():
        path.unlink()
    (tmp_path / "run/checkpoints/step-000004").rmdir()
    again = handful("train", "--resume", "--out", tmp_path / "run")
    assert again.code == 0
    assert f"{found['loss']:.4f} nats a token" in again.out
    steps = of_kind("step", read_lines(tmp_path / "run/events.jsonl"))
    assert [e["loss"] for e in steps] == [e["loss"] for e in of_kind("step", events)]


def test_train_leaves_a_run_alone(handful: Call, at_home: Path) -> None:
    before = (at_home / "run/events.jsonl").read_bytes()
    message = mistake(handful("train", "tiny.toml", "--out", "run"))  # one line: before the text is read
    assert message == "out = 'run': holds a run; go on with it by --resume, or name another by --out"
    assert (at_home / "run/events.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "9"], ["tiny.toml"], ["--router", "olmoe"], ["--balance", "none"], ["--data", "text"],
        ["--from", "run"], ["--only", "experts"],
    ],
)  # fmt: skip
def test_a_run_goes_on_with_its_own_settings(options: list[str], handful: Call, at_home: Path) -> None:
    message = mistake(handful("train", *options, "--resume", "--out", "run"))
    assert message == "resume: the run goes on with its own settings; give --out and --resume alone"


# ---------------------------------------------------------------------------------------------------------------------
# upcycle, and train --from.


@pytest.fixture(scope="module")
def dense_run(home: Path) -> Path:
    """A dense model's run, below home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("HANDFUL_CACHE", str(home / "cache"))
        text = SETTINGS.replace("experts = 4\nexpert_width = 8\n", "ffn = 24\n")
        (home / "dense.toml").write_text('router = "none"\n' + text, encoding="utf-8")
        patch.setattr(sys, "argv", ["handful", "train", "dense.toml", "--out", "dense"])
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return home / "dense"


SHORT = ["--data", "text", "--context", "16", "--eval-tokens", "128"]


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "copy", "--experts", "4"],
        ["--method", "granular", "--experts", "3", "--top-k", "1", "--slices", "4"],
        ["--method", "split", "--experts", "4", "--top-k", "4", "--fit-tokens", "64"],
    ],
)
def test_upcycle_then_train(options: list[str], handful: Call, at_home: Path, dense_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    result = handful("upcycle", "dense", out, *options, *SHORT, "--json")
    found = document(result)
    assert (found["method"], found["written_as"], found["why_not_public"]) == (options[1], "qwen3_moe", None)
    assert found["after"]["loss"] == pytest.approx(found["before"]["loss"], rel=1e-5)
    trained = of_kind("eval", read_lines(dense_run / "events.jsonl"))[-1]
    assert found["before"]["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert found["before"]["bits_per_byte"] == pytest.approx(trained["bits_per_byte"], rel=1e-5)
    assert f"{options[1]}: 2 of 2 layers" in result.err
    price = document(handful("cost", out, "--json"))
    assert price["total_parameters"]["incl_all_embeddings"] == found["after"]["total_parameters"]

    (tmp_path / "on.toml").write_text('[data]\nsource = "text"\n' + SETTINGS[SETTINGS.index("[train]") :])
    run = tmp_path / "run"
    end = document(handful("train", tmp_path / "on.toml", "--from", out, "--only", "experts", "--out", run, "--json"))
    assert end["event"] == "end"
    asked, config = (json.loads(file.read_text("utf-8")) for file in (run / "run.json", out / "config.json"))
    assert (asked["only"], asked["started"]) == ("experts", True)
    assert asked["model"]["router"]["experts"] == config["num_experts"]
    # It goes on from the mixture, which says what the dense model says.
    text, dense = load_data("text", tokenizer="dense/model"), load("dense")
    assert isinstance(dense, Decoder)
    with torch.no_grad():
        loss, _ = batch_loss(dense, *Batches(text.train, batch=4, context=16, seed=0).at(0), "float32")
    assert of_kind("step", read_lines(run / "events.jsonl"))[0]["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_upcycle_shows_a_table(handful: Call, at_home: Path, dense_run: Path, tmp_path: Path) -> None:
    result = handful("upcycle", "dense", tmp_path / "made", "--experts", "4", *SHORT)
    assert result.code == 0
    for words in ("qwen3_moe", "total parameters", "active parameters", "held-out loss", "bits a byte"):
        assert words in result.out
    # Without losses no text is read.
    result = handful("upcycle", "dense", tmp_path / "other", "--data", "nowhere", "--eval-tokens", "0")
    assert (result.code, "held-out" in result.out) == (0, False)


def test_upcycle_says_what_it_is_written_as(handful: Call, at_home: Path, dense_run: Path, tmp_path: Path) -> None:
    config = at_home / "dense.toml"
    (tmp_path / "relu.toml").write_text(config.read_text("utf-8").replace("[model]", '[model]\nactivation = "relu"'))
    assert handful("train", tmp_path / "relu.toml", "--steps", "1", "--out", tmp_path / "relu").code == 0
    result = handful("upcycle", tmp_path / "relu", tmp_path / "made", "--experts", "4", *SHORT, "--json")
    assert document(result)["written_as"] == "handful"
    assert result.err.splitlines()[-1].startswith("written as Handful's own: ")


def test_upcycle_mistakes(handful: Call, at_home: Path, dense_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    assert mistake(handful("upcycle", "dense", "text")) == "out = 'text': exists; name another folder as OUT"
    assert "holds no checkpoint" in mistake(handful("upcycle", "text", out))

    def last_line(*options: str) -> str:
        result = handful("upcycle", *options, *SHORT)
        assert (result.code, result.out) == (1, "")
        return result.err.splitlines()[-1].removeprefix("error ")

    # Before any text is read: one line.
    assert mistake(handful("upcycle", "run", out)) == "upcycle model: it is an MoE already; a dense model is needed"
    assert mistake(handful("upcycle", "dense", out, "--top-k", "9")) == "upcycle top_k = 9: from 1 to experts = 8"
    assert mistake(handful("train", "--from", "dense", "--only", "routers", "--out", out)).startswith(
        "only = 'routers'"
    )
    long = mistake(handful("train", "--from", "run", "--context", "999", "--out", out))
    assert long.startswith("train.context = 999: at most ")
    shutil.copytree(dense_run / "model", tmp_path / "bare")
    (tmp_path / "bare/tokenizer.json").unlink()
    bare = str(tmp_path / "bare")
    assert last_line(bare, str(out)) == f"{bare}: it has no tokenizer.json, which the text is read by"
    assert not out.exists()


def test_a_split_keeps_three_quarters_and_reads_the_runs_own_text(
    handful: Call, at_home: Path, dense_run: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    short = SHORT[2:]  # no --data
    result = handful("upcycle", "dense", made, "--method", "split", "--fit-tokens", "64", *short, "--json")
    found = document(result)
    assert result.err.startswith("text: 40 documents")
    router = json.loads((made / "config.json").read_text("utf-8"))
    assert (router["num_experts"], router["num_experts_per_tok"]) == (8, 6)
    assert found["after"]["loss"] < found["before"]["loss"] + 0.5
    note = json.loads((made / "handful.json").read_text("utf-8"))
    assert (note["upcycled_from"], note["text"]) == ("dense", {"source": "text", "column": None})
    # What goes on from it reads that text too; and from a run's checkpoint, that run's.
    for start in (made, "run", "run/model"):
        out = tmp_path / f"more-{Path(start).name}"
        result = handful("train", "--from", start, "--steps", "1", "--batch", "2", "--context", "16", "--out", out)
        assert result.code == 0
        assert result.err.startswith("text: 40 documents")
    # Another is read where one is named.
    write_text(tmp_path / "other", documents=41)
    result = handful("upcycle", "dense", tmp_path / "again", "--data", tmp_path / "other", *short)
    assert ": 41 documents" in result.err


# ---------------------------------------------------------------------------------------------------------------------
# eval and presets.


def test_eval_of_one_model_and_of_two(handful: Call, at_home: Path, dense_run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the router of {name} chooses tokens\n" * 90, encoding="utf-8")
    text = ["--text", str(tmp_path / "a.txt"), "--text", str(tmp_path / "b.*")]
    one = document(handful("eval", "run", *text, "--json"))
    rounded = document(handful("eval", "run", *text, "--json", *EIGHT_BITS))
    gap = rounded["files"][0]["models"][0]["loss"] - one["files"][0]["models"][0]["loss"]
    assert 0 < abs(gap) < 0.01
    assert [Path(row["file"]).name for row in one["files"]] == ["a.txt", "b.txt", "all of them"]
    a, b, both = (row["models"][0] for row in one["files"])
    assert both["loss"] == pytest.approx((a["loss"] * a["tokens"] + b["loss"] * b["tokens"]) / both["tokens"])
    assert (one["context"], one["files"][0]["bytes"], one["files"][0]["difference"]) == (16, 2790, None)

    result = handful("eval", "run", "dense", *text)
    assert result.code == 0
    for words in ("A  run", "B  dense", "B − A,", "all of them", f"{both['loss']:.4f}"):
        assert words in result.out
    assert re.search(r"predicts this text better than|no difference is seen", result.err)
    two = document(handful("eval", "run", "dense", *text, "--json"))
    apart = two["files"][-1]["difference"]
    losses_of = [model["bits_per_byte"] for model in two["files"][-1]["models"]]
    assert apart["bits_per_byte"] == pytest.approx(losses_of[1] - losses_of[0])
    assert apart["error"] > 0
    # A model beside itself is no better.
    same = handful("eval", "run", "run/model", *text)
    assert "no difference is seen: +0.0000 ± 0.0000 bits a byte" in same.err


def test_eval_of_what_a_run_held_out(handful: Call, at_home: Path) -> None:
    result = handful("eval", "run", "--json")
    (row,) = document(result)["files"]
    assert row["file"] == "held out of text"
    (end,) = of_kind("end", read_lines(at_home / "run/events.jsonl"))
    assert row["models"][0]["loss"] == pytest.approx(end["loss"], rel=0.05)  # of other windows, and of all of it


def test_eval_mistakes(handful: Call, at_home: Path, tmp_path: Path) -> None:
    shutil.copytree(at_home / "run/model", tmp_path / "model")
    assert mistake(handful("eval", tmp_path / "model")).endswith(
        "does not say what text it was trained on; name some by --text"
    )
    assert "nowhere" in mistake(handful("eval", "run", "--text", "nowhere"))
    assert mistake(handful("eval", "run", "--quant", "int2")) == "quant = 'int2': int8 or int4"
    assert mistake(handful("eval", "run", "--context", "17")).startswith("context = 17: from 1 to 16")
    assert mistake(handful("eval", "run", "--device", "tpu")).startswith("device = 'tpu': this computer has cpu")


def test_presets(handful: Call) -> None:
    found = {row["name"]: row for row in document(handful("presets", "--json"))}
    assert list(found) == list(PRESETS)
    assert found["mixtral"]["total_parameters"] == 46_702_792_704
    assert found["switch"]["total_parameters"] is None
    result = handful("presets")
    assert result.code == 0
    for name in PRESETS:
        assert name in result.out
    assert "46.7 G, 12.9 G active" in result.out


# ---------------------------------------------------------------------------------------------------------------------
# Terminals.


def in_a_process(*arguments: str | bytes, home: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "handful", *arguments], capture_output=True, cwd=home,
        env={**os.environ, "HANDFUL_CACHE": str(home / "cache"), **environment},
    )  # fmt: skip


def test_a_terminal_that_knows_ascii_alone(at_home: Path) -> None:
    result = in_a_process("presets", home=at_home, PYTHONIOENCODING="ascii", COLUMNS="200")
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"capacity 2?T/E" not in result.stdout
    assert b"capacity 2-T/E" in result.stdout  # a middle dot, as well as it can be said
    result = in_a_process("--help", home=at_home, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_path_that_is_no_text(at_home: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    result = in_a_process("cost", folder, home=at_home)
    assert result.returncode == 1
    assert result.stderr.startswith(b"error " + folder + b": holds no checkpoint")
    # A run in such a folder is a run like any other.
    asked = (b"train", b"tiny.toml", b"--steps", b"1", b"--out", folder + b"/run")
    result = in_a_process(*asked, home=at_home)
    assert result.returncode == 0, result.stderr
    assert folder + b"/run/report.html" in result.stdout.replace(b"\n", b"").replace(b" ", b"")


def test_shell_completion() -> None:
    command = Path(sys.executable).with_name("handful")
    if not command.exists():
        pytest.skip("the command is not installed")
    environment = {**os.environ, "_HANDFUL_COMPLETE": "complete_bash", "COMP_WORDS": "handful e", "COMP_CWORD": "1"}
    found = subprocess.run([command], capture_output=True, text=True, env=environment)
    assert found.stdout.split() == ["eval"]


def test_training_that_cannot_begin(handful: Call, at_home: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    assert mistake(handful("train", "--resume", "--out", out)) == f"out = {str(out)!r}: holds no run to resume"
    assert mistake(handful("train", "none.toml", "--out", out)) == "config 'none.toml': no such file"
    assert mistake(handful("train", "--router", "gpt-4")).startswith("router preset 'gpt-4': one of switch, ")
    tokens = mistake(handful("train", "--tokens", "9", "--steps", "9"))
    assert tokens == "train.tokens, train.steps: give one of them"
    assert "nowhere" in mistake(handful("train", "--data", "nowhere", "--out", out))
    assert not out.exists()


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Ctrl-C while that many batches have been drawn, counted from 1."""
    drawn, real = 0, Batches.at

    def at(self: Batches, step: int) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == batch:
            signal.raise_signal(signal.SIGINT)
        return real(self, step)

    monkeypatch.setattr(Batches, "at", at)


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupted_training_is_130_and_goes_on(
    as_json: bool, handful: Call, at_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "a run"
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, batch=3)
        result = handful("train", "tiny.toml", "--out", run, *["--json"] * as_json)
    assert result.code == 130
    assert result.err.splitlines()[-1] == f"interrupted at step 3; this goes on: handful train --resume --out '{run}'"
    if as_json:
        found = json.loads(result.out)
        assert (found["event"], found["step"], found["out"]) == ("interrupted", 3, str(run))
    else:
        assert result.out == ""
    assert (run / "report.html").exists()
    assert handful("train", "--resume", "--out", run).code == 0
    assert losses(run) == losses(at_home / "run")


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in of_kind("step", read_lines(run / "events.jsonl"))]


def test_ctrl_c_in_a_process_of_its_own(at_home: Path, tmp_path: Path) -> None:
    settings = SETTINGS.replace("steps = 4", "steps = 5000").replace("eval_every = 2", "eval_every = 0")
    (tmp_path / "long.toml").write_text(settings, encoding="utf-8")
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "handful", "train", str(tmp_path / "long.toml"), "--out", str(run)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    limit = time.monotonic() + 300
    while not (run / "model").exists():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("interrupted at step ")
    assert read_lines(run / "events.jsonl")[-1]["event"] == "interrupted"


def test_training_that_diverges(handful: Call, at_home: Path, tmp_path: Path) -> None:
    result = handful("train", "tiny.toml", "--out", tmp_path / "run", "--lr", "1e39")
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    assert re.fullmatch(r"error step 2: .* is .*; there is no checkpoint", result.err.splitlines()[-1])
    assert sum(line.startswith("error") for line in result.err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# generate.

EIGHT_BITS = ["--kv-cache-dtype", "int8"]


def test_a_seed_repeats_the_text(handful: Call, at_home: Path) -> None:
    def text(*options: str) -> str:
        result = handful("generate", "run", "the router", "--max-tokens", "30", *options)
        assert result.code == 0
        assert result.out.startswith("the router")
        assert "tokens/s" in result.err
        return result.out

    assert text("--seed", "1") == text("--seed", "1")
    assert text("--seed", "1") != text("--seed", "2")
    assert text("--temperature", "0") == text("--temperature", "0", "--seed", "7")


def test_generated_json(handful: Call, at_home: Path) -> None:
    plain = handful("generate", "run", "the", "--seed", "1", "--max-tokens", "20")
    result = handful("generate", "run", "the", "--seed", "1", "--max-tokens", "20", "--json")
    found = document(result)
    assert f"the{found['text']}\n" == plain.out == result.err
    assert (found["model"], found["prompt"]) == ("run", "the")
    assert 1 <= found["tokens"] <= 20


def test_everything_that_generate_can_be_told(handful: Call, at_home: Path) -> None:
    """Settings of the draws, a stop text, quantized weights, log-probabilities and a recorded routing."""
    options = ["--seed", "1", "--max-tokens", "12", "--top-k", "20", "--min-p", "0.01", "--repetition-penalty", "1.2"]
    found = document(
        handful("generate", "run", "the", *options, "--json", "--logprobs", "2", "--routing", "routing.safetensors")
    )
    assert found["finish"] in ("length", "stop")
    assert len(found["logprobs"]) == found["tokens"]
    for one in found["logprobs"]:
        assert one["token"] <= max(one["top"].values()) + 1e-6
        assert len(one["top"]) == 2
    recording = Recording.read(at_home / "routing.safetensors")
    tokens = load_tokenizer(at_home / "run/model").encode("the")
    made = [one["id"] for one in found["logprobs"]]
    assert recording.tokens_T is not None
    assert recording.tokens_T.tolist()[1:] == [*tokens, *made][: recording.tokens - 1]
    again = document(handful("generate", "run", "the", *options, "--json"))
    assert (again["text"], again["logprobs"]) == (found["text"], None)
    stop = found["text"][3:5]
    cut = document(handful("generate", "run", "the", *options, "--json", "--stop", "never here", "--stop", stop))
    assert (cut["text"], cut["finish"]) == (found["text"][: found["text"].find(stop)], "stop")
    assert document(handful("generate", "run", "the", "--max-tokens", "3", "--quant", "int4", "--json"))["tokens"] == 3
    rounded = document(handful("generate", "run", "the", *options, "--json", "--logprobs", "2", *EIGHT_BITS))
    apart = [one["token"] - other["token"] for one, other in zip(rounded["logprobs"], found["logprobs"], strict=False)]
    assert 0 < max(map(abs, apart[:3])) < 0.1


@pytest.mark.parametrize("verb", [["generate", "run", "the", "--max-tokens", "1"], ["eval", "run"]])
def test_exact_activations(verb: list[str], handful: Call, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For this process, before the kernels ask, and for those that it starts."""
    monkeypatch.setenv("HANDFUL_EXACT_ACTIVATIONS", "0")
    assert handful(*verb, "--quant", "int8").code == 0
    assert os.environ["HANDFUL_EXACT_ACTIVATIONS"] == "0"
    assert handful(*verb, "--quant", "int8", "--exact-activations").code == 0
    assert os.environ["HANDFUL_EXACT_ACTIVATIONS"] == "1"


def test_drafts_change_no_text(handful: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handful.speculation.DraftCosts.steps", lambda *_: 1.0)
    save(chat_model(), tmp_path)
    options = [tmp_path, "the cat sat, the cat sat, the cat", "--temperature", "0", "--max-tokens", "80"]
    without = document(handful("generate", *options, "--no-speculate", "--json"))
    found = document(handful("generate", *options, "--speculate", "--json"))
    assert found["text"] == without["text"]
    assert 0 < found["accepted_tokens"] <= found["draft_tokens"]
    assert (without["accepted_tokens"], without["draft_tokens"]) == (0, 0)
    shown = handful("generate", *options, "--speculate").err
    assert f"{found['accepted_tokens']} of {found['draft_tokens']} drafted tokens accepted" in shown


def test_the_seed_that_was_drawn_is_shown(handful: Call, at_home: Path) -> None:
    first = handful("generate", "run", "the", "--max-tokens", "20", "--temperature", "1")
    drafted = r"(?:, \d+ of \d+ drafted tokens accepted)?"
    shown = re.fullmatch(rf"\d+ tokens, [\d,]+ tokens/s{drafted}, seed (\d+)", first.err.strip())
    assert shown
    again = handful("generate", "run", "the", "--max-tokens", "20", "--temperature", "1", "--seed", shown[1])
    assert again.out == first.out
    found = document(handful("generate", "run", "the", "--max-tokens", "20", "--temperature", "1", "--json"))
    assert found["sampling"]["temperature"] == 1
    seed = str(found["seed"])
    assert handful("generate", "run", "the", "--max-tokens", "20", "--temperature", "1", "--seed", seed).out == (
        f"the{found['text']}\n"
    )
    greedy = handful("generate", "run", "the", "--max-tokens", "2", "--temperature", "0")
    assert "seed" not in greedy.err  # nothing was drawn


def test_a_prompt_from_elsewhere(handful: Call, at_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = ["--max-tokens", "8", "--seed", "1"]
    right = handful("generate", "run", "the router\n of", *how).out

    def typed(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    (tmp_path / "prompt.txt").write_text("the router\n of\n", encoding="utf-8")
    assert handful("generate", "run", "--file", tmp_path / "prompt.txt", *how).out == right
    typed(b"the router\n of\n")
    assert handful("generate", "run", "-", *how).out == right
    typed(b"the router\n of")
    assert handful("generate", "run", "-", *how).out == right
    typed(b"\xff")
    assert mistake(handful("generate", "run", "-")) == "stdin: must be UTF-8"
    (tmp_path / "prompt.txt").write_bytes(b"\xff")
    assert mistake(handful("generate", "run", "--file", tmp_path / "prompt.txt")).endswith("must be UTF-8")
    assert mistake(handful("generate", "run", "x", "--file", "y")) == "prompt, file: give one of them"
    assert mistake(handful("generate", "run", "--file", "nowhere")) == "file = 'nowhere': No such file or directory"


def test_log_probabilities_come_with_texts(handful: Call, at_home: Path) -> None:
    how = ["--max-tokens", "6", "--seed", "1", "--logprobs", "3"]
    found = document(handful("generate", "run", "the", *how, "--json"))
    tokenizer = load_tokenizer(at_home / "run/model")
    for one in found["logprobs"]:
        assert one["text"] == tokenizer.token_bytes(one["id"]).decode("utf-8", "replace")
        assert list(one["top"]) == list(one["top_texts"])
        for token, text in one["top_texts"].items():
            assert text == tokenizer.token_bytes(int(token)).decode("utf-8", "replace")
    assert mistake(handful("generate", "run", "the", *how)) == "logprobs = 3: only with --json, which has room for them"


def test_the_models_own_sampling_is_used_and_told_of(handful: Call, at_home: Path, tmp_path: Path) -> None:
    shutil.copytree(at_home / "run/model", tmp_path / "m")
    asked = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(asked))
    how = ["--max-tokens", "5", "--seed", "1"]
    result = handful("generate", tmp_path / "m", "the", *how)
    told = "as the model's generation_config.json asks"
    assert result.err.splitlines()[0] == f"temperature 0.6, top k 20, top p 0.95, {told}"
    same = handful("generate", "run", "the", *how, "--temperature", "0.6", "--top-k", "20", "--top-p", "0.95")
    assert same.out == result.out
    assert told not in same.err
    some = handful("generate", tmp_path / "m", "the", *how, "--temperature", "0.7", "--top-p", "1")
    assert some.err.splitlines()[0] == f"top k 20, {told}"
    assert told not in handful("generate", tmp_path / "m", "the", *how, "--temperature", "0").err
    found = document(handful("generate", tmp_path / "m", "the", *how, "--json"))
    assert {name: found["sampling"][name] for name in ("temperature", "top_k", "top_p")} == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95,
    }  # fmt: skip


def test_a_mistyped_path_is_looked_for_elsewhere_with_a_word(
    handful: Call, at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def nothing(*_: object, **__: object) -> None:
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    first, last = handful("generate", "runs/trian", "x").err.splitlines()
    assert first.startswith("runs/trian: no such folder here; looking for it ")
    assert last == "error runs/trian: no such folder, and it cannot be downloaded: no such repository"


def test_generate_within_a_budget(handful: Call, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text, to the letter; what the budget did, and a forecast, beside it."""
    from handful import ceilings
    from handful.ceilings import Ceilings, Overhead

    overhead = Overhead(**{field.name: 1e-5 for field in dataclasses.fields(Overhead)})
    machine = Ceilings(
        cpu="", threads=2, native_error=None, memory_bytes=10**9, disk_free_bytes=10**9, read_bytes_per_second=1e9,
        disk_bytes_per_second=1e8, float32_flops=1e9, bfloat16_flops=1e9, overhead=overhead, measured_at=1.0,
    )  # fmt: skip
    monkeypatch.setattr(ceilings, "ceilings", lambda folder: machine)
    options = ["--seed", "1", "--max-tokens", "12"]
    whole = document(handful("generate", "run", "the", *options, "--json"))
    assert whole["memory"] is None
    result = handful("generate", "run", "the", *options, "--json", "--memory", "2MB")
    within = document(result)
    assert within["text"] == whole["text"]
    held = within["memory"]
    assert held["slots"] == held["experts"]
    assert 0 < held["hit_rate"] < 1  # the first use of each is a miss
    assert held["forecast_tokens_per_second"] > 0
    least = held["resident_bytes"] + 2 * held["expert_bytes"]
    tight = document(handful("generate", "run", "the", *options, "--json", "--memory", str(least)))
    assert tight["text"] == whole["text"]
    assert tight["memory"]["slots"] == 2
    assert tight["memory"]["bytes_read"] > held["bytes_read"]
    told = handful("generate", "run", "the", *options, "--memory", str(least)).err
    assert re.search(r"2 of 8 experts in memory, \d+% of uses found there, .* read, .* waited; forecast", told)
    assert "memory" in mistake(handful("generate", "run", "the", "--memory", str(least - 1)))
    assert mistake(handful("generate", "run", "the", "--memory", "lots")).startswith("memory = 'lots': a size such as")


def test_generate_is_interrupted(handful: Call, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C shows, and records, what there is."""
    generating: Any = importlib.import_module("handful.generate")  # the name is the function's
    real = generating.stream

    def stream(*args: Any) -> Iterator[Any]:
        for number, delta in enumerate(real(*args)):
            if number == 4:
                raise KeyboardInterrupt
            yield delta

    monkeypatch.setattr(generating, "stream", stream)
    result = handful("generate", "run", "the", "--seed", "1", "--json", "--routing", "routing.safetensors")
    found = json.loads(result.out)
    assert (result.code, found["finish"], found["tokens"]) == (130, "interrupted", 4)
    assert result.err.startswith(f"the{found['text']}")
    assert Recording.read(at_home / "routing.safetensors").tokens >= 5


def test_what_cannot_be_generated(handful: Call, at_home: Path) -> None:
    assert mistake(handful("generate", "./nowhere/at/all", "x")) == "./nowhere/at/all: no such folder"
    assert mistake(handful("generate", "run", "x", "--max-tokens", "0")) == "max_tokens = 0: at least 1"
    assert mistake(handful("generate", "run", "x", "--temperature", "-1")) == "temperature = -1.0: at least 0"
    assert mistake(handful("generate", "run", "x", "--top-p", "0")) == "top_p = 0.0: above 0, at most 1"
    assert mistake(handful("generate", "run", "x", "--top-k", "-1")) == "top_k = -1: at least 0"
    assert mistake(handful("generate", "run", "x", "--min-p", "2")) == "min_p = 2.0: from 0 to 1"
    assert mistake(handful("generate", "run", "x", "--repetition-penalty", "0")) == "repetition_penalty = 0.0: above 0"
    tiny = mistake(handful("generate", "run", "x", "--repetition-penalty", "1e-9"))
    assert tiny == "repetition_penalty = 1e-09: from 0.01 to 100"
    assert mistake(handful("generate", "run", "x", "--quant", "int3")) == "quant = 'int3': int8 or int4"
    assert (
        mistake(handful("generate", "run", "x", "--routing", "a.st"))
        == "routing = 'a.st': the name of a .safetensors file"
    )
    assert mistake(handful("generate", "run", "x", "--logprobs", "-1")) == "logprobs = -1: at least 0, or none"
    assert "the model's context is" in mistake(handful("generate", "run", "the router " * 200))


@pytest.mark.parametrize("arguments", [["generate", "run", "the"], ["cost", "mixtral", "--json"]])
def test_a_closed_pipe_is_no_error_to_show(arguments: list[str], home: Path) -> None:
    """As with `| head -c1`, and sooner: the reader is gone before the first byte."""
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "handful", *arguments], cwd=home, stdout=write, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    finally:
        os.close(write)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
    assert result.returncode == 1


# ---------------------------------------------------------------------------------------------------------------------
# compare.


SMALL_TEAMS = ["--width", "16", "--layers", "1", "--context", "16", "--batch", "4"]


def test_compare_reuses_what_is_finished(handful: Call, at_home: Path, tmp_path: Path) -> None:
    command = ["compare", "--data", "text", "--tokens", "1", "--router", "mixtral", *SMALL_TEAMS]
    command += ["--out", str(tmp_path / "three")]
    result = handful(*command, "--json")
    found = document(result)
    assert [team["name"] for team in found["teams"]] == ["dense-active", "moe", "dense-total"]
    assert found["teams"][1]["model"]["router"] == to_dict(PRESETS["mixtral"].router)
    assert (found["train"]["steps"], found["train"]["eval_every"]) == (1, 1)
    assert {team["model"]["width"] for team in found["teams"]} == {16}
    assert [team["lr"] for team in found["teams"]] == [0.016, 0.032, 0.016]
    assert found == json.loads((tmp_path / "three/compare.json").read_text("utf-8"))
    # The finding in a sentence, and what to look at next.
    finding, to_open, to_see = result.err.splitlines()[-3:]
    assert to_see == f"handful serve {tmp_path / 'three/moe/seed-0'} --open shows its routers at work, token by token"
    assert finding.startswith("With ")
    assert "too short to judge: an expert was trained on " in finding
    assert to_open.startswith(f"open {tmp_path / 'three/report.html'} ")
    runs = {path: path.read_bytes() for path in (tmp_path / "three").glob("*/seed-0/events.jsonl")}
    assert len(runs) == 3

    again = handful(*command)
    assert again.code == 0
    assert "mixture of experts" in again.out
    assert f"{found['teams'][1]['heldout_loss']['mean']:.4f}" in again.out
    assert {path: path.read_bytes() for path in runs} == runs
    # Another comparison in its place is refused, and told what to do.
    other = mistake_after(handful(*command, "--top-k", "1"))
    assert other.startswith("model.")
    assert other.endswith("; name another folder by --out")
    # As a model it is none, but holds some.
    inside = mistake(handful("eval", tmp_path / "three", "--text", "text"))
    assert inside.startswith(f"{tmp_path / 'three'}: holds a comparison; name one of its runs: ")
    assert str(tmp_path / "three/moe/seed-0") in inside
    assert "holds runs; name one of its runs: " in mistake(handful("generate", at_home, "x"))
    (tmp_path / "file").write_text("")
    to_a_file = mistake_after(handful(*command[:-1], tmp_path / "file"))
    assert to_a_file == f"out = '{tmp_path / 'file'}': a file; name a folder by --out"


def mistake_after(result: Ended) -> str:
    """The last line of a call that failed after it had said something."""
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    return result.err.splitlines()[-1].removeprefix("error ")


def test_several_routers_and_balances(handful: Call, at_home: Path, tmp_path: Path) -> None:
    command = [
        "compare",
        "--data",
        "text",
        "--tokens",
        "200",
        *SMALL_TEAMS,
        "--lr",
        "0.01",
        "--out",
        str(tmp_path / "all"),
    ]
    result = handful(*command, "--router", "mixtral", "--router", "64x2", "--balance", "none", "--balance", "switch")
    assert result.code == 0
    # Both have Switch's loss as it is, at weights of their own.
    for name in ("mixtral", "64x2"):
        assert f"{name} has the balance switch as it is" in result.err
    found = json.loads((tmp_path / "all/compare.json").read_text("utf-8"))
    assert [team["name"] for team in found["teams"]] == [
        "dense-active", "mixtral", "mixtral-none", "64x2", "64x2-none", "dense-total",
    ]  # fmt: skip
    assert {team["lr"] for team in found["teams"]} == {0.01}
    assert [team["balance"]["loss"] for team in found["teams"]] == ["none", "switch", "none", "switch", "none", "none"]
    words = " ".join(result.out.split())
    for value in ("8, 2 a token", "64, 2 a token", "switch 0.02", "dead experts at the end"):
        assert value in words
    assert "Too short to judge: " in result.err


def test_a_comparison_from_a_file(handful: Call, at_home: Path, tmp_path: Path) -> None:
    found = document(handful("compare", "tiny.toml", "--balance", "none", "--out", tmp_path / "file", "--json"))
    assert [team["name"] for team in found["teams"]] == ["dense-active", "moe", "moe-none", "dense-total"]
    assert (found["train"]["steps"], found["train"]["eval_every"]) == (4, 2)
    assert found["teams"][1]["model"]["router"]["experts"] == 4


def test_an_interrupted_comparison_is_130_and_goes_on(
    handful: Call, at_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = importlib.import_module("handful.compare")  # `handful.compare` is the function
    monkeypatch.setattr(compare, "steps_within", lambda *args: 3)
    out = tmp_path / "three"
    command = ["compare", "--data", "text", "--minutes", "1", "--router", "mixtral", *SMALL_TEAMS, "--out", str(out)]
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, batch=5)  # the second team's second step
        result = handful(*command)
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-1] == f"interrupted: the same command goes on; every run is kept in {out}"

    # Timing it again would say something else: it goes on with what it began with.
    monkeypatch.setattr(compare, "steps_within", lambda *args: pytest.fail("timed again"))
    result = handful(*command, "--json")
    assert f"{out} was begun with 3 steps, and goes on with them" in result.err
    found = document(result)
    assert len(found["teams"]) == 3
    assert [len(losses(out / team["name"] / "seed-0")) for team in found["teams"]] == [3, 3, 3]


def test_a_comparison_that_cannot_begin(handful: Call, at_home: Path) -> None:
    both = mistake(handful("compare", "--tokens", "100", "--minutes", "1"))
    assert both == "tokens, minutes: give one of them"
    assert mistake(handful("compare", "--router", "gpt-4")).startswith("router preset 'gpt-4': one of switch, ")
