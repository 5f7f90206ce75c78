"""What an engine is asked and what it answers.

Request   what to go on from, and how
Job       a request on its way through the engine
Delta     what a step made for one job
StopText  its text as it comes, up to the first of some stop texts
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from handful.observe import Recording
from handful.positions import KVCache
from handful.routing import Routing
from handful.routing_options import Missing, RoutingOptions, RoutingPlan
from handful.sampling import Logprobs, Sampler, Sampling
from handful.speculation import PromptLookup
from handful.text import Stream

__all__ = ["Delta", "Finish", "Job", "Request", "StopText"]

Finish = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to go on from, and how.

    prompt           token ids.
    max_tokens       that are made at most; the model's context may be reached before. 0, where the prompt is scored:
                     nothing is made.
    sampling         how they are drawn.
    stop             texts at which it ends; they are not part of the answer. For models with a tokenizer. One that is a
                     special token's text stands for that token.
    stop_tokens      tokens at which it ends, not part of the answer either.
    fresh            the answer is a text of its own (a message), and not the prompt's text gone on with: a space that a
                     tokenizer puts before every text is none of it.
    logprobs         of how many of the most probable tokens, beside the drawn one's; None: no log-probabilities.
    prompt_logprobs  likewise of the prompt's own tokens, which `Job.prompt_logprobs` holds.
    routing          what it asks of the routers, and to be told of them; None: nothing.
    """

    prompt: Sequence[int]
    max_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    fresh: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    routing: RoutingOptions | None = None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a step made for one request: one token of it, or that it ended.

    token       None where the request ended without one.
    text        that is certain now: a character that several tokens spell comes whole, and what may be the beginning of
                a stop text is held back.
    logprobs    of the token, or of the stop token.
    finish      why it ended: "stop" (a stop token or text), "length" (max_tokens or the context), "cancelled" or
                "failed"; None while it goes on.
    stop_token  that was drawn and ended it.
    error       why it failed.
    routed      where its routing is recorded: that of the tokens that passed since the delta before, in every MoE
                layer; first the prompt's, then of one token each. The last token that is made passes no more.
    routings    likewise the whole routings of the last of these tokens, one row each.
    missing     the experts that it was computed without since the delta before, as they were not to be had; None: with
                all.
    """

    job: Job
    token: int | None
    text: str = ""
    logprobs: Logprobs | None = None
    finish: Finish | None = None
    stop_token: int | None = None
    error: Exception | None = None
    routed: Recording | None = None
    routings: Sequence[Routing] = ()
    missing: Missing | None = None


class Job:
    """A request on its way through the engine.

    made                 the tokens so far.
    finish               as in its last delta.
    prompt_logprobs      of each token of the prompt, where they were asked for: whole when the first delta comes. None
                         for the first, which follows nothing.
    submitted, admitted  when, in seconds of `time.monotonic`; admitted is None while it waits.
    cached               tokens of the prompt that were not computed, as they were in memory.
    """

    def __init__(self, number: int, request: Request, room: int) -> None:
        self.number = number
        self.request = request
        self.made: list[int] = []
        self.finish: Finish | None = None
        self.prompt_logprobs: list[Logprobs | None] = []
        self.submitted = time.monotonic()
        self.admitted: float | None = None
        self.cached = 0
        self._room = room  # tokens that its cache is to hold
        self._begun = False  # its prompt is being read
        self._read = 0  # tokens of the prompt that are read
        self._shareable = 0  # tokens from the first on that another prompt may begin with
        self._cache: KVCache | None = None
        self._sampler: Sampler | None = None
        self._stops: frozenset[int] = frozenset()
        self._text: StopText | None = None
        self._plan: RoutingPlan | None = None
        self._lookup: PromptLookup | None = None
        self._routed: list[Recording] = []  # of all tokens that passed, where it is recorded
        self._routings: list[Routing] = []  # of the last of them
        self._missing: Missing | None = None  # what it was computed without, and was not told of
        self._told = 0  # of `_routed`, how many were told in deltas

    def __repr__(self) -> str:
        return f"Job({self.number}, {len(self.request.prompt)} + {len(self.made)} tokens, {self.finish or 'going on'})"


class StopText:
    """Text as it comes, up to the first of some stop texts."""

    def __init__(self, stream: Stream, stop: Sequence[str]) -> None:
        self._stream = stream
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is certain with this token, and whether a stop text has come."""
        return self._certain(self._stream.push(token), last=False)

    def finish(self) -> tuple[str, bool]:
        """What is held back when no token comes any more."""
        return self._certain(self._stream.finish(), last=True)

    def _certain(self, text: str, last: bool) -> tuple[str, bool]:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
