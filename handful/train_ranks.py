"""What ranks share in a training step: gradients, their norm, and the time that they wait for each other.

Parameters that every rank has are DistributedDataParallel's: their gradients are added while the backward pass goes on.
FSDP would hold them in parts and gather them for every layer; over gloo that takes longer (docs/ranks.md has figures),
and they are the small part of such a model. Experts that a rank alone has get their gradients from all tokens by the
way that these came (`experts/parallel.py`); those of copies are added here.

Legend: E experts · c copied ones of a rank · L MoE layers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from handful.config import ModelConfig
from handful.errors import ConfigError
from handful.evaluate import batch_loss
from handful.experts.parallel import Layout, ParallelExperts, dealt
from handful.model import Decoder
from handful.placement import read_split
from handful.ranks import Ranks
from handful.routing import Routing
from handful.spread import own_experts

__all__ = ["Shared", "check_ranks", "layout_line", "read_layouts"]


def check_ranks(config: ModelConfig, ranks: Ranks, device: str) -> None:
    """ConfigError for a model that ranks cannot share a batch of, and for a device that they do not compute on."""
    router = config.router
    if ranks.size > 1 and device != "cpu":
        raise ConfigError(f"device = {device!r}: cpu, on several ranks")
    if ranks.size == 1 or router is None:
        return
    if router.capacity_factor or router.eval_capacity_factor or router.choice == "expert":
        what = "choice = 'expert'" if router.choice == "expert" else "capacity_factor"
        raise ConfigError(
            f"model.router.{what}: on several ranks tokens of one would compete with those of others; "
            "none, or sequence_capacity"
        )


def read_layouts(file: Path, config: ModelConfig, ranks: Ranks) -> list[Layout]:
    """Who has which experts of each MoE layer, as `handful place` wrote it. ConfigError if it is for others."""
    given = read_split(file, "placement")
    layers, router = len(config.moe_layers), config.router
    if router is None or len(given) != layers:
        raise ConfigError(f"placement: {len(given)} layers; the model has {layers} with experts")
    if any(len(placement.experts) != ranks.size for placement, _ in given):
        raise ConfigError(f"placement: of {len(given[0][0].experts)} devices; there are {ranks.size} ranks")
    return [Layout(router.experts, placement.experts, shares) for placement, shares in given]


def layout_line(config: ModelConfig, ranks: Ranks, layouts: Sequence[Layout] | None) -> str:
    """In a line what each rank has."""
    hosts = len(set(ranks.hosts))
    where = "1 host" if hosts == 1 else f"{hosts} hosts" + (" (two-level)" if ranks.two_level else "")
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''} each"
    experts = "no experts to spread"
    if config.router is not None and config.moe_layers:
        held = dealt(config.router.experts, ranks.size) if layouts is None else layouts[0].held
        counts = "+".join(str(len(own)) for own in held)
        more = "" if layouts is None else " in the first layer"
        experts = f"experts of a layer {counts}{more}"
    return f"{ranks.size} ranks on {where}, {threads}: {experts}; all else on every rank (DDP over gloo)"


class Shared:
    """A model's training step, shared by ranks. One process alone shares it with nobody."""

    def __init__(self, model: Decoder, ranks: Ranks) -> None:
        self.ranks = ranks
        self.loss: nn.Module = _Loss(model)
        self.experts = [moe.experts for moe in model.moe_layers if isinstance(moe.experts, ParallelExperts)]
        own, parameters = own_experts(model), dict(model.named_parameters())
        self._own = {name: _Part(parameters[name], own[name], ranks) for name in own}
        everybodys = [p for name, p in parameters.items() if name not in own and p.requires_grad]
        if ranks.group is not None and everybodys:
            apart = [f"model.{name}" for name in [*own, *dict(model.named_buffers())]]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.loss, apart)
            self.loss = DistributedDataParallel(self.loss, process_group=ranks.group, gradient_as_bucket_view=True)
            self.loss.register_comm_hook(ranks.group, _added)

    def batch_loss(
        self, inputs_BS: Tensor, targets_BS: Tensor, dtype: str, *, last: bool
    ) -> tuple[Tensor, list[Routing]]:
        """`evaluate.batch_loss` of this rank's tokens. Gradients of the last micro-batch bring those before along."""
        waits = isinstance(self.loss, DistributedDataParallel) and not last
        with self.loss.no_sync() if waits else nullcontext():  # type: ignore[operator]
            found: tuple[Tensor, list[Routing]] = self.loss(inputs_BS, targets_BS, dtype)
            return found

    def complete_gradients(self) -> None:
        """Experts that nobody's token went to have a gradient of 0, as in one process; copies that of all of them."""
        for part in self._own.values():
            parameter = part.parameter
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if part.copied:
                whole = parameter.new_zeros(part.copied, *parameter.shape[1:])
                whole[part.among_c] = parameter.grad[part.places_c]
                parameter.grad[part.places_c] = self.ranks.sum(whole)[part.among_c]

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The norm of the whole model's gradient; each expert counts once."""
        norm = nn.utils.get_total_norm([g for name, g in gradients.items() if name not in self._own])
        if not self._own:
            return norm
        square = torch.zeros((), dtype=torch.float64)
        for name, part in self._own.items():
            if name in gradients:
                square += gradients[name][part.first].double().square().sum()
        found: Tensor = (norm.double().square() + self.ranks.sum(square)).sqrt().to(norm.dtype)
        return found

    def waited(self) -> float:
        """Seconds, on average, that ranks waited since the last time for the experts of each layer's slowest."""
        if not self.experts or self.ranks.size == 1:
            return 0.0
        seconds_L = torch.tensor([experts.clock.seconds for experts in self.experts], dtype=torch.float64)
        for experts in self.experts:
            experts.clock.seconds = 0.0
        mean_L = self.ranks.sum(seconds_L.clone()) / self.ranks.size
        return float((self.ranks.max(seconds_L) - mean_L).sum())


class _Part:
    """A parameter of which this rank has its own experts' rows.

    first                of these rows, those of experts of which no rank before has a copy.
    copied               experts that have copies somewhere.
    among_c, places_c    of those that this rank has, which of these they are, and their rows here.
    """

    def __init__(self, parameter: nn.Parameter, experts: ParallelExperts, ranks: Ranks) -> None:
        layout, numbers = experts.layout, experts.numbers
        self.parameter = parameter
        self.first = [place for place, e in enumerate(numbers) if layout.primary[e] == ranks.rank]
        copied_E = layout.copies_E > 1
        self.copied = int(copied_E.sum())
        self.places_c = [place for place, e in enumerate(numbers) if copied_E[e]]
        self.among_c = (copied_E.cumsum(0) - 1)[[numbers[place] for place in self.places_c]]


class _Loss(nn.Module):
    """What is differentiated, as one module."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BS: Tensor, targets_BS: Tensor, dtype: str) -> tuple[Tensor, list[Routing]]:
        return batch_loss(self.model, inputs_BS, targets_BS, dtype)


def _added(group: dist.ProcessGroup, bucket):  # type: ignore[no-untyped-def]  # torch would look at them
    """Gradients are added: ranks weigh their losses themselves."""
    work: Any = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
