"""A model whose experts are spread over ranks, and the whole of it again: for checkpoints, which know of no ranks.

spread(model, ranks)              each rank keeps its own experts of every MoE layer
with whole(model, ranks) as all   on rank 0 the tensors of all ranks, each made when it is asked for
read_into(model, folder)          a checkpoint's tensors, of experts those that this rank has
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from handful.errors import ConfigError, HandfulError, first_line
from handful.experts.parallel import Layout, ParallelExperts, dealt
from handful.families.io import read_state
from handful.kernels.extension import available
from handful.lazy_tensors import Entry, Tensors
from handful.model import Decoder
from handful.ranks import Ranks

__all__ = [
    "own_experts", "read_into", "read_part", "spread", "whole", "whole_name",
]  # fmt: skip

LOCAL = ".experts.local."  # in the name of a tensor of which a rank has its own experts' part


def spread(model: Decoder, ranks: Ranks, layouts: Sequence[Layout] | None = None) -> None:
    """Keep this rank's experts of each MoE layer, in place; the others' memory is given back.

    layouts   of the MoE layers, in order (`handful place` finds some); None: experts are dealt evenly, in order.

    ConfigError for layouts of other layers or experts, and where some ranks have the native kernels and others do not:
    they would answer in other dtypes.
    """
    layers = model.moe_layers
    has = torch.tensor([int(available()), -int(available())])
    if int(ranks.max(has).sum()):
        raise ConfigError("ranks: some have the native kernels and others do not (handful doctor says why)")
    if layouts is None:
        layouts = [Layout(moe.experts.count, dealt(moe.experts.count, ranks.size)) for moe in layers]
    if len(layouts) != len(layers):
        raise ConfigError(f"placement: {len(layouts)} layers; the model has {len(layers)} with experts")
    for moe, layout in zip(layers, layouts, strict=True):
        if layout.experts != moe.router.config.experts:
            raise ConfigError(f"placement: of {layout.experts} experts; the model has {moe.router.config.experts}")
        moe.experts = ParallelExperts(moe.experts, layout, ranks)  # type: ignore[assignment]


def whole_name(name: str) -> str:
    """The name that a tensor has in a model that is not spread."""
    return name.replace(LOCAL, ".experts.")


def own_experts(model: Decoder) -> dict[str, ParallelExperts]:
    """By the name of each tensor that is a rank's own part, the experts that it belongs to."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, ParallelExperts)}
    return {name: modules[name.split(".local.")[0]] for name in model.state_dict() if LOCAL in name}


def read_into(model: Decoder, folder: Path) -> None:
    """Read a checkpoint folder's weights into a decoder of the same shape, one tensor at a time; of experts that are
    spread those that this rank has."""
    state, own = read_state(model.config, folder), own_experts(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            read_part(state.entry(whole_name(name)), own.get(name), tensor)


def read_part(entry: Entry, experts: ParallelExperts | None, out: Tensor) -> None:
    """Read a tensor of the whole, or a rank's own experts' part of it, into `out`."""
    if experts is None:
        entry.fill(out, None)
        return
    for row, expert in zip(out, experts.numbers, strict=True):
        entry.fill(row, expert)


@contextmanager
def whole(
    model: Decoder, ranks: Ranks, more: Callable[[str], Mapping[str, Tensor]] = lambda name: {}
) -> Iterator[tuple[Tensors, dict[str, Tensors]] | None]:
    """On rank 0 all tensors of a model's state by the names of one that is not spread, made when they are asked for:
    the other ranks give theirs meanwhile. On those None, when it is over.

    more   what else there is for each tensor, by kind, such as an optimizer's moments. It is the second value.

    What goes wrong on rank 0 is told to all.
    """
    state, own = model.state_dict(), own_experts(model)

    def gathered(kind: str, name: str) -> Tensor:
        held = more(name).get(kind) if kind else state[name]
        # A rank without experts has no moments either.
        return _gathered(state[name][:0] if held is None else held.detach(), own[name], ranks)

    if ranks.rank:
        while (told := ranks.first(None)) is not None:
            if isinstance(told, HandfulError):
                raise told
            gathered(*told)
        yield None
        return
    latest: dict[tuple[str, str], Tensor] = {}  # the stacks of one layer: they are read by turns, expert by expert

    def entry(kind: str, name: str) -> Entry:
        tensor = more(name)[kind] if kind else state[name]
        if name not in own:
            return Entry.of(tensor)

        def fill(out: Tensor, expert: int | None) -> None:
            if (kind, name) not in latest:
                if any(other.split(LOCAL)[0] != name.split(LOCAL)[0] for _, other in latest):
                    latest.clear()
                ranks.first((kind, name))
                latest[kind, name] = gathered(kind, name)
            stack = latest[kind, name]
            out.copy_(stack if expert is None else stack[expert])

        return Entry(tensor.dtype, (own[name].layout.experts, *tensor.shape[1:]), fill)

    kinds = dict.fromkeys(kind for name in state for kind in more(name))
    beside = {
        kind: Tensors({whole_name(name): entry(kind, name) for name in state if kind in more(name)}) for kind in kinds
    }
    try:
        yield Tensors({whole_name(name): entry("", name) for name in state}), beside
    except BaseException as error:
        ranks.first(error if isinstance(error, HandfulError) else HandfulError(first_line(error)))
        raise
    ranks.first(None)


def _gathered(tensor: Tensor, experts: ParallelExperts, ranks: Ranks) -> Tensor:
    """Rank 0's: the rows of all experts, of copies the first. Empty on the others."""
    primary = experts.layout.primary
    mine = [place for place, expert in enumerate(experts.numbers) if primary[expert] == ranks.rank]
    rows = tensor[mine].contiguous()
    sent = [len(mine)] + [0] * (ranks.size - 1)
    counts = [primary.count(rank) for rank in range(ranks.size)]
    came = ranks.exchange(rows.flatten(1).view(torch.uint8), sent, counts if ranks.rank == 0 else [0] * ranks.size)()
    order = [expert for rank, own in enumerate(experts.layout.held) for expert in own if primary[expert] == rank]
    if ranks.rank:
        return rows
    found = torch.empty(experts.layout.experts, *tensor.shape[1:], dtype=tensor.dtype)
    found[order] = came.view(tensor.dtype).view(len(order), *tensor.shape[1:])
    return found
