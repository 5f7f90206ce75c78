"""What may be said of two held-out losses: a lead, none, or that the run was too short to judge.

One rule, for the sentence in the terminal and the page alike:

    chance      a lead counts when it is larger than the spread over seeds of both teams. One seed has no spread: there
                it must be larger than what seeds of the default comparison differ by, 0.03 nats a token.
    too short   each expert was trained on less than 8 tokens for each of its weights, or the curves still crossed in
                the last third of the run. An expert sees only the tokens that are sent to it: in the default
                comparison the mixture is level with its twin at 4, and ahead at 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["CHANCE", "ENOUGH", "Verdict", "judge", "tokens_per_expert_weight"]

CHANCE = 0.03  # nats a token, highest minus lowest of three seeds: docs/benchmarks.md
ENOUGH = 8.0  # tokens for each weight of an expert
LAST = 2 / 3  # of the tokens: from there on, curves should not cross
LEVEL = 0.001  # nats a token: less is no side to be on

Kind = Literal["lower", "higher", "level", "too short"]


@dataclass(frozen=True)
class Verdict:
    """What may be said of a team beside another.

    kind   "lower" or "higher": its loss is, beyond chance; "level": no difference is seen; "too short" to judge.
    lead   nats a token by which its loss is the lower one.
    why    the reasons, in words, for "too short".
    """

    kind: Kind
    lead: float
    why: tuple[str, ...] = ()


def judge(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    tokens_per_weight: float,
    curves: Sequence[tuple[float, float, float]] = (),
) -> Verdict:
    """A team's final held-out losses, one a seed, beside another's.

    tokens_per_weight   of the mixtures among the two, the fewest: tokens that an expert was trained on for each of its
                        weights. math.inf where neither is a mixture.
    curves              (tokens, our loss, their loss) at the evaluations of both, means over the seeds.
    """
    lead = sum(theirs) / len(theirs) - sum(ours) / len(ours)
    chance = max(max(losses) - min(losses) for losses in (ours, theirs)) if len(ours) > 1 else CHANCE
    why = []
    if tokens_per_weight < ENOUGH:
        why.append(
            f"an expert was trained on {tokens_per_weight:.1f} tokens for each of its weights; about {ENOUGH:.0f} are "
            "needed before its lead can show"
        )
    end = curves[-1][0] if curves else 0.0
    late = [theirs_at - ours_at for tokens, ours_at, theirs_at in curves if tokens >= LAST * end]
    if any(side > LEVEL for side in late) and any(side < -LEVEL for side in late):
        why.append("the curves still crossed in the last third of the run")
    if why:
        return Verdict("too short", lead, tuple(why))
    return Verdict("level" if abs(lead) <= chance else "lower" if lead > 0 else "higher", lead)


def tokens_per_expert_weight(tokens: int, top_k: int, experts: int, expert_weights: int) -> float:
    """Tokens that a mean expert was trained on, for each of its weights: tokens · K / E / weights."""
    return tokens * top_k / experts / expert_weights
