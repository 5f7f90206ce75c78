"""The real clients: OpenAI's own, and Prometheus's parser."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import Served, chat_model, serving

from handful.model import Decoder

ASKED: Any = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(chat_model(), api_key="k") as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="k", max_retries=0)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=5, temperature=0, logprobs=2, echo=True
    )
    (choice,) = answer.choices
    assert choice.text.startswith("the cat")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == 3 + 5
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    stream = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=5, temperature=0, echo=True, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text
    assert chunks[-1].usage == answer.usage
    ids = client.completions.create(model="tiny", prompt=[[5, 6], [7]], max_tokens=1, n=2)
    assert [choice.index for choice in ids.choices] == [0, 1, 2, 3]


def test_chats(client: openai.OpenAI) -> None:
    how: Any = {"model": "tiny", "messages": ASKED, "temperature": 0, "max_completion_tokens": 6}
    answer = client.chat.completions.create(**how, logprobs=True, top_logprobs=1)
    message, seen = answer.choices[0].message, answer.choices[0].logprobs
    assert (message.role, answer.choices[0].finish_reason) == ("assistant", "length")
    assert seen is not None
    assert seen.content is not None
    assert [row.logprob for row in seen.content] == [row.top_logprobs[0].logprob for row in seen.content]
    text, roles = "", []
    for chunk in client.chat.completions.create(**how, stream=True):
        text += chunk.choices[0].delta.content or ""
        roles.append(chunk.choices[0].delta.role)
    assert text == message.content
    assert roles == ["assistant"] + [None] * (len(roles) - 1)


def test_many_at_once_from_one_client(served: Served) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="k") as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(model="tiny", messages=ASKED, temperature=0, max_tokens=4)
                    for _ in range(20)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    assert len(set(asyncio.run(ask()))) == 1


def test_errors(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=ASKED)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="tools: is not supported") as wrong:
        client.chat.completions.create(
            model="tiny", messages=ASKED, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert (wrong.value.param, wrong.value.type) == ("tools", "invalid_request_error")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    with pytest.raises(openai.BadRequestError):
        list(client.completions.create(model="tiny", prompt=[9999], stream=True))
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_client_that_is_refused_tries_again() -> None:
    """After the second that Retry-After says."""
    model: Decoder = chat_model()
    with serving(model, max_sequences=1, queue=0) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=2)
        served.slow(0.05)
        first = client.completions.create(model="tiny", prompt="a", max_tokens=100, stream=True)
        with pytest.raises(openai.RateLimitError):
            client.with_options(max_retries=0).completions.create(model="tiny", prompt="a", max_tokens=1)
        threading.Timer(0.3, first.close).start()
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


def test_langchain(served: Served) -> None:
    """Called, streamed with usage, in a batch, and by its completions class."""
    from langchain_openai import ChatOpenAI, OpenAI

    url = f"{served.url}/v1"
    chat = ChatOpenAI(model="tiny", base_url=url, api_key="k", temperature=0, max_tokens=6, seed=1, max_retries=0)  # type: ignore[arg-type,call-arg]
    said = chat.invoke("the cat")
    assert said.usage_metadata is not None
    assert said.usage_metadata["output_tokens"] == 6
    assert said.response_metadata["finish_reason"] == "length"
    assert "".join(str(part.content) for part in chat.stream("the cat")) == said.content
    first, _ = chat.batch(["the cat", "a dog"])
    assert first.content == said.content
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke("the cat")
    assert len(scored.response_metadata["logprobs"]["content"]) == 6
    routed = chat.bind(extra_body={"experts_off": {"0": [0]}, "top_k_experts": 1}).invoke("the cat")
    assert routed.content != said.content
    completion = OpenAI(model="tiny", base_url=url, api_key="k", temperature=0, max_tokens=6)  # type: ignore[arg-type]
    text = completion.invoke("the cat")
    assert text == served.post("/v1/completions", prompt="the cat", max_tokens=6, temperature=0)["choices"][0]["text"]
