"""`handful cost`: what a model takes, from its config alone."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from handful.cli.shared import Json, config_of, open_screen, precision_of, print_json

EXAMPLE = "handful cost mixtral --context 8192 --ranks 8"


def run(
    model: Annotated[str, typer.Argument(help="A preset, a config.json, a run or checkpoint folder, or org/name.")],
    context: Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence. Default: the model's own.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Devices that the experts are spread over.")] = 1,
    hosts: Annotated[int, typer.Option(min=1, help="That these stand on, as many on each.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of weights, cache and what is sent; int8, int4, mxfp4 and fp8 are of weights alone.")
    ] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs, bytes and traffic of a model, from its config alone."""
    from handful.console import cost_sentence, cost_tables
    from handful.cost import cost as price
    from handful.count import Counted
    from handful.width import show

    config, notes = config_of(model)
    published, unknown = precision_of(model)
    result = price(config, context=context, ranks=ranks, hosts=hosts, dtype=dtype, published=published)
    notes += unknown
    for note in notes:
        open_screen().print(note, style="dim")
    if as_json:
        about = None
        if isinstance(config, Counted):
            names = ("family", "known", "lacks", "notes", "not_understood")
            about = {"runs": not config.lacks, **{name: getattr(config, name) for name in names}}
        print_json({"model": model, "note": "; ".join(notes) or None, "counted": about, **result.to_dict()})
        return
    Console().print(cost_sentence(result), highlight=False)
    show(*cost_tables(model, result))
