"""Speculation: drafts of the tokens that may come next, and how many of them pay.

    PromptLookup   one sequence's drafts: where its last tokens stood before, what followed them follows again
    DraftCosts     how long a step with drafts takes, beside one without
    share_out      how many tokens of each sequence's draft are to pass
    draft_limit    tokens of a step with drafts at most, and whether there are to be any

A step that passes a sequence's last token and a draft of k more gives logits after each of the k + 1. Tokens are drawn
from them in order, as ever: while the drawn token is the draft's, the logits after it hold, and the first other one
ends it. So a draft changes how many tokens a step makes, and never which.

In a mixture of experts a draft is not free: k + 1 tokens choose more experts than one, and each that is chosen is read.
What a step takes is therefore measured, what is likely to come is counted, and a token passes only where more tokens a
second come of it. Drafts are counted whether they pass or not: where a text does not repeat itself, none has to pass to
show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from handful.config import ModelConfig
from handful.cost import parameters
from handful.count import counted
from handful.experts import Experts
from handful.experts.quantized import QuantizedExperts
from handful.kernels import few_tokens
from handful.model import Decoder

__all__ = ["DraftCosts", "PromptLookup", "draft_limit", "share_out"]

# Tokens that must stand before a draft as they stand at the end, and how many are compared: a longer match is a better
# sign of what comes.
SHORTEST, LONGEST = 2, 8
CANDIDATES = 64  # matches that are compared, the latest: of a common pair of tokens there may be thousands
MOST = 8  # tokens of a step with drafts, where our kernels set no limit
UNKNOWN = 0.5  # how often a draft's token comes, where none has been seen yet
LATEST = 1 / 12  # the weight of the latest of what is counted and measured, once there is as much of it
WORK = 1 / 16  # of a step without drafts: what one token more takes beside the weights that it reads
GAIN = 1.1  # by how much more tokens a second drafts are to be expected, to pass at all
REFRESH = 64  # steps with drafts after which one without is measured again
AGAIN = 32, 1024  # steps without drafts after which drafts that did not pay are tried again: at first, and at most


@dataclass
class _Mean:
    """Of numbers, the latest of which weigh the most."""

    value: float = 0.0
    count: int = 0

    def add(self, number: float) -> None:
        self.count += 1
        self.value += max(LATEST, 1 / self.count) * (number - self.value)


class PromptLookup:
    """The drafts of one sequence (prompt lookup decoding: n-grams of its own prompt and answer).

    rates   how often the token came that was drafted after so many tokens alike, by their number.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, int], list[int]] = {}  # places of tokens that followed two tokens
        self._prompt = len(prompt)
        self._draft: list[int] = []
        self._alike = 0  # how many tokens before the draft stand at the end too
        self.rates = [_Mean(UNKNOWN, 1) for _ in range(LONGEST + 1)]
        self._hold(prompt)

    def draft(self, made: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that may follow those made so far; none where the last ones are new together."""
        new = made[len(self._tokens) - self._prompt :]
        for place, (drafted, token) in enumerate(zip(self._draft, new, strict=False)):
            self.rates[self._place(place)].add(drafted == token)
            if drafted != token:
                break
        self._hold(new)
        self._draft, self._alike = self._find(most) if most > 0 else ([], 0)
        return self._draft

    def chances(self) -> list[float]:
        """How likely each token of the last draft is to come, and all before it."""
        found, chance = [], 1.0
        for place in range(len(self._draft)):
            chance *= self.rates[self._place(place)].value
            found.append(chance)
        return found

    def _place(self, place: int) -> int:
        return min(self._alike + place, LONGEST)

    def _hold(self, new: Sequence[int]) -> None:
        tokens = self._tokens
        for token in new:
            if len(tokens) >= SHORTEST:
                self._after.setdefault((tokens[-2], tokens[-1]), []).append(len(tokens))
            tokens.append(token)

    def _find(self, most: int) -> tuple[list[int], int]:
        """What followed the latest of the longest matches, and its length."""
        tokens, best, longest = self._tokens, 0, 0
        if len(tokens) < SHORTEST:
            return [], 0
        for place in reversed(self._after.get((tokens[-2], tokens[-1]), [])[-CANDIDATES:]):
            length = SHORTEST
            while length < min(place, LONGEST) and tokens[place - 1 - length] == tokens[-1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
                if length == LONGEST:
                    break
        if longest == 0:
            return [], 0
        following = tokens[best : best + most]
        # A match at the very end repeats what lies between: the draft goes on with itself.
        return (following * -(-most // len(following)))[:most], longest


class DraftCosts:
    """How long steps take by how many tokens they pass, beside those of one token of each sequence.

    What is not measured is guessed from the weights that so many tokens read: of E experts, n tokens that choose K each
    reach E·(1 - (1 - K/E)ⁿ). A measured step says by how much the guess is off, for as many tokens and those near it.
    Drafts begin short, and are at most twice as long as those that were measured. Where they do not pay they end; what
    was measured is forgotten after a while, and twice as late every time that it was right.

    most   tokens of a step with drafts.
    """

    def __init__(self, config: ModelConfig, most: int) -> None:
        self.most = most
        self._reads = _reads(config, most)
        self._measured: dict[int, _Measured] = {}  # by how many sequences there are

    def longest(self, sequences: int) -> int:
        """Tokens of all drafts that a step of so many sequences may have now."""
        own = self._measured.get(sequences)
        if own is None or own.since >= REFRESH:
            return 0
        return min(self.most - sequences, 2 * (max(own.off) - sequences) if own.off else 1)

    def steps(self, sequences: int, tokens: int) -> float:
        """How many steps without drafts one of so many tokens lasts."""
        own, guess = self._measured.get(sequences), self._guess(sequences, tokens)
        if own is None or not own.off:
            return 1 + guess
        return 1 + guess * own.off[min(own.off, key=lambda other: abs(other - tokens))].value

    def _guess(self, sequences: int, tokens: int) -> float:
        return self._reads[tokens] / self._reads[sequences] - 1

    def measured(self, sequences: int, tokens: int, made: int, seconds: float) -> None:
        """A step of decoding passed so many tokens and made so many of them, and took so long. Another process may have
        been in the way: none counts as more than twice what was expected."""
        own = self._measured.setdefault(sequences, _Measured())
        if tokens == sequences:
            own.plain.add(min(seconds, 2 * own.plain.value) if own.plain.count else seconds)
            own.since, own.waited = 0, own.waited + 1
            if own.off and own.waited >= own.again:
                own.off.clear()
                own.waited, own.again = 0, min(2 * own.again, AGAIN[1])
            return
        steps = seconds / own.plain.value
        took = min(steps, 2 * self.steps(sequences, tokens))
        own.off.setdefault(tokens, _Mean()).add(max(0.0, took - 1) / self._guess(sequences, tokens))
        own.since += 1
        if made > sequences * steps:
            own.waited, own.again = 0, AGAIN[0]


@dataclass
class _Measured:
    """Of steps of so many sequences.

    plain           seconds of one without drafts.
    off             by tokens: how much longer one with drafts takes, of what is guessed that it takes longer.
    since           steps with drafts since the last without.
    waited, again   steps without drafts since the last that paid, and after how many they are tried again.
    """

    plain: _Mean = field(default_factory=_Mean)
    off: dict[int, _Mean] = field(default_factory=dict)
    since: int = 0
    waited: int = 0
    again: int = AGAIN[0]


def share_out(costs: DraftCosts, chances: Sequence[Sequence[float]]) -> list[int]:
    """How many tokens of each sequence's draft are to pass, so that the most tokens a second are expected: none where
    none pays.

    chances   of each draft, as `PromptLookup.chances` gives them.
    """
    sequences, counts = len(chances), [0] * len(chances)
    likely = sorted(((chance, at) for at, own in enumerate(chances) for chance in own), reverse=True)
    made, best, kept = float(sequences), GAIN * sequences, 0
    for count, (chance, _) in enumerate(likely[: costs.longest(sequences)], 1):
        made += chance
        rate = made / costs.steps(sequences, sequences + count)
        if rate > best:
            best, kept = rate, count
    for _, at in likely[:kept]:
        counts[at] += 1
    return counts


def _reads(config: ModelConfig, most: int) -> list[float]:
    """How long a step of 0, 1, … up to so many tokens is guessed to take, of one token's."""
    active = parameters(counted(config), active=True)
    routed = active.parts.routed_experts
    others = active.excl_input_embedding - routed
    found = []
    for tokens in range(most + 1):
        reached = 1.0  # of the experts of one token
        if config.router is not None:
            E, K = config.router.experts, config.router.top_k
            reached = E / K * (1 - (1 - K / E) ** tokens)
        found.append((others + routed * reached) / (others + routed) + WORK * (tokens - 1))
    return found


def draft_limit(model: Decoder, *, exact: bool) -> int | None:
    """Tokens of a step with drafts at most, of all sequences; None: there are to be none.

    exact   only where each token has the bits that it has alone, and no expert is fetched for a draft.
    """
    config, router = model.config, model.config.router
    few = few_tokens(model.embed.weight.dtype, *(() if router is None else (router.experts, router.top_k)))
    if not exact:
        return few or MOST
    if config.mla is not None or not model.embed.weight.is_cpu:
        return None
    for moe in model.moe_layers:
        native = isinstance(moe.experts, Experts | QuantizedExperts) and moe.experts.backend in ("auto", "native")
        if not native or type(moe.shared_gate) is nn.Linear:  # torch multiplies such a gate
            return None
    return few
