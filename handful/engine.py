"""Tokens out of a model: prefill the prompt, then one token after another through the KV cache.

Legend: S tokens · V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handful.errors import ConfigError
from handful.model import Decoder, KVCache

__all__ = ["Sampling", "generate", "generate_tokens", "sample"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    temperature   0 takes the likeliest token; 1 draws from the model's own probabilities.
    top_p         draw only among the likeliest tokens that together have this probability (nucleus sampling).
    seed          of the draws; None: a different one each time.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature = {self.temperature}: at least 0")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(f"seed = {self.seed}: at most 64 bits")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: above 0, at most 1")


def sample(logits_V: Tensor, sampling: Sampling, random: torch.Generator | None = None) -> int:
    """Draw a token from one position's logits."""
    logits_V = logits_V.float()
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    shares_V = (logits_V / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        sorted_V, order_V = shares_V.sort(descending=True)
        # A token stays if those before it have not reached top_p yet: the likeliest always does.
        sorted_V[sorted_V.cumsum(0) - sorted_V >= sampling.top_p] = 0
        shares_V = torch.zeros_like(shares_V).scatter_(0, order_V, sorted_V)
    return int(torch.multinomial(shares_V, 1, generator=random))


@torch.inference_mode()
def generate_tokens(
    model: Decoder, prompt: Sequence[int], max_tokens: int, sampling: Sampling | None = None, stop: int | None = None
) -> Iterator[int]:
    """Yield at most `max_tokens` tokens after the prompt, up to the token `stop` (not yielded) or the model's context.

    ConfigError for an empty prompt, one that fills the context, or a token outside the vocabulary.
    """
    sampling = sampling or Sampling()
    context, vocab = model.config.context, model.config.vocab
    if not prompt:
        raise ConfigError("prompt: at least one token")
    if len(prompt) >= context:
        raise ConfigError(f"prompt: {len(prompt)} tokens; the model's context is {context}, so at most {context - 1}")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens}: at least 1")
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        raise ConfigError(f"prompt: a token is outside the vocabulary of {vocab}")
    model.eval()
    weight = model.embed.weight
    room = min(context, len(prompt) + max_tokens)
    cache = KVCache(model.config, 1, room, dtype=weight.dtype, device=weight.device)
    random = None
    if sampling.seed is not None:
        random = torch.Generator(weight.device).manual_seed(sampling.seed)
    tokens_1S = torch.tensor([list(prompt)], device=weight.device)
    for _ in range(room - len(prompt)):
        logits_1SV, _ = model(tokens_1S, cache)
        token = sample(logits_1SV[0, -1], sampling, random)
        if token == stop:
            return
        yield token
        tokens_1S = torch.tensor([[token]], device=weight.device)


def generate(model: Decoder, prompt: str, *, max_tokens: int = 200, sampling: Sampling | None = None) -> Iterator[str]:
    """Yield the text that follows a prompt, piece by piece, until the document ends or `max_tokens` are made.

    The model must have a tokenizer (`handful.load` sets it). A character that several tokens spell is yielded whole.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError("model: it has no tokenizer; use generate_tokens, or load a checkpoint that holds one")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # a shell hands over any byte
        raise ConfigError(f"prompt = {prompt!r}: must be UTF-8") from None
    # A document starts after an end-of-text token, in training and so here.
    tokens = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    stream = tokenizer.stream(tokens)
    for token in generate_tokens(model, tokens, max_tokens, sampling, stop=tokenizer.eos_id):
        yield stream.push(token)
    yield stream.finish()
