"""What each expert is worth: the loss on held-out text without it, less the loss with all.

Both losses are of the same tokens, so their difference is paired; its error is that over documents, whose tokens are
not independent. Which costs are beyond noise is judged for all experts of all layers together (Benjamini-Hochberg).

Legend: D documents · L layers · E experts of one
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handful.inspection.collect import more_nats, stages
from handful.inspection.statistics import Ratio, adjusted, ratio
from handful.inspection.subject import Subject
from handful.inspection.texts import Window

__all__ = ["Ablated", "ablate", "costs", "sample", "worth"]


@dataclass(frozen=True, eq=False)
class Ablated:
    """What was measured: nats of each document without each expert less those with all.

    more_ED   of each layer (E, D); nan for an expert that was not reached.
    tokens_D  predicted tokens of each document.
    loss      nats per token with all experts.
    """

    more_ED: Sequence[Tensor]
    tokens_D: Tensor
    loss: float
    whole: bool


def sample(windows: Sequence[Window], tokens: int, seed: int) -> list[Window]:
    """About so many tokens of some windows: one window of each document by turns, drawn at random. Documents are
    numbered anew, from 0."""
    draw = random.Random(seed)
    left: dict[int, list[Window]] = {}
    for window in windows:
        left.setdefault(window.document, []).append(window)
    for mine in left.values():
        draw.shuffle(mine)
    chosen: list[Window] = []
    held = 0
    while held < tokens and any(left.values()):
        for mine in left.values():
            if mine and held < tokens:
                chosen.append(mine.pop())
                held += chosen[-1].length
    number = {document: i for i, document in enumerate(sorted({window.document for window in chosen}))}
    return [Window(number[window.document], window.tokens) for window in chosen]


def ablate(subject: Subject, windows: Sequence[Window], progress: Callable[[int, int], None] | None = None) -> Ablated:
    """The loss of windows without each expert of each layer, by documents. A Ctrl-C ends it with what it has."""
    documents = 1 + max((window.document for window in windows), default=-1)
    tokens_D = torch.zeros(documents, dtype=torch.float64)
    for window in windows:
        tokens_D[window.document] += window.length
    more = [torch.full((experts, documents), torch.nan, dtype=torch.float64) for experts in subject.experts]
    done, total, whole, nats = 0, sum(subject.experts), True, torch.nan
    try:
        for layer, more_ED in enumerate(more):
            staged = stages(subject, windows, layer)
            nats = sum(float(stage.nats_BS.double().sum()) for _, stage in staged)
            for expert in range(subject.experts[layer]):
                more_ED[expert] = more_nats(subject, staged, documents, [expert])
                done += 1
                if progress is not None:
                    progress(done, total)
    except KeyboardInterrupt:
        whole = False
    return Ablated(more, tokens_D, nats / float(tokens_D.sum()), whole)


def worth(more_nD: Tensor, tokens_D: Tensor) -> Ratio:
    """(n,) nats per token that each costs, with its error over documents."""
    return ratio(more_nD.T, tokens_D)


def costs(ablated: Ablated, level: float) -> list[list[dict[str, Any]]]:
    """For each layer and expert its cost in nats per token, its standard error, p (two-sided, Student's t), q and
    whether it is beyond noise; None for an expert that was not reached."""
    found = [worth(more_ED, ablated.tokens_D) for more_ED in ablated.more_ED]
    p = [
        torch.where(more_ED.isnan().any(1), torch.nan, side.apart())
        for more_ED, side in zip(ablated.more_ED, found, strict=True)
    ]
    q = adjusted(torch.cat(p)).split([len(layer) for layer in p]) if p else ()
    layers = []
    for side, p_E, q_E in zip(found, p, q, strict=True):
        rows = []
        for cost, error, p_e, q_e in zip(
            side.value.tolist(), side.error.tolist(), p_E.tolist(), q_E.tolist(), strict=True
        ):
            known = cost == cost
            rows.append(
                {
                    "cost": cost if known else None,
                    "error": error if error == error else None,
                    "p": p_e if known else None,
                    "q": q_e if known else None,
                    "beyond": bool(known and q_e <= level),
                }
            )
        layers.append(rows)
    return layers
