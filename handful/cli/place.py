"""`handful place`: which expert on which device, from a recorded load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from handful.cli.shared import Json, open_screen, print_json
from handful.errors import ConfigError

EXAMPLE = "handful place runs/inspect/inspect.json --devices 8 --slots 10 --out placement.json"


def run(
    load: Annotated[
        Path,
        typer.Argument(
            help="inspect.json of handful inspect, a routing of generate --routing, or JSON: a list for each layer, "
            "of every expert's load."
        ),
    ],
    devices: Annotated[int, typer.Option(min=1, help="How many there are.")],
    slots: Annotated[int, typer.Option(min=1, help="Experts of a layer that a device has room for, copies too.")],
    dead: Annotated[list[int] | None, typer.Option(help="A device that is gone; may be given several times.")] = None,
    before: Annotated[Path | None, typer.Option(help="A placement that this command wrote: few experts move.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the placement is written, as JSON.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Place experts on devices by their load, with copies of the busy ones, so that the busiest device has least."""
    from dataclasses import asdict

    from handful.checkpoint import read_json, write_file
    from handful.console import placement_table
    from handful.placement import Placed, Placement, place_layer, read_load
    from handful.width import show

    screen = open_screen()
    wrong = [device for device in dead or () if not 0 <= device < devices]
    if wrong:
        raise ConfigError(f"dead = {wrong[0]}: a device from 0 to {devices - 1}")
    room = [0 if device in (dead or ()) else slots for device in range(devices)]
    loads, was = read_load(load), None
    if before is not None:
        found: Any = read_json(before)
        try:
            was = [Placement(tuple(tuple(own) for own in layer["experts"])) for layer in found["layers"]]
        except (KeyError, TypeError):
            raise ConfigError(f"before = {str(before)!r}: no placement that handful place wrote") from None
        if len(was) != len(loads):
            raise ConfigError(f"before: {len(was)} layers; the load has {len(loads)}")
    made: list[Placed] = [place_layer(values, room, None if was is None else was[i]) for i, values in enumerate(loads)]
    document = {"devices": devices, "slots": room, "layers": [asdict(one) for one in made]}
    if out is not None:
        write_file(out, json.dumps(document, indent=2) + "\n")
    if as_json:
        print_json(document)
        return
    show(placement_table(made))
    if out is not None:
        screen.print(f"{out} has every device's experts and their shares")
