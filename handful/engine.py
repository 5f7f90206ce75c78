"""The engine: requests in, tokens out. Requests join and leave between steps, and share every matrix product.

    submit ─► waiting ─► [ read the prompt, in chunks ─► decode, one token a step ] ─► finished, or cancelled

A step takes one token of every sequence that decodes and a chunk of those that are still read, lays them one after the
other, and passes them through the model together: only attention looks at each sequence for itself. So a long prompt
does not stop the others' streams, and experts are read once for all tokens that chose them. While no prompt is read, a
sequence's token may be followed by a draft of the next ones (`speculation`): a step makes several tokens of it then.

Legend: S tokens · T tokens of all sequences · D model width · V vocabulary
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handful.errors import ConfigError, HandfulError, RankLostError
from handful.kernels import steady_tokens
from handful.model import Decoder
from handful.observe import Recorder, Recording
from handful.positions import KVCache, KVCaches, cache_dtype
from handful.prefix_cache import WORTH, Prefix, PrefixCache, common
from handful.request import Delta, Finish, Job, Request, StopText
from handful.routing import Routing
from handful.routing_options import Missing, told
from handful.sampling import Logprobs, Sampler, logprobs
from handful.speculation import DraftCosts, PromptLookup, draft_limit, share_out

__all__ = ["CHUNK", "Delta", "Engine", "EngineStats", "Finish", "Job", "Request", "StopText", "check_prompt"]

CHUNK = 512  # tokens of prompts that a step reads at most, where nothing is said
SCORED = 1 << 22  # logits of a prompt that are held at a time while its tokens are scored

Passing = tuple[Job, Sequence[int]]  # a job and its tokens in a pass


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine holds now, and what it did since it was made.

    cached_tokens  room that the caches of running requests take, of `cache_tokens`.
    kept_tokens    that are kept for prompts that begin with them.
    prompt_tokens  that were read or found; made_tokens: that were made.
    prefix_tokens  of prompts that were looked for among those kept; prefix_hits: that were found.
    draft_tokens   that passed as drafts; accepted_tokens: that were made so.
    """

    running: int
    waiting: int
    cached_tokens: int
    cache_tokens: int
    kept_tokens: int
    prompt_tokens: int
    made_tokens: int
    prefix_tokens: int
    prefix_hits: int
    draft_tokens: int
    accepted_tokens: int


class Engine:
    """Runs requests on a decoder.

    max_sequences   that are in the works at once; more wait their turn, first come, first served.
    cache_tokens    that all their caches may hold together: a request is let in when its prompt and max_tokens have
                    room. Room that is left holds prompts that were read, for those that begin alike. None: 8 times the
                    model's context.
    chunk           tokens of prompts that a step reads at most.
    kv_cache_dtype  "auto": keys and values in the weights' dtype. "int8": in 8 bits (`handful.kv_rows`), about half of
                    bfloat16's bytes. ConfigError for that with latent attention.
    on_routing      told of every forward pass: the jobs in it, how many tokens of each, and the routings. Of a draft
                    what came true.
    before_pass     called before every forward pass, and again where a rank was lost in it, which is then made again:
                    says which experts are not to be had. What is computed without them begins no other prompt.
    speculate       pass drafts of coming tokens, found in what a sequence said before, where that makes more tokens a
                    second. None: if it changes no bit, and all experts are in this process's memory; True: anyhow;
                    False: never.

    A prompt that begins as one in memory does is not computed again as far as they are alike. Nor does that change a
    bit: our kernels give a token the same ones in every pass of at least so many tokens (`kernels.steady_tokens`), so
    that what was read in such passes is kept, and at least so many of a prompt's tokens are read. Without our kernels,
    on a GPU and with latent attention results are the same up to rounding, as they are beside other neighbours.

    A draft changes no token: each is drawn from its own logits, with the random numbers that it would have. Nor does it
    change a bit of them: up to so many tokens in a pass (`kernels.few_tokens`) each has those that it has alone. Where
    they are the same up to rounding (as above, and where torch multiplies a gate of shared experts), so they are here.
    Passes in which a prompt is read, or a request changes what routers do, have no drafts.

    Where tokens compete for an expert's capacity, or experts choose, a sequence's result would depend on its
    neighbours: such models run one sequence at a time, prompts whole, each computed.

    An engine belongs to one thread. Others may call `check` and `stats`.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_sequences: int = 16,
        cache_tokens: int | None = None,
        chunk: int = CHUNK,
        kv_cache_dtype: str = "auto",
        on_routing: Callable[[Sequence[Job], Sequence[int], list[Routing]], None] | None = None,
        before_pass: Callable[[], Missing | None] | None = None,
        speculate: bool | None = None,
    ) -> None:
        for name, value in (("max_sequences", max_sequences), ("cache_tokens", cache_tokens), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: at least 1")
        self.model = model.eval()
        self.max_sequences = max_sequences
        self.cache_tokens = 8 * model.config.context if cache_tokens is None else cache_tokens
        self.chunk = chunk
        self._cache_dtype = cache_dtype(kv_cache_dtype, model.config, model.embed.weight.dtype)
        self.on_routing = on_routing
        self.before_pass = before_pass
        router = model.config.router
        self._apart = router is not None and not router.independent
        if speculate and self._apart:
            raise ConfigError("speculate = True: this router's tokens compete for places; drafts would take some")
        most = None if speculate is False or self._apart else draft_limit(model, exact=speculate is None)
        self._costs = None if most is None else DraftCosts(model.config, most)
        self._steady = _steady_tokens(model)
        self._moe_layers = len(model.moe_layers)
        self._prefixes = None if self._apart else PrefixCache()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._ended: list[Delta] = []
        self._submitted = 0
        self._prompt_tokens = self._made_tokens = 0
        self._prefix_tokens = self._prefix_hits = 0
        self._draft_tokens = self._accepted_tokens = 0

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
        if request.routing is not None:
            self._check_routing(request)
        room = self._room(request)
        if room > self.cache_tokens:
            raise ConfigError(f"prompt and max_tokens: {room} tokens; all caches together hold {self.cache_tokens}")

    def _check_routing(self, request: Request) -> None:
        assert request.routing is not None
        plan, tokens = request.routing.plan(self.model.config), self._room(request)
        if plan.replay is None:
            return
        if plan.replay.tokens > tokens:
            raise ConfigError(f"replay: {plan.replay.tokens} tokens; prompt and max_tokens are {tokens}")
        if self._apart and plan.replay.tokens < len(request.prompt):
            raise ConfigError(
                f"replay: {plan.replay.tokens} tokens of a prompt of {len(request.prompt)}; this router's tokens "
                "compete for places, and are routed together"
            )

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
            kept_tokens=0 if self._prefixes is None else self._prefixes.tokens,
            prompt_tokens=self._prompt_tokens,
            made_tokens=self._made_tokens,
            prefix_tokens=self._prefix_tokens,
            prefix_hits=self._prefix_hits,
            draft_tokens=self._draft_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Steps.

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Pass a batch through the model, and return what it made: of each request a token, or several where a draft of
        them was right, each in a delta of its own.

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
        while self._waiting and len(self._running) < self.max_sequences:
            job = self._waiting[0]
            if self.cached_tokens + job._room > self.cache_tokens:
                return
            self._waiting.popleft()
            job.admitted = time.monotonic()
            device = self.model.embed.weight.device
            job._cache = KVCache(self.model.config, 1, job._room, dtype=self._cache_dtype, device=device)
            request, tokenizer = job.request, self.model.tokenizer
            stops, prefix = set(request.stop_tokens), tuple[int, ...]()
            if tokenizer is not None:
                stops |= {token for text in request.stop if (token := tokenizer.special_id(text)) is not None}
                prefix = tokenizer.prefix
                job._text = StopText(tokenizer.stream(() if request.fresh else request.prompt), request.stop)
            job._stops = frozenset(stops)
            job._sampler = Sampler(request.sampling, request.prompt, device, spared={*stops, *prefix})
            if request.routing is not None and request.routing.changes:
                job._plan = request.routing.plan(self.model.config)
            self._running.append(job)
            if self._prefixes is not None:
                self._prefixes.shrink(self.cache_tokens - self.cached_tokens)

    def _batches(self) -> list[list[Passing]]:
        """The jobs of this step and the new tokens of each: as one batch, or one of each job."""
        left, reads, batch = self.chunk, False, list[Passing]()
        for job in self._running:
            tokens: Sequence[int] = job.made[-1:]
            if not tokens:
                if not (job._begun or self._begin(job)):
                    continue
                unread = len(job.request.prompt) - job._read
                take = unread if self._apart else self._part(unread, left)
                tokens = job.request.prompt[job._read : job._read + take]
                left -= min(left, len(tokens))
                reads = True
            if tokens:
                batch.append((job, tokens))
        if self._apart:
            return [[one] for one in batch]
        if batch and not reads and self._costs is not None and all(job._plan is None for job, _ in batch):
            batch = self._with_drafts(batch, self._costs)
        return [batch] if batch else []

    def _with_drafts(self, batch: list[Passing], costs: DraftCosts) -> list[Passing]:
        """A batch of sequences that decode, and what pays of their drafts."""
        free = costs.most - len(batch)
        if free < 1:
            return batch
        drafts, chances = [], []
        for job, _ in batch:
            if job._lookup is None:
                job._lookup = PromptLookup(job.request.prompt)
            left = job._room - len(job.request.prompt) - len(job.made)  # the last of them passes no more
            drafts.append(job._lookup.draft(job.made, min(free, left - 1)))
            chances.append(job._lookup.chances())
        counts = share_out(costs, chances)
        passing = zip(batch, drafts, counts, strict=True)
        return [(job, [*tokens, *draft[:count]]) for (job, tokens), draft, count in passing]

    def _part(self, unread: int, left: int) -> int:
        """How many tokens of a prompt are read now, of which a step may read `left`: no few are left for the last."""
        steady = self._steady
        if steady is None or self.chunk < 2 * steady or left >= unread or unread - left >= steady:
            return min(unread, left)
        return max(0, unread - steady)

    def _forward(self, batch: list[Passing]) -> list[Delta]:
        began = time.perf_counter()
        device = self.model.embed.weight.device
        jobs, new = [job for job, _ in batch], [len(tokens) for _, tokens in batch]
        decodes = all(job.made for job in jobs)
        drafted = decodes and max(new) > 1
        caches = [job._cache for job in jobs if job._cache is not None]
        ids = np.array([[token for _, tokens in batch for token in tokens]], dtype=np.int64)
        tokens_1T = torch.from_numpy(ids).to(device)  # in half of torch.tensor's time
        alone = len(caches) == 1 and not drafted
        cache = caches[0] if alone else KVCaches(caches, new, singly=drafted)
        parts = [(job._plan, own.length, count) for job, own, count in zip(jobs, caches, new, strict=True)]
        try:
            # Of sequences that decode every token's logits are wanted, of those that are read few.
            pass_on = self.model if decodes else self.model.hidden_states
            missing, made_1T, routings = self._pass(pass_on, tokens_1T, cache, parts)
        except Exception as error:  # such as a disk that is gone: no cache has advanced
            if drafted:  # by a token that may never be made
                return self._forward([(job, tokens[:1]) for job, tokens in batch])
            if len(batch) == 1:
                return [self._end(jobs[0], "failed", error=error)]
            return [delta for one in batch for delta in self._forward([one])]
        if self.on_routing is not None and not drafted:
            self.on_routing(jobs, new, routings)
        steady = self._steady is None or sum(new) >= self._steady
        # Who draws, its draft, after which of the tokens, and whether no expert was missing.
        ready: list[tuple[Job, Sequence[int], range, bool]] = []
        end, deltas = 0, list[Delta]()
        for job, tokens in batch:
            start, end = end, end + len(tokens)
            lacks = None if job._plan is not None and job._plan.whole else missing
            if lacks is not None and (job._missing is None or job._missing.count <= lacks.count):
                job._missing = lacks
            if job.made:
                ready.append((job, tokens[1:], range(start, end), lacks is None))
                continue
            if _records(job.request):
                _record(job, routings, start, end)
            if job.request.prompt_logprobs is not None:
                self._score(job, made_1T[0, start:end])
            if steady and lacks is None and job._shareable == job._read:
                job._shareable += len(tokens)
            job._read += len(tokens)
            self._prompt_tokens += len(tokens)
            if job._read < len(job.request.prompt):
                continue
            if job._cache is not None and job._cache.slides:  # what its prompt's end looks at may go with what comes
                self._keep(job)
            if job.request.max_tokens == 0:
                deltas.append(self._end(job, "length"))
            else:
                ready.append((job, (), range(end - 1, end), lacks is None))
        if not ready:
            return deltas
        if decodes:
            logits_TV = made_1T.flatten(0, 1)
        else:
            places = [place for _, _, own, _ in ready for place in own]
            logits_TV = self.model.logits(made_1T[0, places])
        kept, following = list[range](), iter(logits_TV.unbind())
        for job, draft, own, whole in ready:
            made = self._draw(job, draft, [*islice(following, len(own))], own, routings, whole)
            kept.append(own[: len(made)])
            deltas += made
        if self._costs is not None and decodes:
            self._costs.measured(len(batch), sum(new), sum(map(len, kept)), time.perf_counter() - began)
        if self.on_routing is not None and drafted:
            made_so = [[routing.rows(own.start, own.stop) for own in kept] for routing in routings]
            self.on_routing(jobs, [len(own) for own in kept], [Routing.joined(parts) for parts in made_so])
        return deltas

    def _pass(
        self, pass_on: Callable[..., Any], tokens_1T: Tensor, cache: Any, parts: Sequence[tuple[Any, int, int]]
    ) -> tuple[Missing | None, Tensor, list[Routing]]:
        """What the model, or a part of it, makes of some tokens with the experts that there are. No cache has advanced
        where it fails."""
        while True:
            missing = None if self.before_pass is None else self.before_pass()
            try:
                told_layers = told(parts, self._moe_layers, missing)
                return missing, *pass_on(tokens_1T, cache, routing=told_layers)
            except RankLostError:
                if self.before_pass is None:
                    raise

    # -----------------------------------------------------------------------------------------------------------------
    # Prompts that begin alike.

    def _begin(self, job: Job) -> bool:
        """Take what is in memory of a prompt's beginning. False: more of it is being read now, which is waited for."""
        request = job.request
        most = len(request.prompt) - (self._steady or 1)
        if self._prefixes is not None and job._plan is None and request.prompt_logprobs is None and most > 0:
            prompt, recorded = np.asarray(request.prompt[:most]), _records(request)
            source, length = self._prefixes.find(prompt, recorded)
            coming = 0
            for other in self._running:
                theirs = other.request
                if not other._begun or other._plan is not None or (recorded and not _records(theirs)):
                    continue
                alike = common(np.asarray(theirs.prompt), prompt)
                if other._read < alike and len(theirs.prompt) >= (self._steady or 1):
                    coming = max(coming, alike)
                shared = min(alike, other._shareable)
                if other._cache is not None and shared > length and shared >= other._cache.least:
                    length, source = shared, self._prefix_of(other, shared)
            if coming >= length + WORTH:
                return False
            self._prefix_tokens += len(request.prompt)
            if source is not None:
                assert job._cache is not None
                job._cache.begin(source.held, length)
                job.cached = job._read = job._shareable = length
                if source.routed is not None and recorded:
                    job._routed = [source.routed.part(0, length)]
                self._prompt_tokens += length
                self._prefix_hits += length
        job._begun = True
        return True

    def _prefix_of(self, job: Job, length: int) -> Prefix:
        """The first tokens of a job's, as its own cache holds them."""
        assert job._cache is not None
        tokens = np.asarray([*job.request.prompt, *job.made])[:length]
        routed = Recording.joined(job._routed).part(0, length) if job._routed else None
        return Prefix(tokens, job._cache.beginning(length), routed)

    def _keep(self, job: Job) -> None:
        """Keep what a job's cache holds that other prompts may begin with."""
        if self._prefixes is None or job._cache is None or job._plan is not None:
            return
        if job._shareable >= job._cache.least:
            self._prefixes.keep(self._prefix_of(job, job._shareable))
            self._prefixes.shrink(self.cache_tokens - self.cached_tokens)

    # -----------------------------------------------------------------------------------------------------------------
    # Tokens.

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

    def _draw(
        self, job: Job, draft: Sequence[int], logits: Sequence[Tensor], places: range, routings: Sequence[Routing],
        whole: bool,
    ) -> list[Delta]:  # fmt: skip
        """Draw the token after each of a job's tokens in a pass, as long as it is what its draft passed next."""
        deltas: list[Delta] = []
        for place, logits_V, drafted in zip(places, logits, (*draft, None), strict=True):
            if job.made:
                if _records(job.request):
                    _record(job, routings, place, place + 1)
                if whole and self._steady is None and job._shareable == job._read + len(job.made) - 1:
                    job._shareable += 1
            deltas.append(self._token(job, logits_V))
            if job.finish is not None or job.made[-1] != drafted:
                break
        accepted = len(deltas) - 1
        self._draft_tokens += len(draft)
        self._accepted_tokens += accepted
        if job._cache is not None:
            job._cache.length -= len(draft) - accepted
        return deltas

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
        return Delta(job=job, token=token, text=text, logprobs=seen, **_news(job))

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
        told_now = {"token": token, "text": text, "logprobs": logprobs, "stop_token": stop_token, **_news(job)}
        self._running = [other for other in self._running if other is not job]
        if job in self._waiting:
            self._waiting.remove(job)
        if finish != "failed":
            self._keep(job)
        job._cache = job._sampler = job._text = job._plan = job._lookup = None
        job._routed, job._routings = [], []
        return Delta(job=job, finish=finish, error=error, **told_now)


def _steady_tokens(model: Decoder) -> int | None:
    """`kernels.steady_tokens` for a model; None: results are the same up to rounding alone."""
    config, weight = model.config, model.embed.weight
    if config.mla is not None or not weight.is_cpu:
        return None
    router = config.router
    return steady_tokens(weight.dtype, *(() if router is None else (router.experts, router.top_k)))


def _records(request: Request) -> bool:
    return request.routing is not None and request.routing.record


def _record(job: Job, routings: Sequence[Routing], start: int, end: int) -> None:
    """Record what became of a job's tokens in a pass, its rows start..end."""
    own = [routing.rows(start, end) for routing in routings]
    if job._plan is not None:  # beside others a token has as many places as theirs
        own = [routing.of_top(job._plan.top_k) for routing in own]
    recorder = Recorder()
    recorder.add(own)
    job._routed.append(recorder.recording())
    job._routings = [routing.rows(end - start - 1, end - start) for routing in own]


def _news(job: Job) -> dict[str, Any]:
    """What a delta tells of the routing since the delta before."""
    missing, job._missing = job._missing, None
    if job._told == len(job._routed):
        return {"missing": missing}
    routed = Recording.joined(job._routed[job._told :])
    job._told = len(job._routed)
    return {"missing": missing, "routed": routed, "routings": job._routings}


def check_prompt(prompt: Sequence[int], max_tokens: int, vocab: int, least: int = 1) -> None:
    if not prompt:
        raise ConfigError("prompt: at least one token")
    if max_tokens < least:
        raise ConfigError(f"max_tokens = {max_tokens}: at least {least}")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise ConfigError(f"prompt: a token is outside the vocabulary of {vocab}")
