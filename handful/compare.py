"""The honest comparison: a mixture beside a dense model of its active size and one of its total size.

    Team 1  dense-active   a small dense model
    Team 2  moe            the small one's active parameters, the big one's total
    Team 3  dense-total    a dense model with as many parameters as the MoE holds

There may be several mixtures: other routers, other balances. The twins are then those of the first one.

All see the same tokens in the same order under the same optimizer and schedule, each at the learning rate that a sweep
found best for its kind. They take turns, so that a busy minute of the computer falls on all of them. What comes out is
a plain document: one table for people, `compare.json` for programs, and `report.html` to look at.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from handful import __version__, checkpoint, report
from handful.config import BalanceConfig, ModelConfig, TrainConfig
from handful.config_io import to_dict
from handful.cost import cost
from handful.data import Data
from handful.engine import Engine
from handful.errors import ConfigError, TrainingError
from handful.families.io import load_decoder
from handful.generate import stream
from handful.lesson import lesson
from handful.machine import machine
from handful.model import Decoder
from handful.request import Request
from handful.runs import Run, check_folder, read_events
from handful.sampling import Sampling
from handful.train import Event, interrupts, train

__all__ = ["LABELS", "Team", "compare", "line_up", "steps_within", "teams", "twins"]

LABELS = {
    "dense-active": "Team 1 · small dense",
    "moe": "Team 2 · mixture of experts",
    "dense-total": "Team 3 · big dense",
}

# Peak learning rates, swept equally for each kind of team: `bench/lr_sweep.py` and its log.
LEARNING_RATES = {"dense-active": 0.016, "moe": 0.032, "dense-total": 0.016}
TURNS = 50  # of each team in a run
NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")

OnEvent = Callable[["Team", int, Event], None]


@dataclass(frozen=True, kw_only=True)
class Team:
    """One side of the comparison: its name (that of its folder), what people call it, its shape, how it is trained."""

    name: str
    label: str
    model: ModelConfig
    settings: TrainConfig


def twins(moe: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """The dense models with the active and with the total parameters of an MoE.

    They differ from it in the feed-forward width alone, which is the average over layers of what the MoE's layer uses
    or holds, its router included, rounded up to a multiple of 8: a twin is never the smaller one.
    """
    if moe.router is None:
        raise ConfigError(
            "model.router = None (router = 'none'): a comparison starts from an MoE, and makes its dense twins itself"
        )
    bare = replace(
        moe, router=None, expert_width=0, shared_width=0, shared_gate=False, expert_bias=False, dense_first=0,
        moe_every=1, dense_layers=(), ffn=8,
    )  # fmt: skip
    price, dense = cost(moe), cost(bare)
    per_width = moe.layers * moe.width * (3 if moe.gated else 2)

    def widened(parameters: int) -> ModelConfig:
        width = 8 + max(0, parameters - dense.total) / per_width
        return replace(bare, ffn=8 * -int(-width // 8))

    return widened(price.active), widened(price.total)


def teams(moe: ModelConfig, settings: TrainConfig, rates: Mapping[str, float] | None = None) -> list[Team]:
    """The three teams, each with its learning rate (None: the swept ones)."""
    return line_up({"moe": (moe, settings)}, rates)


def line_up(
    mixtures: Mapping[str, tuple[ModelConfig, TrainConfig]], rates: Mapping[str, float] | None = None
) -> list[Team]:
    """The teams of a comparison of some mixtures, by their names: they stand between the twins of the first one.

    rates   peak learning rates of "dense-active", "moe" (every mixture) and "dense-total". None: the swept ones.
    """
    rates = rates or LEARNING_RATES
    moe, settings = next(iter(mixtures.values()))
    active, total = twins(moe)
    dense = replace(settings, balance=BalanceConfig())
    sides = {"dense-active": (active, dense), **mixtures, "dense-total": (total, dense)}
    if len(sides) != len(mixtures) + 2:
        raise ConfigError("a mixture's name is none of a twin's: dense-active, dense-total")
    called = {"dense-active": "small dense", "moe": "mixture of experts", "dense-total": "big dense"}
    return [
        Team(
            name=name,
            label=f"Team {number} · {called.get(name, name)}",
            model=model,
            settings=replace(of_side, lr=rates[name if name in rates else "moe"]),
        )
        for number, (name, (model, of_side)) in enumerate(sides.items(), 1)
    ]


def steps_within(entrants: Sequence[Team], data: Data, minutes: float, seeds: int, device: str = "cpu") -> int:
    """How many steps of every team and seed fit into some minutes of training, by timing a few steps of each.

    KeyboardInterrupt after Ctrl-C.
    """
    seconds = 0.0
    for team in entrants:
        settings = replace(team.settings, steps=4, eval_every=0, eval_tokens=team.settings.context)
        events = list(train(team.model, settings, data, device=device))
        if events[-1]["event"] == "interrupted":
            raise KeyboardInterrupt
        times = [event["seconds"] for event in events if event["event"] == "step"]
        seconds += (times[-1] - times[0]) / (len(times) - 1)
    return max(1, int(minutes * 60 / (seeds * seconds)))


def compare(
    data: Data,
    entrants: Sequence[Team],
    out: str | Path,
    *,
    seeds: int = 1,
    device: str = "cpu",
    command: str = "",
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Train every team with every seed, write OUT/compare.json and OUT/report.html, and return the document.

    The teams of a seed take turns of some steps each, which changes none of their numbers. A run that OUT already
    holds, finished or not, is gone on with; ConfigError if its settings are others, before anything is trained. After
    Ctrl-C the document has the seeds that all teams have finished; KeyboardInterrupt if there is none.
    """
    if seeds < 1:
        raise ConfigError(f"seeds = {seeds}: at least 1")
    out = Path(out)
    _check_out(out, entrants, seeds, data)
    runs: dict[str, list[list[Event]]] = {team.name: [] for team in entrants}
    with interrupts() as stop:
        for seed in range(seeds):
            _take_turns(entrants, seed, data, out, device, stop, on_event)
            if stop():
                break
    for team in entrants:
        for seed in range(seeds):
            events = read_events(_folder(out, team, seed))
            if not any(event["event"] == "end" for event in events):
                break
            runs[team.name].append(events)
    # A spread over other seeds would not compare.
    common = min(map(len, runs.values()))
    if not common:
        raise KeyboardInterrupt
    rows = [_row(team, runs[team.name][:common]) for team in entrants]
    models = {team.name: load_decoder(_folder(out, team, 0)).to(device) for team in entrants}
    speeds = decode_speeds(list(models.values()))
    for row, rates in zip(rows, speeds, strict=True):
        row["decode_tokens_per_second"] = statistics.median(rates)
        row["decode_range"] = [min(rates), max(rates)]
    baseline = next((row for row in rows if row["name"] == "dense-active"), None)
    for row in rows:
        row["reached"] = _reached(row["curve"], baseline["heldout_loss"]["mean"]) if baseline else None
    mixtures = [team for team in entrants if team.model.router is not None]
    shown, told = lesson(models, mixtures[0].name, data, mixtures[0].settings.context) if mixtures else (None, None)
    count = NUMBERS[len(entrants)] if len(entrants) < len(NUMBERS) else str(len(entrants))
    document = {
        "title": f"{count} teams, one text",
        "handful": __version__,
        "machine": vars(machine()) | {"threads": torch.get_num_threads(), "device": device},
        "data": data.summary(),
        "seeds": list(range(common)),
        "train": to_dict(replace(entrants[0].settings, balance=(mixtures or entrants)[0].settings.balance)),
        "command": command,
        "teams": rows,
        "sample": shown,
        "lesson": told,
    }
    checkpoint.write_file(out / "compare.json", document)
    report.write(document, out / "report.html")
    return document


def _folder(out: Path, team: Team, seed: int) -> Path:
    return out / team.name / f"seed-{seed}"


def _check_out(out: Path, entrants: Iterable[Team], seeds: int, data: Data) -> None:
    """ConfigError if OUT holds what is not this comparison's, or is a file."""
    check_folder(out)
    if (out / "run.json").exists():
        raise ConfigError(f"out = {str(out)!r}: holds a run of one model; name another folder by --out")
    for seed in range(seeds):
        for team in entrants:
            folder = _folder(out, team, seed)
            if not (folder / "run.json").exists():
                continue
            try:
                Run.open(folder, resume=True).check(team.model, replace(team.settings, seed=seed), data)
            except ConfigError as error:
                raise ConfigError(f"{error}; name another folder by --out") from None


def _take_turns(
    entrants: Iterable[Team],
    seed: int,
    data: Data,
    out: Path,
    device: str,
    stop: Callable[[], bool],
    on_event: OnEvent | None,
) -> None:
    """Train the teams of a seed, some steps of each in turn, until all are at their ends or have been stopped."""
    with ExitStack() as open_runs:
        training = {}
        for team in entrants:
            stream = _run(team, seed, data, _folder(out, team, seed), device, stop)
            training[team.name] = (team, open_runs.enter_context(closing(stream)))
        while training:
            for team, stream in list(training.values()):
                try:
                    ended = _turn(team, seed, stream, on_event)
                except TrainingError as error:
                    raise TrainingError(f"{team.label}, seed {seed}: {error}") from None
                if ended:
                    del training[team.name]


def _turn(team: Team, seed: int, stream: Iterable[Event], on_event: OnEvent | None) -> bool:
    """Some steps of a team; whether it has come to its end."""
    left = max(1, team.settings.steps // TURNS)
    for event in stream:
        if on_event:
            on_event(team, seed, event)
        left -= event["event"] == "step"
        if not left:
            return False
    return True


def _run(team: Team, seed: int, data: Data, folder: Path, device: str, stop: Callable[[], bool]) -> Generator[Event]:
    """The events of one team's training with one seed; of one that is finished, its start and its end."""
    resume = (folder / "run.json").exists()
    events = read_events(folder) if resume else []
    if any(event["event"] == "end" for event in events):
        yield from (event for event in events if event["event"] in ("start", "end"))
    elif not stop():
        settings = replace(team.settings, seed=seed)
        yield from train(team.model, settings, data, folder, resume=resume, device=device, stop=stop)


def _row(team: Team, runs: list[list[Event]]) -> dict[str, Any]:
    """A team's part of the document: its runs' own, put together over the seeds."""
    each = [report.from_events(events)["teams"][0] for events in runs]
    ranges = [run["train_range"] for run in each if run["train_range"]]  # a run of one step has none
    return {
        **each[0],
        "name": team.name,
        "label": team.label,
        "heldout_loss": _spread([run["heldout_loss"]["mean"] for run in each]),
        "bits_per_byte": _spread([run["bits_per_byte"]["mean"] for run in each]),
        "train_tokens_per_second": statistics.median(run["train_tokens_per_second"] for run in each),
        "train_range": [min(low for low, _ in ranges), max(high for _, high in ranges)] if ranges else None,
        "train_seconds": statistics.mean(run["train_seconds"] for run in each),
        "curve": [
            {
                **points[0],
                "seconds": statistics.mean(point["seconds"] for point in points),
                "loss": statistics.mean(point["loss"] for point in points),
                "low": min(point["loss"] for point in points),
                "high": max(point["loss"] for point in points),
            }
            for points in zip(*(run["curve"] for run in each), strict=True)
        ],
        "warnings": [message for run in each for message in run["warnings"]],
    }


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "spread": max(values) - min(values), "values": values}


def _reached(curve: list[dict[str, Any]], loss: float) -> dict[str, Any] | None:
    """Tokens, FLOPs and seconds at which a curve first came down to a loss, between its points by straight lines.

    at_most   the first evaluation of a training that had begun is already past it: it was then or before.
    """
    axes = ("tokens", "flops", "seconds")
    before: dict[str, Any] | None = None
    for point in curve:
        if point["loss"] <= loss:
            if before is None or not before["tokens"]:  # from the start a curve falls in no straight line
                return {**{axis: point[axis] for axis in axes}, "at_most": True}
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return {**{axis: before[axis] + share * (point[axis] - before[axis]) for axis in axes}, "at_most": False}
        before = point
    return None


def decode_speeds(models: Sequence[Decoder], tokens: int = 64, repeats: int = 5) -> list[list[float]]:
    """Tokens per second of greedy decoding, one sequence, after a short prompt's first token: of every model, some
    repeats, in which the models take turns. Without drafts: they pay where a text repeats itself, whoever made it."""
    engines = [Engine(model, max_sequences=1, speculate=False) for model in models]

    def rate(engine: Engine) -> float:
        context = engine.model.config.context
        prompt = list(range(1, 1 + min(16, context // 2)))
        most = min(tokens, context - len(prompt))
        request = Request(prompt=prompt, max_tokens=most, sampling=Sampling(temperature=0))
        times = [time.perf_counter(), *(time.perf_counter() for _ in stream(engine, request))]
        first = min(1, len(times) - 2)  # with room for one token alone, the prompt's
        return (len(times) - 1 - first) / (times[-1] - times[first])

    rounds = [[rate(engine) for engine in engines] for _ in range(repeats + 1)]
    return [list(rates) for rates in zip(*rounds[1:], strict=True)]  # the first warms up
