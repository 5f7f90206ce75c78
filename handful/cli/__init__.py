"""The command line: one verb, one file, one public call.

`--json` prints one document on stdout and everything else on stderr. What takes long to import is imported by the verb
that needs it, when it runs.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.text import Text

from handful import __version__
from handful.cli import chat, compare, cost, doctor, generate, plan, train, upcycle, verify
from handful.cli.shared import open_screen
from handful.errors import HandfulError

__all__ = ["app", "main"]

app = typer.Typer(
    name="handful",
    help="Mixture-of-experts language models: build, train, compare, price and run them. Start with: handful compare",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# In the order of the help.
VERBS = {
    "compare": compare,
    "train": train,
    "upcycle": upcycle,
    "generate": generate,
    "chat": chat,
    "cost": cost,
    "plan": plan,
    "doctor": doctor,
    "verify": verify,
}


def main() -> None:
    """Run the command line. A user's mistake is one line and exit status 1 (2 for wrong usage); Ctrl-C is 130."""
    try:
        app()
    except HandfulError as error:
        if "--debug" in sys.argv:
            raise
        open_screen().print(Text.assemble(("error", "red"), f" {error}"))
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every verb."""


for name, verb in VERBS.items():
    app.command(name, epilog=f"Example: {verb.EXAMPLE}")(verb.run)
