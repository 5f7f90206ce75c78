"""`handful train`: one model."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful.cli.shared import (
    ColumnOption,
    DataOption,
    DeviceOption,
    Interrupted,
    Json,
    RouterOption,
    command_line,
    decoder_of,
    device_of,
    open_screen,
    print_json,
)
from handful.errors import ConfigError

if TYPE_CHECKING:
    from handful.ranks import Ranks
    from handful.settings import Asked

TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="A tokenizer.json or its folder. Default: trained on the data.")
]

EXAMPLE = "handful train --router olmoe --experts 32 --top-k 4 --steps 300 --out runs/olmoe-like"


def run(
    config: Annotated[Path | None, typer.Argument(help=r"A TOML file: \[model], \[train], \[data].")] = None,
    data: DataOption = None,
    column: ColumnOption = None,
    tokenizer: TokenizerOption = None,
    router: RouterOption = None,
    experts: Annotated[int | None, typer.Option(help="Experts in a layer.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts of a token.")] = None,
    width: Annotated[int | None, typer.Option(help="Model width.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    expert_width: Annotated[int | None, typer.Option(help="Hidden width of an expert.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in an optimizer step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens, instead of steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    balance: Annotated[str | None, typer.Option(help="none, switch, global, sequence, gshard or loss-free.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or auto (the quicker here).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights, the order of the data and the noise.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Go on from a model: a run or checkpoint folder, or org/name.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="all, experts or routers: what is trained. Default: all.")] = None,
    device: DeviceOption = "cpu",
    ranks: Annotated[int | None, typer.Option(help="Processes on this computer that train together.")] = None,
    placement: Annotated[
        Path | None,
        typer.Option(help="Which rank has which experts, as handful place writes it. Default: all alike."),
    ] = None,
    two_level: Annotated[
        bool, typer.Option("--two-level", help="A token crosses to another host once, and is handed on there.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model; the run folder holds its events, checkpoints and report.

    Under torchrun, or with --ranks, several processes train it together, each with a share of the experts.
    """
    from handful import runs
    from handful.ranks import join, start_ranks, under_torchrun
    from handful.settings import resumed_settings, training_settings

    where = device_of(device)
    given: dict[str, dict[str, Any]] = {
        "data": {"source": data, "column": column, "tokenizer": tokenizer},
        "model": {
            "experts": experts, "top_k": top_k, "width": width, "layers": layers, "heads": heads,
            "expert_width": expert_width,
        },
        "train": {
            "context": context, "batch": batch, "steps": steps, "tokens": tokens, "lr": lr, "dtype": dtype,
            "seed": seed,
        },
    }  # fmt: skip
    again = runs.is_of_this_job(out)  # torchrun starts all ranks anew when it has lost one
    if resume and not again:
        extra = [name for group in given.values() for name, value in group.items() if value is not None]
        if extra or config or router or balance or start or only:
            raise ConfigError("resume: the run goes on with its own settings; give --out and --resume alone")
    elif not again:
        runs.check_free(out)
    resume = resume or again
    asked = (
        resumed_settings(out) if resume else training_settings(config, router, balance, given, start=start, only=only)
    )
    if ranks is not None and not under_torchrun():
        raise typer.Exit(start_ranks(ranks))
    with join(two_level=two_level) as together:
        _train(asked, together, where, placement, out, resume, as_json)


def _train(
    asked: Asked, ranks: Ranks, device: str, placement: Path | None, out: Path, resume: bool, as_json: bool
) -> None:
    """On one rank. The first alone speaks, and keeps the run."""
    from handful import report, runs
    from handful.console import facts
    from handful.monitor import tensorboard
    from handful.progress import RunProgress
    from handful.train import train
    from handful.train_ranks import layout_line, read_layouts
    from handful.units import duration
    from handful.width import show

    screen = open_screen(quiet=bool(ranks.rank))
    begin = decoder_of(asked.start, dtype="float32") if asked.start is not None else None
    with ranks.one_first():  # who comes later finds its text and tokens made
        text = asked.load_data(screen.print)
    config = asked.model(text.tokenizer.vocab_size) if begin is None else begin.config
    model, settings = begin or config, asked.train
    layouts = read_layouts(placement, config, ranks) if placement is not None else None
    if ranks.size > 1:
        screen.print(layout_line(config, ranks, layouts))
    last: dict[str, Any] = {}
    again = f"handful train --resume --out {shlex.quote(str(out))}"
    with RunProgress(screen) as progress, tensorboard(out) if not ranks.rank else nullcontext() as sink:
        try:
            sinks = [] if sink is None else [sink]
            for event in train(
                model, settings, text, out, only=asked.only, resume=resume, device=device, sinks=sinks, ranks=ranks,
                layouts=layouts,
            ):  # fmt: skip
                progress(out.name, event)
                last = event
        except KeyboardInterrupt:  # a second Ctrl-C does not wait for the step
            raise Interrupted(f"this goes on from the last checkpoint: {again}" if out.exists() else "") from None
    if ranks.rank:
        return
    page = report.write(
        report.from_events(runs.read_events(out), title=str(out), command=command_line()), out / "report.html"
    )
    interrupted = last["event"] == "interrupted"
    document = {**last, "out": str(out), "model": str(out / "model"), "report": str(page)}
    if as_json:
        print_json(document)
    elif not interrupted:
        waited = last.get("waited_for_experts", 0.0) / max(last["seconds"], 1e-9)
        imbalance = ("imbalance", f"{waited:.1%} of the time: waiting for the slowest rank's experts")
        show(
            facts(
                str(out),
                [
                    ("held-out loss", f"{last['loss']:.4f} nats a token"),
                    ("", f"{last['bits_per_byte']:.4f} bits a byte"),
                    ("time", f"{duration(last['seconds'])}, {last['tokens_per_second']:,.0f} tokens/s"),
                    *([imbalance] if ranks.size > 1 else []),
                    ("model", str(out / "model")),
                    ("report", str(page)),
                ],
            )
        )
    if interrupted:
        screen.print(f"interrupted at step {last['step']}; this goes on: {again}")
        raise typer.Exit(130)
