"""The honest comparison: an MoE beside a dense model of its active size and one of its total size.

    Team 1  dense-active   a small dense model
    Team 2  moe            the small one's active parameters, the big one's total
    Team 3  dense-total    a dense model with as many parameters as the MoE holds

All see the same tokens in the same order under the same optimizer and schedule, each at the learning rate that a sweep
found best for it. What comes out is a plain document: one table for people, `compare.json` for programs, and
`report.html` to look at.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from handful import __version__, checkpoint, report
from handful.config import BalanceConfig, ModelConfig, TrainConfig, to_dict
from handful.cost import cost
from handful.data import Data
from handful.engine import Sampling, generate_tokens
from handful.errors import ConfigError
from handful.families.io import load_decoder
from handful.machine import machine
from handful.model import Decoder
from handful.runs import Run, read_events
from handful.train import Event, train

__all__ = ["LABELS", "Team", "compare", "steps_within", "teams", "twins"]

LABELS = {
    "dense-active": "Team 1 · small dense",
    "moe": "Team 2 · mixture of experts",
    "dense-total": "Team 3 · big dense",
}

# Peak learning rates, swept equally for each team: `bench/lr_sweep.py` and its log.
LEARNING_RATES = {"dense-active": 0.016, "moe": 0.032, "dense-total": 0.016}


@dataclass(frozen=True, kw_only=True)
class Team:
    """One side of the comparison: its name, its shape and how it is trained."""

    name: str
    model: ModelConfig
    settings: TrainConfig

    @property
    def label(self) -> str:
        return LABELS[self.name]


def twins(moe: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """The dense models with the active and with the total parameters of an MoE.

    They differ from it in the feed-forward width alone, which is the average over layers of what the MoE's layer uses
    or holds, its router included, rounded up to a multiple of 8: a twin is never the smaller one.
    """
    if moe.router is None:
        raise ConfigError("model.router = None: a comparison starts from an MoE")
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


def teams(moe: ModelConfig, settings: TrainConfig, rates: dict[str, float] | None = None) -> list[Team]:
    """The three teams, each with its learning rate (None: the swept ones)."""
    active, total = twins(moe)
    rates = rates or LEARNING_RATES
    models = {"dense-active": active, "moe": moe, "dense-total": total}
    return [
        Team(
            name=name,
            model=model,
            settings=replace(
                settings, lr=rates[name], balance=settings.balance if model.router is not None else BalanceConfig()
            ),
        )
        for name, model in models.items()
    ]


def steps_within(entrants: Sequence[Team], data: Data, minutes: float, seeds: int) -> int:
    """How many steps of every team and seed fit into some minutes of training, by timing a few steps of each.

    KeyboardInterrupt after Ctrl-C.
    """
    seconds = 0.0
    for team in entrants:
        settings = replace(team.settings, steps=4, eval_every=0, eval_tokens=team.settings.context)
        events = list(train(team.model, settings, data))
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
    command: str = "",
    on_event: Callable[[Team, int, Event], None] | None = None,
) -> dict[str, Any]:
    """Train every team with every seed, write OUT/compare.json and OUT/report.html, and return the document.

    A run that OUT already holds, finished or not, is gone on with; ConfigError if its settings are others. After
    Ctrl-C the document has the runs that were finished; KeyboardInterrupt if no team was.
    """
    if seeds < 1:
        raise ConfigError(f"seeds = {seeds}: at least 1")
    out = Path(out)
    runs: dict[str, list[list[Event]]] = {team.name: [] for team in entrants}
    for seed in range(seeds):
        for team in entrants:
            events = _run(team, seed, data, out / team.name / f"seed-{seed}", on_event)
            if events is None:
                break
            runs[team.name].append(events)
        else:
            continue
        break
    finished = [team for team in entrants if runs[team.name]]
    if not finished:
        raise KeyboardInterrupt
    # Every team counts the seeds that all finished teams have: a spread over other seeds would not compare.
    common = min(len(runs[team.name]) for team in finished)
    rows = [_row(team, runs[team.name][:common], out) for team in finished]
    baseline = next((row for row in rows if row["name"] == "dense-active"), None)
    for row in rows:
        row["reached"] = _reached(row["curve"], baseline["heldout_loss"]["mean"]) if baseline else None
    document = {
        "title": "Three teams, one text",
        "handful": __version__,
        "machine": vars(machine()) | {"threads": torch.get_num_threads()},
        "data": data.summary(),
        "seeds": list(range(common)),
        "train": to_dict(replace(entrants[0].settings, balance=_balance(entrants))),
        "command": command,
        "teams": rows,
        "sample": _sample(out, entrants, data) if any(row["name"] == "moe" for row in rows) else None,
    }
    checkpoint.write_file(out / "compare.json", document)
    report.write(document, out / "report.html")
    return document


def _balance(entrants: Sequence[Team]) -> BalanceConfig:
    return next((t.settings.balance for t in entrants if t.model.router is not None), BalanceConfig())


def _run(
    team: Team, seed: int, data: Data, folder: Path, on_event: Callable[[Team, int, Event], None] | None
) -> list[Event] | None:
    """One team's training with one seed: its events, or None if Ctrl-C ended it."""
    settings = replace(team.settings, seed=seed)
    resume = (folder / "run.json").exists()
    events = read_events(folder) if resume else []
    if any(event["event"] == "end" for event in events):
        Run.open(folder, resume=True).check(team.model, settings, data)
        for event in events:
            if on_event and event["event"] in ("start", "end"):
                on_event(team, seed, event)
        return events
    for event in train(team.model, settings, data, folder, resume=resume):
        if on_event:
            on_event(team, seed, event)
        if event["event"] == "interrupted":
            return None
    return read_events(folder)


def _row(team: Team, runs: list[list[Event]], out: Path) -> dict[str, Any]:
    """A team's part of the document: its runs' own, put together over the seeds."""
    each = [report.from_events(events)["teams"][0] for events in runs]
    return {
        **each[0],
        "name": team.name,
        "label": team.label,
        "heldout_loss": _spread([run["heldout_loss"]["mean"] for run in each]),
        "bits_per_byte": _spread([run["bits_per_byte"]["mean"] for run in each]),
        "train_tokens_per_second": statistics.median(run["train_tokens_per_second"] for run in each),
        "train_seconds": statistics.mean(run["train_seconds"] for run in each),
        "decode_tokens_per_second": decode_speed(load_decoder(out / team.name / "seed-0")),
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


def _reached(curve: list[dict[str, Any]], loss: float) -> dict[str, float] | None:
    """Tokens, FLOPs and seconds at which a curve first came down to a loss, between its points by straight lines."""
    before: dict[str, Any] | None = None
    for point in curve:
        if point["loss"] <= loss:
            if before is None:
                return {axis: point[axis] for axis in ("tokens", "flops", "seconds")}
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return {
                axis: before[axis] + share * (point[axis] - before[axis]) for axis in ("tokens", "flops", "seconds")
            }
        before = point
    return None


def decode_speed(model: Decoder, tokens: int = 64, repeats: int = 5) -> float:
    """Tokens per second of greedy generation, one sequence, after a short prompt: the median of some repeats."""
    prompt = list(range(1, 1 + min(16, model.config.context // 2)))
    tokens = min(tokens, model.config.context - len(prompt))
    rates = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        made = sum(1 for _ in generate_tokens(model, prompt, tokens, Sampling(temperature=0)))
        rates.append(made / (time.perf_counter() - began))
    return statistics.median(rates[1:])  # the first warms up


@torch.no_grad()
def _sample(out: Path, entrants: Iterable[Team], data: Data) -> dict[str, Any]:
    """Held-out text with the experts of every token, from the MoE's first seed."""
    moe = next(team for team in entrants if team.name == "moe")
    model = load_decoder(out / "moe" / "seed-0")
    middle = len(data.heldout) // 2
    tokens = [int(t) for t in data.heldout[middle : middle + 2 * moe.model.context]]
    tokens_BS = torch.tensor(tokens[: len(tokens) // 2 * 2]).view(2, -1) if len(tokens) >= 4 else torch.tensor([tokens])
    _, routings = model(tokens_BS)
    return {
        "pieces": data.tokenizer.pieces(tokens_BS.flatten().tolist()),
        "layers": [i for i in range(moe.model.layers) if moe.model.is_moe(i)],
        "experts": [r.experts_TK.tolist() for r in routings],
        "weights": [[[round(w, 4) for w in row] for row in r.weights_TK.tolist()] for r in routings],
    }
