"""The loss of a decoder on text: what a training step makes smaller, and what a held-out text judges by.

Legend: B sequences · S tokens in one · T = B·S · D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from handful.loss import linear_cross_entropy
from handful.model import Decoder
from handful.ranks import ALONE, Ranks
from handful.routing import Routing

__all__ = ["autocast", "batch_loss", "evaluate"]


def autocast(like: Tensor, dtype: str) -> torch.autocast:
    """bfloat16 products where `dtype` says so, on the device of a tensor."""
    return torch.autocast(like.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def batch_loss(model: Decoder, inputs_BS: Tensor, targets_BS: Tensor, dtype: str) -> tuple[Tensor, list[Routing]]:
    """The mean loss of a batch in nats per token, with its graph, and the routings that it came by."""
    with autocast(inputs_BS, dtype):
        x_BSD, routings = model.hidden_states(inputs_BS)
        return linear_cross_entropy(x_BSD.flatten(0, 1), model.output_weight, targets_BS.flatten()), routings


@torch.no_grad()
def evaluate(
    model: Decoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    dtype: str = "float32",
    first: Callable[[list[Routing]], None] | None = None,
    ranks: Ranks = ALONE,
) -> float:
    """Mean loss in nats per token over held-out batches, the model in evaluation mode.

    dtype   "bfloat16" is autocast's; with "float32" a model computes in the dtype of its weights.
    first   hears the routings of the first batch, of this rank's tokens.
    ranks   that share each batch.
    """
    was_training = model.training
    model.eval()
    device = model.embed.weight.device
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for inputs_BS, targets_BS in batches:
        mine = ranks.share(len(inputs_BS))
        loss, routings = batch_loss(model, inputs_BS[mine].to(device), targets_BS[mine].to(device), dtype)
        if first is not None and not tokens:
            first(routings)
        total += float(loss) * targets_BS[mine].numel()
        tokens += targets_BS.numel()
    model.train(was_training)
    return float(ranks.sum(total)) / tokens
