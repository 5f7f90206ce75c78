"""What keeps experts busy. Left alone, a router collapses: an expert that is chosen learns, and is chosen more.

Every loss is a function of routings and is 1 when the load is even, so their weights compare. Padding counts in none of
them (`Routing.real_T`), and of no tokens at all each is 0. The loss-free bias needs no loss at all: it moves selection,
not gradients.

Where ranks share a batch, the load is that of all: the ranks' losses, each weighed by its share of the tokens, add up
to that of one process. `ranks`: which they are; None: all of torch.distributed, if there are any.

Legend: B sequences · S tokens in one · T = B·S tokens · E experts · K experts per token · L MoE layers
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from handful.config import BalanceConfig
from handful.ranks import Ranks
from handful.routing import Routing

__all__ = [
    "balance_loss",
    "global_loss",
    "gshard_loss",
    "sequence_loss",
    "step_load",
    "switch_loss",
    "update_bias",
    "z_loss",
]


def _probabilities(routing: Routing) -> Tensor:
    """Scores that sum to 1 over the experts: softmax's do; sigmoid's are divided by their sum (DeepSeek-V3, eq. 19)."""
    scores_TE = routing.scores_TE
    return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)


def switch_loss(routing: Routing, ranks: Ranks | None = None) -> Tensor:
    """E · Σ_e f_e · P_e: Switch Transformer's load-balancing loss (arXiv:2101.03961, eq. 4), a scalar.

    f_e is the share of the T·K assignments that chose expert e (before any were dropped), P_e the mean probability
    that the router gave it. The gradient flows through P alone.
    """
    return global_loss(routing, _of_all(ranks, routing.chosen_E))


def sequence_loss(routing: Routing, sequences: int) -> Tensor:
    """The same within each of B sequences, averaged over them (DeepSeek-V3, arXiv:2412.19437, eq. 17-20), a scalar."""
    E, K = routing.experts, routing.top_k
    if not sequences:
        return routing.scores_TE.sum() * 0
    experts_Bn, counted_Bn = (value_TK.reshape(sequences, -1) for value_TK in (routing.experts_TK, routing.counted_TK))
    load_BE = counted_Bn.new_zeros(sequences, E).scatter_add_(1, experts_Bn, counted_Bn)
    tokens_B1 = load_BE.sum(-1, keepdim=True) / K
    some_B1 = tokens_B1.clamp_min(1)
    real_BS1 = counted_Bn.view(sequences, -1, K)[..., :1] > 0
    sum_BE = torch.where(real_BS1, _probabilities(routing).view(sequences, -1, E), 0.0).sum(1)
    loss_B = E * (load_BE / (some_B1 * K) * sum_BE / some_B1).sum(-1)
    return loss_B.sum() / (tokens_B1 > 0).sum().clamp_min(1)  # a sequence of nothing but padding is none


def global_loss(routing: Routing, load_E: Tensor) -> Tensor:
    """The same with the load of the whole batch (arXiv:2501.11873), a scalar.

    load_E are the assignments that each expert got over all micro-batches and ranks (`step_load`). Averaged over equal
    micro-batches this is the loss of the whole batch, exactly: the load carries no gradient and P is a mean over
    tokens. A sequence about one subject may then use few experts, as long as the batch uses all.
    """
    load_E = load_E / load_E.sum().clamp_min(1)
    return routing.experts * (load_E * routing.mean(_probabilities(routing))).sum()


def gshard_loss(routing: Routing, ranks: Ranks | None = None) -> Tensor:
    """E² · mean_e(c_e / T · m_e): GShard's auxiliary loss (arXiv:2006.16668, algorithm 1, line 13), a scalar.

    c_e counts first choices, m_e is the mean probability. The paper's loss is this without E², which its code has.
    """
    counted_T = routing.counted_TK[:, 0]
    first_E = counted_T.new_zeros(routing.experts).index_add_(0, routing.experts_TK[:, 0], counted_T)
    first_E = _of_all(ranks, first_E)
    first_E = first_E / first_E.sum().clamp_min(1)
    return routing.experts**2 * (first_E * routing.mean(_probabilities(routing))).mean()


def z_loss(routing: Routing) -> Tensor:
    """mean_t (log Σ_e exp logit)²: router z-loss (ST-MoE, arXiv:2202.08906, eq. 5), a scalar. Keeps them small."""
    return routing.mean(routing.logits_TE.logsumexp(-1).square())


def balance_loss(
    config: BalanceConfig,
    routings: Sequence[Routing],
    sequences: int,
    load_LE: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """The balancing loss that the config names, averaged over MoE layers and without its weight, a scalar.

    `load_LE` is the whole batch's load, which "global" needs when the batch comes in micro-batches; None: these
    routings are the whole batch, each rank's being its share of it.
    """
    if config.loss == "global" and load_LE is None and routings:
        load_LE = step_load([routings], ranks)
    losses = []
    for layer, routing in enumerate(routings):
        if config.loss == "switch":
            losses.append(switch_loss(routing, ranks))
        elif config.loss == "global" and load_LE is not None:
            losses.append(global_loss(routing, load_LE[layer]))
        elif config.loss == "sequence":
            losses.append(sequence_loss(routing, sequences))
        elif config.loss == "gshard":
            losses.append(gshard_loss(routing, ranks))
    return torch.stack(losses).mean() if losses else torch.zeros(())


@torch.no_grad()
def step_load(micro_batches: Sequence[Sequence[Routing]], ranks: Ranks | None = None) -> Tensor:
    """(L, E) assignments chosen per layer and expert in an optimizer step: over all micro-batches, and ranks if any."""
    return _of_all(ranks, torch.stack([torch.stack([r.chosen_E for r in rs]) for rs in micro_batches]).sum(0))


def _of_all(ranks: Ranks | None, count: Tensor) -> Tensor:
    """The sum over the ranks."""
    if ranks is not None:
        return ranks.sum(count.clone())
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count := count.clone())
    return count


@torch.no_grad()
def update_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> None:
    """b_e += u · sign(mean load - load_e), in place, after an optimizer step (loss-free balancing, arXiv:2408.15664).

    load_E is the whole step's load. An expert below the mean becomes likelier to be chosen, one above it less; the
    weights that its output is multiplied by do not change.
    """
    bias_E += rate * torch.sign(load_E.mean() - load_E)
