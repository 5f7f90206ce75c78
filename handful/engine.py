"""The engine: requests in, tokens out. Requests join and leave between steps, and share every matrix product.

    submit ─► waiting ─► [ read the prompt, in chunks ─► decode, one token a step ] ─► finished, or cancelled

A step takes one token of every sequence that decodes and a chunk of those that are still read, lays them one after the
other, and passes them through the model together: only attention looks at each sequence for itself. So a long prompt
does not stop the others' streams, and experts are read once for all tokens that chose them.

Legend: S tokens · T tokens of all sequences · D model width · V vocabulary
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from handful.errors import ConfigError, HandfulError
from handful.model import Decoder
from handful.positions import KVCache, KVCaches
from handful.routing import Routing
from handful.sampling import Logprobs, Sampler, Sampling, logprobs
from handful.text import Stream

__all__ = ["CHUNK", "Delta", "Engine", "EngineStats", "Finish", "Job", "Request", "StopText", "check_prompt"]

CHUNK = 512  # tokens of prompts that a step reads at most, where nothing is said
SCORED = 1 << 22  # logits of a prompt that are held at a time while its tokens are scored

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
    """

    prompt: Sequence[int]
    max_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    fresh: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a step made for one request.

    token       None where the request ended without one.
    text        that is certain now: a character that several tokens spell comes whole, and what may be the beginning of
                a stop text is held back.
    logprobs    of the token, or of the stop token.
    finish      why it ended: "stop" (a stop token or text), "length" (max_tokens or the context), "cancelled" or
                "failed"; None while it goes on.
    stop_token  that was drawn and ended it.
    error       why it failed.
    """

    job: Job
    token: int | None
    text: str = ""
    logprobs: Logprobs | None = None
    finish: Finish | None = None
    stop_token: int | None = None
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine holds now, and what it did since it was made.

    cached_tokens  room that the caches of running requests take, of `cache_tokens`.
    prompt_tokens  that were read; made_tokens: that were made.
    """

    running: int
    waiting: int
    cached_tokens: int
    cache_tokens: int
    prompt_tokens: int
    made_tokens: int


class Job:
    """A request on its way through the engine.

    made                 the tokens so far.
    finish               as in its last delta.
    prompt_logprobs      of each token of the prompt, where they were asked for: whole when the first delta comes. None
                         for the first, which follows nothing.
    submitted, admitted  when, in seconds of `time.monotonic`; admitted is None while it waits.
    """

    def __init__(self, number: int, request: Request, room: int) -> None:
        self.number = number
        self.request = request
        self.made: list[int] = []
        self.finish: Finish | None = None
        self.prompt_logprobs: list[Logprobs | None] = []
        self.submitted = time.monotonic()
        self.admitted: float | None = None
        self._room = room  # tokens that its cache is to hold
        self._read = 0  # tokens of the prompt that are read
        self._cache: KVCache | None = None
        self._sampler: Sampler | None = None
        self._stops: frozenset[int] = frozenset()
        self._text: StopText | None = None

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


class Engine:
    """Runs requests on a decoder.

    max_sequences   that are in the works at once; more wait their turn, first come, first served.
    cache_tokens    that all their caches may hold together: a request is let in when its prompt and max_tokens have
                    room. None: 8 times the model's context.
    chunk           tokens of prompts that a step reads at most.
    on_routing      told of every forward pass: the jobs in it, how many tokens of each, and the routings.

    Where tokens compete for an expert's capacity, or experts choose, a sequence's result would depend on its
    neighbours: such models run one sequence at a time, prompts whole.

    An engine belongs to one thread. Others may call `check` and `stats`.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_sequences: int = 16,
        cache_tokens: int | None = None,
        chunk: int = CHUNK,
        on_routing: Callable[[Sequence[Job], Sequence[int], list[Routing]], None] | None = None,
    ) -> None:
        for name, value in (("max_sequences", max_sequences), ("cache_tokens", cache_tokens), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: at least 1")
        self.model = model.eval()
        self.max_sequences = max_sequences
        self.cache_tokens = 8 * model.config.context if cache_tokens is None else cache_tokens
        self.chunk = chunk
        self.on_routing = on_routing
        router = model.config.router
        self._apart = router is not None and not router.independent
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._ended: list[Delta] = []
        self._submitted = 0
        self._prompt_tokens = 0
        self._made_tokens = 0

    # -----------------------------------------------------------------------------------------------------------------
    # Requests.

    def submit(self, request: Request) -> Job:
        """Take a request. ConfigError for one that cannot be run."""
        self.check(request)
        self._submitted += 1
        job = Job(self._submitted, request, self._room(request))
        self._waiting.append(job)
        return job

    def check(self, request: Request) -> None:
        """ConfigError for a request that cannot be run."""
        config = self.model.config
        scores = request.prompt_logprobs is not None
        check_prompt(request.prompt, request.max_tokens, config.vocab, least=0 if scores else 1)
        most = config.context - min(1, request.max_tokens)
        if len(request.prompt) > most:
            limit = f"the model's context is {config.context}" + (
                f", so at most {most}" if most < config.context else ""
            )
            raise ConfigError(f"prompt: {len(request.prompt)} tokens; {limit}")
        if isinstance(request.stop, str) or not all(request.stop):
            raise ConfigError(f"stop = {request.stop!r}: a list of texts that are not empty")
        if request.stop and self.model.tokenizer is None:
            raise ConfigError("stop: the model has no tokenizer, which the text of its tokens is read by")
        for name, count in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
            if count is not None and count < 0:
                raise ConfigError(f"{name} = {count}: at least 0, or none")
        room = self._room(request)
        if room > self.cache_tokens:
            raise ConfigError(f"prompt and max_tokens: {room} tokens; all caches together hold {self.cache_tokens}")

    def _room(self, request: Request) -> int:
        """Tokens that its cache is to hold."""
        return min(self.model.config.context, len(request.prompt) + request.max_tokens)

    def cancel(self, job: Job) -> None:
        """End a request, wherever it is. Its last delta comes with the next step. No more happens to one that ended."""
        if job.finish is None:
            self._ended.append(self._end(job, "cancelled"))

    @property
    def busy(self) -> bool:
        """There is something for a step to do."""
        return bool(self._waiting or self._running or self._ended)

    @property
    def cached_tokens(self) -> int:
        """Room that the caches of running requests take now, in tokens."""
        return sum(job._room for job in self._running)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            cached_tokens=self.cached_tokens,
            cache_tokens=self.cache_tokens,
            prompt_tokens=self._prompt_tokens,
            made_tokens=self._made_tokens,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Steps.

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Pass a batch through the model, and return what it made: at most one token of each request.

        A batch that fails is tried again, one request at a time: those that fail alone end, the others go on.
        """
        deltas, self._ended = self._ended, []
        self._admit()
        for batch in self._batches():
            deltas += self._forward(batch)
        return deltas

    def run(self, requests: Iterable[Request]) -> list[Job]:
        """Run requests to their ends. What one fails by is raised, after it."""
        jobs = [self.submit(request) for request in requests]
        while self.busy:
            for delta in self.step():
                if delta.error is not None:
                    raise delta.error
        return jobs

    def _admit(self) -> None:
        weight = self.model.embed.weight
        while self._waiting and len(self._running) < self.max_sequences:
            job = self._waiting[0]
            if self.cached_tokens + job._room > self.cache_tokens:
                return
            self._waiting.popleft()
            job.admitted = time.monotonic()
            job._cache = KVCache(self.model.config, 1, job._room, dtype=weight.dtype, device=weight.device)
            request, tokenizer = job.request, self.model.tokenizer
            stops, prefix = set(request.stop_tokens), tuple[int, ...]()
            if tokenizer is not None:
                stops |= {token for text in request.stop if (token := tokenizer.special_id(text)) is not None}
                prefix = tokenizer.prefix
                job._text = StopText(tokenizer.stream(() if request.fresh else request.prompt), request.stop)
            job._stops = frozenset(stops)
            job._sampler = Sampler(request.sampling, request.prompt, weight.device, spared={*stops, *prefix})
            self._running.append(job)

    def _batches(self) -> list[list[tuple[Job, Sequence[int]]]]:
        """The jobs of this step and the new tokens of each: as one batch, or one of each job."""
        left, batch = self.chunk, []
        for job in self._running:
            tokens: Sequence[int] = job.made[-1:]
            if not tokens:
                take = len(job.request.prompt) if self._apart else left
                tokens = job.request.prompt[job._read : job._read + take]
                left -= min(left, len(tokens))
            if tokens:
                batch.append((job, tokens))
        return [[one] for one in batch] if self._apart else [batch] if batch else []

    def _forward(self, batch: list[tuple[Job, Sequence[int]]]) -> list[Delta]:
        device = self.model.embed.weight.device
        jobs, new = [job for job, _ in batch], [len(tokens) for _, tokens in batch]
        caches = [job._cache for job in jobs if job._cache is not None]
        tokens_1T = torch.tensor([[token for _, tokens in batch for token in tokens]], device=device)
        cache = caches[0] if len(caches) == 1 else KVCaches(caches, new)
        try:
            x_1TD, routings = self.model.hidden_states(tokens_1T, cache)
        except Exception as error:  # such as a disk that is gone: no cache has advanced
            if len(batch) == 1:
                return [self._end(jobs[0], "failed", error=error)]
            return [delta for one in batch for delta in self._forward([one])]
        if self.on_routing is not None:
            self.on_routing(jobs, new, routings)
        ready, last, end, deltas = [], [], 0, []
        for job, count in zip(jobs, new, strict=True):
            end += count
            if not job.made:
                if job.request.prompt_logprobs is not None:
                    self._score(job, x_1TD[0, end - count : end])
                job._read += count
                self._prompt_tokens += count
            if job._read < len(job.request.prompt):
                continue
            if job.request.max_tokens == 0:
                deltas.append(self._end(job, "length"))
            else:
                ready.append(job)
                last.append(end - 1)
        if not ready:
            return deltas
        logits_TV = self.model.logits(x_1TD[0] if len(last) == x_1TD.shape[1] else x_1TD[0, last])
        return deltas + [self._token(job, logits_V) for job, logits_V in zip(ready, logits_TV, strict=True)]

    def _score(self, job: Job, x_SD: Tensor) -> None:
        """Log-probabilities of the tokens of a prompt that follow those that are being read."""
        prompt, count = job.request.prompt, job.request.prompt_logprobs
        assert count is not None
        if job._read == 0:
            job.prompt_logprobs.append(None)
        following = prompt[job._read + 1 : job._read + 1 + len(x_SD)]
        step = max(1, SCORED // self.model.config.vocab)
        for at in range(0, len(following), step):
            tokens = following[at : at + step]
            job.prompt_logprobs += logprobs(self.model.logits(x_SD[at : at + len(tokens)]), tokens, count)

    def _token(self, job: Job, logits_V: Tensor) -> Delta:
        """Draw a job's next token, and see whether it ends with it."""
        assert job._sampler is not None
        request = job.request
        try:
            token = job._sampler(logits_V)
        except HandfulError as error:
            return self._end(job, "failed", error=error)
        seen = None if request.logprobs is None else logprobs(logits_V[None], [token], request.logprobs)[0]
        if token in job._stops:
            return self._end(job, "stop", logprobs=seen, stop_token=token)
        job.made.append(token)
        self._made_tokens += 1
        text, stopped = ("", False) if job._text is None else job._text.push(token)
        if stopped:
            return self._end(job, "stop", token=token, text=text, logprobs=seen)
        if len(request.prompt) + len(job.made) >= job._room:
            return self._end(job, "length", token=token, text=text, logprobs=seen)
        return Delta(job=job, token=token, text=text, logprobs=seen)

    def _end(
        self,
        job: Job,
        finish: Finish,
        *,
        token: int | None = None,
        text: str = "",
        logprobs: Logprobs | None = None,
        stop_token: int | None = None,
        error: Exception | None = None,
    ) -> Delta:
        """Forget all that was kept for a job. A text that was held back comes now, and may hold a stop text."""
        if job._text is not None and (finish != "stop" or token is None):
            rest, stopped = job._text.finish()
            text += rest
            finish = "stop" if stopped and finish == "length" else finish
        job.finish = finish
        job._cache = job._sampler = job._text = None
        self._running = [other for other in self._running if other is not job]
        if job in self._waiting:
            self._waiting.remove(job)
        return Delta(
            job=job, token=token, text=text, logprobs=logprobs, finish=finish, stop_token=stop_token, error=error
        )


def check_prompt(prompt: Sequence[int], max_tokens: int, vocab: int, least: int = 1) -> None:
    if not prompt:
        raise ConfigError("prompt: at least one token")
    if max_tokens < least:
        raise ConfigError(f"max_tokens = {max_tokens}: at least {least}")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise ConfigError(f"prompt: a token is outside the vocabulary of {vocab}")
