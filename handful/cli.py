"""The command line: one verb, one public call. `--json` prints one document on stdout and everything else on stderr."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text

from handful import __version__
from handful.errors import ConfigError, HandfulError

if TYPE_CHECKING:
    from handful.compare import Team
    from handful.config import ModelConfig
    from handful.count import Counted
    from handful.encoder_decoder import EncoderDecoder
    from handful.experts.stored import Store
    from handful.model import Decoder
    from handful.train import Event
    from handful.upcycle import Method, Partition

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

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, all else on stderr.")]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="A file, a folder, a glob or hf:org/name. Default: the Python standard library."),
]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="A tokenizer.json or its folder. Default: trained on the data.")
]
RouterOption = Annotated[str | None, typer.Option("--router", help="A published router, such as mixtral or olmoe.")]


def main() -> None:
    """Run the command line. A user's mistake is one line and exit status 1 (2 for wrong usage); Ctrl-C is 130."""
    try:
        app()
    except HandfulError as error:
        if "--debug" in sys.argv:
            raise
        _screen().print(Text.assemble(("error", "red"), f" {error}"))
        sys.exit(1)


def _screen() -> Console:
    """Where people look. Text is shown as it is: paths may hold brackets, and a line is not to be cut."""
    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


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


@app.command(epilog="Example: handful compare --minutes 5 --seeds 3 --out runs/three-teams")
def compare(
    data: DataOption = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Training tokens for every team.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Training time of all runs together.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often each team is trained.")] = 1,
    router: RouterOption = None,
    out: Annotated[Path, typer.Option(help="The folder for runs, table and report.")] = Path("runs/compare"),
    as_json: Json = False,
) -> None:
    """Train an MoE beside its dense twins: a small one of its active size, a big one of its total size."""
    from handful.compare import compare as run_compare
    from handful.compare import steps_within, teams
    from handful.console import RunProgress, comparison_table
    from handful.data import load_data
    from handful.presets import preset, small_model, small_training
    from handful.runs import read_asked

    if tokens is not None and minutes is not None:
        raise ConfigError("tokens, minutes: give one of them")
    screen = _screen()
    like = preset(router) if router else None
    text = load_data(data, progress=screen.print)
    settings = small_training(like)
    if tokens is not None:
        settings = small_training(like, steps=max(1, tokens // settings.tokens_per_step))
    entrants = teams(small_model(text.tokenizer.vocab_size, like), settings)
    if minutes is not None:
        # Timing is never twice the same: what was begun before says how long it goes on.
        begun = out / entrants[0].name / "seed-0"
        held = read_asked(begun)["train"]["steps"] if (begun / "run.json").exists() else None
        if held:
            screen.print(f"{out} was begun with {held} steps, and goes on with them")
        settings = small_training(like, steps=held or steps_within(entrants, text, minutes, seeds))
        entrants = teams(small_model(text.tokenizer.vocab_size, like), settings)
    interrupted = False
    with RunProgress(screen) as progress:

        def named(team: str, seed: int) -> str:
            return team if seeds == 1 else f"{team}, seed {seed}"

        def show(team: Team, seed: int, event: Event) -> None:
            nonlocal interrupted
            interrupted = interrupted or event["event"] == "interrupted"
            progress(named(team.label, seed), event)

        for seed in range(seeds):
            for team in entrants:
                progress.expect(named(team.label, seed))
        document = run_compare(
            text,
            entrants,
            out,
            seeds=seeds,
            command=shlex.join(["handful", *sys.argv[1:]]),
            on_event=show,
        )
    if as_json:
        _print_json(document)
    else:
        Console().print(comparison_table(document))
    screen.print(f"report: {out / 'report.html'}")
    if interrupted:
        screen.print("interrupted; the same command goes on")
        raise typer.Exit(130)


@app.command(epilog="Example: handful train --router olmoe --experts 32 --top-k 4 --steps 300 --out runs/olmoe-like")
def train(
    config: Annotated[Path | None, typer.Argument(help=r"A TOML file: \[model], \[train], \[data].")] = None,
    data: DataOption = None,
    tokenizer: TokenizerOption = None,
    router: RouterOption = None,
    experts: Annotated[int | None, typer.Option(help="Experts in a layer.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts of a token.")] = None,
    width: Annotated[int | None, typer.Option(help="Model width.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    expert_width: Annotated[int | None, typer.Option(help="Hidden width of an expert.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in an optimizer step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens, instead of steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    balance: Annotated[str | None, typer.Option(help="none, switch, global, sequence, gshard or loss-free.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or auto (the quicker here).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights, the order of the data and the noise.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="Go on from a model: a run or checkpoint folder, or org/name.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="all, experts or routers: what is trained. Default: all.")] = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model; the run folder holds its events, checkpoints and report."""
    from handful import report, runs
    from handful.console import RunProgress, duration, facts
    from handful.settings import resumed_settings, training_settings
    from handful.train import train as run_train
    from handful.watch import tensorboard

    screen = _screen()
    given: dict[str, dict[str, Any]] = {
        "data": {"source": data, "tokenizer": tokenizer},
        "model": {
            "experts": experts, "top_k": top_k, "width": width, "layers": layers, "heads": heads,
            "expert_width": expert_width,
        },
        "train": {
            "context": context, "batch": batch, "steps": steps, "tokens": tokens, "lr": lr, "dtype": dtype,
            "seed": seed,
        },
    }  # fmt: skip
    if resume:
        extra = [name for group in given.values() for name, value in group.items() if value is not None]
        if extra or config or router or balance or start or only:
            raise ConfigError("resume: the run goes on with its own settings; give --out and --resume alone")
        asked = resumed_settings(out)
    else:
        runs.check_free(out)
        asked = training_settings(config, router, balance, given, start=start, only=only)
    begin = _decoder(asked.start, dtype="float32") if asked.start is not None else None
    text = asked.load_data(screen.print)
    model, settings = begin or asked.model(text.tokenizer.vocab_size), asked.train
    last: dict[str, Any] = {}
    with RunProgress(screen) as progress, tensorboard(out) as sink:
        for event in run_train(model, settings, text, out, only=asked.only, resume=resume, sinks=[sink]):
            progress(out.name, event)
            last = event
    page = report.write(
        report.from_events(runs.read_events(out), title=str(out), command=shlex.join(["handful", *sys.argv[1:]])),
        out / "report.html",
    )
    interrupted = last["event"] == "interrupted"
    document = {**last, "out": str(out), "model": str(out / "model"), "report": str(page)}
    if as_json:
        _print_json(document)
    elif not interrupted:
        Console().print(
            facts(
                str(out),
                [
                    ("held-out loss", f"{last['loss']:.4f} nats a token"),
                    ("", f"{last['bits_per_byte']:.4f} bits a byte"),
                    ("time", f"{duration(last['seconds'])}, {last['tokens_per_second']:,.0f} tokens/s"),
                    ("model", str(out / "model")),
                    ("report", str(page)),
                ],
            )
        )
    if interrupted:
        screen.print(f"interrupted at step {last['step']}; go on with --resume --out {shlex.quote(str(out))}")
        raise typer.Exit(130)


@app.command(epilog="Example: handful upcycle runs/dense runs/mixture --method granular --experts 4 --slices 4")
def upcycle(
    dense: Annotated[str, typer.Argument(help="A run folder, a checkpoint folder or org/name: a dense model.")],
    out: Annotated[Path, typer.Argument(help="The folder of the new checkpoint.")],
    method: Annotated[str, typer.Option(help="copy, granular or split.")] = "copy",
    experts: Annotated[int, typer.Option(help="Copies; of split, the experts that a network is cut into.")] = 8,
    top_k: Annotated[int, typer.Option(help="Copies, or experts, of a token.")] = 2,
    slices: Annotated[int | None, typer.Option(help="granular: the parts of a copy. Default: 2.")] = None,
    noise: Annotated[float, typer.Option(help="copy, granular: a share of the weights' size.")] = 0.0,
    partition: Annotated[
        str | None, typer.Option(help="split: by coactivation (the default), weights or at random.")
    ] = None,
    data: DataOption = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a sequence of that text.")] = 512,
    eval_tokens: Annotated[int, typer.Option(min=0, help="Held-out tokens of a loss, at most; 0: no losses.")] = 65536,
    fit_tokens: Annotated[int, typer.Option(min=1, help="split: tokens that the routers are fitted on.")] = 8192,
    seed: Annotated[int, typer.Option(min=0, help="Of the routers, the noise and the partition.")] = 0,
    as_json: Json = False,
) -> None:
    """Make an MoE from a dense model."""
    from dataclasses import asdict

    from handful.console import upcycle_table
    from handful.data import Batches, load_data
    from handful.families.io import find_folder, save
    from handful.upcycle import report
    from handful.upcycle import upcycle as run_upcycle

    screen = _screen()
    if out.exists():
        raise ConfigError(f"out = {str(out)!r}: exists; name another folder")
    folder = find_folder(dense)
    model = _decoder(folder)
    text, sample_BS = None, None
    if eval_tokens or method == "split":
        if model.tokenizer is None:
            raise ConfigError(f"{dense}: it has no tokenizer.json, which the text is read by")
        context = min(context, model.config.context)
        text = load_data(data, tokenizer=str(folder), progress=screen.print)
    if text is not None and method == "split":
        sample_BS, _ = Batches(text.train, batch=max(1, fit_tokens // context), context=context, seed=seed).at(0)

    def show(done: int, total: int) -> None:
        if 10 * done // total > 10 * (done - 1) // total:
            screen.print(f"{method}: {done} of {total} layers")

    made = run_upcycle(
        model, cast("Method", method), experts=experts, top_k=top_k, slices=slices, noise=noise,
        partition=cast("Partition | None", partition), text_BS=sample_BS, seed=seed, progress=show,
    )  # fmt: skip
    if eval_tokens:
        screen.print("evaluating both")
    found = report(model, made, text if eval_tokens else None, context=context, tokens=eval_tokens)
    save(made, out)
    if as_json:
        _print_json({"dense": dense, "out": str(out), "method": method, **asdict(found)})
    else:
        Console().print(upcycle_table(str(out), found))
    if found.why_not_public:
        screen.print(f"written as Handful's own: {found.why_not_public}")


def _decoder(model: str | Path, dtype: str | None = None) -> Decoder:
    import torch

    from handful.families.io import load_decoder

    return load_decoder(model, dtype=getattr(torch, dtype) if dtype else None)


@app.command(epilog="Example: handful generate runs/demo/moe/seed-0 'def main(' --max-tokens 100 --seed 1")
def generate(
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
    from handful.engine import Delta, Engine, Sampling, stream, text_request
    from handful.engine import generate as run_generate
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
    with LoadProgress(_screen()) as progress:
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
            for piece in run_generate(found, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop or ()):
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
    if not isinstance(found, EncoderDecoder):
        tokens = [delta.token for delta in deltas if delta.token is not None]
        made = len(tokens)
        if routing is not None and deltas:
            # The last token was made, and did not pass through the model.
            passed = [*request.prompt, *tokens][: recorder.tokens]
            recorder.recording(passed).save(routing)
    within = None if store is None else _within(model, found, store, quant, made / seconds)
    if as_json:
        _print_json(
            {"model": model, "prompt": prompt, "text": "".join(pieces), "finish": finish, "tokens": made,
             "seconds": seconds, "tokens_per_second": made / seconds,
             "logprobs": [{"id": d.token, **asdict(d.logprobs)} for d in deltas if d.logprobs is not None] or None,
             "memory": within}
        )  # fmt: skip
    else:
        _screen().print(f"{made} tokens, {made / seconds:,.0f} tokens/s", style="dim")
        if within is not None:
            _screen().print(memory_line(within), style="dim")
    if finish == "interrupted":
        raise typer.Exit(130)


def _within(
    model: str, found: Decoder | EncoderDecoder, store: Store, quant: str | None, rate: float
) -> dict[str, Any]:
    """What a memory budget did, and the forecast beside it."""
    from dataclasses import asdict

    from handful.ceilings import ceilings
    from handful.memory import resident_bytes
    from handful.plan import plan as run_plan

    stats = store.stats()
    dtype = quant or str(found.embed.weight.dtype).removeprefix("torch.")
    held = resident_bytes(found)
    forecast = None
    if dtype in ("float32", "bfloat16", "int8", "int4"):
        planned = run_plan(
            found.config, ceilings(store.pack.path.parent), dtype=dtype,
            memory=held + stats.slots * stats.expert_bytes,
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


@app.command(epilog="Example: handful cost mixtral --context 8192 --ranks 8")
def cost(
    model: Annotated[str, typer.Argument(help="A preset, a config.json, a run or checkpoint folder, or org/name.")],
    context: Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence. Default: the model's own.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Devices that the experts are spread over.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of weights, cache and what is sent; int8, int4 and mxfp4 are of weights alone.")
    ] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs, bytes and traffic of a model, from its config alone."""
    from handful.console import cost_tables
    from handful.cost import cost as price
    from handful.count import Counted

    config, notes = _config_of(model)
    result = price(config, context=context, ranks=ranks, dtype=dtype)
    for note in notes:
        _screen().print(note, style="dim")
    if as_json:
        about = None
        if isinstance(config, Counted):
            names = ("family", "known", "lacks", "notes", "not_understood")
            about = {"runs": not config.lacks, **{name: getattr(config, name) for name in names}}
        _print_json({"model": model, "note": "; ".join(notes) or None, "counted": about, **result.to_dict()})
        return
    for table in cost_tables(model, result):
        Console().print(table)


@app.command(epilog="Example: handful plan qwen3 --quant int4 --memory 8GB")
def plan(
    model: Annotated[str, typer.Argument(help="A preset, a config.json, a run or checkpoint folder, or org/name.")],
    memory: Annotated[
        str | None, typer.Option(help="What the weights may take, such as 4GB. Default: what is free.")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="float32, bfloat16, int8 or int4. Default: the last three.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence. Default: at most 4096.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that decode together.")] = 1,
    trace: Annotated[
        Path | None, typer.Option(help="A routing that generate --routing wrote: its hit rates are used.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this computer again.")] = False,
    as_json: Json = False,
) -> None:
    """Whether a model runs on this computer, and how fast, from its config alone: nothing else is downloaded."""
    from dataclasses import asdict

    from handful.ceilings import ceilings
    from handful.console import plan_line, plan_tables
    from handful.cost import cost as price
    from handful.observe import Recording
    from handful.plan import plan as run_plan
    from handful.trace import check_recording, replay
    from handful.units import parse_bytes

    screen = _screen()
    budget = None if memory is None else parse_bytes(memory)
    config, notes = _config_of(model)
    recording = None if trace is None else Recording.read(trace)
    if recording is not None:
        check_recording(recording, config, str(trace))
    folder, there = _checkpoint_place(model)
    download = 0 if there else price(config, context=1).weight_bytes
    machine = ceilings(folder, fresh=measure)
    formats = ("bfloat16", "int8", "int4") if quant is None else (quant,)
    plans = [
        run_plan(config, machine, dtype=dtype, memory=budget, context=context, batch=batch, download=download)
        for dtype in formats
    ]
    replays = [
        replay(recording, found.capacity) if recording is not None and found.capacity < found.experts else None
        for found in plans
    ]
    for note in notes:
        screen.print(note, style="dim")
    if as_json:
        documents = []
        for found, played in zip(plans, replays, strict=True):
            rate = None if played is None else found.decode_tokens_per_second(played.hit_rate)
            traced = None if played is None else {**asdict(played), "decode_tokens_per_second": rate}
            documents.append({**found.to_dict(), "trace": traced})
        _print_json({"model": model, "note": "; ".join(notes) or None, "machine": asdict(machine), "plans": documents})
        return
    for table in plan_tables(model, machine, plans, replays):
        Console().print(table)
    print()
    for found in plans:
        print(plan_line(found))
    if plans[0].unforecast and not plans[0].lacks:
        screen.print(f"no speed is forecast: {plans[0].unforecast}", style="dim")


def _checkpoint_place(model: str) -> tuple[Path, bool]:
    """The folder that a model's checkpoint and the pack of its experts lie in, or would; and whether it is there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from handful.families.io import find_folder
    from handful.presets import PRESETS

    if model in PRESETS:
        return Path(HF_HUB_CACHE), False
    path = Path(model)
    folder = path.parent if path.is_file() else find_folder(model, only="config.json")
    return folder, any(folder.glob("*.safetensors"))


def _config_of(model: str) -> tuple[ModelConfig | Counted, tuple[str, ...]]:
    """The config that a name stands for, or what it is made of; and what to say about it."""
    from handful.config import EncoderDecoderConfig
    from handful.count import Counted, count_encoder_decoder
    from handful.families.io import find_config
    from handful.presets import PRESETS, small_model

    if model not in PRESETS:
        if "/" not in model and not Path(model).exists():
            raise ConfigError(f"{model!r}: no such file or folder, and no preset: {', '.join(PRESETS)}")
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


@app.command(epilog="Example: handful doctor --json")
def doctor(as_json: Json = False) -> None:
    """What this computer can do, and which expert backend it gets."""
    from dataclasses import asdict

    import torch

    from handful.console import backend_table, facts, si, size
    from handful.experts.choice import choose, time_backends
    from handful.machine import machine, measure

    found, rates = machine(), measure()
    choices = {str(dtype)[6:]: choose("cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    timed = time_backends()
    if as_json:
        _print_json(
            {
                "handful": __version__,
                "machine": vars(found),
                "measured": vars(rates),
                "experts": {dtype: asdict(choice) for dtype, choice in choices.items()},
                "timed": [asdict(row) for row in timed],
            }
        )
        return
    rows = [
        ("handful", __version__),
        ("torch", found.torch),
        ("processor", f"{found.cpu}, {found.cores} cores, {found.threads} threads"),
        ("vector instructions", " ".join(found.isa) or "none known"),
        ("memory", f"{size(found.memory_bytes)}, {size(found.memory_available_bytes)} available"),
        ("GPU", ", ".join(found.gpus) or "none"),
        ("native extension", found.native_error or "loaded"),
        ("memory read", f"{size(rates.read_bytes_per_second)}/s"),
        ("products, float32", si(rates.float32_flops, "FLOP/s")),
        ("products, bfloat16", si(rates.bfloat16_flops, "FLOP/s")),
        *((f"experts, {dtype}", f"{choice.backend}: {choice.reason}") for dtype, choice in choices.items()),
    ]
    console = Console()
    console.print(facts("This machine", rows))
    console.print(backend_table(timed))


@app.command(epilog="Example: handful verify --seed 7")
def verify(
    seed: Annotated[int, typer.Option(min=0, help="Of the random cases.")] = 0,
    as_json: Json = False,
) -> None:
    """Prove on this computer that every experts backend computes what the plain loop does in float64."""
    from rich.progress import Progress

    from handful.console import verification_table
    from handful.verify.run import verify as run_verify

    screen = _screen()
    examined = ""
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("verify", total=None)

        def show(done: int, total: int, what: str) -> None:
            nonlocal examined
            bar.update(task, completed=done, total=total, description=what)
            if what != examined and not screen.is_terminal:
                screen.print(f"{done} of {total}: {what}")
            examined = what

        found = run_verify(seed, progress=show)

    if as_json:
        _print_json(found.to_dict())
    else:
        Console().print(verification_table(found))
    for row in found.rows:
        more = len(row.failures) - 3
        for failure in (*row.failures[:3], *([f"and {more} more failures; --json tells all"] if more > 0 else [])):
            screen.print(f"{row.backend} {row.level} {row.format}: {failure}", style="red")
    if found.native_error:
        screen.print(f"the native kernels were not examined: {found.native_error}")
    wrong = sum(not row.ok for row in found.rows)
    if wrong:
        screen.print(f"{wrong} of {len(found.rows)} rows {'is' if wrong == 1 else 'are'} wrong")
        raise typer.Exit(1)
    screen.print(f"all {len(found.rows)} rows are right, {found.seconds:.0f} s")


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))
