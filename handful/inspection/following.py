"""What an expert follows: token identity, position, a label of documents. Pure functions of routings, beside chance.

One number says how much: the share of the variance of "this expert is chosen" that a label explains, across halves,

    Σ_x w_x (P₁(e | x) - P₁(e)) (P₂(e | x) - P₂(e)) / (P(e) (1 - P(e)))

with P₁ and P₂ of the two halves of the documents, and w_x the weight of label x. Noise of one half is none of the
other's, so without any effect its mean is 0 however many labels there are, and what only one half has does not count.
1 means that the label decides. It is tested against permutations that break what is asked about and keep the rest:

    token      token identity: the tokens of each document are turned against its routing, by a random number of places,
               round and round. Both keep their order, so runs of a subject, and documents that use some experts and
               some words more, are in chance as they are in the text.
    position   place in the window, in steps of 1, 1, 2, 4, 8, …: what token identity explains is first taken away (from
               each choice the expert's rate for that token in its half); then each window is turned as above.
    a label    (folder, suffix, …): whole documents change labels, within their half.
    a label, given token: the same of what token identity does not explain.

Legend: T tokens · E experts · D documents · X labels (values of one kind) · R permutations · W windows · H = 2 halves
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from handful.inspection.routings import Observed
from handful.inspection.statistics import permutation_p

__all__ = [
    "FEW_DOCUMENTS",
    "FEW_TOKENS",
    "FEW_USES",
    "GIVEN",
    "Followed",
    "chi_squared",
    "follow",
    "kinds",
    "position_names",
]

FEW_USES = 50  # times that an expert must be used in each half to be judged
FEW_TOKENS = 8  # times that a token must occur in each half to be a label
FEW_DOCUMENTS = 2  # documents that a label must have in each half
GIVEN = " given token"


@dataclass(frozen=True, eq=False)
class Followed:
    """How much the experts of every layer follow one kind of label. A list has one tensor for each layer.

    names       of the X labels.
    share_E     the share of variance explained, across halves; chance_E, its mean over the permutations.
    agreement_E the correlation of the halves' rates over labels.
    p_E, own_E  as `statistics.permutation_p` gives; nan for an expert that is not judged.
    naive_E     the p of a χ² test on all tokens, as if they were independent and the text were one: what is claimed
                where nothing is controlled. nan where token identity is given.
    lift_HXE    P(e | x) / P(e) in each half; count_HX, tokens of each label.
    why_not     why nothing was tested, else "".
    """

    kind: str
    names: Sequence[object]
    share_E: Sequence[Tensor]
    chance_E: Sequence[Tensor]
    agreement_E: Sequence[Tensor]
    p_E: Sequence[Tensor]
    own_E: Sequence[Tensor]
    naive_E: Sequence[Tensor]
    lift_HXE: Sequence[Tensor]
    count_HX: Tensor
    why_not: str = ""


def kinds(observed: Observed) -> list[str]:
    """What can be asked for: token, position, and each kind of label alone and given token."""
    return ["token", "position", *(name for kind in observed.labels for name in (kind, kind + GIVEN))]


def position_names(longest: int) -> list[str]:
    """The names of the steps of position, of windows of at most so many tokens: 0, 1, 2–3, 4–7, …"""
    edges = _edges(longest)
    return [str(a) if b - a == 1 else f"{a}–{b - 1}" for a, b in pairwise(edges)]


def follow(
    observed: Observed,
    kind: str,
    generator: torch.Generator,
    permutations: int = 200,
    progress: Callable[[int, int], None] | None = None,
) -> Followed:
    """How much every expert follows that kind, beside chance."""
    if kind == "token":
        label_T, names, why = _token_labels(observed)
        draw: _Draw = _Turned(observed, label_T, len(names))
    elif kind == "position":
        names = list(position_names(int(observed.position_T.max()) + 1)) if observed.tokens else []
        why = "" if len(names) > 1 else "windows of one token"
        draw = _Placed(observed, len(names))
    else:
        base = kind.removesuffix(GIVEN)
        label_D, names, why = _document_labels(observed, base)
        draw = _Relabelled(observed, label_D, len(names), given_token=kind != base)
    if why:
        return Followed(kind, names, [], [], [], [], [], [], [], torch.zeros(2, len(names)), why)
    parts: list[_Layer] = []
    for layer in range(len(observed.layers)):
        sums = draw.layer(layer)
        found = _Layer(observed, layer, *sums(None), rest=draw.rest)
        drawn_RE = torch.empty(permutations, observed.experts[layer], dtype=torch.float64)
        for r in range(permutations):
            drawn_RE[r] = _across(*sums(draw.permutation(r, generator)))[0] / found.variance_E
            if progress is not None:
                progress(layer * permutations + r + 1, len(observed.layers) * permutations)
        drawn_RE[:, ~found.judged_E] = 0.0
        found.drawn_RE = drawn_RE
        parts.append(found)
    share = torch.cat([part.share_E for part in parts])
    p, own = permutation_p(share, torch.cat([part.drawn_RE for part in parts], 1))
    sizes = list(observed.experts)
    return Followed(
        kind,
        names,
        [part.share_E for part in parts],
        [torch.where(part.judged_E, part.drawn_RE.mean(0), torch.nan) for part in parts],
        [part.agreement_E for part in parts],
        list(p.split(sizes)),
        list(own.split(sizes)),
        [part.naive_E for part in parts],
        [part.lift_HXE for part in parts],
        parts[0].count_HX,
    )


class _Layer:
    """What the halves say of one layer, unpermuted."""

    drawn_RE: Tensor

    def __init__(self, observed: Observed, layer: int, sum_HXE: Tensor, count_HX: Tensor, *, rest: bool) -> None:
        used_TE = observed.used_TE(layer)
        uses_HE = torch.stack([used_TE[observed.half_T == half].sum(0) for half in (0, 1)]).double()
        tokens = torch.bincount(observed.half_T, minlength=2).double().unsqueeze(1).clamp_min(1)
        rate_HE = uses_HE / tokens
        self.judged_E = (uses_HE >= FEW_USES).all(0) & (rate_HE < 1).all(0)
        covariance_E, agreement_E, mean_HE = _across(sum_HXE, count_HX)
        # Of the tokens that have a label, so that no share is above 1; what is left over has no rate of its own.
        base_HE = rate_HE if rest else mean_HE
        self.judged_E &= ((base_HE > 0) & (base_HE < 1)).all(0)
        self.variance_E = torch.where(self.judged_E, (base_HE * (1 - base_HE)).prod(0).clamp_min(1e-30).sqrt(), 1.0)
        self.share_E = torch.where(self.judged_E, covariance_E / self.variance_E, torch.nan)
        self.agreement_E = torch.where(self.judged_E, agreement_E, torch.nan)
        rate_HXE = sum_HXE / count_HX.unsqueeze(-1).clamp_min(1)
        # What token identity leaves over is above or below 0, and so is seen from the expert's rate.
        self.lift_HXE = (rate_HXE + rate_HE.unsqueeze(1) if rest else rate_HXE) / rate_HE.unsqueeze(1).clamp_min(1e-12)
        self.count_HX = count_HX
        self.naive_E = torch.full_like(self.share_E, torch.nan)
        if not rest:
            self.naive_E = torch.where(self.judged_E, chi_squared(sum_HXE.sum(0), count_HX.sum(0)), torch.nan)


def _across(sum_HXE: Tensor, count_HX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The covariance of the halves' rates over labels, their correlation, (E,) each, and their means, (H, E)."""
    count_HX1 = count_HX.double().unsqueeze(-1)
    rate_HXE = sum_HXE.double() / count_HX1.clamp_min(1)
    # A label counts by its tokens, where both halves have them.
    weight_X1 = count_HX1.prod(0) / count_HX1.sum(0).clamp_min(1)
    weight_X1 = weight_X1 / weight_X1.sum().clamp_min(1e-12)
    mean_HE = (weight_X1 * rate_HXE).sum(1)
    off_HXE = rate_HXE - mean_HE.unsqueeze(1)
    covariance_E = (weight_X1 * off_HXE[0] * off_HXE[1]).sum(0)
    spread_E = (weight_X1 * off_HXE.square()).sum(1).prod(0).sqrt()
    return covariance_E, torch.where(spread_E > 0, covariance_E / spread_E.clamp_min(1e-30), 0.0), mean_HE


def chi_squared(sum_XE: Tensor, count_X: Tensor) -> Tensor:
    """(E,) Pearson's p of "an expert's rate is that of all labels", as if every token were independent."""
    count_X1, sum_XE = count_X.double().unsqueeze(1), sum_XE.double()
    rate_E = sum_XE.sum(0) / count_X1.sum().clamp_min(1)
    off_XE = sum_XE / count_X1.clamp_min(1) - rate_E
    chi2_E = (count_X1 * off_XE.square()).sum(0) / (rate_E * (1 - rate_E)).clamp_min(1e-30)
    freedom = torch.tensor(max(1, int((count_X > 0).sum()) - 1) / 2, dtype=torch.float64)
    p_E: Tensor = torch.special.gammaincc(freedom, chi2_E / 2)
    return p_E


# ---------------------------------------------------------------------------------------------------------------------
# Labels.


def _token_labels(observed: Observed) -> tuple[Tensor, list[object], str]:
    """The label of each token, X for one that is too rare; the tokens that are labels."""
    ids, place_T = observed.tokens_T.unique(return_inverse=True)
    count_HX = torch.bincount(observed.half_T * len(ids) + place_T, minlength=2 * len(ids)).view(2, -1)
    often_X = (count_HX >= FEW_TOKENS).all(0)
    number_X = torch.where(often_X, often_X.cumsum(0) - 1, int(often_X.sum()))
    names: list[object] = ids[often_X].tolist()
    why = "" if len(names) > 1 else f"fewer than two tokens occur {FEW_TOKENS} times in both halves"
    return number_X[place_T], names, why


def _document_labels(observed: Observed, kind: str) -> tuple[Tensor, list[object], str]:
    """The label of each document, -1 for one that is in too few; their names."""
    given = observed.labels[kind]
    held = {name: [0, 0] for name in sorted(set(given))}
    for name, half, length in zip(given, observed.half_D.tolist(), observed.length_D.tolist(), strict=True):
        held[name][half] += length > 0
    names = [name for name, counts in held.items() if min(counts) >= FEW_DOCUMENTS]
    place = {name: i for i, name in enumerate(names)}
    why = ""
    if len(held) < 2:
        why = f"all documents have one label, {next(iter(held), '')!r}"
    elif len(names) < 2:
        why = f"fewer than two labels have {FEW_DOCUMENTS} documents in each half"
    return torch.tensor([place.get(name, -1) for name in given]), list(names), why


def _edges(longest: int) -> list[int]:
    edges = [0, 1]
    while edges[-1] < longest:
        edges.append(min(longest, edges[-1] * 2))
    return edges


# ---------------------------------------------------------------------------------------------------------------------
# Permutations. Each kind gives, for a layer, a function from a permutation (None: as it is) to the sums over tokens of
# each label and half, (H, X, E), and the tokens of each, (H, X).

_Sums = Callable[[object], tuple[Tensor, Tensor]]


class _Draw:
    """Permutation r is the same for every layer. rest: whether the sums are of what token identity leaves over."""

    rest = False

    def __init__(self) -> None:
        self._kept: dict[int, object] = {}

    def permutation(self, r: int, generator: torch.Generator) -> object:
        if r not in self._kept:
            self._kept[r] = self.drawn(generator)
        return self._kept[r]

    def drawn(self, generator: torch.Generator) -> object:
        raise NotImplementedError

    def layer(self, layer: int) -> _Sums:
        raise NotImplementedError


class _Turned(_Draw):
    """Token labels turned against the routing, document by document."""

    def __init__(self, observed: Observed, label_T: Tensor, labels: int) -> None:
        super().__init__()
        self.observed, self.label_T, self.labels = observed, label_T, labels
        self.first_D = observed.length_D.cumsum(0) - observed.length_D

    def drawn(self, generator: torch.Generator) -> object:
        return (torch.rand(self.observed.documents, generator=generator) * self.observed.length_D).long()

    def layer(self, layer: int) -> _Sums:
        observed, X, E = self.observed, self.labels, self.observed.experts[layer]
        experts_TK = observed.experts_TK[layer].long()
        chosen_TK = torch.where(experts_TK < 0, E, experts_TK)
        at = observed.document_T
        place_T = torch.arange(observed.tokens) - self.first_D[at]

        def sums(turn_D: object) -> tuple[Tensor, Tensor]:
            label_T = self.label_T
            if isinstance(turn_D, Tensor):
                label_T = label_T[self.first_D[at] + (place_T + turn_D[at]) % observed.length_D[at]]
            group_T = observed.half_T * (X + 1) + label_T
            both_N = (group_T.unsqueeze(1) * (E + 1) + chosen_TK).flatten()
            sum_HXE = torch.bincount(both_N, minlength=2 * (X + 1) * (E + 1)).view(2, X + 1, E + 1)
            count_HX = torch.bincount(group_T, minlength=2 * (X + 1)).view(2, X + 1)
            return sum_HXE[:, :X, :E], count_HX[:, :X]

        return sums


class _Placed(_Draw):
    """Windows turned, of what token identity does not explain: by running sums, so that a turn costs little."""

    rest = True

    def __init__(self, observed: Observed, labels: int) -> None:
        super().__init__()
        self.observed = observed
        _, self.length_W = observed.window_T.unique_consecutive(return_counts=True)
        self.first_W = self.length_W.cumsum(0) - self.length_W
        self.half_W = observed.half_T[self.first_W]
        edges = torch.tensor(_edges(int(self.length_W.max()) if len(self.length_W) else 1))
        self.from_WP = torch.minimum(edges[:-1], self.length_W.unsqueeze(1))
        self.size_WP = torch.minimum(edges[1:], self.length_W.unsqueeze(1)) - self.from_WP
        self.count_HX = torch.zeros(2, labels, dtype=torch.long).index_add_(0, self.half_W, self.size_WP)

    def drawn(self, generator: torch.Generator) -> object:
        return (torch.rand(len(self.length_W), generator=generator) * self.length_W).long()

    def layer(self, layer: int) -> _Sums:
        rest_TE = _left_over(self.observed, layer)
        running = torch.zeros(len(rest_TE) + 1, rest_TE.shape[1], dtype=torch.float64)
        torch.cumsum(rest_TE.double(), 0, out=running[1:])
        first_W1, length_W1 = self.first_W.unsqueeze(1), self.length_W.unsqueeze(1)

        def sums(turn_W: object) -> tuple[Tensor, Tensor]:
            start_WP = self.from_WP
            if isinstance(turn_W, Tensor):
                start_WP = (start_WP + turn_W.unsqueeze(1)) % length_W1
            end_WP = start_WP + self.size_WP
            over_WP = (end_WP - length_W1).clamp_min(0)
            part = running[first_W1 + end_WP - over_WP] - running[first_W1 + start_WP]
            if isinstance(turn_W, Tensor):
                part = part + running[first_W1 + over_WP] - running[first_W1]
            return torch.zeros(2, *part.shape[1:], dtype=torch.float64).index_add_(0, self.half_W, part), self.count_HX

        return sums


class _Relabelled(_Draw):
    """Documents that change labels within their half."""

    def __init__(self, observed: Observed, label_D: Tensor, labels: int, *, given_token: bool) -> None:
        super().__init__()
        self.observed, self.label_D, self.labels, self.rest = observed, label_D, labels, given_token
        self.in_halves = [((observed.half_D == half) & (label_D >= 0)).nonzero().squeeze(1) for half in (0, 1)]

    def drawn(self, generator: torch.Generator) -> object:
        drawn_D = self.label_D.clone()
        for at in self.in_halves:
            drawn_D[at] = self.label_D[at[torch.randperm(len(at), generator=generator)]]
        return drawn_D

    def layer(self, layer: int) -> _Sums:
        observed, X = self.observed, self.labels
        value_TE = _left_over(observed, layer) if self.rest else observed.used_TE(layer)
        sum_DE = observed.by_document(value_TE.double())

        def sums(drawn_D: object) -> tuple[Tensor, Tensor]:
            label_D = drawn_D if isinstance(drawn_D, Tensor) else self.label_D
            group_D = torch.where(label_D < 0, 2 * X, observed.half_D * X + label_D)
            sum_GE = torch.zeros(2 * X + 1, sum_DE.shape[1], dtype=torch.float64).index_add_(0, group_D, sum_DE)
            count_G = torch.zeros(2 * X + 1, dtype=torch.long).index_add_(0, group_D, observed.length_D)
            return sum_GE[:-1].view(2, X, -1), count_G[:-1].view(2, X)

        return sums


def _left_over(observed: Observed, layer: int) -> Tensor:
    """(T, E) each choice less the expert's rate for that token in that half of the text."""
    used_TE = observed.used_TE(layer)
    _, token_T = observed.tokens_T.unique(return_inverse=True)
    group_T = token_T * 2 + observed.half_T
    groups = int(group_T.max()) + 1 if len(group_T) else 0
    sum_GE = torch.zeros(groups, used_TE.shape[1]).index_add_(0, group_T, used_TE)
    count_G = torch.bincount(group_T, minlength=groups).clamp_min(1)
    return used_TE - (sum_GE / count_G.unsqueeze(1))[group_T]
