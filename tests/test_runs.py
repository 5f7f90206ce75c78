"""A run's folder: new or resumed, what must be the same, checkpoints that appear whole, events cut back to them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import moe, of_kind, read_lines, timeless, tiny_data, training, write_text
from torch import Tensor

from handful import __version__, checkpoint
from handful.config import BalanceConfig
from handful.config_io import to_dict
from handful.data import Data, load_data
from handful.errors import CheckpointError, ConfigError
from handful.families.io import load
from handful.model import Decoder
from handful.runs import Run, read_events
from handful.train import train
from handful.train_step import make_optimizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return tiny_data(tmp_path_factory.mktemp("runs"))


def begun(folder: Path, data: Data, **changes: Any) -> Run:
    run = Run.open(folder, resume=False)
    run.begin(moe(), training(**changes), data)
    return run


def stepped(seed: int = 0) -> tuple[Decoder, torch.optim.AdamW]:
    """A model and its optimizer after a step with made-up gradients."""
    torch.manual_seed(seed)
    model = Decoder(moe({"balance_bias": True, "score": "sigmoid"}))
    optimizer = make_optimizer(model, training())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for layer in model.moe_layers:
        assert layer.router.balance_bias is not None
        layer.router.balance_bias += torch.randn(4)
    return model, optimizer


def moments(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
        if isinstance(value, Tensor)
    }


# ---------------------------------------------------------------------------------------------------------------------
# Opening.


def test_a_new_folder(tmp_path: Path, data: Data) -> None:
    run = begun(tmp_path / "a/b/run", data)
    assert not run.resumed
    assert run.last() is None
    asked = json.loads((tmp_path / "a/b/run/run.json").read_text())
    assert asked["handful"] == __version__
    assert asked["model"] == to_dict(moe())
    assert asked["train"] == to_dict(training())
    assert asked["data"]["fingerprint"] == data.fingerprint
    assert asked["data"]["origin"] == data.origin
    assert asked["data"]["train_tokens"] == data.train_tokens


def test_opening_errors(tmp_path: Path, data: Data) -> None:
    begun(tmp_path / "run", data)
    with pytest.raises(ConfigError, match=r"^out = '.*/run': holds a run; go on with it by --resume, or name another"):
        Run.open(tmp_path / "run", resume=False)
    with pytest.raises(ConfigError, match=r"^out = '.*/none': holds no run to resume$"):
        Run.open(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    for path, why in (("file", "a file; name a folder by --out"), ("file/run", "Not a directory")):
        with pytest.raises(ConfigError, match=f"^out = '{re.escape(str(tmp_path / path))}': {why}$"):
            Run.open(tmp_path / path, resume=False)


def test_a_run_that_reached_no_checkpoint_begins_again(tmp_path: Path, data: Data) -> None:
    run = begun(tmp_path / "run", data)
    run.write({"event": "start"})
    run.write({"event": "step", "step": 1})
    again = Run.open(tmp_path / "run", resume=True)
    assert not again.resumed
    again.begin(moe(), training(), data)
    assert again.events() == []


@pytest.mark.parametrize(
    ("section", "field", "value", "has"),
    [
        ("model", "width", 32, 16),
        ("model", "tied", False, True),
        ("train", "steps", 7, 6),
        ("train", "lr", 0.5, 0.01),
        ("train", "seed", 3, 0),
        ("train", "dtype", "bfloat16", "float32"),
    ],
)
def test_resuming_refuses_another_setting(
    section: str, field: str, value: Any, has: Any, tmp_path: Path, data: Data
) -> None:
    run = begun(tmp_path / "run", data)
    config, settings = (
        (dataclasses.replace(moe(), **{field: value}), training())
        if section == "model"
        else (moe(), training(**{field: value}))
    )
    said = f"{section}.{field} = {value!r}: the run in {tmp_path / 'run'} has {has!r}"
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        run.check(config, settings, data)
    # With or without a checkpoint, and before anything is written.
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(ConfigError, match=re.escape(said)):
        next(train(config, settings, data, tmp_path / "run", resume=True))
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_resuming_refuses_nested_settings_and_other_text(tmp_path: Path, data: Data) -> None:
    run = begun(tmp_path / "run", data)
    with pytest.raises(ConfigError, match=r"^model\.router = "):
        run.check(moe({"jitter": 0.1}), training(), data)
    with pytest.raises(ConfigError, match=r"^train\.balance = "):
        run.check(moe(), training(balance=BalanceConfig(z_weight=0.1)), data)
    other = load_data(str(write_text(tmp_path / "other", documents=41)), vocab=300, cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"^data: not the text, or not the tokenizer, of the run in "):
        run.check(moe(), training(), other)


def test_auto_is_what_the_run_began_with(tmp_path: Path, data: Data) -> None:
    run = begun(tmp_path / "run", data, dtype="bfloat16")
    assert run.check(moe(), training(dtype="auto"), data) == "bfloat16"
    assert run.check(moe(), training(dtype="bfloat16"), data) == "bfloat16"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints.


def test_save_and_restore_everything(tmp_path: Path, data: Data) -> None:
    run = begun(tmp_path / "run", data)
    model, optimizer = stepped()
    path = run.save(1, 12.5, model, optimizer, data.tokenizer)
    assert path == tmp_path / "run/checkpoints/step-000001"
    assert {p.name for p in path.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "trainer.safetensors",
        "trainer.json",
    }  # fmt: skip
    assert (tmp_path / "run/model").is_symlink()
    assert (tmp_path / "run/model").readlink() == Path("checkpoints/step-000001")  # so that the folder can be moved

    other, fresh = stepped(seed=1)
    assert Run.open(tmp_path / "run", resume=True).restore(other, fresh) == (1, 12.5)
    ours, theirs = model.state_dict(), other.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    before, after = moments(model, optimizer), moments(other, fresh)
    assert before.keys() == after.keys()
    assert {key.split(".")[0] for key in before} == {"step", "exp_avg", "exp_avg_sq"}
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    # And they go on alike: moments of their own, not views of a file.
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = q.grad = torch.ones_like(p)
    optimizer.step()
    fresh.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_last_two_are_kept(tmp_path: Path, data: Data) -> None:
    run = begun(tmp_path / "run", data)
    model, optimizer = stepped()
    for step in (9, 10, 999_999, 1_000_000):
        run.save(step, 1.0, model, optimizer, data.tokenizer)
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"step-999999", "step-1000000"}
    assert run.last() == tmp_path / "run/checkpoints/step-1000000"
    assert (tmp_path / "run/model").resolve() == run.last()


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path, data: Data) -> None:
    run = begun(tmp_path / "run", data)
    folder = tmp_path / "run/checkpoints"
    for name in (".new-step-000007", ".old-step-000002", "step-000005-good", "step-9.bak", "notes"):
        (folder / name).mkdir(parents=True)
    assert run.last() is None
    model, optimizer = stepped()
    for step in (1, 2, 3):
        run.save(step, 1.0, model, optimizer, data.tokenizer)
    assert run.last() == folder / "step-000003"
    assert (folder / "step-000005-good").exists()


def test_restore_finishes_what_a_kill_left_undone(tmp_path: Path, data: Data) -> None:
    """Killed after the last checkpoint appeared, before the link was moved and the event written."""
    run = tmp_path / "run"
    whole = list(train(moe(), training(), data, run))
    (run / "model").unlink()
    (run / "model").symlink_to("checkpoints/step-000004")
    kept = of_kind("checkpoint", whole)[-1]
    events = whole[: whole.index(kept)]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    again = list(train(moe(), training(), data, run, resume=True))
    assert [event["event"] for event in again] == ["start", "end"]
    assert again[-1]["loss"] == whole[-1]["loss"]
    assert (run / "model").resolve() == run / "checkpoints/step-000006"
    assert timeless(read_lines(run / "events.jsonl")) == timeless(whole)


def test_events_are_cut_back_to_the_checkpoint(tmp_path: Path, data: Data) -> None:
    run = tmp_path / "run"
    whole = list(train(moe(), training(), data, run))
    shutil.rmtree(run / "checkpoints/step-000006")
    with open(run / "events.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "step", "st')  # a line that a kill cut off
    assert read_events(run) == whole
    list(train(moe(), training(), data, run, resume=True))
    assert timeless(read_lines(run / "events.jsonl")) == timeless(whole)


def test_events_that_cannot_be_written(tmp_path: Path, data: Data) -> None:
    run = begun(tmp_path / "run", data)
    (tmp_path / "run/events.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"/run/events\.jsonl: cannot be written: Is a directory$"):
        run.write({"event": "start"})


def test_events_without_a_file(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("trainer.json", r"trainer\.json: no such file"),
        ("trainer.safetensors", r"trainer\.safetensors: no such file"),
        ("model.safetensors", r"step-000006: no model\.safetensors"),
    ],
)
def test_a_checkpoint_without_a_file_is_refused(file: str, said: str, tmp_path: Path, data: Data) -> None:
    run = tmp_path / "run"
    list(train(moe(), training(), data, run))
    (run / "checkpoints/step-000006" / file).unlink()
    before = (run / "events.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=said):
        list(train(moe(), training(), data, run, resume=True))
    assert (run / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("file", ["trainer.safetensors", "model.safetensors", "trainer.json"])
def test_a_truncated_file_is_refused(file: str, tmp_path: Path, data: Data) -> None:
    run = tmp_path / "run"
    list(train(moe(), training(), data, run))
    path = run / "checkpoints/step-000006" / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=rf"step-000006/{re.escape(file)}: (truncated|not JSON)"):
        list(train(moe(), training(), data, run, resume=True))


def test_moments_of_another_shape_are_named(tmp_path: Path, data: Data) -> None:
    run = tmp_path / "run"
    list(train(moe(), training(), data, run))
    path = run / "checkpoints/step-000006/trainer.safetensors"
    state = dict(checkpoint.read_tensors(path))
    state["exp_avg.embed.weight"] = torch.zeros(3, 3)
    checkpoint.write_file(path, state)
    said = r"trainer\.safetensors: tensor 'exp_avg\.embed\.weight' has shape \[3, 3\]"
    with pytest.raises(CheckpointError, match=said):
        list(train(moe(), training(), data, run, resume=True))


def test_the_link_can_always_be_loaded(tmp_path: Path, data: Data) -> None:
    """At every event, RUN/model is a whole checkpoint or not there yet."""
    run, found = tmp_path / "run", []
    for event in train(moe(), training(checkpoint_every=1), data, run):
        if event["event"] == "checkpoint":
            found.append(load(run).embed.weight.detach().clone())
    assert len(found) == 6
    assert len({float(weight.sum()) for weight in found}) == 6
