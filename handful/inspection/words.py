"""What an inspection found, in sentences: for the terminal, the page and programs that show one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["costly", "kind_words", "listed", "summary"]

GIVEN = " given token"
KIND_WORDS = {"token": "token identity"} | {kind: f"the {kind}" for kind in ("text", "folder", "suffix", "file")}


def kind_words(kind: str) -> str:
    """What a kind is called: "folder given token" is "the folder beyond token identity"."""
    if kind.endswith(GIVEN):
        return f"{kind.removesuffix(GIVEN)} beyond token identity"
    return KIND_WORDS.get(kind, kind)


def summary(side: Mapping[str, Any]) -> dict[str, Any]:
    """Counts over all layers, and the finding: the first sentence is the headline."""
    experts = [expert for layer in side["layers"] for expert in layer["experts"]]
    sentences = [_followed(side, len(experts))]
    sentences += [_load(side), *_repeats(side), *_pairs(side), *_ablation(side, experts)]
    return {
        "experts": len(experts),
        "judged": sum(layer["judged"] for layer in side["layers"]),
        "dead": sum(int(layer["dead"]["value"]) for layer in side["layers"]),
        "follow": {kind["kind"]: kind["follow"] for kind in side["kinds"] if not kind["why_not"]},
        "sentences": sentences,
    }


def _followed(side: Mapping[str, Any], total: int) -> str:
    kinds = {kind["kind"]: kind for kind in side["kinds"] if not kind["why_not"] and kind["judged"]}
    some: list[str] = []
    none: list[str] = []
    for name, kind in kinds.items():
        if name.endswith(GIVEN):
            continue
        if not kind["follow"]:
            none.append(kind_words(name))
            continue
        beyond = kinds.get(name + GIVEN)
        rest = f" (with token identity taken away, {beyond['follow']:,})" if beyond else ""
        some.append(f"{kind['follow']:,} follow {kind_words(name)}{rest}")
    said = f"Of {total:,} experts in {_count(len(side['layers']), 'layer')}, "
    if not kinds:
        return said + "nothing that they may follow could be tested on this text."
    if not some:
        return said + f"none follows {listed(none, 'or')} beyond chance in both halves of the text."
    others = f"; none follows {listed(none, 'or')}" if none else ""
    return said + f"{listed(some)}, beyond chance and in both halves of the text{others}."


def _load(side: Mapping[str, Any]) -> str:
    layers = side["layers"]
    uneven = sum(min(layer["max_vio"]["halves"]) > layer["max_vio"]["high"] for layer in layers)
    dead = sum(int(layer["dead"]["value"]) for layer in layers)
    seldom = sum(len(layer["experts"]) - layer["judged"] for layer in layers)
    said = f"The load is less even than chance in {uneven} of {_count(len(layers), 'layer')}; "
    said += f"{_count(dead, 'expert is', 'experts are') if dead else 'no expert is'} dead"
    more = seldom - dead
    return said + (
        f", and {more:,} more {'is' if more == 1 else 'are'} used too seldom to be judged." if more > 0 else "."
    )


def _repeats(side: Mapping[str, Any]) -> list[str]:
    rows = [(layer["repeats"], layer["layer"]) for layer in side["layers"]]
    beyond = [(row, name) for row, name in rows if row["beyond"]]
    if not rows:
        return []
    if not beyond:
        return ["Consecutive tokens share their first expert no more often than chance, in any layer."]
    row, name = max(beyond, key=lambda pair: pair[0]["rate"] - pair[0]["within_documents"])
    return [
        f"Consecutive tokens share their first expert more often than chance in {len(beyond)} of "
        f"{_count(len(rows), 'layer')}: {row['rate']:.1%} in layer {name}, where each document's own load gives "
        f"{row['within_documents']:.1%} and an even one {row['even']:.1%}."
    ]


def _pairs(side: Mapping[str, Any]) -> list[str]:
    tested = sum(layer["pairs"]["tested"] for layer in side["layers"])
    if not tested:
        return []
    above, below = (sum(layer["pairs"][sign] for layer in side["layers"]) for sign in ("above", "below"))
    return [
        f"Of {tested:,} pairs of experts, {above:,} meet more often than chance and {below:,} less, in both halves."
    ]


def _ablation(side: Mapping[str, Any], experts: Sequence[Mapping[str, Any]]) -> list[str]:
    if side["ablation"] is None:
        return []
    rows = [expert["ablation"] for expert in experts]
    measured = [row for row in rows if row["cost"] is not None]
    cost = [row for row in measured if row["beyond"] and row["cost"] > 0]
    gain = [row for row in measured if row["beyond"] and row["cost"] < 0]
    said = f"Switched off alone, {len(cost):,} of {_count(len(measured), 'expert')} cost"
    said += f"{'s' * (len(cost) == 1)} the loss something beyond noise"
    found = costly(side)
    if found and cost:
        layer, expert, row = found[0]
        said += f"; the dearest, expert {expert} of layer {layer}, {row['cost']:.4f} ± {row['error']:.4f} nats a token"
    said += f"; {_count(len(gain), 'one makes', 'ones make')} it lower." if gain else "."
    if any(layer["alike"] is None for layer in side["layers"]):  # interrupted before
        return [said]
    pairs = [pair for layer in side["layers"] for pair in layer["alike"]["pairs"]]
    spare = sum(pair["redundant"] for pair in pairs)
    free = _count(spare, "pair is redundant", "pairs are redundant") if spare else "no pair is redundant"
    if not pairs:
        return [said, f"{free[0].upper()}{free[1:]}."]
    near = _count(len(pairs), "pair of experts gives", "pairs of experts give")
    return [said, f"{near} outputs far more alike than others; {free}."]


def costly(side: Mapping[str, Any]) -> list[tuple[str, int, Mapping[str, Any]]]:
    """(layer, expert, cost) of all that were measured, the dearest first."""
    rows = [
        (layer["layer"], expert["expert"], expert["ablation"])
        for layer in side["layers"]
        for expert in layer["experts"]
        if expert.get("ablation") and expert["ablation"]["cost"] is not None
    ]
    return sorted(rows, key=lambda row: -row[2]["cost"])


def listed(items: Sequence[str], last: str = "and") -> str:
    """a, b and c."""
    return f" {last} ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
