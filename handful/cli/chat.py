"""`handful chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from handful.cli import answers
from handful.cli.shared import Json, open_screen, print_json
from handful.errors import ConfigError

EXAMPLE = "handful chat org/name --system 'Answer in one sentence.'"
HELP = "/reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def run(
    model: answers.ModelArgument,
    system: answers.SystemOption = None,
    max_tokens: Annotated[int, typer.Option(help="Stop an answer after this many tokens.")] = 1024,
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
    as_json: Json = False,
) -> None:
    """Talk with a model that has a chat template. A line is a message; from a pipe too."""
    from dataclasses import asdict

    from handful.chat import Conversation, render
    from handful.encoder_decoder import EncoderDecoder

    given = answers.given_settings(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    variables = answers.variables_of(template_arg)
    screen, shown = open_screen(), sys.stderr if as_json else sys.stdout
    answers.keep_exact(exact_activations)
    found, store = answers.open_model(model, quant, memory, pack)
    try:
        if isinstance(found, EncoderDecoder):
            raise ConfigError(f"{model}: is an encoder-decoder: a decoder is needed")
        if found.tokenizer is None:
            raise ConfigError(f"{model}: it has no tokenizer")
        sampling, told = answers.settle(found, given)
        conversation = Conversation(
            found, system=system, max_tokens=max_tokens, sampling=sampling, stop=stop or (), variables=variables,
            kv_cache_dtype=kv_cache_dtype, speculate=speculate,
        )  # fmt: skip
        # That there is a template, and that it takes a system message, is found out before anybody types.
        render(found.tokenizer, [*conversation.messages, {"role": "user", "content": "…"}], variables=variables)
        if told is not None:
            screen.print(told, style="dim")
        if sampling.seed is not None:
            screen.print(f"seed {sampling.seed}", style="dim")
        screen.print(HELP, style="dim")
        while (text := _line()) is not None:
            if text in ("/exit", "/quit"):
                break
            if text == "/reset":
                conversation.reset()
                screen.print("forgotten", style="dim")
            elif text.startswith("/"):
                screen.print(f"{text.split()[0]}: no such command; {HELP}", style="dim")
            elif text:
                try:
                    with contextlib.closing(conversation.ask(text)) as pieces:
                        for piece in pieces:
                            print(piece, end="", file=shown, flush=True)
                    print(file=shown, flush=True)
                except KeyboardInterrupt:
                    print(file=shown, flush=True)
                    screen.print("stopped", style="dim")
                except ConfigError as error:
                    hint = "; /reset makes room" if str(error).startswith("prompt: ") else ""
                    screen.print(f"error {error}{hint}")
        if as_json:
            print_json({"model": model, "messages": conversation.messages, "sampling": asdict(sampling)})
    finally:
        if store is not None:
            store.close()


def _line() -> str | None:
    """What is typed, on one line; None at the end, or when Ctrl-C is pressed."""
    asking = sys.stdin.isatty()
    if asking:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited, and those before come back with ↑
    try:
        return input("> " if asking else "").strip()
    except UnicodeDecodeError:
        raise ConfigError("stdin: must be UTF-8") from None
    except (EOFError, KeyboardInterrupt):
        if asking:
            print()
        return None
