"""Experts that are not to be had: the routers choose among the others, who asked is told, and nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from serving import chat_model

from handful.engine import Delta, Engine
from handful.errors import RankLostError
from handful.model import Decoder
from handful.request import Request
from handful.routing_options import Missing, RoutingOptions
from handful.sampling import Sampling

PROMPT = list(range(20, 60))
GREEDY = Sampling(temperature=0)


def model() -> Decoder:
    return chat_model(router={"experts": 6, "top_k": 2})


def asking(engine: Engine, *requests: Request) -> list[list[Delta]]:
    """The deltas of each request."""
    jobs = [engine.submit(request) for request in requests]
    found: dict[Any, list[Delta]] = {job: [] for job in jobs}
    while engine.busy:
        for delta in engine.step():
            assert delta.error is None, delta.error
            found[delta.job].append(delta)
    return [found[job] for job in jobs]


def request(**changes: Any) -> Request:
    values: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "sampling": GREEDY, "logprobs": 0}
    return Request(**(values | changes))


def seen(deltas: list[Delta]) -> list[Any]:
    return [(delta.token, delta.logprobs.token if delta.logprobs else None) for delta in deltas]


def near(found: list[Delta], right: list[Delta]) -> None:
    """The same up to rounding: without the kernels passes of other sizes round otherwise."""
    assert [delta.token for delta in found] == [delta.token for delta in right]
    for one, other in zip(found, right, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert one.logprobs.token == pytest.approx(other.logprobs.token, abs=1e-5)


def by(missing: list[Missing | None]) -> Callable[[], Missing | None]:
    """One after the other, the last for ever."""
    return lambda: missing.pop(0) if len(missing) > 1 else missing[0]


def test_as_if_they_were_asked_to_be_off() -> None:
    """Beside requests that ask for something themselves, whose own wishes hold too."""
    own = model()
    off = {0: (1, 2), 1: (5,)}
    engine = Engine(own, before_pass=lambda: Missing.among(own.config, off))
    plain, both, whole = asking(
        engine,
        request(),
        request(routing=RoutingOptions(experts_off={0: [0], 1: [5]}, top_k=1)),
        request(routing=RoutingOptions(whole=True)),
    )
    right = asking(
        Engine(own),
        request(routing=RoutingOptions(experts_off=off)),
        request(routing=RoutingOptions(experts_off={0: [0, 1, 2], 1: [5]}, top_k=1)),
        request(),
    )
    assert [seen(found) for found in (plain, both, whole)] == [seen(found) for found in right]
    assert seen(plain) != seen(whole)
    for delta in plain:
        assert delta.missing is not None
        assert (delta.missing.experts, delta.missing.count, delta.missing.of) == (off, 3, 12)
    assert all(delta.missing is None for delta in whole)


def test_where_too_few_would_be_left_they_are_computed_all_the_same() -> None:
    own = model()
    missing = Missing.among(own.config, {0: [0, 1, 2, 3]})
    asked = request(routing=RoutingOptions(experts_off={0: [4]}))
    assert seen(*asking(Engine(own, before_pass=lambda: missing), asked)) == seen(*asking(Engine(own), asked))


@pytest.mark.parametrize("kernels", [True, False])
def test_what_was_computed_without_them_begins_no_other_prompt(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that was read, or went on, while experts were missing is read again."""
    own = model()
    if not kernels:
        monkeypatch.setattr("handful.engine._steady_tokens", lambda model: None)
    (right,) = asking(Engine(own), request())
    gone = Missing.among(own.config, {0: [0, 1, 2]})
    for order in ([gone, None], [None, gone, None], [None, None, gone, gone, None]):
        engine = Engine(own, before_pass=by(list(order)))
        (first,) = asking(engine, request())
        told = [delta.missing is not None for delta in first]
        assert told == [one is not None for one in order][: len(told)] + [False] * (len(first) - len(order))
        (again,) = asking(engine, request(prompt=PROMPT + [delta.token for delta in first if delta.token is not None]))
        (fresh,) = asking(Engine(own), request(prompt=again[0].job.request.prompt))
        near(again, fresh)
        (whole,) = asking(engine, request())
        near(whole, right)


def test_a_pass_in_which_a_rank_goes_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    own = model()
    right = [seen(found) for found in asking(Engine(own), request(), request(prompt=PROMPT[:7]))]
    calls = []

    def lost(*args: Any) -> Any:
        calls.append(1)
        if len(calls) % 3 == 0:
            raise RankLostError("link: gone")
        return forward(*args)

    def gone(*args: Any) -> Any:
        raise RankLostError("link: gone")

    experts = own.moe_layers[1].experts
    forward = experts.forward
    monkeypatch.setattr(experts, "forward", lost)
    asked = []
    engine = Engine(own, before_pass=lambda: asked.append(1))
    found = asking(engine, request(), request(prompt=PROMPT[:7]))
    assert [seen(one) for one in found] == right
    assert len(asked) == len(calls) > 12
    monkeypatch.setattr(experts, "forward", gone)
    with pytest.raises(RankLostError):  # nobody knows of another way
        Engine(own).run([request(), request()])


def test_the_worst_is_told() -> None:
    """Of what a prompt was read without, in several steps."""
    own = model()
    some, more = (Missing.among(own.config, {0: list(range(n))}) for n in (1, 3))
    engine = Engine(own, chunk=10, before_pass=by([some, more, some, None]))
    (deltas,) = asking(engine, request())
    assert deltas[0].missing is more
    assert all(delta.missing is None for delta in deltas[1:])
    assert torch.equal(more.off[0], torch.tensor([True] * 3 + [False] * 3))  # type: ignore[arg-type]
    assert more.off[1] is None
