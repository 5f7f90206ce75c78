"""How well models predict files: loss and bits per byte of each, and two models on the same text, paired.

A document is read in windows that do not overlap; every token is predicted but the first end-of-text, as in training.
So the bits of a text under two tokenizers compare. Two models are paired by blocks of the text: where a block is hard
it is hard for both, and what is left tells them apart far better than their own spreads would.

Legend: B sequences · S tokens in one · T = B·S · D width · V vocabulary
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handful.errors import ConfigError
from handful.evaluate import autocast
from handful.model import Decoder
from handful.positions import KVCache, cache_dtype

__all__ = ["Difference", "Scored", "difference", "score", "together"]

BLOCK = 1024  # bytes of text that are compared as one
CHUNK = 1 << 22  # logits held at once
BATCH = 8  # sequences at once


@dataclass(frozen=True)
class Scored:
    """What a model makes of some documents.

    tokens   predicted ones, the ends of documents included; bytes, of UTF-8.
    blocks   the nats of each block of 1024 bytes, document after document.
    """

    tokens: int
    bytes: int
    blocks: tuple[float, ...]

    @property
    def nats(self) -> float:
        return math.fsum(self.blocks)

    @property
    def loss(self) -> float:
        """Nats per token. 0 of no tokens."""
        return self.nats / self.tokens if self.tokens else 0.0

    @property
    def bits_per_byte(self) -> float:
        """0 of no bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Difference:
    """One model's bits per byte less another's on the same text, and the standard error of that over its blocks.

    error is None for fewer than two blocks.
    """

    bits_per_byte: float
    error: float | None


@torch.no_grad()
def score(
    model: Decoder,
    documents: Sequence[bytes],
    *,
    context: int,
    dtype: str = "float32",
    kv_cache_dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """A decoder's loss on documents (UTF-8), in windows of `context` tokens.

    dtype            "bfloat16" is autocast's.
    kv_cache_dtype   as in `Engine`: "int8" tells what keys and values in 8 bits cost.
    progress         called with (windows done, windows in all).

    ConfigError for a model without a tokenizer, and for a context that it does not have.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError("model: it has no tokenizer.json, which the text is read by")
    if not 1 <= context <= model.config.context:
        raise ConfigError(f"context = {context}: from 1 to {model.config.context}, the model's")
    lengths = [len(tokenizer.token_bytes(token, special=False)) for token in range(tokenizer.vocab_size)]
    first_of_all, before, after = tokenizer.frame  # as documents stand in training
    texts = tokenizer.encode_batch([document.decode() for document in documents])
    rows = [[*first_of_all, *before, *ids, *after] for ids in texts]

    first: list[int] = []  # each document's first block
    count = 0
    for document in documents:
        first.append(count)
        count += max(1, -(-len(document) // BLOCK))
    blocks = torch.zeros(count, dtype=torch.float64)
    # Windows of one length go through the model together, so that none needs padding.
    windows: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for place, row in enumerate(rows):
        for start in range(0, len(row) - 1, context):
            windows[min(context, len(row) - 1 - start)].append((place, start))
    places = []
    for place, (row, document) in enumerate(zip(rows, documents, strict=True)):
        ends = torch.tensor([0, *(lengths[token] for token in row[1:-1])]).cumsum(0)
        places.append(first[place] + (ends // BLOCK).clamp(max=max(0, (len(document) - 1) // BLOCK)))
    was_training, device = model.training, model.embed.weight.device
    held = cache_dtype(kv_cache_dtype, model.config, model.embed.weight.dtype)
    model.eval()
    done, total = 0, sum(map(len, windows.values()))
    for length, starts in windows.items():
        for at in range(0, len(starts), BATCH):
            group = starts[at : at + BATCH]
            tokens_BS = torch.tensor([rows[place][start : start + length + 1] for place, start in group], device=device)
            cache = None
            if held == torch.int8:
                cache = KVCache(model.config, len(group), length, dtype=held, device=device)
            nats_T = _losses(model, tokens_BS[:, :-1], tokens_BS[:, 1:], dtype, cache)
            nats_BS = nats_T.view(len(group), length).cpu().double()
            for nats_S, (place, start) in zip(nats_BS, group, strict=True):
                blocks.index_add_(0, places[place][start : start + length], nats_S)
            done += len(group)
            if progress is not None:
                progress(done, total)
    model.train(was_training)
    return Scored(
        tokens=sum(len(row) - 1 for row in rows), bytes=sum(map(len, documents)), blocks=tuple(blocks.tolist())
    )


def _losses(model: Decoder, inputs_BS: Tensor, targets_BS: Tensor, dtype: str, cache: KVCache | None) -> Tensor:
    """(T,) nats of every target, float32."""
    with autocast(inputs_BS, dtype):
        x_TD = model.hidden_states(inputs_BS, cache)[0].flatten(0, 1)
        step = max(1, CHUNK // model.config.vocab)
        parts = [
            torch.nn.functional.cross_entropy((x @ model.output_weight.mT).float(), targets, reduction="none")
            for x, targets in zip(x_TD.split(step), targets_BS.flatten().split(step), strict=True)
        ]
    return torch.cat(parts)


def together(found: Sequence[Scored]) -> Scored:
    """Several files as one."""
    return Scored(
        tokens=sum(each.tokens for each in found),
        bytes=sum(each.bytes for each in found),
        blocks=tuple(nats for each in found for nats in each.blocks),
    )


def difference(ours: Scored, theirs: Scored, sizes: Sequence[int]) -> Difference:
    """Our bits per byte less theirs, on the same documents of these many bytes each.

    The error is that of a ratio of sums (Cochran, Sampling Techniques, 6.4): of the blocks' differences in bits over
    their bytes.
    """
    bytes_n = [
        min(BLOCK, size - start) for size in sizes for start in (range(0, size, BLOCK) if size else [0])
    ]  # as `score` cuts them
    bits_n = [(a - b) / math.log(2) for a, b in zip(ours.blocks, theirs.blocks, strict=True)]
    total = sum(bytes_n)
    if not total:
        return Difference(0.0, None)
    ratio = math.fsum(bits_n) / total
    n = len(bits_n)
    if n < 2:
        return Difference(ratio, None)
    rest = math.fsum((bits - ratio * size) ** 2 for bits, size in zip(bits_n, bytes_n, strict=True))
    return Difference(ratio, math.sqrt(rest * n / (n - 1)) / total)
