"""The tables and small charts of an inspection's page, as HTML: what is there without JavaScript."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from handful.inspection.words import costly, kind_words

__all__ = ["costs", "experts", "layers", "pairs", "side_by_side", "visible"]

Doc = Mapping[str, Any]
Cell = tuple[str, str]  # a value, and the note below it
DEAREST = 20  # experts in the table of costs


# ---------------------------------------------------------------------------------------------------------------------
# The table: measures down, sides across; below a value its chance level and its halves.


def side_by_side(sides: Sequence[Doc], names: Sequence[str]) -> str:
    """Every measure, a column for each side."""
    kinds = dict.fromkeys(kind["kind"] for side in sides for kind in side["kinds"])
    groups: dict[str, dict[str, list[Cell]]] = {
        "What it is": {
            "Experts": [(f"{s['summary']['experts']:,}", f"in {len(s['layers']):,} layers") for s in sides],
            "Used often enough to be judged": [
                (f"{s['summary']['judged']:,}", f"{s['few_uses']} times in each half") for s in sides
            ],
            'Loss <span class="unit">nats/token</span>': [(f"{s['loss']:.3f}", "") for s in sides],
        },
        "Load, mean of layers": {
            "MaxVio": [_mean(s, "max_vio", "{:.2f}") for s in sides],
            "Entropy": [_mean(s, "entropy", "{:.3f}") for s in sides],
            "Dead experts, of all layers": [(f"{s['summary']['dead']:,}", "") for s in sides],
            "Same first expert on consecutive tokens": [_repeats(s) for s in sides],
        },
        "Experts that follow, in both halves": {_title(kind): [_kind(s, kind) for s in sides] for kind in kinds},
        "Experts together": {
            "Pairs that meet more than chance": [_met(s, "above") for s in sides],
            "Pairs that meet less": [_met(s, "below") for s in sides],
        },
    }
    if any(side["ablation"] for side in sides):
        groups["Switched off alone"] = {
            "Experts that cost something": [_cost(s, 1) for s in sides],
            "Experts without which the loss is lower": [_cost(s, -1) for s in sides],
            "Redundant pairs": [_redundant(s) for s in sides],
        }
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = ""
    for title, rows in groups.items():
        body += f'<tr class="group"><th scope="rowgroup" colspan="{len(sides) + 1}">{title}</th></tr>'
        for measure, cells in rows.items():
            values = "".join(f"<td>{value}<small>{note}</small></td>" for value, note in cells)
            body += f'<tr><th scope="row">{measure}</th>{values}</tr>'
    style = "measures facts-table" + " single" * (len(sides) == 1)
    return f'<table class="{style}"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'


def _title(kind: str) -> str:
    return escape(kind_words(kind).removeprefix("the ").capitalize())


def _mean(side: Doc, name: str, form: str) -> Cell:
    rows = [layer[name] for layer in side["layers"]]
    value, chance, one, two = (
        form.format(sum(values) / len(rows))
        for values in zip(*((row["value"], row["chance"], *row["halves"]) for row in rows), strict=True)
    )
    return value, f"chance {chance} · halves {one} and {two}"


def _repeats(side: Doc) -> Cell:
    rows = [layer["repeats"] for layer in side["layers"]]
    value, chance, even, one, two = (
        f"{sum(values) / len(rows):.1%}"
        for values in zip(*((r["rate"], r["within_documents"], r["even"], *r["halves"]) for r in rows), strict=True)
    )
    return value, f"chance {chance} (even {even}) · halves {one} and {two}"


def _kind(side: Doc, name: str) -> Cell:
    kind = next((kind for kind in side["kinds"] if kind["kind"] == name), None)
    if kind is None:
        return "—", "no labels that differ"
    if kind["why_not"]:
        return "—", escape(f"not tested: {kind['why_not']}")
    bare = "" if kind["claimed"] is None else f" · {kind['claimed']:,} without these controls"
    return f"{kind['follow']:,}", f"of {kind['judged']:,}{bare}"


def _met(side: Doc, sign: str) -> Cell:
    tested = sum(layer["pairs"]["tested"] for layer in side["layers"])
    if not tested:
        return "—", "not tested"
    return f"{sum(layer['pairs'][sign] for layer in side['layers']):,}", f"of {tested:,}"


def _cost(side: Doc, sign: int) -> Cell:
    if side["ablation"] is None:
        return "—", "not measured"
    rows = [row for _, _, row in costly(side)]
    return f"{sum(row['beyond'] and row['cost'] * sign > 0 for row in rows):,}", f"of {len(rows):,}"


def _redundant(side: Doc) -> Cell:
    if side["ablation"] is None or any(layer["alike"] is None for layer in side["layers"]):
        return "—", "not measured"
    pairs = [pair for layer in side["layers"] for pair in layer["alike"]["pairs"]]
    return f"{sum(pair['redundant'] for pair in pairs):,}", f"of {len(pairs):,} that are alike"


# ---------------------------------------------------------------------------------------------------------------------
# Layer by layer: small charts, the same scale for all sides.

# Title, what it is, the key of a layer, those of its chance level and value, and how values are written.
_CHARTS = (
    ("Same first expert", "Consecutive tokens with one first expert. Dotted: each document’s own load, in any order.",
     "repeats", "rate", "within_documents", "{:.0%}"),
    ("MaxVio", "How far the busiest expert is above the even load. Dotted: an even router, by chance.",
     "max_vio", "value", "chance", "{:.1f}"),
    ("Entropy of the load", "1 is even, 0 is one expert for all. Dotted: an even router, by chance.",
     "entropy", "value", "chance", "{:.2f}"),
)  # fmt: skip


def layers(sides: Sequence[Doc], names: Sequence[str]) -> str:
    """Small charts of every layer, on the same scale for all sides."""
    out = ""
    for title, note, key, value, chance, form in _CHARTS:
        points = [
            [(layer[key][value], layer[key][chance], layer[key]["halves"]) for layer in side["layers"]]
            for side in sides
        ]
        flat = [x for rows in points for at, by_chance, halves in rows for x in (at, by_chance, *halves)]
        low, high = (min(flat) - 0.02, 1.0) if key == "entropy" else (0.0, max(flat) * 1.08 or 1.0)
        charts = ""
        for side, name, rows in zip(sides, names, points, strict=True):
            labels = [str(layer["layer"]) for layer in side["layers"]]
            head = f'<p class="side">{escape(name)}</p>' if len(sides) > 1 else ""
            charts += head + _chart(title, labels, rows, low, high, form)
        out += f"<div><h3>{title}</h3><p>{note}</p>{charts}</div>"
    return f'<div class="trio">{out}</div>'


def _chart(
    title: str,
    labels: Sequence[str],
    rows: Sequence[tuple[float, float, Sequence[float]]],
    low: float,
    high: float,
    form: str,
) -> str:
    """Dots for the layers, a bar between the halves, a dotted line for chance."""
    width, height, left, top, bottom = 320, 150, 40, 8, 30

    def x(i: int) -> float:
        return round(left + (i + 0.5) * (width - left - 8) / len(rows), 1)

    def y(value: float) -> float:
        return round(top + (height - top - bottom) * (high - value) / ((high - low) or 1), 1)

    said = "; ".join(
        f"layer {label} {form.format(value)}, chance {form.format(chance)}"
        for label, (value, chance, _) in zip(labels, rows, strict=True)
    )
    parts = []
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4}" text-anchor="end">{form.format(value)}</text>')
    step = max(1, -(-len(rows) // 12))
    half = round((width - left - 8) / len(rows) / 2, 1)
    by_chance = "chance" if len(rows) <= 12 else "chance whole"
    for i, (label, (value, chance, halves)) in enumerate(zip(labels, rows, strict=True)):
        if i % step == 0:
            parts.append(f'<text x="{x(i)}" y="{height - 14}" text-anchor="middle">{escape(label)}</text>')
        span = f'x1="{x(i) - half:.1f}" x2="{x(i) + half:.1f}"'
        parts.append(f'<line class="{by_chance}" {span} y1="{y(chance)}" y2="{y(chance)}"/>')
        parts.append(f'<line class="halves" x1="{x(i)}" x2="{x(i)}" y1="{y(min(halves))}" y2="{y(max(halves))}"/>')
        parts.append(f'<circle class="value" cx="{x(i)}" cy="{y(value)}" r="3.5"/>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 1}" text-anchor="middle">layer</text>')
    aria = escape(f"{title} by layer: {said}")
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{aria}">{"".join(parts)}</svg>'


# ---------------------------------------------------------------------------------------------------------------------
# Costs, pairs, experts.


def _grid(heads: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A table that scrolls by itself; the cells are HTML."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        "<tr>" + f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="list">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def costs(side: Doc) -> str:
    """What each expert costs: how it was measured, and the dearest."""
    done = side["ablation"]
    if done is None:
        return '<p class="note">Not measured: asked for without ablation, or interrupted before it.</p>'
    how = (
        "The router takes the next best expert in its place."
        if done["removal"] == "replaced"
        else "Its output is left out, and nothing takes its place."
    )
    said = (
        f"{done['tokens']:,} held-out tokens of {done['documents']:,} documents, {done['loss']:.4f} with all experts."
    )
    rows = costly(side)
    beyond = [row for row in rows if row[2]["beyond"]]
    table = _grid(
        ("Layer, expert", "nats/token", "± error", "q"),
        [
            (f"{layer}, {expert}", f"{row['cost']:.4f}", _number(row["error"]), _small(row["q"]))
            for layer, expert, row in (beyond or rows)[:DEAREST]
        ],
        "What each expert costs",
    )
    what = "The dearest of those beyond noise" if beyond else "None is beyond noise; the dearest"
    return f'<p class="how">{said} {how}</p><details><summary>{what}</summary>{table}</details>'


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    return "—" if value is None else f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def pairs(side: Doc) -> str:
    """Pairs beyond chance, and experts that are alike."""
    rows = [
        (_two(layer, pair), *(f"{lift:.2f}×" for lift in pair["lift"]), f"{pair['tokens']:,}")
        for layer in side["layers"]
        for pair in (*layer["pairs"]["most"], *layer["pairs"]["least"])
    ]  # fmt: skip
    out = ""
    if rows:
        table = _grid(("Layer: experts", "half 1", "half 2", "tokens"), rows, "Pairs that meet, against chance")
        out += f"<details><summary>Pairs that meet most and least beyond chance, by layer</summary>{table}</details>"
    else:
        out += '<p class="note">No pair of experts meets more or less often than chance in both halves.</p>'
    if side["ablation"] is None or any(layer["alike"] is None for layer in side["layers"]):
        return out + '<p class="note">Whether experts are alike was not measured.</p>'
    alike = [
        (
            _two(layer, pair),
            " and ".join(f"{x:.2f}" for x in pair["cosine"]), f"{layer['alike']['quartiles'][1]:.2f}",
            "yes" if pair["redundant"] else "no",
            f"{pair['together']['cost']:.4f} ± {pair['together']['error']:.4f}" if pair["together"] else "—",
        )
        for layer in side["layers"]
        for pair in layer["alike"]["pairs"]
    ]  # fmt: skip
    if not alike:
        return out + '<p class="note">No two experts of a layer give outputs that are far more alike than others’.</p>'
    heads = ("Layer: experts", "cosine, halves", "median pair", "redundant", "both off, nats/token")
    spare = sum(row[3] == "yes" for row in alike)
    title = f"Experts whose outputs are alike: {len(alike):,}, of which redundant {spare:,}"
    return out + f"<details{' open' if spare else ''}><summary>{title}</summary>{_grid(heads, alike, title)}</details>"


def _two(layer: Doc, pair: Doc) -> str:
    return f"{layer['layer']}: {pair['experts'][0]} and {pair['experts'][1]}"


def experts(side: Doc) -> str:
    """A table of each layer's experts, folded."""
    kinds = [kind["kind"] for kind in side["kinds"] if not kind["why_not"]]
    out = ""
    for layer in side["layers"]:
        rows = []
        for expert in layer["experts"]:
            cells = [str(expert["expert"]), f"{100 * expert['load']:.2f} %"]
            cells += [_followed(expert[kind]) for kind in kinds]
            if side["ablation"]:
                row = expert["ablation"]
                cells.append(
                    "—"
                    if row["cost"] is None
                    else f"{row['cost']:+.4f}{'' if row['beyond'] else ' <small>noise</small>'}"
                )
            rows.append(cells)
        heads = [
            "Expert",
            "Load",
            *map(_title, kinds),
            *(["Cost"] if side["ablation"] else []),
        ]
        table = _grid(heads, rows, f"Experts of layer {layer['layer']}")
        out += f"<details><summary>Layer {escape(str(layer['layer']))}</summary>{table}</details>"
    return out


def _followed(found: Doc | None) -> str:
    if found is None:
        return "<small>too seldom</small>"
    if not found["follows"]:
        return "<small>not beyond chance</small>"
    labels = " ".join(
        f'<span class="token">{escape(visible(top["label"]))}</span>&nbsp;<small>{min(top["lift"]):.1f}×</small>'
        for top in found["most"][:4]
    )
    return f"{_percent(found['share'])} {labels}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.01 else f"{100 * share:.2g} %"


def visible(text: str) -> str:
    """A token as it can be seen; of a run of spaces, how many."""
    text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return re.sub("␣{4,}", lambda match: f"{len(match[0])}␣", text) or "∅"
