"""The comparison: twins of the right size, the same tokens for all, an honest document, and a second call goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB, Event, moe, of_kind, read_lines, timeless, tiny_data, training, write_text

from handful import __version__
from handful.compare import (
    LABELS,
    LEARNING_RATES,
    Team,
    _reached,
    compare,
    decode_speeds,
    line_up,
    steps_within,
    teams,
    twins,
)
from handful.config import BalanceConfig, ModelConfig
from handful.config_io import to_dict
from handful.cost import cost
from handful.data import Batches, Data, load_data
from handful.errors import ConfigError, TrainingError
from handful.families.io import load
from handful.model import Decoder
from handful.presets import PRESETS, small_model, small_training
from handful.runs import read_events

module: Any = sys.modules["handful.compare"]  # `handful.compare` is the function
RATES = {"dense-active": 1e-2, "moe": 2e-2, "dense-total": 5e-3}
NAMES = list(RATES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return tiny_data(tmp_path_factory.mktemp("compare"))


def three(**changes: Any) -> list[Team]:
    settings = training(**({"balance": BalanceConfig(loss="switch", weight=0.01), "checkpoint_every": 3} | changes))
    return teams(moe(), settings, RATES)


@pytest.fixture(scope="module")
def two_seeds(data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A finished comparison, not to be changed."""
    out = tmp_path_factory.mktemp("two") / "out"
    return compare(data, three(), out, seeds=2, command="handful compare"), out


def without_clock(value: Any) -> Any:
    """A document without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "train_seconds", "machine", "_range")
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if not key.endswith(clock)}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------------
# The teams.

SHAPES: dict[str, ModelConfig] = {
    **{f"small {name}": small_model(2048, preset) for name, preset in PRESETS.items()},
    **{name: preset.model for name, preset in PRESETS.items() if preset.model is not None},
    "untied, shared and gated": moe(shared_width=20, shared_gate=True, tied=False),
    "mostly dense": moe(layers=6, dense_first=5, ffn=40),
    "hardly active": moe({"experts": 64, "top_k": 1, "normalize": False}, expert_width=1, moe_every=2, ffn=1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_twins_are_never_smaller_and_hardly_larger(name: str) -> None:
    config = SHAPES[name]
    price = cost(config)
    per_width = config.layers * config.width * (3 if config.gated else 2)
    for twin, parameters in zip(twins(config), (price.active, price.total), strict=True):
        found = cost(twin)
        assert found.total == found.active >= parameters
        # Eight hidden units more in every layer at most; the narrowest twin has eight.
        assert found.total < parameters + 8 * per_width or twin.ffn == 8
        assert twin.ffn % 8 == 0
        assert twin.router is None
        same = ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "activation", "qk_norm", "context", "tied")
        assert [field for field in same if getattr(twin, field) != getattr(config, field)] == []


def test_twins_by_hand() -> None:
    """One expert of 12 hidden units a token of four, two layers of width 16: 3 · 16 · 12 = 576 parameters an expert."""
    config = moe({"top_k": 1, "normalize": False})
    active, total = twins(config)
    # A layer uses 576 + 4 · 16 of the router = 640 = 48 · 13.3 and holds 4 · 576 + 64 = 2368 = 48 · 49.3.
    assert (active.ffn, total.ffn) == (16, 56)
    for twin in (active, total):
        assert sum(p.numel() for p in Decoder(twin).parameters()) == cost(twin).total


def test_twins_of_a_dense_model() -> None:
    with pytest.raises(ConfigError, match=r"^model\.router = None .*: a comparison starts from an MoE, and makes"):
        twins(twins(moe())[0])


def test_teams() -> None:
    settings = training(balance=BalanceConfig(loss="switch", weight=0.01, z_weight=0.1))
    found = teams(moe(), settings, RATES)
    assert [team.name for team in found] == NAMES
    assert [team.label for team in found] == [LABELS[name] for name in NAMES]
    assert [team.settings.lr for team in found] == list(RATES.values())
    assert [team.settings.balance for team in found] == [BalanceConfig(), settings.balance, BalanceConfig()]
    assert [team.model for team in found] == [twins(moe())[0], moe(), twins(moe())[1]]
    # All else is the same.
    plain = {dataclasses.replace(team.settings, lr=1.0, balance=BalanceConfig()) for team in found}
    assert plain == {dataclasses.replace(settings, lr=1.0, balance=BalanceConfig())}
    assert {team.name: team.settings.lr for team in teams(moe(), settings)} == LEARNING_RATES


def test_the_default_comparison_is_float32_at_equal_settings() -> None:
    found = teams(small_model(2048), small_training())
    assert {team.settings.dtype for team in found} == {"float32"}
    assert len({(team.settings.steps, team.settings.tokens_per_step, team.settings.schedule) for team in found}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# How long.


def pretend(step_seconds: dict[str, float], last: str = "end") -> Callable[..., Iterator[Event]]:
    """A training whose first step takes nine seconds and whose others take what the learning rate's team is given."""

    def train(model: ModelConfig, settings: Any, data: Data, out: None = None, *, device: str) -> Iterator[Event]:
        assert (out, device) == (None, "cpu")
        name = next(name for name, rate in RATES.items() if rate == settings.lr)
        for step in range(1, settings.steps + 1):
            yield {"event": "step", "step": step, "seconds": 9 + (step - 1) * step_seconds[name]}
        yield {"event": last}

    return train


def test_steps_within_by_hand(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train", pretend({"dense-active": 0.5, "moe": 1.0, "dense-total": 1.5}))
    assert steps_within(three(), data, minutes=2, seeds=1) == 40  # 120 s of 3 s for a step of each
    assert steps_within(three(), data, minutes=2, seeds=4) == 10
    assert steps_within(three(), data, minutes=0.001, seeds=1) == 1


def test_steps_within_is_interrupted(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train", pretend(dict.fromkeys(NAMES, 1.0), last="interrupted"))
    with pytest.raises(KeyboardInterrupt):
        steps_within(three(), data, minutes=2, seeds=1)


def test_steps_within_leaves_nothing(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert steps_within(three(), data, minutes=0.05, seeds=1) >= 1
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# The document.


def test_all_teams_see_the_same_tokens_in_the_same_order(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, int], list[Any]] = {}
    current: tuple[str, int] = ("", -1)
    real = Batches.at

    def at(self: Batches, step: int) -> Any:
        batch = real(self, step)
        seen.setdefault(current, []).append([tensor.tolist() for tensor in batch])
        return batch

    def follow(team: Team, seed: int, event: Event) -> None:
        nonlocal current
        current = (team.name, seed)

    monkeypatch.setattr(Batches, "at", at)
    compare(data, three(), tmp_path / "out", seeds=2, on_event=follow)
    assert set(seen) == {(name, seed) for name in NAMES for seed in (0, 1)}
    for seed in (0, 1):
        assert len(seen["moe", seed]) == 6
        assert seen["dense-active", seed] == seen["moe", seed] == seen["dense-total", seed]
    assert seen["moe", 0] != seen["moe", 1]


def test_the_document_keeps_its_contract(two_seeds: tuple[dict[str, Any], Path], data: Data) -> None:
    document, _ = two_seeds
    assert set(document) == {
        "title", "handful", "machine", "data", "seeds", "train", "command", "teams", "sample", "lesson",
    }  # fmt: skip
    assert document["handful"] == __version__
    assert document["command"] == "handful compare"
    assert document["seeds"] == [0, 1]
    assert document["data"] == data.summary()
    assert {"cpu", "cores", "threads", "memory_bytes"} <= set(document["machine"])
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["train"]["balance"]["loss"] == "switch"  # the one that is used, not the dense twin's
    assert [team["name"] for team in document["teams"]] == NAMES
    entrants = three()
    for team, entrant in zip(document["teams"], entrants, strict=True):
        price = cost(entrant.model, context=entrant.settings.context)
        assert set(team) == {
            "name", "label", "model", "parameters", "train_flops_per_token", "weight_bytes", "lr", "balance",
            "heldout_loss", "bits_per_byte", "train_tokens_per_second", "train_range", "decode_tokens_per_second",
            "decode_range", "train_seconds", "reached", "curve", "routing", "stability",
            "warnings",
        }  # fmt: skip
        assert team["label"] == LABELS[team["name"]]
        assert team["model"] == to_dict(entrant.model)
        assert team["parameters"] == {"total": price.total, "active": price.active}
        assert team["train_flops_per_token"] == price.train_flops
        assert team["weight_bytes"] == 4 * price.total
        assert team["lr"] == RATES[team["name"]]
        assert team["balance"] == to_dict(entrant.settings.balance)
        for of, speed in (("train_range", "train_tokens_per_second"), ("decode_range", "decode_tokens_per_second")):
            low, high = team[of]
            assert 0 < low <= high
            assert low <= team[speed] <= high or of == "train_range"  # whose first step counts for the mean alone
        assert (team["routing"] is not None) == (team["name"] == "moe")
        assert [point["tokens"] for point in team["curve"]] == [0, 128, 256, 384]
        for point in team["curve"]:
            assert point["flops"] == point["tokens"] * price.train_flops
            assert point["low"] <= point["loss"] <= point["high"]
        assert team["curve"][-1]["loss"] == pytest.approx(team["heldout_loss"]["mean"])
        assert [point["step"] for point in team["stability"]] == ([2, 4, 6] if team["name"] == "moe" else [])
    routing = document["teams"][1]["routing"]
    assert set(routing) == {"steps", "tokens", "load", "max_vio", "dead", "entropy", "dropped"}
    assert routing["steps"] == [3, 6]
    assert [len(layers) for layers in routing["load"]] == [2, 2]
    assert [len(experts) for layers in routing["load"] for experts in layers] == [4] * 4


def test_means_and_spreads_are_over_the_seeds(two_seeds: tuple[dict[str, Any], Path]) -> None:
    document, out = two_seeds
    for team in document["teams"]:
        runs = [read_lines(out / team["name"] / f"seed-{seed}" / "events.jsonl") for seed in (0, 1)]
        ends = [of_kind("end", events)[0] for events in runs]
        for key, field in (("heldout_loss", "loss"), ("bits_per_byte", "bits_per_byte")):
            values = [end[field] for end in ends]
            assert values[0] != values[1]
            assert team[key]["values"] == values
            assert team[key]["mean"] == pytest.approx(sum(values) / 2)
            assert team[key]["spread"] == pytest.approx(abs(values[0] - values[1]))
        assert team["train_tokens_per_second"] == statistics.median(end["tokens_per_second"] for end in ends)
        assert team["train_seconds"] == pytest.approx(sum(end["seconds"] for end in ends) / 2)
        for i, point in enumerate(team["curve"]):
            evals = [of_kind("eval", events)[i] for events in runs]
            assert point["loss"] == pytest.approx(sum(event["loss"] for event in evals) / 2)
            assert (point["low"], point["high"]) == tuple(sorted(event["loss"] for event in evals))
            assert point["seconds"] == pytest.approx(sum(event["seconds"] for event in evals) / 2)


def test_the_sample_is_held_out_text_with_its_experts(two_seeds: tuple[dict[str, Any], Path], data: Data) -> None:
    document, out = two_seeds
    sample = document["sample"]
    middle = len(data.heldout) // 2
    tokens = [int(token) for token in data.heldout[middle : middle + 64]]  # two sequences of the model's context
    assert "".join(sample["pieces"]) == data.tokenizer.decode(tokens, special=True)
    assert len(sample["pieces"]) == 64
    assert sample["layers"] == [0, 1]
    model = load(out / "moe/seed-0")
    with torch.no_grad():
        _, routings = model(torch.tensor(tokens).view(2, 32))
    assert sample["experts"] == [routing.experts_TK.tolist() for routing in routings]
    for layer, routing in zip(sample["weights"], routings, strict=True):
        torch.testing.assert_close(torch.tensor(layer), routing.weights_TK, atol=6e-5, rtol=0)


def test_the_files_are_the_document(two_seeds: tuple[dict[str, Any], Path]) -> None:
    document, out = two_seeds

    def forbidden(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    written = json.loads((out / "compare.json").read_text(), parse_constant=forbidden)
    assert written == json.loads(json.dumps(document, allow_nan=False))
    page = (out / "report.html").read_text()
    assert all(label in page for label in LABELS.values())
    assert {path.name for path in out.iterdir()} == {"compare.json", "report.html", *NAMES}


def test_one_seed_has_no_spread(data: Data, tmp_path: Path) -> None:
    document = compare(data, three(), tmp_path / "out")
    for team in document["teams"]:
        assert len(team["heldout_loss"]["values"]) == 1
        assert team["heldout_loss"]["spread"] == 0
        assert all(point["low"] == point["loss"] == point["high"] for point in team["curve"])


def curve(*losses: float) -> list[dict[str, Any]]:
    return [{"tokens": 100 * (i + 1), "flops": 1e6 * (i + 1), "seconds": 2.0 * (i + 1), "loss": loss}
            for i, loss in enumerate(losses)]  # fmt: skip


def test_reached_by_hand() -> None:
    # From 4.0 at 200 tokens to 3.0 at 300: 3.25 is three quarters of the way.
    def reached(tokens: float, at_most: bool = False) -> dict[str, Any]:
        return {"tokens": tokens, "flops": 1e4 * tokens, "seconds": 0.02 * tokens, "at_most": at_most}

    assert _reached(curve(5.0, 4.0, 3.0), 3.25) == reached(275.0)
    assert _reached(curve(5.0, 4.0, 3.0), 4.0) == reached(200.0)
    assert _reached(curve(5.0, 4.0, 3.0), 3.0) == reached(300.0)
    assert _reached(curve(5.0, 4.0, 3.0), 2.9) is None
    assert _reached(curve(5.0, 5.0, 4.0), 4.5) == reached(250.0)
    assert _reached([], 1.0) is None
    # Where the first evaluation is past it already, it was then or before; so too after one of step 0, from which a
    # curve falls in no straight line.
    assert _reached(curve(5.0, 4.0, 3.0), 6.0) == reached(100, at_most=True)
    assert _reached(curve(3.0, 5.0, 2.0), 3.0) == reached(100, at_most=True)  # the first time
    start = {"tokens": 0, "flops": 0, "seconds": 0.0, "loss": 8.0}
    assert _reached([start, *curve(5.0, 4.0)], 6.0) == reached(100, at_most=True)
    assert _reached([start, *curve(5.0, 4.0)], 4.5) == reached(150.0)


def test_reached_is_measured_against_the_small_dense_team(two_seeds: tuple[dict[str, Any], Path]) -> None:
    document, _ = two_seeds
    goal = document["teams"][0]["heldout_loss"]["mean"]
    for team in document["teams"]:
        assert team["reached"] == _reached(team["curve"], goal)
    assert document["teams"][0]["reached"]["tokens"] == pytest.approx(384)


def test_decode_speeds_have_room_in_any_context() -> None:
    found = decode_speeds([Decoder(moe(context=context)) for context in (2, 3, 16, 17, 100)], tokens=4, repeats=2)
    assert [len(rates) for rates in found] == [2] * 5
    assert all(0 < rate < math.inf for rates in found for rate in rates)


# ---------------------------------------------------------------------------------------------------------------------
# Again.


def test_a_second_call_trains_nothing(
    two_seeds: tuple[dict[str, Any], Path], data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, out = two_seeds
    monkeypatch.setattr(module, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    events: list[tuple[str, int, str]] = []
    again = compare(
        data, three(), out, seeds=2, command="handful compare",
        on_event=lambda team, seed, event: events.append((team.name, seed, event["event"])),
    )  # fmt: skip
    assert without_clock(again) == without_clock(document)
    assert events == [(name, seed, kind) for seed in (0, 1) for name in NAMES for kind in ("start", "end")]


def test_a_run_of_auto_is_used_again(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" came to is written down, and is no other setting."""
    monkeypatch.setattr(sys.modules["handful.train"], "pick_dtype", lambda *args: ("float32", "measured so"))
    first = compare(data, three(dtype="auto"), tmp_path / "out")
    monkeypatch.setattr(module, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert without_clock(compare(data, three(dtype="auto"), tmp_path / "out")) == without_clock(first)


def test_more_seeds_are_added_to_what_is_there(
    two_seeds: tuple[dict[str, Any], Path], data: Data, tmp_path: Path
) -> None:
    compare(data, three(), tmp_path / "out", seeds=1)
    begun: list[tuple[str, int]] = []

    def follow(team: Team, seed: int, event: Event) -> None:
        if event["event"] == "step" and event["step"] == 1:
            begun.append((team.name, seed))

    document = compare(data, three(), tmp_path / "out", seeds=2, command="handful compare", on_event=follow)
    assert begun == [(name, 1) for name in NAMES]
    assert without_clock(document) == without_clock(two_seeds[0])


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(finished: bool, data: Data, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if finished:
        compare(data, three()[:1], out)
    else:
        with pytest.raises(KeyboardInterrupt):
            compare(data, three(), out, on_event=press("dense-active", 0, step=1))
    before = (out / "dense-active/seed-0/events.jsonl").read_bytes()
    said = f"train.steps = 7: the run in {out}/dense-active/seed-0 has 6; name another folder by --out"
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        compare(data, three(steps=7), out)
    wider = teams(moe({"experts": 8}), three()[1].settings, RATES)
    with pytest.raises(ConfigError, match=r"^model\.ffn = \d+: the run in "):
        compare(data, [dataclasses.replace(wider[2], name="dense-active")], out)
    other = load_data(str(write_text(tmp_path / "text", documents=41)), vocab=VOCAB, cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"^data: not the text, or not the tokenizer, of the run in "):
        compare(other, three(), out)
    assert (out / "dense-active/seed-0/events.jsonl").read_bytes() == before


def test_no_seeds(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^seeds = 0: at least 1$"):
        compare(data, three(), tmp_path / "out", seeds=0)


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C.


def press(name: str, seed: int, step: int) -> Callable[[Team, int, Event], None]:
    """Ctrl-C after a step of a team and seed."""

    def on_event(team: Team, at: int, event: Event) -> None:
        if (team.name, at, event["event"]) == (name, seed, "step") and event["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return on_event


def test_ctrl_c_keeps_what_is_finished(two_seeds: tuple[dict[str, Any], Path], data: Data, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compare(data, three(), out, seeds=2, on_event=press("dense-active", 0, step=4))
    assert not (out / "compare.json").exists()
    # All of them were at it, and all keep what they have.
    stopped = [of_kind("interrupted", read_events(out / name / "seed-0"))[0]["step"] for name in NAMES]
    assert stopped == [4, 3, 3]
    assert not (out / "moe/seed-1").exists()

    document = compare(data, three(), out, seeds=2, on_event=press("moe", 1, step=2))
    assert [team["name"] for team in document["teams"]] == NAMES
    assert document["seeds"] == [0]
    assert [len(team["heldout_loss"]["values"]) for team in document["teams"]] == [1, 1, 1]
    assert json.loads((out / "compare.json").read_text()) == json.loads(json.dumps(document))
    assert "Team 1" in (out / "report.html").read_text()

    # Twice interrupted, it ends as if it had never been; routing is told in shorter windows.
    document = compare(data, three(), out, seeds=2, command="handful compare")
    plain = without_clock(two_seeds[0])
    found = without_clock(document)
    for team in (*plain["teams"], *found["teams"]):
        del team["routing"]
    assert found == plain


# ---------------------------------------------------------------------------------------------------------------------
# Taking turns, and several mixtures.


def test_teams_take_turns(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURNS", 4)
    order: list[tuple[str, int]] = []

    def follow(team: Team, seed: int, event: Event) -> None:
        if event["event"] == "step":
            order.append((team.name, event["step"]))

    compare(data, three(steps=12, eval_every=0, checkpoint_every=0), tmp_path / "out", on_event=follow)
    # Three steps of each in turn.
    assert order == [(name, turn * 3 + i) for turn in range(4) for name in NAMES for i in (1, 2, 3)]


def test_turns_change_no_number(data: Data, two_seeds: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    alone = list(module.train(moe(), dataclasses.replace(three()[1].settings, seed=1), data, tmp_path / "alone"))
    together = read_events(two_seeds[1] / "moe/seed-1")
    assert timeless(alone) == timeless(together)


def test_a_team_that_diverges_is_named(data: Data, tmp_path: Path) -> None:
    wild = three()
    wild[1] = dataclasses.replace(wild[1], settings=dataclasses.replace(wild[1].settings, lr=1e30))
    with pytest.raises(TrainingError, match=r"^Team 2 · mixture of experts, seed 0: step \d: "):
        compare(data, wild, tmp_path / "out")
    # The others keep what they have, and nobody holds their locks.
    compare(data, [wild[0], wild[2]], tmp_path / "out")


def several() -> list[Team]:
    settings = training(balance=BalanceConfig(loss="switch", weight=0.01))
    free = dataclasses.replace(settings, balance=BalanceConfig())
    wide = moe({"experts": 8})
    return line_up({"even": (moe(), settings), "free": (moe(), free), "wide": (wide, settings)}, RATES)


def test_a_line_up_stands_between_the_twins_of_the_first() -> None:
    found = several()
    assert [team.name for team in found] == ["dense-active", "even", "free", "wide", "dense-total"]
    assert [team.label for team in found] == [
        "Team 1 · small dense", "Team 2 · even", "Team 3 · free", "Team 4 · wide", "Team 5 · big dense",
    ]  # fmt: skip
    assert (found[0].model, found[-1].model) == twins(moe())
    assert [team.settings.lr for team in found] == [1e-2, 2e-2, 2e-2, 2e-2, 5e-3]
    assert [team.settings.balance.loss for team in found] == ["none", "switch", "none", "switch", "none"]
    with pytest.raises(ConfigError, match=r"^a mixture's name is none of a twin's"):
        line_up({"dense-total": (moe(), training())})


def test_several_mixtures_in_one_document(data: Data, tmp_path: Path) -> None:
    document = compare(data, several(), tmp_path / "out", seeds=2)
    assert document["title"] == "Five teams, one text"
    even, free, wide = document["teams"][1:4]
    # The same seed and shape: they begin alike, and part by their balance alone.
    assert even["curve"][0]["loss"] == free["curve"][0]["loss"] != wide["curve"][0]["loss"]
    assert even["curve"][-1]["loss"] != free["curve"][-1]["loss"]
    assert [team["routing"] is not None for team in document["teams"]] == [False, True, True, True, False]
    page = (tmp_path / "out/report.html").read_text()
    for words in ("The dense twins match Team 2 · even.", "switch 0.01", "Dead experts", "8, 2 a token"):
        assert words in page


def test_a_folder_of_somebody_else_is_refused(data: Data, tmp_path: Path) -> None:
    list(module.train(moe(), training(), data, tmp_path / "run"))
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ConfigError, match=r"run': holds a run of one model; name another folder by --out$"):
        compare(data, three(), tmp_path / "run")
    assert sorted((tmp_path / "run").rglob("*")) == before
    # Whatever team differs, nothing is trained before that is found.
    compare(data, three()[1:2], tmp_path / "out")
    other = teams(moe({"experts": 8}), three()[1].settings, RATES)
    with pytest.raises(ConfigError, match=r"^model\.router = .*; name another folder by --out$"):
        compare(data, other, tmp_path / "out")
    assert not (tmp_path / "out/dense-active").exists()
