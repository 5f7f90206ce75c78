"""What the verbs share: options that mean the same, where people and programs read, the model that a name means."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from handful.errors import ConfigError

if TYPE_CHECKING:
    from handful.config import ModelConfig
    from handful.cost import Precision
    from handful.count import Counted
    from handful.model import Decoder

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, all else on stderr.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A file, a folder, a glob or hf:name. Default: the text of the model that is begun with, or else the "
        "Python standard library.",
    ),
]
ColumnOption = Annotated[
    str | None,
    typer.Option(
        "--column", help="The column that holds the text. Default: text, or content, or the only one with text."
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1.")]
RouterOption = Annotated[
    str | None,
    typer.Option(
        "--router", help="A published router, such as mixtral or olmoe (handful presets); none: a dense model."
    ),
]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what the next command does."""


def open_screen(*, quiet: bool = False) -> Console:
    """Where people look. Text is shown as it is: paths may hold brackets, and a line is not to be cut."""
    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True, quiet=quiet)


def command_line() -> str:
    """What was typed."""
    return shlex.join(["handful", *sys.argv[1:]])


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


def decoder_of(model: str | Path, dtype: str | None = None) -> Decoder:
    import torch

    from handful.families.io import load_decoder

    return load_decoder(model, dtype=getattr(torch, dtype) if dtype else None)


def precision_of(model: str) -> tuple[Precision | None, tuple[str, ...]]:
    """How the checkpoint that a name stands for stores its weights, None where that is not known; and what to say."""
    from handful.cost import PACKED, Precision
    from handful.presets import PRESETS

    found: Precision | None
    if model in PRESETS:
        known = PRESETS[model]
        found = None if known.model is None else PACKED.get(known.published) or Precision(name=known.published)
    else:
        from handful.families.io import find_precision  # by way of torch, which a preset's price does not need

        found = find_precision(model)
    if found is not None and not found.known:
        return None, (f"stored by {found.name}, which is not known here: nor is the size of the checkpoint",)
    return found, (f"published in {found.name}",) if found is not None and found.parts else ()


def device_of(name: str) -> str:
    """The name of a device that this computer has. ConfigError for another."""
    import torch

    has = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in has and not (name == "cuda" and len(has) > 1):
        raise ConfigError(f"device = {name!r}: this computer has {', '.join(has)}")
    return name


def config_of(model: str) -> tuple[ModelConfig | Counted, tuple[str, ...]]:
    """The config that a name stands for, or what it is made of; and what to say about it."""
    from handful.config import EncoderDecoderConfig
    from handful.count import Counted, count_encoder_decoder
    from handful.presets import PRESETS, small_model

    if model not in PRESETS:
        if "/" not in model and not Path(model).exists():
            raise ConfigError(f"{model!r}: no such file or folder, and no preset: {', '.join(PRESETS)}")
        from handful.families.io import find_config  # by way of torch, which a preset's price does not need

        found = find_config(model)
        if isinstance(found, EncoderDecoderConfig):
            found = count_encoder_decoder(found)
        if isinstance(found, Counted):
            return found, (*((f"counted, not run: {found.lacks}",) if found.lacks else ()), *found.notes)
        return found, ()
    known = PRESETS[model]
    if known.model is not None:
        return known.model, (known.source,)
    note = f"{known.source}: no published decoder; this is the small model with its router"
    return small_model(2048, known), (note,)
