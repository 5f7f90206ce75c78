"""What routers chose on some documents, one value: all that the measures read.

Legend: T tokens · E experts · K experts per token · D documents · W windows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from handful.errors import RoutingError

__all__ = ["Observed", "halves"]


@dataclass(frozen=True, eq=False)
class Observed:
    """The routings of T tokens in the order of their documents, for every MoE layer.

    layers       a name for each; experts, how many it has.
    experts_TK   the chosen experts of each layer, best first; -1 where an assignment was not computed.
    tokens_T     the token that stood there: the one that was routed.
    document_T   its document, 0 to D - 1; window_T its window, counted over all; position_T its place in the window.
    half_D       0 or 1: which half of the text a document is in.
    labels       for each kind ("folder", …) the label of each document.
    """

    layers: Sequence[str]
    experts: Sequence[int]
    experts_TK: Sequence[Tensor]
    tokens_T: Tensor
    document_T: Tensor
    window_T: Tensor
    position_T: Tensor
    half_D: Tensor
    labels: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        rows = {len(x) for x in (*self.experts_TK, self.tokens_T, self.document_T, self.window_T, self.position_T)}
        if len(rows) > 1 or not len(self.layers) == len(self.experts) == len(self.experts_TK):
            raise RoutingError(f"observed: {len(self.layers)} layers' routings of {sorted(rows)} tokens do not fit")
        if bool((self.document_T.diff() < 0).any()):
            raise RoutingError("observed: tokens stand in the order of their documents")

    @property
    def tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def documents(self) -> int:
        return len(self.half_D)

    @cached_property
    def half_T(self) -> Tensor:
        return self.half_D[self.document_T]

    @cached_property
    def length_D(self) -> Tensor:
        """Tokens of each document."""
        return torch.bincount(self.document_T, minlength=self.documents)

    def used_TE(self, layer: int) -> Tensor:
        """1.0 where an expert computed a token of that layer."""
        return self.share_TE(layer, self.experts_TK[layer])

    def first_TE(self, layer: int) -> Tensor:
        """1.0 at the expert that a token chose first."""
        return self.share_TE(layer, self.experts_TK[layer][:, :1])

    def share_TE(self, layer: int, experts_Tk: Tensor) -> Tensor:
        found_TE = torch.zeros(self.tokens, self.experts[layer] + 1)  # the last column takes what was not computed
        return found_TE.scatter_(1, experts_Tk.long() % (self.experts[layer] + 1), 1.0)[:, :-1]

    def by_document(self, value_Tn: Tensor) -> Tensor:
        """The sum over each document's tokens, (D, n…)."""
        sums = torch.zeros(self.documents, *value_Tn.shape[1:], dtype=value_Tn.dtype)
        return sums.index_add_(0, self.document_T, value_Tn)


def halves(lengths: Sequence[int], labels: Mapping[str, Sequence[str]]) -> Tensor:
    """(D,) the half, 0 or 1, of documents of so many tokens each, in the order given.

    Each goes to the half that has fewer tokens of its labels, taken together, so far: so both halves have as much of
    every label as the documents allow. Who wants chance to decide gives them in a random order.
    """
    keys = list(zip(*labels.values(), strict=True)) if labels else [()] * len(lengths)
    held: dict[object, list[int]] = {}
    total = [0, 0]
    half = []
    for key, length in zip(keys, lengths, strict=True):
        mine = held.setdefault(key, [0, 0])
        side = int((mine[1], total[1]) < (mine[0], total[0]))
        mine[side] += length
        total[side] += length
        half.append(side)
    return torch.tensor(half, dtype=torch.long)
