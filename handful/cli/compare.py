"""`handful compare`: mixtures of experts beside their dense twins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful.cli.shared import (
    ColumnOption,
    DataOption,
    DeviceOption,
    Json,
    command_line,
    device_of,
    open_screen,
    print_json,
)
from handful.errors import ConfigError

if TYPE_CHECKING:
    from handful.compare import Team
    from handful.settings import Asked
    from handful.train import Event

EXAMPLE = "handful compare --router mixtral --router deepseek-v3 --balance none --out runs/routers"


def run(
    config: Annotated[Path | None, typer.Argument(help=r"A TOML file: \[model], \[train], \[data].")] = None,
    data: DataOption = None,
    column: ColumnOption = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Training tokens for every team.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Training time of all runs together.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often each team is trained.")] = 1,
    router: Annotated[
        list[str] | None,
        typer.Option("--router", help="A published router, such as mixtral (handful presets); again for another team."),
    ] = None,
    balance: Annotated[
        list[str] | None,
        typer.Option(help="Each mixture once more with none, switch, global, sequence, gshard or loss-free."),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts in a layer.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts of a token.")] = None,
    width: Annotated[int | None, typer.Option(help="Model width.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    expert_width: Annotated[int | None, typer.Option(help="Hidden width of an expert.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in an optimizer step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of every team. Default: swept ones.")] = None,
    device: DeviceOption = "cpu",
    out: Annotated[Path, typer.Option(help="The folder for runs, table and report.")] = Path("runs/compare"),
    as_json: Json = False,
) -> None:
    """Train mixtures of experts beside dense twins: a small one of their active size, a big one of their total size."""
    from handful.compare import compare, steps_within
    from handful.console import comparison_table
    from handful.finding import finding
    from handful.progress import RunProgress
    from handful.runs import read_asked
    from handful.settings import training_settings
    from handful.text import SMALLEST_VOCAB
    from handful.width import show

    if tokens is not None and minutes is not None:
        raise ConfigError("tokens, minutes: give one of them")
    screen = open_screen()
    where = device_of(device)
    given: dict[str, dict[str, Any]] = {
        "data": {"source": data, "column": column},
        "model": {
            "experts": experts, "top_k": top_k, "width": width, "layers": layers, "expert_width": expert_width,
        },
        "train": {"context": context, "batch": batch, "tokens": tokens, "lr": lr},
    }  # fmt: skip
    asked: dict[str, Asked] = {}
    names: list[str | None] = [*router] if router else [None]
    for name in names:
        own = training_settings(config, name, None, given)
        called = name or "moe"
        asked.setdefault(called, own)
        for kind in balance or []:
            other = training_settings(config, name, kind, given)
            if other.train.balance == own.train.balance:
                screen.print(f"{called} has the balance {kind} as it is")
            else:
                asked.setdefault(f"{called}-{kind}", other)
    _entrants(asked, SMALLEST_VOCAB, steps=None)  # what is wrong is said before any text is read
    text = next(iter(asked.values())).load_data(screen.print)
    entrants = _entrants(asked, text.tokenizer.vocab_size, steps=None)
    if minutes is not None:
        # Timing is never twice the same: what was begun before says how long it goes on.
        begun = out / entrants[0].name / "seed-0"
        held = read_asked(begun)["train"]["steps"] if (begun / "run.json").exists() else None
        if held:
            screen.print(f"{out} was begun with {held} steps, and goes on with them")
        if not held:
            screen.print("timing a few steps of every team")
        steps = held or steps_within(entrants, text, minutes, seeds, where)
        entrants = _entrants(asked, text.tokenizer.vocab_size, steps=steps)
    interrupted = False
    with RunProgress(screen) as progress:

        def named(team: str, seed: int) -> str:
            return team if seeds == 1 else f"{team}, seed {seed}"

        def follow(team: Team, seed: int, event: Event) -> None:
            nonlocal interrupted
            interrupted = interrupted or event["event"] == "interrupted"
            progress(named(team.label, seed), event)

        for seed in range(seeds):
            for team in entrants:
                progress.expect(named(team.label, seed))
        try:
            document = compare(text, entrants, out, seeds=seeds, device=where, command=command_line(), on_event=follow)
        except KeyboardInterrupt:
            document = None
    if document is not None:
        if as_json:
            print_json(document)
        else:
            show(comparison_table(document))
        screen.print(finding(document)[0])
        screen.print(f"open {out / 'report.html'} for the curves, the load of every expert and what it costs")
        for mixture in [team["name"] for team in document["teams"] if team["model"]["router"]][:1]:
            run = out / mixture / "seed-0"
            screen.print(f"handful serve {run} --open shows its routers at work, token by token")
    if interrupted or document is None:
        screen.print(f"interrupted: the same command goes on; every run is kept in {out}")
        raise typer.Exit(130)


def _entrants(asked: dict[str, Asked], vocab: int, steps: int | None) -> list[Team]:
    """The teams; with as many steps as are said, or else those that were asked for."""
    from dataclasses import replace

    from handful.compare import LABELS, line_up
    from handful.presets import evaluate_every

    def settled(one: Asked) -> Any:
        # Equal for all teams: what "auto" measures may differ from team to team.
        train = replace(one.train, dtype="float32" if one.train.dtype == "auto" else one.train.dtype)
        if steps is not None:
            every = train.eval_every if "eval_every" in one.said else evaluate_every(steps)
            train = replace(train, steps=steps, eval_every=every)
        return one.model(vocab), train

    mixtures = {name if len(asked) > 1 else "moe": settled(one) for name, one in asked.items()}
    first = next(iter(asked.values()))
    return line_up(mixtures, dict.fromkeys(LABELS, first.train.lr) if "lr" in first.said else None)
