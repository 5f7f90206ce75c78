"""OpenAI's surface, as clients use it: what comes is what the engine makes, in the shapes that clients read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from serving import Served, chat_model, serving

from handful.chat import chat_tokens
from handful.engine import Engine, Request
from handful.generate import generate_tokens
from handful.model import Decoder
from handful.sampling import Sampling
from handful.text import Tokenizer

GREEDY = Sampling(temperature=0)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return chat_model()


@pytest.fixture(scope="module")
def served(model: Decoder) -> Iterator[Served]:
    with serving(model) as found:
        yield found


def tokenizer_of(model: Decoder) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer


def alone(model: Decoder, prompt: list[int], tokens: int, sampling: Sampling = GREEDY) -> str:
    """The text of that many tokens after a prompt, made by itself."""
    stream = tokenizer_of(model).stream(prompt)
    made = generate_tokens(model, prompt, tokens, sampling, tokenizer_of(model).eos_id)
    return "".join(map(stream.push, made)) + stream.finish()


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


# ---------------------------------------------------------------------------------------------------------------------
# Completions.


def test_a_prompt_in_every_form(model: Decoder, served: Served) -> None:
    ids = tokenizer_of(model).encode_prompt("the cat")
    other = [5, 9, 6]
    first, second = alone(model, ids, 6), alone(model, other, 6)
    how: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    forms: list[tuple[Any, list[str]]] = [
        ("the cat", [first]), (ids, [first]), (["the cat"], [first]), ([ids], [first]), ([ids, other], [first, second]),
        (["the cat", "the cat"], [first, first]),
    ]  # fmt: skip
    for prompt, want in forms:
        answer = served.post(COMPLETIONS, prompt=prompt, **how)
        assert texts(answer) == want
        assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
        assert answer["id"].startswith("cmpl-")
        prompts = len(ids) * len(want) if prompt != [ids, other] else len(ids) + len(other)
        usage = {"prompt_tokens": prompts, "completion_tokens": 6 * len(want), "total_tokens": prompts + 6 * len(want)}
        assert answer["usage"].items() >= usage.items()
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
        assert answer["choices"][0]["logprobs"] is None
    assert served.post(COMPLETIONS, prompt="the cat", model="tiny", temperature=0)["usage"]["completion_tokens"] == 16


def test_choices_have_seeds_of_their_own(model: Decoder, served: Served) -> None:
    """n of each prompt, prompt by prompt; the first of them is what the seed gives alone."""
    prompts = [[5, 9, 6], [7]]
    answer = served.post(COMPLETIONS, prompt=prompts, n=3, seed=2**63 - 2, max_tokens=5, temperature=0.9, top_k=40)
    seeds = [2**63 - 2, 2**63 - 1, -(2**63)]
    want = [
        alone(model, prompt, 5, Sampling(temperature=0.9, top_p=1, top_k=40, seed=seed))
        for prompt in prompts
        for seed in seeds
    ]
    assert texts(answer) == want
    assert len(set(want)) > 3
    assert answer["usage"]["prompt_tokens"] == 4
    assert served.post(COMPLETIONS, prompt=[7], n=2)["choices"][0] != served.post(COMPLETIONS, prompt=[7])["choices"][0]


@torch.no_grad()
def test_echo_and_logprobs(model: Decoder, served: Served) -> None:
    tokenizer = tokenizer_of(model)
    ids = tokenizer.encode_prompt("the cat ☃")
    answer = served.post(COMPLETIONS, prompt="the cat ☃", max_tokens=3, temperature=0, echo=True, logprobs=2)
    (choice,), seen = answer["choices"], answer["choices"][0]["logprobs"]
    made = list(generate_tokens(model, ids, 3, GREEDY))
    assert choice["text"] == "the cat ☃" + alone(model, ids, 3)
    assert len({len(seen[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
    want_SV = model(torch.tensor([[*ids, *made]]))[0][0].log_softmax(-1)
    assert seen["token_logprobs"][0] is None
    assert seen["top_logprobs"][0] is None
    assert seen["tokens"] == [tokenizer.token_bytes(token).decode(errors="replace") for token in [*ids, *made]]
    for place, token in enumerate([*ids, *made][1:]):
        assert seen["token_logprobs"][place + 1] == pytest.approx(float(want_SV[place, token]), abs=1e-4)
        best = max(seen["top_logprobs"][place + 1].values())
        assert best == pytest.approx(float(want_SV[place].max()), abs=1e-4)
        assert (seen["token_logprobs"][place + 1] == best) == (token == int(want_SV[place].argmax()))
    assert all(
        seen["token_logprobs"][i] == max(seen["top_logprobs"][i].values()) for i in range(len(ids), len(ids) + 3)
    )
    offsets = seen["text_offset"]
    assert offsets[:3] == [0, 0, 3]  # <s> is not shown
    assert offsets == sorted(offsets)
    assert offsets[len(ids)] == len("the cat ☃")


def test_logprobs_of_the_answer_alone(model: Decoder, served: Served) -> None:
    answer = served.post(COMPLETIONS, prompt="the", max_tokens=4, temperature=0, logprobs=0)
    seen = answer["choices"][0]["logprobs"]
    assert len(seen["tokens"]) == 4
    assert seen["text_offset"][0] == 0
    for token, value, top in zip(seen["tokens"], seen["token_logprobs"], seen["top_logprobs"], strict=True):
        assert top == {token: value}  # the drawn one is always among them


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("echo", [False, True])
def test_few_tokens(model: Decoder, served: Served, max_tokens: int, echo: bool) -> None:
    how: dict[str, Any] = {"prompt": "the cat", "max_tokens": max_tokens, "temperature": 0, "echo": echo}
    answer = served.post(COMPLETIONS, **how)
    ids = tokenizer_of(model).encode_prompt("the cat")
    text = alone(model, ids, 1) if max_tokens else ""
    assert texts(answer) == ["the cat" * echo + text]
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert answer["choices"][0]["logprobs"] is None
    seen = served.post(COMPLETIONS, logprobs=1, **how)["choices"][0]["logprobs"]
    assert len(seen["tokens"]) == len(ids) * echo + max_tokens
    events = served.events(COMPLETIONS, **how)
    assert "".join(event["choices"][0]["text"] for event in events) == texts(answer)[0]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_drawn_stop_token_has_its_entry_beside_an_echo(model: Decoder, served: Served) -> None:
    """Who scores a continuation asks for one token more and cuts exactly one entry off, whatever it is."""
    prompt = [5, 9, 6]
    (drawn,) = generate_tokens(model, prompt, 1, GREEDY)
    how: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    for stop in ([], [drawn]):
        answer = served.post(COMPLETIONS, echo=True, stop_token_ids=stop, return_tokens_as_token_ids=True, **how)
        (choice,) = answer["choices"]
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in [*prompt, drawn]]
        assert choice["logprobs"]["token_logprobs"][-1] == choice["logprobs"]["top_logprobs"][-1][f"token_id:{drawn}"]
        assert choice["finish_reason"] == ("stop" if stop else "length")
        assert answer["usage"]["completion_tokens"] == (0 if stop else 1)
    assert served.post(COMPLETIONS, stop_token_ids=[drawn], **how)["choices"][0]["logprobs"]["tokens"] == []


def test_stops(model: Decoder, served: Served) -> None:
    how: dict[str, Any] = {"prompt": "the cat", "max_tokens": 24, "temperature": 0}
    whole = texts(served.post(COMPLETIONS, **how))[0]
    assert len(whole) > 8
    stop = whole[3:5]
    for given in (stop, ["§", stop]):
        answer = served.post(COMPLETIONS, stop=given, **how)
        assert texts(answer) == [whole[: whole.find(stop)]]
        assert answer["choices"][0]["finish_reason"] == "stop"
        events = served.events(COMPLETIONS, stop=given, **how)
        assert "".join(event["choices"][0]["text"] for event in events) == texts(answer)[0]
    prompt = [5, 9, 6]
    model.tokenizer, kept = None, model.tokenizer
    try:
        made = list(generate_tokens(model, prompt, 4, GREEDY))
        answer = served.post(COMPLETIONS, prompt=prompt, max_tokens=4, temperature=0, logprobs=0)
        assert answer["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in made]
        assert served.post(COMPLETIONS, 400, prompt="text")["error"]["param"] == "prompt"
        assert served.post(COMPLETIONS, 400, prompt=prompt, stop="x")["error"]["param"] == "stop"
    finally:
        model.tokenizer = kept


# ---------------------------------------------------------------------------------------------------------------------
# Chats.


def test_a_chat(model: Decoder, served: Served) -> None:
    ids = chat_tokens(tokenizer_of(model), ASKED)
    answer = served.post(CHAT, messages=ASKED, max_tokens=6, temperature=0)
    (choice,) = answer["choices"]
    want = Engine(model).run([Request(prompt=ids, max_tokens=6, sampling=GREEDY, fresh=True)])[0].made
    text = tokenizer_of(model).decode(want)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert (answer["object"], choice["finish_reason"], choice["logprobs"]) == ("chat.completion", "length", None)
    assert (
        answer["usage"].items()
        >= {"prompt_tokens": len(ids), "completion_tokens": 6, "total_tokens": len(ids) + 6}.items()
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    for messages, name in ((parts, "max_tokens"), (ASKED, "max_completion_tokens")):
        again = served.post(CHAT, messages=messages, temperature=0, **{name: 6})
        assert again["choices"] == answer["choices"]
    split = [{"role": "user", "content": [{"type": "text", "text": one} for one in ("the", "cat")]}]
    lines = [{"role": "user", "content": "the\ncat"}]
    both = [served.post(CHAT, messages=one, temperature=0, max_tokens=6)["choices"] for one in (split, lines)]
    assert both[0] == both[1]
    # Where nothing is said, it goes on to the end of the context.
    whole = served.post(CHAT, messages=ASKED, temperature=0, ignore_eos=True)
    assert whole["usage"]["total_tokens"] == model.config.context


def test_logprobs_of_a_chat(model: Decoder, served: Served) -> None:
    answer = served.post(CHAT, messages=ASKED, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2)
    rows = answer["choices"][0]["logprobs"]["content"]
    assert len(rows) == 5
    for row in rows:
        assert row["token"] == bytes(row["bytes"]).decode(errors="replace")
        assert len(row["top_logprobs"]) == 2
        assert row["top_logprobs"][0] == {name: row[name] for name in ("token", "logprob", "bytes")}
        assert row["top_logprobs"][1]["logprob"] <= row["logprob"] < 0
    none = served.post(CHAT, messages=ASKED, max_tokens=5, temperature=0, logprobs=True)
    assert [row["top_logprobs"] for row in none["choices"][0]["logprobs"]["content"]] == [[]] * 5
    ids = served.post(CHAT, messages=ASKED, max_tokens=1, logprobs=True, return_tokens_as_token_ids=True)
    assert ids["choices"][0]["logprobs"]["content"][0]["token"].startswith("token_id:")


def test_variables_of_the_template(model: Decoder, served: Served) -> None:
    how: dict[str, Any] = {"messages": ASKED, "max_tokens": 4, "temperature": 0}
    assert served.post(CHAT, chat_template_kwargs={"enable_thinking": False}, **how)
    without = served.post(CHAT, add_generation_prompt=False, **how)
    ids = chat_tokens(tokenizer_of(model), ASKED, answer=False)
    assert without["usage"]["prompt_tokens"] == len(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Streams.


@pytest.mark.parametrize("usage", [False, True])
def test_a_streamed_chat_is_the_whole_one(served: Served, usage: bool) -> None:
    how = {
        "messages": ASKED,
        "max_tokens": 7,
        "temperature": 0.8,
        "seed": 3,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 1,
    }
    whole = served.post(CHAT, **how)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    events = served.events(CHAT, **how, **options)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"]) for event in events}) == 1
    if usage:
        *events, last = events
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert [event["usage"] for event in events if "usage" in event] == [None] * len(events) * usage
    for index, choice in enumerate(whole["choices"]):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        rows = [row for one in own if one["logprobs"] for row in one["logprobs"]["content"]]
        assert rows == choice["logprobs"]["content"]
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + ["length"]


def test_a_streamed_completion_is_the_whole_one(served: Served) -> None:
    how: dict[str, Any] = {"prompt": ["the cat", "☃"], "max_tokens": 7, "temperature": 0, "echo": True, "logprobs": 2}
    whole, events = served.post(COMPLETIONS, **how), served.events(COMPLETIONS, **how)
    assert all("usage" not in event for event in events)
    for index, choice in enumerate(whole["choices"]):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in own) == choice["text"]
        for name, column in choice["logprobs"].items():
            assert [value for one in own for value in one["logprobs"][name]] == column
        assert own[-1]["finish_reason"] == "length"


def test_a_slow_stream_is_kept_alive(model: Decoder) -> None:
    """A comment when nothing comes for long; it is no event, and the answer is the same."""
    with serving(model, quiet_seconds=0.05, max_sequences=1) as served:
        served.slow(0.15)
        with served.http.stream("POST", CHAT, json={"messages": ASKED, "max_tokens": 2, "stream": True}) as answer:
            text = "".join(answer.iter_text())
        assert text.startswith(": waiting\n\n")
        assert text.count("data: ") >= 3
        assert text.endswith("data: [DONE]\n\n")


# ---------------------------------------------------------------------------------------------------------------------
# Models and tokens.


def test_models(served: Served, model: Decoder) -> None:
    answer = served.http.get("/v1/models").json()
    assert answer["object"] == "list"
    (one,) = answer["data"]
    assert (one["id"], one["object"], one["max_model_len"]) == ("tiny", "model", 128)
    assert served.http.get("/v1/models/tiny").json() == one
    assert served.http.get("/v1/models/a/b").status_code == 404


def test_tokens_and_text(served: Served, model: Decoder) -> None:
    tokenizer = tokenizer_of(model)
    answer = served.post("/tokenize", prompt="the cat ☃", return_token_strs=True)
    assert answer["tokens"] == tokenizer.encode_prompt("the cat ☃")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 128)
    assert "".join(answer["token_strs"]) == "<s>the cat ☃"
    plain = served.post("/tokenize", prompt="the cat ☃", add_special_tokens=False)
    assert plain["tokens"] == answer["tokens"][1:]
    assert served.post("/detokenize", tokens=plain["tokens"]) == {"prompt": "the cat ☃"}
    assert served.post("/tokenize", messages=ASKED)["tokens"] == chat_tokens(tokenizer, ASKED)
    info = served.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "<|im_end|>", None)
    assert info["chat_template"] == tokenizer.chat_templates["default"]


def test_numbers_are_plain(served: Served) -> None:
    answer = served.post(COMPLETIONS, prompt="the", max_tokens=3, logprobs=20)
    assert all(math.isfinite(value) for value in answer["choices"][0]["logprobs"]["token_logprobs"])
