"""One optimizer step: micro-batches, losses, gradient clipping, update, balance bias; and its learning rate.

Everything random in it is a function of the seed and of the step's number. Ranks share each micro-batch: each weighs
its losses by its share of the sequences, and gradients are added: they are those of one process (`train_ranks.py`).

Legend: B sequences · S tokens in one · L MoE layers · E experts
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from handful.balance import balance_loss, step_load, update_bias, z_loss
from handful.config import ModelConfig, TrainConfig
from handful.evaluate import autocast
from handful.model import Decoder
from handful.observe import dropped
from handful.ranks import ALONE, Ranks
from handful.routing import Routing
from handful.train_ranks import Shared

__all__ = ["StepResult", "Stepper", "lr_at", "make_optimizer", "seed"]


def lr_at(step: int, settings: TrainConfig) -> float:
    """The learning rate of a step, counted from 0."""
    # Rounded first: 0.07 · 100 is 7.000000000000001 to a computer, and its ceiling would be 8.
    warm = math.ceil(round(settings.warmup * settings.steps, 6))
    if step < warm:
        return settings.lr * (step + 1) / warm
    if settings.schedule == "cosine":
        done = (step - warm) / max(1, settings.steps - warm)
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        falling = max(1, round(settings.decay * settings.steps))
        share = min(1.0, (settings.steps - step) / falling)
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * share)


def make_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW on the parameters that require gradients; weight decay on matrices, none on norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    others = [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def seed(number: int) -> None:
    """Of everything random that follows."""
    torch.manual_seed(number % (1 << 63))  # torch refuses larger ones


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a step reports: plain values for its event, the load of its MoE layers, and how long ranks waited for the
    slowest one's experts."""

    plain: dict[str, Any]
    load_LE: Tensor | None
    dropped_L: list[float]
    waited: float


class Stepper:
    """One optimizer step: micro-batches, losses, gradient clipping, update, balance bias."""

    def __init__(
        self,
        config: ModelConfig,
        settings: TrainConfig,
        model: Decoder,
        optimizer: torch.optim.AdamW,
        device: str,
        ranks: Ranks = ALONE,
    ) -> None:
        self.settings, self.model, self.optimizer, self.device = settings, model, optimizer, device
        if settings.compile:
            model.hidden_states = torch.compile(model.hidden_states)  # type: ignore[method-assign]
        self.is_moe = config.router is not None
        self.ranks, self.shared = ranks, Shared(model, ranks)

    def step(self, step: int, inputs_BS: Tensor, targets_BS: Tensor) -> StepResult:
        """FloatingPointError names what is not finite; the weights have not changed then."""
        cfg, balance = self.settings, self.settings.balance
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, cfg)
        chunks = (tokens_BS.to(self.device).chunk(cfg.accumulate) for tokens_BS in (inputs_BS, targets_BS))
        mine = self.ranks.share(len(inputs_BS) // cfg.accumulate)
        micro = [(x_BS[mine], y_BS[mine]) for x_BS, y_BS in zip(*chunks, strict=True)]
        share = len(micro[0][0]) * cfg.accumulate / len(inputs_BS)
        load_LE = self._load_ahead(step, micro) if balance.loss == "global" else None
        sums = {"loss": 0.0, "balance_loss": 0.0, "z_loss": 0.0}
        seen: list[list[Routing]] = []
        for i, (x_BS, y_BS) in enumerate(micro):
            self._seed(step, i)
            loss, routings = self.shared.batch_loss(x_BS, y_BS, cfg.dtype, last=i == cfg.accumulate - 1)
            parts = {"loss": loss}
            if routings and balance.loss != "none":
                parts["balance_loss"] = balance_loss(balance, routings, len(x_BS), load_LE, self.ranks)
                loss = loss + balance.weight * parts["balance_loss"]
            if routings and balance.z_weight:
                parts["z_loss"] = torch.stack([z_loss(r) for r in routings]).mean()
                loss = loss + balance.z_weight * parts["z_loss"]
            # All ranks look at the same values, so that all stop, or none.
            values = self.ranks.sum(torch.stack([*parts.values(), loss]).detach().double() * share).tolist()
            if not all(map(math.isfinite, values)):
                name, value = next(
                    (n, v) for n, v in zip([*parts, "loss"], values, strict=True) if not math.isfinite(v)
                )
                self.optimizer.zero_grad(set_to_none=True)
                where = f"micro-batch {i + 1} of {cfg.accumulate}"
                raise FloatingPointError(f"step {step + 1}: {name} is {value} ({where})")
            (loss * (share / cfg.accumulate)).backward()
            for name, value in zip(parts, values, strict=False):
                sums[name] += value / cfg.accumulate
            seen.append([_detached(r) for r in routings])
        self.shared.complete_gradients()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norm = self.shared.norm(grads)
        if not torch.isfinite(norm):
            name = next((n for n, g in grads.items() if not g.isfinite().all()), "all parameters together")
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"step {step + 1}: the gradient of {name} is not finite")
        nn.utils.clip_grads_with_norm_(self.model.parameters(), cfg.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        step_load_LE = step_load(seen, self.ranks) if self.is_moe else None
        if step_load_LE is not None and balance.bias_rate:
            for moe, load_E in zip(self.model.moe_layers, step_load_LE, strict=True):
                if moe.router.balance_bias is not None:
                    update_bias(moe.router.balance_bias, load_E, balance.bias_rate)
        plain = {
            "loss": sums["loss"],
            "balance_loss": sums["balance_loss"] if self.is_moe and balance.loss != "none" else None,
            "z_loss": sums["z_loss"] if self.is_moe and balance.z_weight else None,
            "lr": lr_at(step, cfg),
            "grad_norm": float(norm),
        }
        dropped_L = self._dropped(seen, share) if self.is_moe else []
        return StepResult(plain, None if step_load_LE is None else step_load_LE.cpu(), dropped_L, self.shared.waited())

    def _dropped(self, seen: list[list[Routing]], share: float) -> list[float]:
        """The share of assignments that each layer dropped, of all ranks'."""
        layers = zip(*seen, strict=True)
        mine_L = [sum(map(dropped, layer)) / len(layer) * share for layer in layers]
        found: list[float] = self.ranks.sum(torch.tensor(mine_L, dtype=torch.float64)).tolist()
        return found

    def _load_ahead(self, step: int, micro: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """The whole step's load before its first backward pass, at the price of a second forward pass: the global
        loss's gradient in the first micro-batch depends on the routing of the last."""
        if len(micro) == 1 or not self.is_moe:
            return None  # the forward pass itself shows it
        seen = []
        with torch.no_grad():
            for i, (x_BS, _) in enumerate(micro):
                self._seed(step, i)
                with autocast(x_BS, self.settings.dtype):
                    seen.append(self.model.hidden_states(x_BS)[1])
        return step_load(seen, self.ranks)

    def _seed(self, step: int, micro: int) -> None:
        # Each rank's noise is its own.
        seed(((self.settings.seed * 1_000_003 + step) * 4099 + micro) + self.ranks.rank * (1 << 40))


def _detached(routing: Routing) -> Routing:
    """What statistics need, without the graph that would keep activations alive."""
    return replace(
        routing,
        logits_TE=routing.logits_TE.detach(),
        scores_TE=routing.scores_TE.detach(),
        weights_TK=routing.weights_TK.detach(),
    )
