"""`handful eval`: how well a model predicts files, or which of two predicts them better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from handful.cli.answers import ExactOption, KvCacheOption, keep_exact
from handful.cli.shared import ColumnOption, DeviceOption, Json, device_of, open_screen, print_json
from handful.errors import ConfigError

EXAMPLE = "handful eval runs/moe runs/dense --text 'notes/**/*.md' --text book.txt"


def run(
    model: Annotated[str, typer.Argument(help="A run folder, a checkpoint folder or org/name.")],
    other: Annotated[str | None, typer.Argument(help="A second model, to be set beside the first.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="A file, a folder, a glob or hf:name; or several. Default: what the run held out."),
    ] = None,
    column: ColumnOption = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a window. Default: the models' own, at most 2048.")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="int8 or int4: how the models are held.")] = None,
    exact_activations: ExactOption = False,
    kv_cache_dtype: KvCacheOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Json = False,
) -> None:
    """Loss and bits per byte of files under a model, or under two and which is better."""
    from rich.markup import escape
    from rich.progress import Progress

    from handful.console import scores_table
    from handful.documents import heldout_of, left_out, read_files
    from handful.families.io import find_folder, load
    from handful.model import Decoder
    from handful.progress import LoadProgress, Pulse
    from handful.runs import text_behind
    from handful.scores import Scored, difference, score, together
    from handful.width import show

    keep_exact(exact_activations)
    screen = open_screen()
    bits = {None: None, "int8": 8, "int4": 4}
    if quant not in bits:
        raise ConfigError(f"quant = {quant!r}: int8 or int4")
    where = device_of(device)
    names = [model] if other is None else [model, other]
    if text:
        files = []
        for source in text:
            name, found_files, skipped = read_files(source, column)
            files += found_files
            if skipped:
                screen.print(f"{name}: {left_out(skipped)}")
    else:
        behind = text_behind(model, find_folder(model))
        if behind is None:
            raise ConfigError(f"text = None: {model} does not say what text it was trained on; name some by --text")
        files = heldout_of(behind["source"], column or behind["column"])
    loaded: list[Decoder] = []
    for name in names:
        with LoadProgress(screen) as loading:
            found = load(name, quantize=bits[quant], device=where, progress=loading)
        if not isinstance(found, Decoder):
            raise ConfigError(f"{name}: an encoder-decoder; eval is for decoders")
        loaded.append(found)
    context = context or min(2048, *(each.config.context for each in loaded))
    results: list[list[Scored]] = []
    pulse = Pulse(screen)

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, total: pulse(f"{what}: {done:,} of {total:,} windows")

    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("eval", total=len(names) * len(files))
        for name, each in zip(names, loaded, strict=True):
            results.append([])
            for file, documents in files:
                bar.update(task, description=escape(f"{name}: {file}"))
                results[-1].append(
                    score(
                        each,
                        documents,
                        context=context,
                        kv_cache_dtype=kv_cache_dtype,
                        progress=told(f"{name}: {file}"),
                    )
                )
                bar.advance(task)
            if not screen.is_terminal:
                screen.print(f"{name}: {len(files):,} {'file' if len(files) == 1 else 'files'} read")
    sizes = [[len(document) for document in documents] for _, documents in files]
    rows: list[dict[str, Any]] = []
    everything = [together(column_of) for column_of in results]
    for place, (file, _) in enumerate([*files, ("all of them", [])] if len(files) > 1 else files):
        of_models = everything if place == len(files) else [each[place] for each in results]
        lengths = [size for group in sizes for size in group] if place == len(files) else sizes[place]
        apart = difference(of_models[1], of_models[0], lengths) if other is not None else None
        rows.append(
            {
                "file": file,
                "bytes": of_models[0].bytes,
                "models": [{"tokens": s.tokens, "loss": s.loss, "bits_per_byte": s.bits_per_byte} for s in of_models],
                "difference": None if apart is None else vars(apart),
            }
        )
    if as_json:
        print_json({"models": names, "context": context, "files": rows})
        return
    show(scores_table(names, rows))
    last = rows[-1]["difference"]
    if last is not None:
        screen.print(_sentence(names, last))


def _sentence(names: list[str], apart: dict[str, Any]) -> str:
    """Which of two is better, if that can be said."""
    gap, error = apart["bits_per_byte"], apart["error"]
    if error is None or abs(gap) <= 2 * error:
        return f"no difference is seen: {gap:+.4f}" + ("" if error is None else f" ± {error:.4f}") + " bits a byte"
    better, worse = (names[1], names[0]) if gap < 0 else (names[0], names[1])
    return f"{better} predicts this text better than {worse}, by {abs(gap):.4f} ± {error:.4f} bits a byte"
