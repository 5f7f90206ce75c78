"""Draws the pictures of what-is-a-mixture.md from a comparison: `python docs/pictures.py runs/demo/compare.json`.

docs/mixture-seats.svg         three teams: parameters, and those at work
docs/mixture-way.svg           one token in one layer: scores, the chosen, their parts
docs/mixture-apprentices.svg   experts touched as a text grows
docs/mixture-experts.svg       what the busiest experts of the first layer compute most often
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from handful.checkpoint import write_file
from handful.observe import touched
from handful.picture import COLUMNS, dots
from handful.units import si

__all__ = ["PICTURES", "draw"]

STYLE = """
.bg{fill:#fff}.t{fill:#1d2129}.s{fill:#5a6372}.on{fill:#d9822b}.off{fill:none;stroke:#d9822b;opacity:.5}
.d1{fill:#3a72b0}.d3{fill:#69806b}.bar{fill:#c4c9d1}.l{stroke:#8a93a1;stroke-width:1.5;fill:none}
.g{stroke:#dcdfe4;fill:none}.c0{stroke:#3a72b0}.c1{stroke:#8a6f9e}.c2{stroke:#d9822b}.c{stroke-width:2.2;fill:none}
.box{fill:none;stroke:#c4c9d1}.h{paint-order:stroke;stroke:#fff;stroke-width:8px}.m{font-family:ui-monospace,Menlo,Consolas,monospace}
@media (prefers-color-scheme:dark){.bg{fill:#14171c}.t{fill:#e8eaee}.s{fill:#a3abb8}.bar,.box{stroke:#4a515d}
.bar{fill:#4a515d}.g{stroke:#2b3038}.h{stroke:#14171c}}
"""


def svg(width: int, height: int, label: str, *parts: str) -> str:
    """A picture with a ground of its own, light or dark as the reader's."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', sans-serif\">\n"
        f'<style>{STYLE}</style>\n<rect class="bg" width="{width}" height="{height}" rx="8"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(
    x: float, y: float, words: str, kind: str = "t", size: float = 14, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight}'
    return f'<text class="{kind}" {place}>{escape(words)}</text>'


def seats(doc: Mapping[str, Any]) -> str:
    largest = max(team["parameters"]["total"] for team in doc["teams"])
    kinds = ("d1", "on", "d3")
    parts, said = [], []
    for i, (team, kind) in enumerate(zip(doc["teams"], kinds, strict=True)):
        left = 30 + 290 * i
        total, active = team["parameters"]["total"], team["parameters"]["active"]
        parts.append(text(left, 36, team["label"], size=16, bold=True))
        for n, on in enumerate(dots(total, active, largest, team["model"]["router"])):
            cx, cy = left + 6 + 12 * (n % COLUMNS), 62 + 12 * (n // COLUMNS)
            parts.append(f'<circle class="{kind if on else "off"}" cx="{cx}" cy="{cy}" r="4.4"/>')
        lines = (
            f"{si(total, short=True)} parameters in memory",
            f"{si(active, short=True)} at work for one token",
            f"held-out loss {team['heldout_loss']['mean']:.3f}",
        )
        parts += [text(left, 182 + 22 * n, line, "t" if n == 2 else "s") for n, line in enumerate(lines)]
        said.append(f"{team['label']}: {', '.join(lines)}")
    return svg(880, 246, ". ".join(said), *parts)


def the_way(doc: Mapping[str, Any]) -> str:
    way, pieces = doc["lesson"]["way"], doc["sample"]["pieces"]
    one = max(way["tokens"], key=lambda token: (sum(c.isalpha() for c in pieces[token["at"]]), -token["at"]))
    at, piece = one["layers"][0], pieces[one["at"]].strip()
    before = "".join(pieces[max(0, one["at"] - 6) : one["at"]]).replace("\n", "↵")
    scores, experts = at["scores"], at["experts"]
    left, wide, tall, foot = 150, 700, 92, 132
    each = wide / len(scores)
    most = max(scores)
    parts = [
        text(30, 62, before[-14:], "s m", 13),
        text(30, 86, piece, "t m", 20, bold=True),
        text(30, 108, "a token", "s", 13),
        text(
            left, 28, f"1 · The router scores all {len(scores)} experts of layer {way['layers'][0]}", size=14, bold=True
        ),
    ]
    for e, score in enumerate(scores):
        high = max(1.5, tall * score / most)
        x, kind = left + e * each + 1, "on" if e in experts else "bar"
        size = f'width="{each - 2:.1f}" height="{high:.1f}"'
        parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{foot - high:.1f}" {size}/>')
    said, y, end = [], foot + 6, left + wide / 2
    room = wide / len(experts)
    for k, expert in enumerate(experts):
        x, box = left + (expert + 0.5) * each, left + (k + 0.5) * room
        share, weight = at["shares"][k], at["weights"][k]
        shape = f'x="{box - room / 2 + 12:.1f}" y="{y + 46}" width="{room - 24:.1f}" height="62"'
        parts += [
            f'<path class="l" d="M{x:.1f} {y}C{x:.1f} {y + 34} {box:.1f} {y + 14} {box:.1f} {y + 46}"/>',
            f'<rect class="box" {shape} rx="8"/>',
            text(box, y + 70, f"expert {expert}, weight {weight:.3f}", anchor="middle", bold=True),
            text(box, y + 94, f"{share:.0%} of the blend, score {scores[expert]:.3f}", "s", 13, "middle"),
            f'<path class="l" d="M{box:.1f} {y + 108}C{box:.1f} {y + 140} {end} {y + 116} {end} {y + 148}"/>',
        ]
        said.append(f"expert {expert} with weight {weight:.3f}")
    values = ", ".join(f"{value:.2f}" for value in at["blend"][:4])
    chosen = f"2 · {len(experts)} of them are chosen; {len(scores) - len(experts)} rest"
    parts += [
        text(end, 166, chosen, "t h", anchor="middle", bold=True),
        text(end, 304, f"3 · The blend: {values}, …", anchor="middle", bold=True),
        text(end, 326, "is added to the token’s row, and the next layer goes on", "s", 13, "middle"),
    ]
    label = f"The token {piece}: {len(scores)} experts are scored, {' and '.join(said)} are chosen and blended."
    return svg(880, 346, label, *parts)


def apprentices(doc: Mapping[str, Any]) -> str:
    sample = doc["sample"]
    router = next(team["model"]["router"] for team in doc["teams"] if team["model"]["router"])
    experts: int = router["experts"]
    counts = [touched(layer) for layer in sample["experts"]]
    last = len(counts[0])
    left, right, top, foot = 60, 740, 30, 250

    def x(t: float) -> float:
        return left + (right - left) * math.log(t) / math.log(last)

    def y(n: float) -> float:
        return foot - (foot - top) * n / experts

    parts = []
    for n in range(0, experts + 1, max(1, experts // 4)):
        parts += [
            f'<path class="g" d="M{left} {y(n):.1f}H{right}"/>',
            text(left - 10, y(n) + 5, str(n), "s", 13, "end"),
        ]
    for t in (1, 2, 5, 10, 20, 50, 100, 200):
        if t <= last:
            parts.append(text(x(t), foot + 22, str(t), "s", 13, "middle"))
    for i, layer in enumerate(counts):
        line = "L".join(f"{x(t):.1f},{y(n):.1f}" for t, n in enumerate(layer, 1))
        parts.append(f'<path class="c c{i % 3}" d="M{line}"/>')
    ends = _apart([y(layer[-1]) for layer in counts], 17)
    parts += [
        text(right + 10, end + 5, f"layer {sample['layers'][i]}: {counts[i][-1]}", "t", 13)
        for i, end in enumerate(ends)
    ]
    parts.append(text((left + right) / 2, foot + 46, "tokens read", "s", 13, "middle"))
    parts.append(text(left, 20, f"different experts touched, of {experts}", "s", 13))
    label = f"Experts touched: {counts[0][0]} by one token, {', '.join(str(layer[-1]) for layer in counts)} by {last}."
    return svg(880, 310, label, *parts)


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """The heights of labels, moved so that none stands on another."""
    out = list(heights)
    order = sorted(range(len(out)), key=lambda i: out[i])
    for before, after in pairwise(order):
        out[after] = max(out[after], out[before] + least)
    return out


def busiest(doc: Mapping[str, Any]) -> str:
    layer = doc["lesson"]["experts"]["layers"][0]
    cards = sorted(enumerate(layer["cards"]), key=lambda pair: -pair[1]["load"])[:4]
    parts, said = [], []
    for i, (expert, card) in enumerate(cards):
        left = 24 + 212 * i
        parts += [
            f'<rect class="box" x="{left}" y="20" width="196" height="196" rx="8"/>',
            text(left + 14, 46, f"expert {expert}", size=15, bold=True),
            text(left + 14, 66, f"{card['load']:.1%} of the work", "s", 13),
        ]
        for n, (piece, here, of) in enumerate(card["tokens"][:6]):
            shown = piece.replace("\n", "↵").replace(" ", "␣")
            shown = shown if len(shown) <= 12 else shown[:11] + "…"
            parts += [
                text(left + 14, 92 + 20 * n, shown, "t m", 13),
                text(left + 182, 92 + 20 * n, f"{here} of {of}", "s", 13, "end"),
            ]
        said.append(f"expert {expert}: {', '.join(piece.strip() or 'spaces' for piece, _, _ in card['tokens'][:3])}")
    return svg(880, 236, f"Tokens of the busiest experts of layer {layer['layer']}. {'; '.join(said)}", *parts)


PICTURES = {
    "mixture-seats.svg": seats,
    "mixture-way.svg": the_way,
    "mixture-apprentices.svg": apprentices,
    "mixture-experts.svg": busiest,
}


def draw(doc: Mapping[str, Any], folder: Path) -> None:
    """All pictures of a comparison of three teams."""
    for name, picture in PICTURES.items():
        write_file(folder / name, picture(doc).encode("utf-8", "replace"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/pictures.py runs/demo/compare.json")
    draw(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(__file__).parent)
