"""`handful generate`: text from a model, and what a memory budget did."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful.cli import answers
from handful.cli.shared import Json, open_screen, print_json
from handful.errors import ConfigError

if TYPE_CHECKING:
    from handful.encoder_decoder import EncoderDecoder
    from handful.engine import Delta
    from handful.experts.store import Store
    from handful.model import Decoder
    from handful.text import Tokenizer

EXAMPLE = "handful generate runs/demo/moe/seed-0 'def main(' --max-tokens 100 --seed 1"


def run(
    model: answers.ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from; -: what comes on stdin.", show_default=False)
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message: answer it, by the model's chat template.")
    ] = False,
    system: answers.SystemOption = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 200,
    stop: answers.StopOption = None,
    temperature: answers.TemperatureOption = None,
    top_k: answers.TopKOption = None,
    top_p: answers.TopPOption = None,
    min_p: answers.MinPOption = None,
    repetition_penalty: answers.PenaltyOption = None,
    seed: answers.SeedOption = None,
    quant: answers.QuantOption = None,
    exact_activations: answers.ExactOption = False,
    kv_cache_dtype: answers.KvCacheOption = "auto",
    memory: answers.MemoryOption = None,
    pack: answers.PackOption = None,
    speculate: answers.SpeculateOption = None,
    template_arg: answers.VariableOption = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: of every token and that many of the most probable, with their texts."),
    ] = None,
    routing: Annotated[
        Path | None, typer.Option(help="Write the experts of every token to this safetensors file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Go on from a prompt, or answer it (--chat, or an encoder-decoder), word by word."""
    import time
    from dataclasses import asdict

    from handful.chat import chat_request
    from handful.console import memory_line
    from handful.encoder_decoder import EncoderDecoder
    from handful.engine import Engine
    from handful.generate import generate, stream, text_request
    from handful.observe import Recorder

    settings = answers.given_settings(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    variables = answers.variables_of(template_arg)
    if routing is not None and routing.suffix != ".safetensors":
        raise ConfigError(f"routing = {str(routing)!r}: the name of a .safetensors file")
    if logprobs is not None and logprobs >= 0 and not as_json:
        raise ConfigError(f"logprobs = {logprobs}: only with --json, which has room for them")
    if not chat and (system is not None or variables):
        raise ConfigError(f"{'template-arg' if system is None else 'system'}: only with --chat")
    prompt = _prompt(prompt, file)
    if as_json:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    answers.keep_exact(exact_activations)
    found, store = answers.open_model(model, quant, memory, pack)
    sampling, told = answers.settle(found, settings)
    if told is not None and not as_json:
        open_screen().print(told, style="dim")
    shown = sys.stderr if as_json else sys.stdout
    pieces: list[str] = []
    deltas: list[Delta] = []
    recorder = Recorder()
    began, finish = time.perf_counter(), "stop"
    try:
        if isinstance(found, EncoderDecoder):
            kv_cache = None if kv_cache_dtype == "auto" else kv_cache_dtype
            of_decoders = {
                "logprobs": logprobs, "routing": routing, "chat": chat or None, "speculate": speculate or None,
                "kv-cache-dtype": kv_cache,
            }  # fmt: skip
            for name, value in of_decoders.items():
                if value is not None:
                    raise ConfigError(f"{name}: of decoders alone, and {model} is an encoder-decoder")
            for piece in generate(found, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop or ()):
                print(piece, end="", file=shown, flush=True)
                pieces.append(piece)
            made = max(0, len(pieces) - 1)  # one for each token, and what was held back at the end
        else:
            how: dict[str, Any] = {
                "max_tokens": max_tokens, "sampling": sampling, "stop": stop or (), "logprobs": logprobs,
            }  # fmt: skip
            if chat:
                before = [] if system is None else [{"role": "system", "content": system}]
                messages = [*before, {"role": "user", "content": prompt}]
                request = chat_request(found, messages, variables=variables, **how)
            else:
                request = text_request(found, prompt, **how)
            opening = "" if chat else prompt
            on_routing = (lambda *told: recorder.add(told[2])) if routing else None
            engine = Engine(found, on_routing=on_routing, kv_cache_dtype=kv_cache_dtype, speculate=speculate)
            for delta in stream(engine, request):
                print(delta.text if pieces else opening + delta.text, end="", file=shown, flush=True)
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
    given = drafted = accepted = 0
    if not isinstance(found, EncoderDecoder):
        drafted, accepted = engine.stats().draft_tokens, engine.stats().accepted_tokens
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
             "seconds": seconds, "tokens_per_second": made / seconds, "seed": sampling.seed,
             "sampling": asdict(sampling), "draft_tokens": drafted, "accepted_tokens": accepted,
             "logprobs": _logprobs(deltas, found.tokenizer), "memory": within}
        )  # fmt: skip
    else:
        drawn = "" if sampling.seed is None else f", seed {sampling.seed}"
        speculated = f", {accepted} of {drafted} drafted tokens accepted" if drafted else ""
        open_screen().print(f"{made} tokens, {made / seconds:,.0f} tokens/s{speculated}{drawn}", style="dim")
        if within is not None:
            open_screen().print(memory_line(within), style="dim")
    if finish == "interrupted":
        raise typer.Exit(130)


def _prompt(given: str | None, file: Path | None) -> str:
    """What was given, what the file holds, or what comes on stdin; the last two without the newline at their end.
    ConfigError for two of them, and for what is not UTF-8."""
    if file is not None and given is not None:
        raise ConfigError("prompt, file: give one of them")
    try:
        if file is not None:
            return file.read_bytes().decode().removesuffix("\n")
        if given is None:
            raise typer.BadParameter("give one, or --file FILE, or - for what comes on stdin", param_hint="prompt")
        if given != "-":
            return given
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{file or 'stdin'}: must be UTF-8") from None
    except OSError as error:
        raise ConfigError(f"file = {str(file)!r}: {error.strerror}") from None


def _logprobs(deltas: list[Delta], tokenizer: Tokenizer | None) -> list[dict[str, Any]] | None:
    """Of every token its id, its text and its log-probability, and the same of the most probable in its place."""
    seen = [(delta.token, delta.logprobs) for delta in deltas if delta.token is not None and delta.logprobs is not None]

    def text(token: int) -> str:
        return "" if tokenizer is None else tokenizer.token_bytes(token).decode("utf-8", "replace")

    return [
        {"id": token, "text": text(token), "token": one.token, "top": dict(one.top),
         "top_texts": {other: text(other) for other in one.top}}
        for token, one in seen
    ] or None  # fmt: skip


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
