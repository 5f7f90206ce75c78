"""The engine: requests that join, wait, leave and are cancelled get what each would get alone, within its bounds."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import VOCAB, dense, moe, tiny_data
from hypothesis import given, settings
from hypothesis import strategies as st

import handful.engine
from handful.config import MLAConfig, ModelConfig
from handful.data import Data
from handful.engine import Delta, Engine, Job, Request, StopText
from handful.errors import CheckpointError, ConfigError
from handful.generate import generate, generate_tokens, stream, text_request
from handful.model import Decoder
from handful.moe import NotCausalWarning
from handful.routing import Routing
from handful.sampling import Sampling, logprobs

GREEDY = Sampling(temperature=0)
KINDS: dict[str, ModelConfig] = {
    "moe": moe({"balance_bias": True, "score": "sigmoid"}, shared_width=8),
    "window and sinks": moe(window=5, full_layers=(1,), sinks=True),
    "latent": dense(mla=MLAConfig(q_rank=None, kv_rank=6, nope_dim=4, rope_dim=4, v_dim=5), rope_adjacent=True),
    "capacity": moe({"eval_capacity_factor": 1.0}),
    "expert choice": moe({"choice": "expert"}),
}


def decoder(kind: str) -> Decoder:
    torch.manual_seed(3)
    with warnings.catch_warnings(action="ignore", category=NotCausalWarning):
        return Decoder(KINDS[kind]).double().eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return tiny_data(tmp_path_factory.mktemp("batching"))


def finished(engine: Engine, jobs: Sequence[Job]) -> bool:
    """Nothing is left of requests that have ended."""
    left = [name for job in jobs for name in ("_cache", "_sampler", "_text") if getattr(job, name) is not None]
    return not engine.busy and engine.cached_tokens == 0 and not left


# ---------------------------------------------------------------------------------------------------------------------
# Together as alone.


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(sorted(KINDS)))
def test_every_request_gets_what_it_would_get_alone(seed: int, kind: str) -> None:
    """Requests of all lengths come at any step; float64, so that no rounding decides between two tokens."""
    draw, model = random.Random(seed), decoder(kind)
    engine = Engine(
        model, max_sequences=draw.randint(1, 4), cache_tokens=draw.choice([32, 40, 100]), chunk=draw.choice([1, 3, 50])
    )
    requests = [
        Request(
            prompt=[draw.randrange(VOCAB) for _ in range(draw.choice([1, 2, 7, 20]))],
            max_tokens=draw.choice([1, 4, 14]),  # with the longest prompt, more than the context holds
            sampling=draw.choice([GREEDY, Sampling(temperature=1.0, top_k=20, seed=draw.randrange(9))]),
        )
        for _ in range(draw.randint(1, 6))
    ]
    later, jobs = list(requests), []
    made: dict[int, list[int | None]] = {}
    while later or engine.busy:
        for _ in range(draw.choice([0, 1, 2])):
            if later:
                jobs.append(engine.submit(later.pop(0)))
        for delta in engine.step():
            made.setdefault(delta.job.number, []).append(delta.token)
        assert engine.cached_tokens <= engine.cache_tokens
        assert len(engine._running) <= engine.max_sequences
    for job, request in zip(jobs, requests, strict=True):
        alone = list(generate_tokens(model, request.prompt, request.max_tokens, request.sampling))
        assert job.made == made[job.number] == alone
        assert job.finish == "length"
    assert finished(engine, jobs)


def test_a_long_prompt_does_not_stop_the_others() -> None:
    engine = Engine(decoder("moe"), chunk=4)
    first = engine.submit(Request(prompt=[1, 2], max_tokens=20, sampling=GREEDY))
    engine.step()
    second = engine.submit(Request(prompt=[7] * 18, max_tokens=2, sampling=GREEDY))
    steps = [{delta.job.number for delta in engine.step()} for _ in range(5)]
    assert steps == [{first.number}] * 4 + [{first.number, second.number}]  # 18 tokens in chunks of 4


def test_first_come_first_served_within_the_caches_room() -> None:
    engine = Engine(decoder("moe"), cache_tokens=30, max_sequences=3)
    big = engine.submit(Request(prompt=[1] * 10, max_tokens=10, sampling=GREEDY))  # 20 tokens
    other = engine.submit(Request(prompt=[2] * 10, max_tokens=5, sampling=GREEDY))  # 15: waits for the first
    small = engine.submit(Request(prompt=[3], max_tokens=2, sampling=GREEDY))  # has room, and waits its turn
    order = []
    while engine.busy:
        order += [delta.job.number for delta in engine.step() if delta.finish]
    assert order == [big.number, small.number, other.number]
    with pytest.raises(ConfigError, match=r"^prompt and max_tokens: 31 tokens; all caches together hold 30$"):
        engine.submit(Request(prompt=[1] * 21, max_tokens=10))


# ---------------------------------------------------------------------------------------------------------------------
# Cancelled.


@pytest.mark.parametrize("steps", range(8))
def test_cancelled_at_every_stage(steps: int) -> None:
    """Waiting (0), while its prompt is read (1, 2), decoding, and after its end: the other goes on as alone."""
    model = decoder("moe")
    engine = Engine(model, chunk=4)
    victim = engine.submit(Request(prompt=[5] * 9, max_tokens=3, sampling=GREEDY))
    other = engine.submit(Request(prompt=[1, 2, 3], max_tokens=12, sampling=GREEDY))
    for _ in range(steps):
        engine.step()
    before, ended = list(victim.made), victim.finish
    engine.cancel(victim)
    engine.cancel(victim)  # again changes nothing
    deltas: list[Delta] = []
    while engine.busy:
        deltas += engine.step()
    last = [delta for delta in deltas if delta.job is victim]
    assert victim.made == before
    if ended is None:
        assert [(delta.token, delta.finish) for delta in last] == [(None, "cancelled")]
        assert victim.finish == "cancelled"
    else:
        assert (last, victim.finish) == ([], "length")
    assert other.made == list(generate_tokens(model, [1, 2, 3], 12, GREEDY))
    assert finished(engine, [victim, other])


def test_a_stream_that_is_closed_is_cancelled() -> None:
    engine = Engine(decoder("moe"))
    request = Request(prompt=[1, 2, 3], max_tokens=20, sampling=GREEDY)
    for deltas in (0, 1, 3):
        going = stream(engine, request)
        jobs = [next(going).job for _ in range(deltas)]
        going.close()  # type: ignore[attr-defined]
        engine.step()
        assert finished(engine, jobs)


# ---------------------------------------------------------------------------------------------------------------------
# Where a text ends.


@given(
    pieces=st.lists(st.text(alphabet="ab☃", max_size=3), max_size=8),
    stop=st.lists(st.text(alphabet="ab☃", min_size=1, max_size=4), max_size=3),
)
def test_text_is_cut_at_the_first_stop_and_never_shown_beyond_it(pieces: list[str], stop: list[str]) -> None:
    class Pieces:
        def push(self, token: int) -> str:
            return pieces[token]

        def finish(self) -> str:
            return ""

    whole, shown = "".join(pieces), ""
    text: Any = StopText(Pieces(), stop)  # type: ignore[arg-type]
    stopped = False
    for token in range(len(pieces)):
        piece, stopped = text.push(token)
        shown += piece
        if stopped:
            break
        # What is held back can still become a stop text, and nothing else is held back.
        held = "".join(pieces[: token + 1])[len(shown) :]
        assert not held or any(other.startswith(held) for other in stop)
    if not stopped:
        piece, stopped = text.finish()
        shown += piece
    places = [whole.find(other) for other in stop if other in whole]
    if stopped:
        # The first stop text that was complete ends it, at its beginning.
        assert any(whole[len(shown) :].startswith(other) for other in stop)
        assert all(whole[: len(shown)].find(other) < 0 for other in stop)
    else:
        assert places == []
        assert shown == whole


def test_a_stop_text_over_several_tokens(data: Data) -> None:
    model = Decoder(moe(context=64)).double()
    model.tokenizer = data.tokenizer
    text = "".join(generate(model, "the router", max_tokens=30, sampling=GREEDY))
    assert len(text) > 12
    for start, end in ((4, 9), (0, 3), (len(text) - 4, len(text))):
        stop = text[start:end]
        assert (
            "".join(generate(model, "the router", max_tokens=30, sampling=GREEDY, stop=[stop]))
            == text[: text.find(stop)]
        )
    request = text_request(model, "the router", max_tokens=30, sampling=GREEDY, stop=[text[4:9]])
    deltas = list(stream(Engine(model), request))
    assert deltas[-1].finish == "stop"
    assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_stop_tokens() -> None:
    model = decoder("moe")
    whole = list(generate_tokens(model, [1, 2, 3], 12, GREEDY))
    request = Request(prompt=[1, 2, 3], max_tokens=12, sampling=GREEDY, stop_tokens=[whole[4], 9999])
    (job,) = Engine(model).run([request])
    assert (job.made, job.finish) == (whole[: whole.index(whole[4])], "stop")


# ---------------------------------------------------------------------------------------------------------------------
# What is told beside the tokens.


@torch.no_grad()
def test_logprobs_are_the_models_own() -> None:
    """Whatever the sampling does to them."""
    model = decoder("latent")
    sampling = Sampling(temperature=0.5, top_k=3, repetition_penalty=1.5, seed=1)
    request = Request(prompt=[4, 5, 6], max_tokens=5, sampling=sampling, logprobs=4)
    tokens = list(request.prompt)
    for delta in stream(Engine(model), request):
        want_V = model(torch.tensor([tokens]))[0][0, -1].log_softmax(-1)
        assert delta.token is not None
        assert delta.logprobs is not None
        assert delta.logprobs.token == pytest.approx(float(want_V[delta.token]), rel=1e-5)
        best = want_V.topk(4)
        assert list(delta.logprobs.top) == best.indices.tolist()
        assert list(delta.logprobs.top.values()) == pytest.approx(best.values.tolist(), rel=1e-5)
        tokens.append(delta.token)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [3, 50])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_prompts_are_scored(chunk: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, and few positions at a time, beside others that are not; up to the whole context."""
    monkeypatch.setattr(handful.engine, "SCORED", 2 * VOCAB)
    model = decoder("moe")
    prompts = [[4, 5, 6, 5, 4, 9, 8], [7], [3] * (32 - min(1, max_tokens))]
    asked = [Request(prompt=p, max_tokens=max_tokens, sampling=GREEDY, prompt_logprobs=2) for p in prompts]
    other = Request(prompt=[1, 2, 3], max_tokens=4, sampling=GREEDY)
    jobs = Engine(model, chunk=chunk).run([*asked, other])
    for prompt, job in zip(prompts, jobs, strict=False):
        want_SV = model(torch.tensor([prompt]))[0][0].log_softmax(-1)
        assert [one is None for one in job.prompt_logprobs] == [True] + [False] * (len(prompt) - 1)
        for want_V, token, one in zip(want_SV, prompt[1:], job.prompt_logprobs[1:], strict=False):
            assert one is not None
            assert one.token == pytest.approx(float(want_V[token]), rel=1e-5)
            best = want_V.topk(2)
            assert list(one.top) == best.indices.tolist()
            assert list(one.top.values()) == pytest.approx(best.values.tolist(), rel=1e-5)
        assert job.finish == "length"
        assert len(job.made) == min(max_tokens, 32 - len(prompt))
    assert jobs[-1].prompt_logprobs == []
    assert jobs[-1].made == list(generate_tokens(model, [1, 2, 3], 4, GREEDY))


def test_the_argmax_token_has_the_largest_value() -> None:
    """To the last bit, in any dtype; of equals that of the argmax comes first, however few are asked for."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits_TV = (torch.randn(20, 400) * 2).to(dtype)
        tokens = logits_TV.argmax(-1).tolist()
        for one, token in zip(logprobs(logits_TV, tokens, 3), tokens, strict=True):
            assert next(iter(one.top)) == token
            assert one.token == one.top[token] == max(one.top.values())
    (one,) = logprobs(torch.zeros(1, 400), [7], 2)
    assert (next(iter(one.top)), len(one.top), one.token) == (0, 2, one.top[0])


def test_a_drawn_stop_token_is_told_and_has_its_logprobs() -> None:
    model = decoder("moe")
    whole = list(generate_tokens(model, [1, 2, 3], 12, GREEDY))
    request = Request(prompt=[1, 2, 3], max_tokens=12, sampling=GREEDY, stop_tokens=[whole[2]], logprobs=1)
    *_, last = stream(Engine(model), request)
    assert (last.token, last.finish, last.stop_token) == (None, "stop", whole[2])
    assert last.logprobs is not None
    assert last.logprobs.token == last.logprobs.top[whole[2]]


def test_statistics() -> None:
    engine = Engine(decoder("moe"), max_sequences=1, cache_tokens=40)
    first, second = (engine.submit(Request(prompt=[1] * 5, max_tokens=n, sampling=GREEDY)) for n in (3, 4))
    engine.step()
    assert vars(engine.stats()) == {
        "running": 1, "waiting": 1, "cached_tokens": 8, "cache_tokens": 40, "kept_tokens": 0,
        "prompt_tokens": 5, "made_tokens": 1, "prefix_tokens": 5, "prefix_hits": 0, "draft_tokens": 0,
        "accepted_tokens": 0,
    }  # fmt: skip
    assert first.admitted is not None
    assert first.submitted <= first.admitted
    assert second.admitted is None
    engine.run([])
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cached_tokens) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.made_tokens) == (10, 7)


# ---------------------------------------------------------------------------------------------------------------------
# Failed.


class Refusing:
    """A layer's experts that cannot be had for some tokens: as on a disk that is gone."""

    def __init__(self, layer: Any, tokens: set[int], seen: list[int]) -> None:
        self.layer, self.tokens, self.seen, self.forward = layer, tokens, seen, layer.forward
        layer.forward = self

    def __call__(self, tokens_BS: Any, *rest: Any) -> Any:
        self.seen.append(tokens_BS.numel())
        if self.tokens & set(tokens_BS.flatten().tolist()):
            raise CheckpointError("experts.pack: cannot be read")
        return self.forward(tokens_BS, *rest)


def test_who_fails_alone_ends_and_the_others_go_on() -> None:
    model = decoder("moe")
    want = list(generate_tokens(model, [1, 2, 3], 5, GREEDY))
    seen: list[int] = []
    Refusing(model.embed, {250}, seen)
    engine = Engine(model)
    requests = [Request(prompt=p, max_tokens=5, sampling=GREEDY) for p in ([1, 2, 3], [250, 2], [1, 2, 3])]
    jobs = [engine.submit(request) for request in requests]
    deltas = engine.step()
    assert seen == [8, 3, 2, 3]  # together, then each alone
    failed = [delta for delta in deltas if delta.error is not None]
    assert [(delta.job.number, delta.finish, str(delta.error)) for delta in failed] == [
        (2, "failed", "experts.pack: cannot be read")
    ]
    while engine.busy:
        engine.step()
    assert [job.made for job in jobs] == [want, [], want]
    assert finished(engine, jobs)
    with pytest.raises(CheckpointError, match="cannot be read"):
        engine.run([requests[1]])
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(generate_tokens(model, [250], 5))


def test_logits_that_choose_nothing_end_one_request() -> None:
    model = Decoder(moe(tied=False)).double()
    want = list(generate_tokens(model, [1, 2, 3], 5, GREEDY))
    with torch.no_grad():
        model.embed.weight[250] = torch.nan
    engine = Engine(model)
    jobs = [engine.submit(Request(prompt=p, max_tokens=5, sampling=GREEDY)) for p in ([1, 2, 3], [250])]
    deltas: list[Delta] = []
    while engine.busy:
        deltas += engine.step()
    assert [delta.job.number for delta in deltas if isinstance(delta.error, CheckpointError)] == [2]
    assert (jobs[0].made, jobs[1].finish) == (want, "failed")


def test_routings_are_told_with_whose_they_are() -> None:
    told: list[tuple[list[int], list[int], int]] = []

    def note(jobs: Sequence[Job], new: Sequence[int], routings: list[Routing]) -> None:
        assert len(routings) == 2
        told.append(([job.number for job in jobs], list(new), routings[0].tokens))

    engine = Engine(decoder("moe"), chunk=4, on_routing=note)
    engine.run([Request(prompt=[1] * n, max_tokens=2, sampling=GREEDY) for n in (6, 3)])
    assert told == [([1], [4], 4), ([1, 2], [2, 2], 4), ([1, 2], [1, 1], 2), ([2], [1], 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt: at least one token"),
        ({"prompt": [1] * 32}, "prompt: 32 tokens; the model's context is 32, so at most 31"),
        ({"max_tokens": 0}, "max_tokens = 0: at least 1"),
        ({"stop": "end"}, r"stop = 'end': a list of texts that are not empty"),
        ({"stop": ["a", ""]}, r"stop = \['a', ''\]: a list of texts that are not empty"),
        ({"stop": ["a"]}, "stop: the model has no tokenizer"),
        ({"logprobs": -1}, "logprobs = -1: at least 0, or none"),
        ({"prompt_logprobs": -1}, "prompt_logprobs = -1: at least 0, or none"),
        ({"prompt_logprobs": 1, "max_tokens": -1}, "max_tokens = -1: at least 0"),
        ({"prompt_logprobs": 1, "max_tokens": 0, "prompt": [1] * 33}, "prompt: 33 tokens; the model's context is 32$"),
    ],
)
def test_requests_that_cannot_be_run(changes: dict[str, Any], message: str) -> None:
    engine = Engine(decoder("moe"))
    with pytest.raises(ConfigError, match=f"^{message}"):
        engine.submit(replace(Request(prompt=[1, 2]), **changes))
    assert not engine.busy


@pytest.mark.parametrize("name", ["max_sequences", "cache_tokens", "chunk"])
def test_bounds_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = 0: at least 1$"):
        Engine(decoder("moe"), **{name: 0})  # type: ignore[arg-type]
