"""Monitors a training: statistics of its routing, the warning of a collapse, TensorBoard.

Legend: L MoE layers · E experts
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handful.config import ModelConfig, TrainConfig
from handful.observe import collapsed, stats
from handful.routing import Routing

__all__ = ["CollapseMonitor", "Event", "Sink", "TensorBoardWarning", "choices", "routing_event", "tensorboard"]

Event = dict[str, Any]
Sink = Callable[[Event], None]  # somewhere that events go

CHOICES = 4096  # assignments that an evaluation keeps, about
CHOOSING, FEWEST_CHOOSING = 256, 16  # tokens that they are of, from the most to the fewest
COLLAPSED_WINDOWS = 3  # routing events in a row that make a warning


def routing_event(window: list[tuple[Tensor, list[float]]], step: int, tokens: int) -> Event:
    """The steps of a window together: (load_LE, the share that was dropped in each layer) of each."""
    load_LE = torch.stack([load for load, _ in window]).sum(0)
    dropped_L = [sum(layer) / len(layer) for layer in zip(*(d for _, d in window), strict=True)]
    return {"event": "routing", "step": step, "tokens": tokens, **vars(stats(load_LE, dropped_L))}


def choices(routings: Sequence[Routing]) -> list[list[list[int]]]:
    """Of each layer, the experts that each of the first tokens went to.

    An evaluation always begins with the same tokens, so that two of them say how much the routing has moved. 256 at
    most, and fewer where a token has many experts: about 4,096 assignments in all.
    """
    some = max(FEWEST_CHOOSING, min(CHOOSING, CHOICES // max(1, sum(routing.top_k for routing in routings))))
    layers = []
    for routing in routings:
        mine = routing.rows(0, min(some, routing.tokens))
        experts = mine.experts_TK.tolist()
        if mine.dropped_TK is not None:
            pairs = zip(experts, mine.dropped_TK.tolist(), strict=True)
            experts = [[e for e, out in zip(row, drop, strict=True) if not out] for row, drop in pairs]
        layers.append(experts)
    return layers


class CollapseMonitor:
    """Says of a layer that its routing has collapsed, once each time, when it has been so for three routing events.

    Those of the warm-up do not count: the first steps often look collapsed until the balance takes hold.
    """

    def __init__(self, config: ModelConfig, settings: TrainConfig) -> None:
        self.warm = settings.warmup * settings.steps
        self.top_k = config.router.top_k if config.router else 0
        self.in_a_row = dict.fromkeys(config.moe_layers, 0)

    def see(self, routing: Event) -> list[Event]:
        """The warnings that a routing event calls for."""
        found: list[Event] = []
        if routing["step"] <= self.warm:
            return found
        for layer, load_E in zip(self.in_a_row, routing["load"], strict=True):
            why = collapsed(torch.tensor(load_E), self.top_k)
            self.in_a_row[layer] = self.in_a_row[layer] + 1 if why else 0
            if self.in_a_row[layer] == COLLAPSED_WINDOWS:
                message = f"routing collapsed in layer {layer}: {why}"
                found.append({"event": "warning", "step": routing["step"], "layer": layer, "message": message})
        return found


class TensorBoardWarning(UserWarning):
    """What a run writes for TensorBoard could not be written, and is left out."""


@contextmanager
def tensorboard(folder: Path) -> Iterator[Sink]:
    """A sink that writes RUN/tensorboard where the package tensorboard is installed, and does nothing where not.

    Nor does it where the disk refuses: a run is worth more than its curves. A warning says so, once.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda event: None
        return
    writer: SummaryWriter | None = None
    refused = False

    def refuse(error: OSError | ValueError) -> None:
        nonlocal refused
        why = (isinstance(error, OSError) and error.strerror) or error
        if not refused:
            warnings.warn(f"{folder / 'tensorboard'}: cannot be written: {why}", TensorBoardWarning, 2)
        refused = True

    def sink(event: Event) -> None:
        if not refused:
            try:
                write(event)
            except (OSError, ValueError) as error:  # no room; or a path that is no text
                refuse(error)

    def write(event: Event) -> None:
        nonlocal writer
        # Made at the first event: a run that is refused leaves nothing behind.
        writer = writer or SummaryWriter(str(folder / "tensorboard"))
        step = event.get("step", 0)
        if event["event"] in ("step", "eval"):
            for name, value in event.items():
                if isinstance(value, float):
                    writer.add_scalar(f"{event['event']}/{name}", value, step)
        elif event["event"] == "routing":
            for name in ("max_vio", "dead", "entropy", "dropped"):
                for layer, value in enumerate(event[name]):
                    writer.add_scalar(f"routing/{name}/{layer}", value, step)

    def quiet(args: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread hands its error on to `write`, and prints a traceback beside it."""
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard")):
            loud(args)

    loud, threading.excepthook = threading.excepthook, quiet
    try:
        yield sink
    finally:
        if writer is not None:
            try:
                writer.close()
            except (OSError, ValueError) as error:  # no room; or a path that is no text
                refuse(error)
        threading.excepthook = loud
