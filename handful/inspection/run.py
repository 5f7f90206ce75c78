"""Inspection from beginning to end: models and texts to one document of plain values.

Legend: E experts · D documents · H = 2 halves · X labels
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handful import __version__
from handful.encoder_decoder import EncoderDecoder
from handful.errors import ConfigError
from handful.families.io import find_folder, load
from handful.inspection import texts
from handful.inspection.ablation import ablate, costs, sample
from handful.inspection.collect import observe, token_names
from handful.inspection.following import FEW_USES, GIVEN, Followed, follow, kinds
from handful.inspection.likeness import alike, cosines, redundant
from handful.inspection.load import load_of
from handful.inspection.pairs import pairs
from handful.inspection.repeats import repeats
from handful.inspection.routings import Observed
from handful.inspection.statistics import adjusted
from handful.inspection.subject import Subject, subject_of
from handful.inspection.words import summary
from handful.model import Decoder
from handful.runs import text_behind
from handful.text import Tokenizer, load_tokenizer

__all__ = ["inspect_model", "inspect_subject"]

TOKENS = 65_536
ABLATE_TOKENS = 8192
CONTEXT = 2048  # at most, unless asked for
SHOWN = 6  # labels of an expert that are listed

Progress = Callable[[str, int, int], None]


def inspect_model(
    model: Any,
    text: str | Sequence[str] | None = None,
    *,
    against: Any = None,
    text2: str | Sequence[str] | None = None,
    column: str | None = None,
    by: Sequence[str] | None = None,
    tokens: int = TOKENS,
    context: int | None = None,
    ablate_tokens: int = ABLATE_TOKENS,
    level: float = 0.05,
    permutations: int = 200,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    opener: Callable[[str], Any] = load,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What a model's experts do on a text, each measure beside its chance level and in two halves of the documents.

    model           a run folder, a checkpoint folder, `org/name`, a `Decoder`, or a mixture of experts of transformers
                    (with `tokenizer`).
    text            files as `handful eval` takes them, or several; NAME=FILES gives their documents that label. None:
                    what the run held out.
    against, text2  one of them: another model on the same text, or another text for the same model, side by side.
    by              kinds of labels: text, folder, suffix, file. None: of the first three those that differ.
    tokens          that are read at most; context, in one window (default: the model's own, at most 2048).
    ablate_tokens   on which the loss is taken without each expert; 0: no ablation.
    level           the share of false ones that is allowed among those called beyond chance (Benjamini-Hochberg).
    permutations    of each test; seed, of all that is drawn.
    opener          what loads a model that is named (default: `handful.load`).
    progress        is told (what, done, in all).

    The document has the keys of docs/inspect.md; `handful.inspection.page.write` makes report.html of it. A Ctrl-C ends
    the reading or the ablation with what it has, and `interrupted` says so. ConfigError for a dense model, an
    encoder-decoder, a wrong setting or a model without a tokenizer; DataError for a text that cannot be split.
    """
    if against is not None and text2 is not None:
        raise ConfigError("against, text2: give one of them")
    check(tokens, ablate_tokens, level, permutations, by)
    subjects = [_opened(model, tokenizer, opener)]
    names = [_named(model)]
    if against is not None:
        subjects.append(_opened(against, tokenizer, opener))
        names.append(_named(against))
    given = [_read(text, model, column)]
    if text2 is not None:
        given.append(_read(text2, model, column))
    began = time.time()
    sides: list[dict[str, Any]] = []
    for place in range(max(len(subjects), len(given))):
        subject, name = subjects[min(place, len(subjects) - 1)], names[min(place, len(names) - 1)]
        sides.append(
            inspect_subject(
                subject, name, given[min(place, len(given) - 1)], by=by, tokens=tokens,
                context=context or min(CONTEXT, *(each.context for each in subjects)),
                ablate_tokens=ablate_tokens, level=level, permutations=permutations, seed=seed, progress=progress,
            )
        )  # fmt: skip
        if sides[-1]["interrupted"]:
            break
    return document(sides, time.time() - began)


def document(sides: Sequence[Mapping[str, Any]], seconds: float, command: str = "") -> dict[str, Any]:
    """The sides of an inspection as one document."""
    return {
        "handful": __version__,
        "command": command,
        "seconds": seconds,
        "interrupted": any(side["interrupted"] for side in sides),
        "sides": list(sides),
    }


def check(tokens: int, ablate_tokens: int, level: float, permutations: int, by: Sequence[str] | None) -> None:
    """ConfigError for a setting that cannot be."""
    for name, value, least in (
        ("tokens", tokens, 1),
        ("ablate_tokens", ablate_tokens, 0),
        ("permutations", permutations, 20),
    ):
        if value < least:
            raise ConfigError(f"{name} = {value}: at least {least}")
    if not 0 < level < 1:
        raise ConfigError(f"level = {level}: between 0 and 1")
    for kind in by or ():
        if kind not in texts.KINDS:
            raise ConfigError(f"by = {kind!r}: one of {', '.join(texts.KINDS)}")


def _opened(model: Any, tokenizer: Tokenizer | None, opener: Callable[[str], Any]) -> Subject:
    if not isinstance(model, str | Path):
        return subject_of(model, tokenizer, _named(model))
    found = opener(str(model))
    if tokenizer is None and not isinstance(found, Decoder | EncoderDecoder):
        tokenizer = load_tokenizer(find_folder(model))
    return subject_of(found, tokenizer, str(model))


def _named(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _read(
    text: str | Sequence[str] | None, model: Any, column: str | None
) -> tuple[str, list[texts.Document], list[str]]:
    if text is not None:
        return texts.read([text] if isinstance(text, str) else text, column)
    behind = text_behind(str(model), find_folder(model)) if isinstance(model, str | Path) else None
    if behind is None:
        raise ConfigError(f"text = None: {_named(model)} does not say what text it was trained on; name some")
    return texts.held_out(behind["source"], column or behind["column"])


def inspect_subject(
    subject: Subject,
    name: str,
    given: tuple[str, Sequence[texts.Document], Sequence[str]],
    *,
    by: Sequence[str] | None,
    tokens: int,
    context: int,
    ablate_tokens: int,
    level: float,
    permutations: int,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """One side: a subject on a text. See `inspect_model`."""
    text_name, documents, said = given
    if not 1 <= context <= subject.context:
        raise ConfigError(f"context = {context}: from 1 to {subject.context}, the model's")

    def tell(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total) if progress is not None else None

    chosen, windows = texts.windows(documents, subject.tokenizer, context, tokens, seed)
    differ = [kind for kind in texts.KINDS[:3] if len({d.labels[kind] for d in chosen}) > 1]
    observed, loss, whole = observe(subject, chosen, windows, by or differ, tell("reading"))
    generator = torch.Generator().manual_seed(seed)
    random = np.random.default_rng(seed)
    followed = [
        follow(observed, kind, generator, permutations, tell(f"permutations: {kind}")) for kind in kinds(observed)
    ]
    layers: list[dict[str, Any]] = [
        {"layer": layer, "top_k": k, **load_of(observed, at, random)}
        for at, (layer, k) in enumerate(zip(subject.layers, subject.top_k, strict=True))
    ]
    for at, (layer_of, repeated, paired) in enumerate(
        zip(layers, repeats(observed, level), pairs(observed, level), strict=True)
    ):
        layer_of |= {"repeats": repeated, "pairs": paired}
        layer_of["experts"] = [{"expert": e, "load": share} for e, share in enumerate(layer_of.pop("load"))]
        used_TE = observed.used_TE(at)
        uses_HE = torch.stack([used_TE[observed.half_T == half].sum(0) for half in (0, 1)])
        layer_of["judged"] = int((uses_HE >= FEW_USES).all(0).sum())
    _write_followed(layers, followed, observed, subject, level)
    side: dict[str, Any] = {
        "model": name,
        "text": text_name,
        "notes": list(said),
        "tokens": observed.tokens,
        "documents": observed.documents,
        "halves": [
            {"documents": int((observed.half_D == h).sum()), "tokens": int((observed.half_T == h).sum())}
            for h in (0, 1)
        ],
        "context": context,
        "loss": loss,
        "level": level,
        "permutations": permutations,
        "seed": seed,
        "few_uses": FEW_USES,
        "kinds": [_kind(each, layers) for each in followed],
        "layers": layers,
        "ablation": None,
        "interrupted": not whole,
    }
    if ablate_tokens and whole:
        _ablate(side, subject, windows, observed, ablate_tokens, level, seed, tell)
    side["summary"] = summary(side)
    return side


def _write_followed(
    layers: Sequence[dict[str, Any]], followed: Sequence[Followed], observed: Observed, subject: Subject, level: float
) -> None:
    """What every expert follows, into its layer: q over layers, experts and kinds together."""
    tested = [each for each in followed if not each.why_not]
    if not tested:
        return
    q = adjusted(torch.stack([torch.cat(list(each.p_E)) for each in tested]))
    for each, q_all in zip(tested, q, strict=True):
        shown = token_names(subject, each.names) if each.kind == "token" else {name: str(name) for name in each.names}
        for at, q_E in enumerate(q_all.split(list(observed.experts))):
            rows = zip(
                each.share_E[at].tolist(), each.chance_E[at].tolist(), each.agreement_E[at].tolist(),
                each.p_E[at].tolist(), each.own_E[at].tolist(), q_E.tolist(), strict=True,
            )  # fmt: skip
            for e, (share, chance, agreement, p, own, q_e) in enumerate(rows):
                if math.isnan(p):
                    layers[at]["experts"][e][each.kind] = None
                    continue
                follows = q_e <= level and own <= level
                layers[at]["experts"][e][each.kind] = {
                    "share": share, "chance": chance, "agreement": agreement, "p": p, "q": q_e, "follows": follows,
                    "most": _most(each, at, e, shown) if follows else [],
                }  # fmt: skip


def _most(each: Followed, layer: int, expert: int, shown: Mapping[Any, str]) -> list[dict[str, Any]]:
    """The labels by which an expert is chosen above its rate in both halves, those that explain most first."""
    lift_HX = each.lift_HXE[layer][:, :, expert]
    explains_X = (lift_HX - 1).prod(0) * each.count_HX.prod(0) / each.count_HX.sum(0).clamp_min(1)
    order = torch.where((lift_HX > 1).all(0), explains_X, -1.0).argsort(descending=True, stable=True)[:SHOWN]
    return [
        {"label": shown[each.names[x]], "lift": lift_HX[:, x].tolist(), "tokens": int(each.count_HX[:, x].sum())}
        for x in order.tolist()
        if bool((lift_HX[:, x] > 1).all())
    ]


def _kind(each: Followed, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [row for layer in layers for row in (e.get(each.kind) for e in layer["experts"]) if row is not None]
    return {
        "kind": each.kind,
        "why_not": each.why_not,
        "labels": len(each.names),
        "judged": len(rows),
        "follow": sum(row["follows"] for row in rows),
        "claimed": None
        if each.kind == "position" or each.kind.endswith(GIVEN)
        else sum(int((naive_E <= 0.05).sum()) for naive_E in each.naive_E),
    }


def _ablate(
    side: dict[str, Any],
    subject: Subject,
    windows: Sequence[texts.Window],
    observed: Observed,
    tokens: int,
    level: float,
    seed: int,
    tell: Callable[[str], Callable[[int, int], None]],
) -> None:
    """The cost of every expert and the redundant ones, into a side."""
    layers = side["layers"]
    some = sample(windows, tokens, seed)
    ablated = ablate(subject, some, tell("ablation"))
    found = costs(ablated, level)
    for layer_of, rows in zip(layers, found, strict=True):
        for expert, row in zip(layer_of["experts"], rows, strict=True):
            expert["ablation"] = row
    near: list[dict[str, Any]] | None = None
    whole = ablated.whole
    if whole:
        half_of = dict(enumerate(observed.half_D.tolist()))
        try:
            near = [alike(cosine_HEE) for cosine_HEE in cosines(subject, windows, half_of, tell("likeness"))]
            redundant(subject, some, ablated, near, found)
        except KeyboardInterrupt:
            whole, near = False, None
    for at, layer_of in enumerate(layers):
        layer_of["alike"] = None if near is None else near[at]
    side["interrupted"] = side["interrupted"] or not whole
    side["ablation"] = {
        "tokens": int(ablated.tokens_D.sum()),
        "documents": len(ablated.tokens_D),
        "loss": ablated.loss,
        "removal": subject.removal,
    }
