"""One prompt gone on with: the request that a model's checkpoint asks for, and its answer piece by piece.

    generate(model, prompt)                  the text that follows a text
    generate_tokens(model, prompt, …)        tokens after tokens; `answer_tokens` of an encoder-decoder
    text_request, token_request              the request of a text or of tokens, for an engine
    stream(engine, request)                  what an engine makes of it, step by step

Legend: V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from handful.encoder_decoder import EncoderDecoder, OutputCache
from handful.engine import Delta, Engine, Request, StopText, check_prompt
from handful.errors import ConfigError
from handful.model import Decoder
from handful.sampling import Sampler, Sampling
from handful.text import Tokenizer

__all__ = [
    "answer_tokens", "generate", "generate_tokens", "sampling_of", "stop_ids", "stream", "text_request",
    "token_request", "tokenizer_of",
]  # fmt: skip


def generate_tokens(
    model: Decoder, prompt: Sequence[int], max_tokens: int, sampling: Sampling | None = None, stop: int | None = None
) -> Iterator[int]:
    """Yield at most `max_tokens` tokens after the prompt, up to the token `stop` (not yielded) or the model's context.

    ConfigError for an empty prompt, one that fills the context, or a token outside the vocabulary.
    """
    request = Request(
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=sampling or Sampling(),
        stop_tokens=() if stop is None else (stop,),
    )
    yield from (delta.token for delta in stream(Engine(model), request) if delta.token is not None)


def stream(engine: Engine, request: Request) -> Iterator[Delta]:
    """Yield what an engine that nobody else uses makes of a request; what it fails by is raised. Closing it cancels the
    request."""
    job = engine.submit(request)
    try:
        while job.finish is None:
            for delta in engine.step():
                if delta.error is not None:
                    raise delta.error
                yield delta
    finally:
        engine.cancel(job)


@torch.inference_mode()
def answer_tokens(
    model: EncoderDecoder, prompt: Sequence[int], max_tokens: int, sampling: Sampling | None = None
) -> Iterator[int]:
    """Yield at most `max_tokens` tokens of an encoder-decoder's answer to a prompt, up to its stop token (not yielded).

    ConfigError for an empty prompt or a token outside the vocabulary.
    """
    check_prompt(prompt, max_tokens, model.config.vocab)
    model.eval()
    weight = model.embed.weight
    encoded = model.encode(torch.tensor([list(prompt)], device=weight.device))
    cache = OutputCache(model.config, 1, max_tokens, dtype=weight.dtype, device=weight.device)
    sampler = Sampler(sampling or Sampling(), prompt, weight.device)
    token = model.config.start
    for _ in range(max_tokens):
        logits_11V, _ = model.decode(torch.tensor([[token]], device=weight.device), encoded, cache)
        token = sampler(logits_11V[0, -1])
        if token == model.config.stop:
            return
        yield token


def generate(
    model: Decoder | EncoderDecoder,
    prompt: str,
    *,
    max_tokens: int = 200,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    kv_cache_dtype: str = "auto",
) -> Iterator[str]:
    """Yield the text that follows a prompt, piece by piece, until the document ends, a text of `stop` comes or
    `max_tokens` are made. Of an encoder-decoder: its answer to the prompt.

    sampling         None: as the model's checkpoint asks, or else the defaults (`sampling_of`).
    kv_cache_dtype   as in `Engine`; of decoders.

    The model must have a tokenizer (`handful.load` sets it). A character that several tokens spell is yielded whole.
    """
    if isinstance(model, EncoderDecoder):
        yield from _answer(model, prompt, max_tokens, sampling, stop)
        return
    request = text_request(model, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop)
    for delta in stream(Engine(model, kv_cache_dtype=kv_cache_dtype), request):
        yield delta.text


def text_request(
    model: Decoder,
    prompt: str,
    *,
    max_tokens: int = 200,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
) -> Request:
    """The request to go on from a text: after what the model's tokenizer puts before every text, with the special
    tokens that the text spells, up to any token that ends an answer of the model's."""
    tokens = tokenizer_of(model, prompt).encode_prompt(prompt)
    return token_request(model, tokens, max_tokens=max_tokens, sampling=sampling, stop=stop, logprobs=logprobs)


def token_request(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int = 200,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
) -> Request:
    """The request to go on from tokens as the model's checkpoint asks: its sampling, and the tokens that end an
    answer."""
    return Request(
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=sampling or sampling_of(model),
        stop=stop,
        stop_tokens=stop_ids(model),
        logprobs=logprobs,
    )


def stop_ids(model: Decoder | EncoderDecoder) -> tuple[int, ...]:
    """The tokens that end an answer: the end-of-text token of the model's tokenizer, and those that config.json and
    generation_config.json name."""
    own = () if model.tokenizer is None else (model.tokenizer.eos_id,)
    named = () if model.origin is None else model.origin.stop_ids
    return tuple(dict.fromkeys((*own, *named)))


def sampling_of(model: Decoder | EncoderDecoder) -> Sampling:
    """How tokens are drawn where nobody says: as the checkpoint's generation_config.json asks, or else `Sampling()`."""
    asked = None if model.origin is None else model.origin.sampling
    return asked or Sampling()


def _answer(
    model: EncoderDecoder, prompt: str, max_tokens: int, sampling: Sampling | None, stop: Sequence[str]
) -> Iterator[str]:
    tokenizer = tokenizer_of(model, prompt)
    # T5's inputs begin with no token of their own and end with the end-of-text token. Its special tokens are words of
    # its task: <extra_id_0>, a gap.
    tokens = tokenizer.encode_rendered(prompt)
    tokens = tokens if tokens[-1:] == [tokenizer.eos_id] else [*tokens, tokenizer.eos_id]
    text = StopText(tokenizer.stream(special=True), stop)
    for token in answer_tokens(model, tokens, max_tokens, sampling or sampling_of(model)):
        piece, stopped = text.push(token)
        yield piece
        if stopped:
            return
    yield text.finish()[0]


def tokenizer_of(model: Decoder | EncoderDecoder, prompt: str) -> Tokenizer:
    """The model's tokenizer. ConfigError if it has none, or cannot read the text."""
    if model.tokenizer is None:
        raise ConfigError("model: it has no tokenizer; use generate_tokens, or load a checkpoint that holds one")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # a shell hands over any byte
        raise ConfigError(f"prompt = {prompt!r}: must be UTF-8") from None
    return model.tokenizer
