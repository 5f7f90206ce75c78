"""`handful compare`: an MoE beside its dense twins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from handful.cli.shared import DataOption, Json, RouterOption, command_line, open_screen, print_json
from handful.errors import ConfigError

if TYPE_CHECKING:
    from handful.compare import Team
    from handful.train import Event

EXAMPLE = "handful compare --minutes 5 --seeds 3 --out runs/three-teams"


def run(
    data: DataOption = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Training tokens for every team.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Training time of all runs together.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often each team is trained.")] = 1,
    router: RouterOption = None,
    out: Annotated[Path, typer.Option(help="The folder for runs, table and report.")] = Path("runs/compare"),
    as_json: Json = False,
) -> None:
    """Train an MoE beside its dense twins: a small one of its active size, a big one of its total size."""
    from handful.compare import compare, steps_within, teams
    from handful.console import RunProgress, comparison_table
    from handful.data import load_data
    from handful.presets import preset, small_model, small_training
    from handful.runs import read_asked

    if tokens is not None and minutes is not None:
        raise ConfigError("tokens, minutes: give one of them")
    screen = open_screen()
    like = preset(router) if router else None
    text = load_data(data, progress=screen.print)
    settings = small_training(like)
    if tokens is not None:
        settings = small_training(like, steps=max(1, tokens // settings.tokens_per_step))
    entrants = teams(small_model(text.tokenizer.vocab_size, like), settings)
    if minutes is not None:
        # Timing is never twice the same: what was begun before says how long it goes on.
        begun = out / entrants[0].name / "seed-0"
        held = read_asked(begun)["train"]["steps"] if (begun / "run.json").exists() else None
        if held:
            screen.print(f"{out} was begun with {held} steps, and goes on with them")
        settings = small_training(like, steps=held or steps_within(entrants, text, minutes, seeds))
        entrants = teams(small_model(text.tokenizer.vocab_size, like), settings)
    interrupted = False
    with RunProgress(screen) as progress:

        def named(team: str, seed: int) -> str:
            return team if seeds == 1 else f"{team}, seed {seed}"

        def show(team: Team, seed: int, event: Event) -> None:
            nonlocal interrupted
            interrupted = interrupted or event["event"] == "interrupted"
            progress(named(team.label, seed), event)

        for seed in range(seeds):
            for team in entrants:
                progress.expect(named(team.label, seed))
        document = compare(
            text,
            entrants,
            out,
            seeds=seeds,
            command=command_line(),
            on_event=show,
        )
    if as_json:
        print_json(document)
    else:
        Console().print(comparison_table(document))
    screen.print(f"report: {out / 'report.html'}")
    if interrupted:
        screen.print("interrupted; the same command goes on")
        raise typer.Exit(130)
