"""How the next token is drawn from a position's logits.

Legend: V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handful import kernels
from handful.errors import CheckpointError, ConfigError
from handful.kernels import with_kernel

__all__ = ["Logprobs", "Sampler", "Sampling", "sample"]

# Below the one, the most probable token has it all; above the other, all are alike. Quotients by them are float32's.
COLDEST, HOTTEST = 1e-30, 1e30
MILDEST, HARSHEST = 0.01, 100.0  # beyond them a penalty says nothing any more, and logits leave float32's range
CANDIDATES = 1024  # most probable tokens that are sorted first: they are nearly always all that top_p keeps


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The settings work in this order.

    repetition_penalty  above 1: logits of tokens that the prompt or the answer has are divided by it, or multiplied
                        where they are negative (arXiv:1909.05858); from 0.01 to 100.
    temperature   0 takes the most probable token; 1 draws from the model's own probabilities.
    top_k         draw only among the most probable k tokens; 0: among all.
    top_p         draw only among the most probable tokens that together have this probability (nucleus sampling,
                  arXiv:1904.09751).
    min_p         draw only among tokens at least that share as probable as the first (arXiv:2407.01082).
    seed          of the draws; None: a different one each time.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature = {self.temperature}: at least 0")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(f"seed = {self.seed}: at most 64 bits")
        if self.top_k < 0:
            raise ConfigError(f"top_k = {self.top_k}: at least 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: above 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p = {self.min_p}: from 0 to 1")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty = {self.repetition_penalty}: above 0")
        if not MILDEST <= self.repetition_penalty <= HARSHEST:
            raise ConfigError(f"repetition_penalty = {self.repetition_penalty}: from {MILDEST} to {HARSHEST:.0f}")


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the model's own probabilities, before any setting of `Sampling`: of the token that was
    drawn, and of the most probable ones, by id, in that order."""

    token: float
    top: Mapping[int, float]


@with_kernel(kernels.largest)
def largest(logits_V: Tensor) -> tuple[int, float]:
    """The place of the largest logit, the first of equals, and it."""
    place = int(logits_V.argmax())
    return place, float(logits_V[place])


def sample(logits_V: Tensor, sampling: Sampling, random: torch.Generator | None = None) -> int:
    """Draw a token from one position's logits. The penalty of repeated tokens is `Sampler`'s: it knows them.

    CheckpointError for logits that nothing can be drawn from; without a draw (temperature 0) it is their argmax.
    """
    if sampling.temperature < COLDEST:
        return largest(logits_V)[0]
    _, best = _best(logits_V)
    # From the best on, so that no quotient is too large.
    logits_V = (logits_V.float() - best) / min(sampling.temperature, HOTTEST)
    share_V = logits_V.softmax(-1)
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return int(torch.multinomial(share_V, 1, generator=random))
    # The most probable first: all of them only where some that are not among the candidates may be kept.
    count = len(share_V) if sampling.top_k == 0 else min(sampling.top_k, len(share_V))
    kept, ids = share_V.topk(min(count, CANDIDATES))
    if len(kept) < count and not (
        float(kept.sum()) >= sampling.top_p or float(kept[-1]) < sampling.min_p * float(kept[0])
    ):
        kept, ids = share_V.topk(count)
    if sampling.top_k:
        kept = kept / kept.sum()
    if sampling.top_p < 1:
        # A token stays if those before it have not reached top_p yet: the most probable always does.
        beyond = kept.cumsum(0) - kept >= sampling.top_p
        beyond[0] = False
        kept = kept.masked_fill(beyond, 0)
    if sampling.min_p:
        kept = kept.masked_fill(kept < sampling.min_p * kept[0], 0)
    return int(ids[torch.multinomial(kept, 1, generator=random)])


def _best(logits_V: Tensor) -> tuple[int, float]:
    """The place of the largest logit, and it. CheckpointError if one is not a number or infinite, or all are -inf."""
    place, best = largest(logits_V)  # a NaN, if any is
    if not math.isfinite(best):
        reason = f"its weights are damaged, or too large for {logits_V.dtype}"
        raise CheckpointError(f"the largest of the model's logits is {best}: {reason}")
    return place, best


class Sampler:
    """Draws one sequence's tokens: its settings, its random numbers, and the tokens that it has.

    spared   tokens that no penalty reaches: those that stand before every text, and those that end one.
    """

    def __init__(
        self, sampling: Sampling, prompt: Iterable[int], device: torch.device, spared: Collection[int] = ()
    ) -> None:
        self._sampling = sampling
        self._random = None
        if sampling.seed is not None:
            self._random = torch.Generator(device).manual_seed(sampling.seed)
        self._spared = frozenset(spared)
        self._seen = None
        if sampling.repetition_penalty != 1:
            self._seen = set(prompt) - self._spared

    def __call__(self, logits_V: Tensor) -> int:
        """The next token. The logits stay as they are. CheckpointError for logits that choose nothing: one that is not
        a number or infinite, or none above -inf."""
        if self._seen is None and self._sampling.temperature >= COLDEST:
            return sample(logits_V, self._sampling, self._random)  # which looks at them itself
        place, _ = _best(logits_V)
        if self._seen is None:
            return place
        ids = torch.tensor(sorted(self._seen), dtype=torch.long, device=logits_V.device)
        held, penalty = logits_V[ids].float(), self._sampling.repetition_penalty
        logits_V = logits_V.float().index_put((ids,), torch.where(held > 0, held / penalty, held * penalty))
        token = sample(logits_V, self._sampling, self._random)
        if token not in self._spared:
            self._seen.add(token)
        return token


def logprobs(logits_TV: Tensor, tokens: Sequence[int], count: int) -> list[Logprobs]:
    """Of a token for each row of logits, and of the row's `count` most probable ones.

    Both are taken from the same rounded values, so that the argmax's equals the largest. It comes first, and of
    other equals the smaller id.
    """
    log_TV = logits_TV.float().log_softmax(-1)
    own_T = log_TV.gather(1, torch.tensor(list(tokens), device=log_TV.device)[:, None])[:, 0].tolist()
    if count == 0:
        return [Logprobs(own, {}) for own in own_T]
    best = log_TV.topk(min(count, log_TV.shape[1]))
    firsts = logits_TV.argmax(-1).tolist()
    found = []
    for own, first, ids, values in zip(own_T, firsts, best.indices.tolist(), best.values.tolist(), strict=True):
        if first not in ids:  # of more equals than were asked for
            ids[0] = first
        rows = sorted(zip(ids, values, strict=True), key=lambda row: (-row[1], row[0] != first, row[0]))
        found.append(Logprobs(own, dict(rows)))
    return found
