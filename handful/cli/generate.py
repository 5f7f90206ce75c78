"""`handful generate`: text from a model, and what a memory budget did."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful.cli.shared import Json, open_screen, print_json
from handful.errors import ConfigError

if TYPE_CHECKING:
    from handful.encoder_decoder import EncoderDecoder
    from handful.experts.stored import Store
    from handful.model import Decoder

EXAMPLE = "handful generate runs/demo/moe/seed-0 'def main(' --max-tokens 100 --seed 1"


def run(
    model: Annotated[str, typer.Argument(help="A run folder, a checkpoint folder or org/name.")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 200,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text. May be given several times.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among this many of the likeliest tokens. 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this total probability.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Draw among tokens this share as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: make tokens that came before less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws. Default: a new one each time.")] = None,
    quant: Annotated[str | None, typer.Option(help="Hold the weights as int8 or int4.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What the weights may take, such as 4GB; the other experts wait on disk.")
    ] = None,
    logprobs: Annotated[int | None, typer.Option(help="With --json: of every token, and of that many others.")] = None,
    routing: Annotated[
        Path | None, typer.Option(help="Write the experts of every token to this safetensors file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Go on from a prompt, or answer it (an encoder-decoder), word by word."""
    import time
    from dataclasses import asdict

    from handful.console import LoadProgress, memory_line
    from handful.encoder_decoder import EncoderDecoder
    from handful.engine import Delta, Engine, Sampling, generate, stream, text_request
    from handful.families.io import load
    from handful.memory import load as load_within
    from handful.observe import Recorder
    from handful.units import parse_bytes

    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    if routing is not None and routing.suffix != ".safetensors":
        raise ConfigError(f"routing = {str(routing)!r}: the name of a .safetensors file")
    bits = {None: None, "int8": 8, "int4": 4}
    if quant not in bits:
        raise ConfigError(f"quant = {quant!r}: int8 or int4")
    if as_json:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    store = None
    with LoadProgress(open_screen()) as progress:
        if memory is None:
            found = load(model, quantize=bits[quant], progress=progress)
        else:
            found, store = load_within(model, parse_bytes(memory), quantize=bits[quant], progress=progress)
    shown = sys.stderr if as_json else sys.stdout
    pieces: list[str] = []
    deltas: list[Delta] = []
    recorder = Recorder()
    began, finish = time.perf_counter(), "stop"
    try:
        if isinstance(found, EncoderDecoder):
            for name, value in (("logprobs", logprobs), ("routing", routing)):
                if value is not None:
                    raise ConfigError(f"{name}: of decoders alone, and {model} is an encoder-decoder")
            for piece in generate(found, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop or ()):
                print(piece, end="", file=shown, flush=True)
                pieces.append(piece)
            made = max(0, len(pieces) - 1)  # one for each token, and what was held back at the end
        else:
            request = text_request(
                found, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop or (), logprobs=logprobs
            )
            engine = Engine(found, on_routing=(lambda *told: recorder.add(told[2])) if routing else None)
            for delta in stream(engine, request):
                print(delta.text if pieces else prompt + delta.text, end="", file=shown, flush=True)
                pieces.append(delta.text)
                deltas.append(delta)
            finish = deltas[-1].finish or finish
    except KeyboardInterrupt:
        finish = "interrupted"
    finally:
        if store is not None:
            store.close()
    print(file=shown)
    seconds = time.perf_counter() - began
    given = 0
    if not isinstance(found, EncoderDecoder):
        tokens = [delta.token for delta in deltas if delta.token is not None]
        made, given = len(tokens), len(request.prompt)
        if routing is not None and deltas:
            # The last token was made, and did not pass through the model.
            passed = [*request.prompt, *tokens][: recorder.tokens]
            recorder.recording(passed).save(routing)
    within = None if store is None else _within(found, store, quant, given + made, made / seconds)
    if as_json:
        print_json(
            {"model": model, "prompt": prompt, "text": "".join(pieces), "finish": finish, "tokens": made,
             "seconds": seconds, "tokens_per_second": made / seconds,
             "logprobs": [{"id": d.token, **asdict(d.logprobs)} for d in deltas if d.logprobs is not None] or None,
             "memory": within}
        )  # fmt: skip
    else:
        open_screen().print(f"{made} tokens, {made / seconds:,.0f} tokens/s", style="dim")
        if within is not None:
            open_screen().print(memory_line(within), style="dim")
    if finish == "interrupted":
        raise typer.Exit(130)


def _within(
    found: Decoder | EncoderDecoder, store: Store, quant: str | None, tokens: int, rate: float
) -> dict[str, Any]:
    """What a memory budget did with so many tokens, and beside it what is forecast for its hits."""
    from dataclasses import asdict

    from handful.ceilings import ceilings
    from handful.memory import resident_bytes
    from handful.plan import plan

    stats = store.stats()
    dtype = quant or str(found.embed.weight.dtype).removeprefix("torch.")
    held = resident_bytes(found)
    forecast = None
    if dtype in ("float32", "bfloat16", "int8", "int4"):
        planned = plan(
            found.config, ceilings(store.pack.path.parent), dtype=dtype,
            memory=held + stats.slots * stats.expert_bytes, context=max(1, tokens),
        )  # fmt: skip
        forecast = planned.decode_tokens_per_second(stats.hit_rate)
    return {
        "resident_bytes": held,
        "slots": stats.slots,
        "experts": stats.experts,
        "expert_bytes": stats.expert_bytes,
        "hit_rate": stats.hit_rate,
        "bytes_read": stats.total("bytes_read"),
        "wait_seconds": stats.total("wait_seconds"),
        "forecast_tokens_per_second": forecast,
        "tokens_per_second": rate,
        "layers": {name: asdict(layer) for name, layer in stats.layers.items()},
    }
