"""Hand-made routings whose answer is known: documents with loads of their own, runs of a subject, and what is planted.

Legend: T tokens · E experts · K experts per token · D documents · V tokens that there are · L layers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from handful.inspection.routings import Observed, halves


def text(documents: int = 24, length: int = 256, window: int = 64, vocab: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Tokens of documents that use some more than others, each in runs: as a text does."""
    generator = torch.Generator().manual_seed(seed)
    taste_DV = torch.randn(documents, vocab, generator=generator)
    rows = []
    for taste_V in taste_DV:
        fresh = torch.multinomial(taste_V.softmax(0), length, replacement=True, generator=generator).tolist()
        stay = (torch.rand(length, generator=generator) < 0.3).tolist()
        row: list[int] = []
        for token, again in zip(fresh, stay, strict=True):
            row.append(row[-1] if again and row else token)
        rows.append(torch.tensor(row))
    place_T = torch.arange(documents * length)
    return {
        "tokens_T": torch.cat(rows),
        "document_T": place_T // length,
        "window_T": place_T // window,
        "position_T": place_T % window,
    }


def logits_of(
    given: Mapping[str, Tensor], experts: int, *, document: float = 0.7, runs: float = 1.0, seed: int = 0
) -> Tensor:
    """(T, E) taste for experts that follows nothing but the document, and keeps on for some tokens."""
    generator = torch.Generator().manual_seed(seed + 1)
    documents, tokens = int(given["document_T"].max()) + 1, len(given["tokens_T"])
    noise_TE = torch.randn(tokens, experts, generator=generator)
    kept = [noise_TE[0]]
    for row in noise_TE[1:]:
        kept.append(0.8 * kept[-1] + 0.6 * row)
    own_DE = document * torch.randn(documents, experts, generator=generator)
    fresh_TE = -torch.empty(tokens, experts).exponential_(generator=generator).log()  # Gumbel: a draw by the taste
    return own_DE[given["document_T"]] + runs * torch.stack(kept) + fresh_TE


def observed(
    given: Mapping[str, Tensor],
    logits_TE: Tensor | Sequence[Tensor],
    top_k: int = 2,
    labels: Mapping[str, Sequence[str]] | None = None,
    half_D: Tensor | None = None,
) -> Observed:
    """What routers chose that go by these logits, one tensor for each layer."""
    layers = [logits_TE] if isinstance(logits_TE, Tensor) else list(logits_TE)
    lengths = torch.bincount(given["document_T"]).tolist()
    return Observed(
        [str(i) for i in range(len(layers))],
        [layer.shape[1] for layer in layers],
        [layer.topk(top_k).indices for layer in layers],
        given["tokens_T"],
        given["document_T"],
        given["window_T"],
        given["position_T"],
        halves(lengths, labels or {}) if half_D is None else half_D,
        dict(labels or {}),
    )
