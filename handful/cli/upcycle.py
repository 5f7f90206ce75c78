"""`handful upcycle`: an MoE from a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from handful.cli.shared import (
    ColumnOption,
    DataOption,
    DeviceOption,
    Json,
    decoder_of,
    device_of,
    open_screen,
    print_json,
)
from handful.errors import ConfigError

if TYPE_CHECKING:
    from handful.upcycle import Method, Partition

EXAMPLE = "handful upcycle runs/dense runs/mixture --method granular --experts 4 --slices 4"


def run(
    dense: Annotated[str, typer.Argument(help="A run folder, a checkpoint folder or org/name: a dense model.")],
    out: Annotated[Path, typer.Argument(help="The folder of the new checkpoint.")],
    method: Annotated[str, typer.Option(help="copy, granular or split.")] = "copy",
    experts: Annotated[int, typer.Option(help="Copies; of split, the experts that a network is cut into.")] = 8,
    top_k: Annotated[
        int | None, typer.Option(help="Copies, or experts, of a token. Default: 2; of split three quarters, 6 of 8.")
    ] = None,
    slices: Annotated[int | None, typer.Option(help="granular: the parts of a copy. Default: 2.")] = None,
    noise: Annotated[float, typer.Option(help="copy, granular: a share of the weights' size.")] = 0.0,
    partition: Annotated[
        str | None, typer.Option(help="split: by coactivation (the default), weights or at random.")
    ] = None,
    data: DataOption = None,
    column: ColumnOption = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a sequence of that text.")] = 512,
    eval_tokens: Annotated[int, typer.Option(min=0, help="Held-out tokens of a loss, at most; 0: no losses.")] = 65536,
    fit_tokens: Annotated[int, typer.Option(min=1, help="split: tokens that the routers are fitted on.")] = 8192,
    device: DeviceOption = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of the routers, the noise and the partition.")] = 0,
    as_json: Json = False,
) -> None:
    """Make an MoE from a dense model."""
    from dataclasses import asdict

    from handful import __version__
    from handful.checkpoint import write_file
    from handful.config import ModelConfig
    from handful.console import upcycle_table
    from handful.data import Batches, load_data
    from handful.families.io import find_config, find_folder, save
    from handful.runs import NOTE, TEXT, text_behind
    from handful.upcycle import check_upcycle, report, upcycle
    from handful.width import show

    screen = open_screen()
    if out.exists():
        raise ConfigError(f"out = {str(out)!r}: exists; name another folder as OUT")
    where = device_of(device)
    folder = find_folder(dense)
    found_config = find_config(folder)
    if not isinstance(found_config, ModelConfig):
        raise ConfigError(f"upcycle model = {dense!r}: a decoder is needed")
    # What is wrong is said before gigabytes are read.
    top_k, _ = check_upcycle(
        found_config, cast("Method", method), experts=experts, top_k=top_k, slices=slices, noise=noise,
        partition=cast("Partition | None", partition),
    )  # fmt: skip
    model = decoder_of(folder).to(where)
    text, sample_BS = None, None
    if eval_tokens or method == "split":
        if model.tokenizer is None:
            raise ConfigError(f"{dense}: it has no tokenizer.json, which the text is read by")
        context = min(context, model.config.context)
        behind = {"source": data, "column": column}
        if data is None:  # its own text, if it says which
            behind = text_behind(dense, folder) or behind
        text = load_data(
            behind["source"], column=column or behind["column"], tokenizer=str(folder), progress=screen.print
        )
    if text is not None and method == "split":
        sample_BS, _ = Batches(text.train, batch=max(1, fit_tokens // context), context=context, seed=seed).at(0)

    def follow(done: int, total: int) -> None:
        if 10 * done // total > 10 * (done - 1) // total:
            screen.print(f"{method}: {done} of {total} layers")

    made = upcycle(
        model, cast("Method", method), experts=experts, top_k=top_k, slices=slices, noise=noise,
        partition=cast("Partition | None", partition), text_BS=sample_BS, seed=seed, progress=follow,
    )  # fmt: skip
    if eval_tokens:
        screen.print("evaluating both")
    found = report(model, made, text if eval_tokens else None, context=context, tokens=eval_tokens)
    save(made.cpu(), out)
    noted = None if text is None else {name: text.origin[name] for name in TEXT}
    write_file(out / NOTE, {"handful": __version__, "upcycled_from": dense, "method": method, "text": noted})
    if as_json:
        print_json({"dense": dense, "out": str(out), "method": method, **asdict(found)})
    else:
        show(upcycle_table(str(out), found))
    if found.why_not_public:
        screen.print(f"written as Handful's own: {found.why_not_public}")
