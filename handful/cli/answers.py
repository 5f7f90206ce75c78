"""What `generate` and `chat` share: their options, the model within its budget, and how its tokens are drawn."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful.cli.shared import open_screen
from handful.errors import ConfigError

if TYPE_CHECKING:
    from handful.cluster.start import Held
    from handful.encoder_decoder import EncoderDecoder
    from handful.experts.store import Store
    from handful.model import Decoder
    from handful.progress import LoadProgress
    from handful.sampling import Sampling

ModelArgument = Annotated[str, typer.Argument(help="A run folder, a checkpoint folder, org/name or org/name@revision.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Stop at this text. May be given several times.")]
TemperatureOption = Annotated[
    float | None, typer.Option(help="0 takes the most probable token. Default: the model's own, or 0.8.")
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        help="Draw among this many of the most probable tokens; 0: among all. Default: the model's own, or 0."
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        help="Draw among the most probable tokens of this total probability. Default: the model's own, or 0.95."
    ),
]
MinPOption = Annotated[
    float | None,
    typer.Option(help="Draw among tokens this share as probable as the first. Default: the model's own, or 0."),
]
PenaltyOption = Annotated[
    float | None,
    typer.Option(help="Above 1: make tokens that came before less likely. Default: the model's own, or 1."),
]
SeedOption = Annotated[int | None, typer.Option(help="Of the draws. Default: a new one each time, which is shown.")]
QuantOption = Annotated[str | None, typer.Option(help="Hold the weights as int8 or int4.")]
KvCacheOption = Annotated[
    str, typer.Option("--kv-cache-dtype", help="Of keys and values: auto, as the weights, or int8, half of bfloat16.")
]
ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact-activations",
        help="In bfloat16: let activations that meet quantized weights keep more than 8 bits; slower.",
    ),
]
MemoryOption = Annotated[
    str | None, typer.Option(help="What the weights may take, such as 4GB; the other experts wait on disk.")
]
PackOption = Annotated[
    Path | None,
    typer.Option(
        "--pack", help="With --memory: where its experts are packed. Default: beside the model, or in the cache folder."
    ),
]
RankMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="What the experts of each rank may take. Default: as much as the loss of any one rank asks of the others.",
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option("--rank-token", envvar="HANDFUL_RANK_TOKEN", help="The secret of ranks of several computers."),
]
SpeculateOption = Annotated[
    bool | None,
    typer.Option(
        "--speculate/--no-speculate",
        help="Pass drafts of coming tokens, found in what was said before, where it is quicker. Default: where it "
        "changes no bit.",
    ),
]
SystemOption = Annotated[str | None, typer.Option(help="The system message, before all others.")]
VariableOption = Annotated[
    list[str] | None,
    typer.Option("--template-arg", help="NAME=VALUE for the chat template, such as enable_thinking=false."),
]


def keep_exact(asked: bool) -> None:
    """For this process, and for the ranks that it starts. To be said before a model is run."""
    if asked:
        os.environ["HANDFUL_EXACT_ACTIVATIONS"] = "1"


def open_model(
    model: str, quant: str | None, memory: str | None, pack: Path | None
) -> tuple[Decoder | EncoderDecoder, Store | None]:
    """The model that a name means, and with a memory budget the store of its experts, to be closed."""
    from handful.families.io import load
    from handful.memory import load as load_within
    from handful.units import parse_bytes

    bits = _bits(quant)
    if pack is not None and memory is None:
        raise ConfigError("pack: needs --memory, without which nothing is packed")
    with progress() as shown:
        if memory is None:
            return load(model, quantize=bits, progress=shown), None
        return load_within(model, parse_bytes(memory), file=pack, quantize=bits, progress=shown)


def held_by_ranks(model: str, quant: str | None, memory: str | None, pack: Path | None) -> Held:
    """What the options ask of ranks."""
    from handful.cluster.start import Held
    from handful.units import parse_bytes

    return Held(
        model=model, bits=_bits(quant), pack=pack, memory=None if memory is None else parse_bytes(memory, "memory")
    )


def progress() -> LoadProgress:
    """Of what is read or packed, on the screen."""
    from handful.progress import LoadProgress

    return LoadProgress(open_screen())


def _bits(quant: str | None) -> int | None:
    bits = {None: None, "int8": 8, "int4": 4}
    if quant not in bits:
        raise ConfigError(f"quant = {quant!r}: int8 or int4")
    return bits[quant]


def given_settings(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None, penalty: float | None,
    seed: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The settings of `Sampling` that were given. ConfigError for one that is wrong, before any model is loaded."""
    from handful.sampling import Sampling

    values = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": penalty,
        "seed": seed,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    Sampling(**given)
    return given


def settle(model: Decoder | EncoderDecoder, given: dict[str, Any]) -> tuple[Sampling, str | None]:
    """How tokens are drawn: as was said, or else as the model's generation_config.json asks, or else by default; with a
    seed. And what to say about it: what is the model's own wish."""
    from handful.generate import sampling_of

    base = sampling_of(model)
    sampling = dataclasses.replace(base, **given)
    if sampling.seed is None and sampling.temperature > 0:
        sampling = dataclasses.replace(sampling, seed=secrets.randbits(31))
    if model.origin is None or model.origin.sampling is None:
        return sampling, None
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    asked = {
        name: value
        for name, value in dataclasses.asdict(base).items()
        if name not in given and name != "seed" and value != neutral.get(name)
    }
    if sampling.temperature == 0:  # nothing is drawn
        asked = {name: value for name, value in asked.items() if name in ("temperature", "repetition_penalty")}
    told = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in asked.items())
    return sampling, f"{told}, as the model's generation_config.json asks" if told else None


def variables_of(given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON has it or else as text."""
    found = {}
    for item in given or ():
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"template-arg = {item!r}: NAME=VALUE, such as enable_thinking=false")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
