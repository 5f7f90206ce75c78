"""`handful plan`: whether a model runs on this computer, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from handful.cli.shared import Json, config_of, open_screen, precision_of, print_json

EXAMPLE = "handful plan qwen3 --quant int4 --memory 8GB"


def run(
    model: Annotated[str, typer.Argument(help="A preset, a config.json, a run or checkpoint folder, or org/name.")],
    memory: Annotated[
        str | None, typer.Option(help="What the weights may take, such as 4GB. Default: what is free.")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="float32, bfloat16, int8 or int4. Default: the last three.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence. Default: at most 4096.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that decode together.")] = 1,
    trace: Annotated[
        Path | None, typer.Option(help="A routing that generate --routing wrote: its hit rates are used.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this computer again.")] = False,
    as_json: Json = False,
) -> None:
    """Whether a model runs on this computer, and how fast, from its config alone: nothing else is downloaded."""
    from dataclasses import asdict

    from handful.cache_replay import check_recording, replay
    from handful.ceilings import ceilings
    from handful.console import plan_line, plan_tables
    from handful.cost import cost as price
    from handful.observe import Recording
    from handful.plan import plan
    from handful.units import parse_bytes
    from handful.width import show

    screen = open_screen()
    budget = None if memory is None else parse_bytes(memory)
    config, notes = config_of(model)
    recording = None if trace is None else Recording.read(trace)
    if recording is not None:
        check_recording(recording, config, str(trace))
    folder, there = _checkpoint_place(model)
    published, unknown = precision_of(model)
    notes += unknown
    priced = price(config, context=1, published=published).bytes
    checkpoint = priced.weights if priced.published is None else priced.published
    download = 0 if there else checkpoint
    machine = ceilings(folder, fresh=measure)
    formats = ("bfloat16", "int8", "int4") if quant is None else (quant,)
    plans = [
        plan(config, machine, dtype=dtype, memory=budget, context=context, batch=batch, download=download)
        for dtype in formats
    ]
    replays = [
        replay(recording, found.capacity) if recording is not None and found.capacity < found.experts else None
        for found in plans
    ]
    for note in notes:
        screen.print(note, style="dim")
    if as_json:
        documents = []
        for found, played in zip(plans, replays, strict=True):
            rate = None if played is None else found.decode_tokens_per_second(played.hit_rate)
            traced = None if played is None else {**asdict(played), "decode_tokens_per_second": rate}
            documents.append({**found.to_dict(), "trace": traced})
        print_json({"model": model, "note": "; ".join(notes) or None, "machine": asdict(machine), "plans": documents})
        return
    show(*plan_tables(model, machine, plans, replays))
    print()
    for found in plans:
        print(plan_line(found))
    if plans[0].unforecast and not plans[0].lacks:
        screen.print(f"no speed is forecast: {plans[0].unforecast}", style="dim")


def _checkpoint_place(model: str) -> tuple[Path, bool]:
    """The folder that a model's checkpoint and the pack of its experts lie in, or would; and whether it is there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from handful.families.io import find_folder
    from handful.presets import PRESETS

    if model in PRESETS:
        return Path(HF_HUB_CACHE), False
    path = Path(model)
    folder = path.parent if path.is_file() else find_folder(model, only="config.json")
    return folder, any(folder.glob("*.safetensors"))
