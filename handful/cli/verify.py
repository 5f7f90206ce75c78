"""`handful verify`: proof of the kernels on this computer."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from handful.cli.shared import Json, open_screen, print_json

EXAMPLE = "handful verify --seed 7"


def run(seed: Annotated[int, typer.Option(min=0, help="Of the random cases.")] = 0, as_json: Json = False) -> None:
    """Prove on this computer that every experts backend computes what the plain loop does in float64."""
    from rich.progress import Progress

    from handful.console import verification_table
    from handful.units import duration
    from handful.verify.run import verify
    from handful.width import show

    screen = open_screen()
    began = time.perf_counter()
    examined = ""
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("verify", total=None)

        def follow(done: int, total: int, what: str) -> None:
            nonlocal examined
            bar.update(task, completed=done, total=total, description=what)
            if what != examined and not screen.is_terminal:
                screen.print(f"{done} of {total}: {what}")
            examined = what

        found = verify(seed, progress=follow)

    if as_json:
        print_json(found.to_dict())
    else:
        show(verification_table(found))
    for row in found.rows:
        more = len(row.failures) - 3
        for failure in (*row.failures[:3], *([f"and {more} more failures; --json tells all"] if more > 0 else [])):
            screen.print(f"{row.backend} {row.level} {row.format}: {failure}", style="red")
    if found.native_error:
        screen.print(f"the native kernels were not examined: {found.native_error}")
    taken = duration(time.perf_counter() - began)
    wrong = sum(not row.ok for row in found.rows)
    if wrong:
        screen.print(
            f"Not proved on this computer: {wrong} of {len(found.rows)} rows {'is' if wrong == 1 else 'are'} wrong; "
            f"it took {taken}."
        )
        raise typer.Exit(1)
    cases = sum(row.cases + row.checks for row in found.rows)
    screen.print(
        f"Proved on this computer: all {len(found.rows)} rows, {cases:,} cases, compute what the plain loop does in "
        f"float64; it took {taken}."
    )
