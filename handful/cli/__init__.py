"""The command line: one verb, one file, one public call.

`--json` prints one document on stdout and everything else on stderr. What takes long to import is imported by the verb
that needs it, when it runs.
"""

from __future__ import annotations

import codecs
import functools
import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.text import Text

from handful import __version__
from handful.cli import (
    chat,
    compare,
    cost,
    doctor,
    eval,
    generate,
    inspect,
    join,
    place,
    plan,
    presets,
    serve,
    train,
    upcycle,
    verify,
)
from handful.cli.shared import open_screen
from handful.errors import HandfulError, RankLostError

__all__ = ["app", "main"]

app = typer.Typer(
    name="handful",
    help="Mixture-of-experts language models: build, train, compare, price and run them. Start with: handful compare",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PLAIN = {
    "·": "-", "–": "-", "—": "-", "−": "-", "×": "x", "≤": "<=", "…": "...", "’": "'", "‘": "'", "“": '"', "”": '"',
    "•": "*", "→": "->", "←": "<-", "½": "1/2", "²": "2", "³": "3",
}  # fmt: skip

# In the order of the help.
VERBS = {
    "compare": compare,
    "train": train,
    "upcycle": upcycle,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "join": join,
    "eval": eval,
    "inspect": inspect,
    "place": place,
    "presets": presets,
    "cost": cost,
    "plan": plan,
    "doctor": doctor,
    "verify": verify,
}


def main() -> None:
    """Run the command line. A user's mistake is one line and exit status 1 (2 for wrong usage); Ctrl-C is 130."""
    warnings.showwarning = _show
    codecs.register_error("handful", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="handful")
    try:
        app()
    except HandfulError as error:
        if "--debug" in sys.argv:
            raise
        # What one of several ranks found, the others only see the end of.
        rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
        if rank == "0" or not isinstance(error, RankLostError):
            where = "" if rank == "0" else f" rank {rank}:"
            open_screen().print(Text.assemble(("error", "red"), f"{where} {error}"))
        sys.exit(1)


def _show(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
    """A warning of ours is a line for people; others name their place in the source."""
    if category.__module__.startswith("handful"):
        open_screen().print(Text.assemble(("warning", "yellow"), f" {message}"))
    else:
        _show_others(message, category, *rest, **options)


_show_others = warnings.showwarning


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """What a terminal's encoding cannot say, said as well as it can: a path's own bytes, or plain characters."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    if all("\udc80" <= character <= "\udcff" for character in text):  # how Python holds bytes that are no text
        return text.encode(error.encoding, "surrogateescape"), error.end
    return "".join(PLAIN.get(character, "?") for character in text), error.end


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


def _interruptible(run: Callable[..., None]) -> Callable[..., None]:
    """A verb whose Ctrl-C is a line, which says what the next command does, and exit status 130."""

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            run(*args, **kwargs)
        except KeyboardInterrupt as pressed:
            said = str(pressed) or "nothing was begun that is kept; the same command starts anew"
            open_screen().print(f"interrupted: {said}")
            raise typer.Exit(130) from None

    return wrapped


for name, verb in VERBS.items():
    app.command(name, epilog=f"Example: {verb.EXAMPLE}")(_interruptible(verb.run))
