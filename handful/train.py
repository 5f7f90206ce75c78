"""Training: optimizer steps as a stream of events, with checkpoints from which a killed run goes on as if nothing was.

`train(...)` yields plain dicts with an "event" key: start, step, routing, eval, warning, checkpoint, end. Who shows or
stores them is the caller's choice; with a run folder they are kept in RUN/events.jsonl too.

Everything random in step n is a function of (seed, n): the batch, and the routers' noise. So a resumed run needs the
weights, the optimizer's moments and a step number, and gives the same losses as one that was never interrupted.

Several ranks make one training: all call `train`, each has a share of every batch and some of the experts, and the
first keeps the run. A checkpoint knows nothing of them, so that as many others, or one alone, go on from it.

Legend: B sequences · S tokens in one · L MoE layers · E experts
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal, cast

import torch
from torch import Tensor, nn

from handful.config import ModelConfig, TrainConfig
from handful.config_io import to_dict
from handful.cost import cost
from handful.data import Batches, Data, bits_per_byte, heldout_batches
from handful.errors import ConfigError, TrainingError
from handful.evaluate import batch_loss, evaluate
from handful.experts.parallel import Layout
from handful.families.weights import shapes
from handful.model import Decoder
from handful.monitor import CollapseMonitor, Event, Sink, choices, routing_event
from handful.ranks import ALONE, Ranks
from handful.routing import Routing
from handful.runs import Run, go_on_from, save_with
from handful.settings import TrainOnly, check_training
from handful.spread import spread
from handful.train_ranks import check_ranks
from handful.train_step import Stepper, make_optimizer, seed

__all__ = ["Event", "interrupts", "pick_dtype", "train"]

Dtype = Literal["auto", "float32", "bfloat16"]

ROUTING_EVERY = 10  # steps whose load is summed up in one routing event

# What `only` leaves to be trained, by the parts of a layer.
TRAINED: dict[str, tuple[str, ...]] = {"experts": (".ffn.experts.", ".ffn.shared."), "routers": (".ffn.router.",)}


def pick_dtype(
    config: ModelConfig, settings: TrainConfig, backend: str = "auto", device: str = "cpu", model: Decoder | None = None
) -> tuple[Dtype, str]:
    """(dtype, reason): settings.dtype, or with "auto" the quicker on this machine for this model's steps.

    model   one to time; None makes one. Its weights stay as they are.

    bfloat16 (autocast) must be clearly quicker, by a fifth, so that noise does not decide and float32 breaks ties.
    """
    if settings.dtype != "auto":
        return settings.dtype, "as asked"
    seconds = {}
    shape = (settings.batch // settings.accumulate, settings.context + 1)
    tokens_BS = torch.randint(config.vocab, shape, device=device)
    model = model or Decoder(config, backend=backend).to(device)
    for dtype in ("float32", "bfloat16"):
        best = math.inf
        for _ in range(4):
            start = time.perf_counter()
            loss, _ = batch_loss(model, tokens_BS[:, :-1], tokens_BS[:, 1:], dtype)
            loss.backward()
            loss.item()  # waits for a GPU, whose queue runs in order
            best = min(best, time.perf_counter() - start)
        seconds[dtype] = best
        model.zero_grad(set_to_none=True)
    quicker: Dtype = "bfloat16" if seconds["bfloat16"] * 1.2 < seconds["float32"] else "float32"
    times = ", ".join(f"{1e3 * s:.0f} ms a micro-batch in {dtype}" for dtype, s in seconds.items())
    return quicker, f"measured {times}"


def train(
    model: ModelConfig | Decoder,
    settings: TrainConfig,
    data: Data,
    out: str | Path | None = None,
    *,
    only: TrainOnly = "all",
    resume: bool = False,
    device: str = "cpu",
    backend: str = "auto",
    stop: Callable[[], bool] | None = None,
    sinks: Iterable[Sink] = (),
    ranks: Ranks = ALONE,
    layouts: Sequence[Layout] | None = None,
) -> Iterator[Event]:
    """Train a model; yields events until the end.

    model    a config, for a new model; or a decoder to go on from, which is trained in place, in float32. `data` must
             be in its tokenizer's tokens.
    out      the run folder: events, checkpoints and RUN/model, the last checkpoint as a Hugging Face folder. None
             keeps nothing. A folder that holds a run is refused unless `resume`.
    only     train all parameters; or only the experts, shared ones too; or only the routers. The others get no
             gradient, and no room in the optimizer.
    resume   go on from the run's last checkpoint; config, settings and `only` must be the run's own.
    backend  who multiplies the experts of a new model.
    stop     asked after every step, in place of Ctrl-C.
    ranks    that share this training (`handful.ranks.join`). Each calls this, and the first alone has the run folder,
             which all read a checkpoint from.
    layouts  who has which experts of each MoE layer; None: they are dealt evenly.

    Ctrl-C finishes the step, saves a checkpoint and ends the stream with an "interrupted" event. TrainingError when a
    loss or gradient is not finite: the last checkpoint stays as it was.
    """
    config = model.config if isinstance(model, Decoder) else model
    start = model if isinstance(model, Decoder) and not resume else None
    _check(config, settings, data, only, start, resume)
    check_ranks(config, ranks, device)
    # These two refuse a text that is too short, so they stand before anything is written or timed.
    batches = Batches(data.train, batch=settings.batch, context=settings.context, seed=settings.seed)
    heldout_bytes = data.evaluated_bytes_per_token(settings.context, settings.eval_tokens)
    run = Run.open(Path(out), resume=resume) if out is not None and not ranks.rank else None
    with run.locked() if run is not None else nullcontext():
        if start is not None:
            start = start.float().to(device)
            _train_only(start, only)
        found: tuple[Dtype, str] | None = None
        if run is not None and resume:
            found = cast(Dtype, run.check(config, settings, data, only)), "as the run began"
        elif not ranks.rank:
            found = pick_dtype(config, settings, backend, device, start)
        found = ranks.first(found)
        assert found is not None
        dtype, reason = found
        job = _Job(
            config=config, settings=replace(settings, dtype=dtype), data=data, batches=batches,
            heldout_bytes=heldout_bytes, dtype_reason=reason, device=device, backend=backend, start=start, only=only,
            run=run, stop=stop, keeps=out is not None, ranks=ranks, layouts=layouts,
        )  # fmt: skip
        try:
            for event in _events(job):
                if run is not None:
                    run.write(event)
                for sink in sinks:
                    sink(event)
                yield event
        except FloatingPointError as error:
            kept = f"the last good checkpoint is {run.last()}" if run and run.last() else "there is no checkpoint"
            raise TrainingError(f"{error}; {kept}") from None


def _check(
    config: ModelConfig, settings: TrainConfig, data: Data, only: str, start: Decoder | None, resume: bool
) -> None:
    """ConfigError for what does not go together."""
    has = data.tokenizer.vocab_size
    # Public models have rows to spare; a model of ours has a row for each token.
    if config.vocab < has or (config.vocab > has and start is None and not resume):
        raise ConfigError(f"model.vocab = {config.vocab}: the tokenizer has {has}")
    check_training(config, settings, only)
    if start is None:
        return
    if start.tokenizer is not None and start.tokenizer.fingerprint != data.tokenizer.fingerprint:
        raise ConfigError("data: its tokenizer is not the model's")
    if settings.context > config.context:
        raise ConfigError(f"train.context = {settings.context}: at most {config.context}, the model's")
    if start.state_dict().keys() != shapes(config).keys():
        raise ConfigError("model: its weights are quantized, and cannot be trained")


def _train_only(model: nn.Module, only: str) -> None:
    """Let gradients reach what is trained, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(only == "all" or any(part in name for part in TRAINED[only]))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Job:
    """A training that may begin: what was asked, checked, and what was found out. `start` is None for a new model."""

    config: ModelConfig
    settings: TrainConfig
    data: Data
    batches: Batches
    heldout_bytes: float
    dtype_reason: str
    device: str
    backend: str
    start: Decoder | None
    only: TrainOnly
    run: Run | None
    stop: Callable[[], bool] | None
    keeps: bool  # some rank has a run
    ranks: Ranks
    layouts: Sequence[Layout] | None


def _events(job: _Job) -> Iterator[Event]:
    config, settings, data, run, ranks = job.config, job.settings, job.data, job.run, job.ranks
    seed(settings.seed)
    model = job.start
    if model is None:
        model = Decoder(config, backend=job.backend).to(job.device)
        _train_only(model, job.only)
    if ranks.size > 1:
        spread(model, ranks, job.layouts)
    model.activation_checkpoint = settings.activation_checkpoint
    optimizer = make_optimizer(model, settings)
    step, seconds = 0, 0.0
    before: list[Event] = []  # what a resumed run did
    monitor = CollapseMonitor(config, settings)
    resumed = ranks.first(run.last() if run is not None and run.resumed else None)
    if run is None and resumed is not None:
        step, seconds = go_on_from(resumed, model, optimizer)
    elif run is not None and run.resumed:
        step, seconds = run.restore(model, optimizer)
        before = run.events()
        for event in before:
            if event["event"] == "routing":
                monitor.see(event)
    elif run is not None:
        if job.start is not None:
            # Before run.json: from then on the folder alone is enough to go on.
            run.save(0, 0.0, model, optimizer, data.tokenizer, ranks)
        run.begin(config, settings, data, job.only, started=job.start is not None)
    elif job.keeps and job.start is not None:
        save_with(model, optimizer, ranks)
    before = ranks.first(before)
    price = cost(config, context=settings.context)
    yield {
        "event": "start",
        "model": to_dict(config),
        "train": to_dict(settings),
        "data": data.summary(),
        "parameters": {"total": price.total, "active": price.active},
        "train_flops_per_token": price.train_flops,
        "only": job.only,
        "dtype": settings.dtype,
        "dtype_reason": job.dtype_reason,
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
        "device": job.device,
        "step": step,
    }
    stepper = Stepper(config, settings, model, optimizer, job.device, ranks)
    evaluation: Event | None = None
    window: list[tuple[Tensor, list[float]]] = []
    waited = 0.0

    def held_out() -> Event:
        parts = heldout_batches(data.heldout, settings.batch, settings.context, settings.eval_tokens)
        chosen: list[list[list[int]]] = []
        loss = evaluate(
            model, parts, settings.dtype, lambda routings: chosen.extend(choices(_of_all(routings, ranks))), ranks
        )
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step}: the held-out loss is {loss}")
        return {
            "event": "eval",
            "step": step,
            "tokens": step * settings.tokens_per_step,
            "seconds": seconds,
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, job.heldout_bytes),
            **({"choices": chosen} if chosen else {}),
        }

    with interrupts() if job.stop is None else nullcontext(job.stop) as interrupted:
        if settings.eval_every and not step and not any(event["event"] == "eval" for event in before):
            yield held_out()  # where the curve begins
        while step < settings.steps:
            began = time.perf_counter()
            done = stepper.step(step, *job.batches.at(step))
            seconds += time.perf_counter() - began
            waited += done.waited
            step += 1
            tokens = step * settings.tokens_per_step
            yield {
                "event": "step",
                "step": step,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                **done.plain,
            }
            stopped, last = ranks.any(interrupted()), step == settings.steps
            save = stopped or last or _every(settings.checkpoint_every, step)
            if done.load_LE is not None:
                window.append((done.load_LE, done.dropped_L))
                # A checkpoint ends a window early: a resumed run would not have what came before it.
                if save or _every(ROUTING_EVERY, step):
                    routing = routing_event(window, step, tokens)
                    window = []
                    yield routing
                    yield from monitor.see(routing)
            if last or _every(settings.eval_every, step):
                evaluation = held_out()
                yield evaluation
            if run is not None and save:
                path = run.save(step, seconds, model, optimizer, data.tokenizer, ranks)
                yield {"event": "checkpoint", "step": step, "path": str(path)}
            elif job.keeps and save:
                save_with(model, optimizer, ranks)
            if stopped and not last:
                yield {"event": "interrupted", "step": step, "seconds": seconds}
                return
        # A run that was killed after its last checkpoint has nothing left to train.
        evaluation = evaluation or held_out()
    yield {
        "event": "end",
        "step": step,
        "loss": evaluation["loss"],
        "bits_per_byte": evaluation["bits_per_byte"],
        "seconds": seconds,
        "tokens_per_second": step * settings.tokens_per_step / max(seconds, 1e-9),
        **({"waited_for_experts": waited} if ranks.size > 1 else {}),
    }


def _of_all(routings: list[Routing], ranks: Ranks) -> list[Routing]:
    """What all ranks chose of their shares of a batch, without the scores that they chose by."""
    if ranks.size == 1:
        return routings
    found = []
    for routing in routings:
        experts_TK, kept_TK = ranks.gathered(routing.experts_TK), ranks.gathered(routing.computed_TK.byte())
        scores = torch.zeros(()).expand(len(experts_TK), routing.experts)
        found.append(Routing(scores, scores, experts_TK, torch.ones(experts_TK.shape), kept_TK == 0))
    return found


def _every(period: int, step: int) -> bool:
    """Whether a step ends a period; a period of 0 never ends."""
    return bool(period) and step % period == 0


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that is read between steps; the second one interrupts at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
