"""`handful inspect`: what a model's experts do, beside chance."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful.cli.answers import MemoryOption, PackOption, QuantOption
from handful.cli.shared import ColumnOption, DeviceOption, Json, command_line, device_of, open_screen, print_json
from handful.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "handful inspect runs/moe --text code='src/**/*.py' --text prose='notes/**/*.md'"

LONG = 20.0  # seconds: an ablation that takes longer is told of first


def run(
    model: Annotated[str, typer.Argument(help="A run folder, a checkpoint folder or org/name.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="A file, a folder, a glob or hf:name; or NAME=one of them, whose documents get that label; or "
            "several. Default: what the run held out.",
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Another model, on the same text, beside the first.")] = None,
    text2: Annotated[list[str] | None, typer.Option("--text2", help="Another text, beside the first.")] = None,
    column: ColumnOption = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="Labels of documents: text, folder, suffix or file. Default: of the first three, those that differ."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read at most.")] = 65_536,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a window. Default: the models' own, at most 2048.")
    ] = None,
    no_ablate: Annotated[bool, typer.Option("--no-ablate", help="Switch no expert off.")] = False,
    ablate_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that the loss without each expert is taken on.")
    ] = 8192,
    level: Annotated[float, typer.Option(help="The share of false ones among what is called beyond chance.")] = 0.05,
    permutations: Annotated[int, typer.Option(min=20, help="Of each test.")] = 200,
    seed: Annotated[int, typer.Option(help="Of what is drawn: documents and permutations.")] = 0,
    by_transformers: Annotated[
        bool, typer.Option("--transformers", help="Load it by the transformers library: any mixture that it has.")
    ] = False,
    quant: QuantOption = None,
    memory: MemoryOption = None,
    pack: PackOption = None,
    device: DeviceOption = "cpu",
    out: Annotated[Path, typer.Option(help="The folder for report.html and inspect.json.")] = Path("runs/inspect"),
    as_json: Json = False,
) -> None:
    """What experts do, each measure beside its chance level and in both halves of the text; what each is worth."""
    from handful.console import inspection_table
    from handful.inspection import inspect_model
    from handful.inspection.page import write
    from handful.runs import check_folder
    from handful.width import show

    screen = open_screen()
    where = device_of(device)
    check_folder(out)
    if by_transformers and (quant or memory or pack):
        raise ConfigError("transformers: without --quant, --memory and --pack, which are for models of our own")
    if memory is not None and where != "cpu":
        raise ConfigError(f"device = {device!r}: --memory is for the cpu")
    with contextlib.ExitStack() as held, _Bars(screen) as bars:

        def opener(name: str) -> Any:
            if by_transformers:
                return _transformers(name, where)
            return _ours(name, quant, memory, pack, where, held, screen)

        found = inspect_model(
            model, text, against=against, text2=text2, column=column, by=by, tokens=tokens, context=context,
            ablate_tokens=0 if no_ablate else ablate_tokens, level=level, permutations=permutations, seed=seed,
            opener=opener, progress=bars,
        )  # fmt: skip
    found["command"] = command_line()
    page = write(found, out)
    if as_json:
        print_json(found)
    else:
        for side in found["sides"]:
            show(inspection_table(side))
    for side in found["sides"]:
        for note in side["notes"]:
            screen.print(note)
        if len(found["sides"]) > 1:
            screen.print(f"{side['model']} on {side['text']}:")
        for sentence in side["summary"]["sentences"]:
            screen.print(sentence)
    screen.print(f"open {page} for every expert; {out / 'inspect.json'} has all numbers")
    if found["interrupted"]:
        screen.print(f"interrupted: what was measured until then is in {out}")
        raise typer.Exit(130)


def _ours(
    name: str,
    quant: str | None,
    memory: str | None,
    pack: Path | None,
    device: str,
    held: contextlib.ExitStack,
    screen: Console,
) -> Any:
    from handful.cli.answers import open_model
    from handful.families.io import load
    from handful.progress import LoadProgress

    if device == "cpu":
        model, store = open_model(name, quant, memory, pack)
        if store is not None:
            held.callback(store.close)
        return model
    bits = {None: None, "int8": 8, "int4": 4}
    if quant not in bits:
        raise ConfigError(f"quant = {quant!r}: int8 or int4")
    with LoadProgress(screen) as progress:
        return load(name, quantize=bits[quant], device=device, progress=progress)


def _transformers(name: str, device: str) -> Any:
    """A model of transformers whose experts our backends compute. ConfigError for one without experts."""
    from handful.families.io import find_folder
    from handful.transformers import NAME, check, load_causal

    model = load_causal(find_folder(name), NAME)
    check(model)
    return model.to(device)


class _Bars:
    """A bar for each stage; where nobody sees one, a line a minute. Says how long a long ablation will take."""

    def __init__(self, screen: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        from handful.progress import Pulse

        self._screen = screen
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeRemainingColumn(),
            console=screen, transient=True, disable=not screen.is_terminal,
        )  # fmt: skip
        self._pulse = Pulse(screen)
        self._task: Any = None
        self._what = ""
        self._last = time.monotonic()

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        from handful.units import duration

        if not self._progress.live.is_started:
            self._progress.start()
        if what != self._what or done == 1:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(what, total=total)
        self._what = what
        self._progress.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if what == "ablation" and done == 2:
            takes = (now - self._last) * total
            if takes > LONG:
                self._screen.print(
                    f"ablation: {total:,} experts, each switched off: at most about {duration(takes)}; Ctrl-C ends it "
                    "with what it has, --no-ablate does without"
                )
        self._last = now
        self._pulse(f"{what}: {done:,} of {total:,}")
