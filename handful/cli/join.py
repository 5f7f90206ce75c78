"""`handful join`: ranks on this computer for a model that is served on another one."""

from __future__ import annotations

from typing import Annotated

import typer

from handful.cli import answers
from handful.cli.shared import open_screen
from handful.errors import ConfigError

EXAMPLE = "handful join node0:29400 org/name --ranks 2"


def run(
    address: Annotated[str, typer.Argument(help="HOST:PORT of `handful serve --rank-port`.")],
    model: answers.ModelArgument,
    ranks: Annotated[int, typer.Option(help="Processes that hold experts here.")] = 1,
    quant: answers.QuantOption = None,
    exact_activations: answers.ExactOption = False,
    memory: answers.RankMemoryOption = None,
    pack: answers.PackOption = None,
    token: answers.TokenOption = None,
) -> None:
    """Hold experts here of a model that is served on another computer."""
    from handful.cluster.control import address_of
    from handful.cluster.start import join_ranks, opened

    screen = open_screen()
    where = address_of(address)
    answers.keep_exact(exact_activations)
    held = answers.held_by_ranks(model, quant, memory, pack)
    if token is None:
        raise ConfigError("token: the secret that the server was started with; give it by HANDFUL_RANK_TOKEN")
    screen.print(f"{ranks} {'rank joins' if ranks == 1 else 'ranks join'} {address}; Ctrl-C ends")
    with answers.progress() as progress:
        found = opened(held, progress)
    join_ranks(held, *found, where, token, ranks=ranks, told=screen.print)
