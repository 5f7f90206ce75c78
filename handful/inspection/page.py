"""An inspection as one self-contained HTML file, with its JSON beside it.

Python renders what must be there without JavaScript: the finding, the tables, the charts of layers, what every expert
is chosen for. The script `web/inspect.js` draws the maps of experts from a JSON block in the page. Nothing is fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from handful.checkpoint import write_file
from handful.inspection.tables import costs, experts, layers, pairs, side_by_side, visible
from handful.inspection.words import kind_words
from handful.report import script_json
from handful.units import duration

__all__ = ["write"]

Doc = Mapping[str, Any]


def write(document: Doc, folder: str | Path) -> Path:
    """Write `report.html` and `inspect.json` into a folder, each whole or not at all, and return the page's path."""
    folder = Path(folder)
    write_file(folder / "inspect.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    write_file(folder / "report.html", _page(document).encode("utf-8", "replace"))
    return folder / "report.html"


def _page(doc: Doc) -> str:
    web = resources.files("handful") / "web"
    sides = doc["sides"]
    names = _names(sides)
    title = "What the experts do"
    parts = {
        "title": escape(title),
        "byline": escape(f"Handful {doc['handful']} · " + "; ".join(_byline(side) for side in sides)),
        "finding": "".join(
            _finding(side, name if len(sides) > 1 else "") for side, name in zip(sides, names, strict=True)
        ),
        "banners": _banners(doc),
        "table": side_by_side(sides, names),
        "layers": layers(sides, names),
        "costs": _per_side(sides, names, costs),
        "pairs": _per_side(sides, names, pairs),
        "experts": _per_side(sides, names, experts),
        "level": f"{sides[0]['level']:.0%}",
        "permutations": f"{sides[0]['permutations']:,}",
        "made": _made(doc, names),
        "data": script_json(_view(sides, names)),
        "css": "".join((web / name).read_text("utf-8") for name in ("report.css", "inspect.css")),
        "js": "".join((web / name).read_text("utf-8") for name in ("parts.js", "inspect.js")),
    }
    # One pass: braces in what is filled in stay what they are.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], (web / "inspect.html").read_text("utf-8"))


def _names(sides: Sequence[Doc]) -> list[str]:
    """What tells the sides apart."""
    differ = "model" if len({side["model"] for side in sides}) > 1 else "text"
    return [side[differ] for side in sides]


def _byline(side: Doc) -> str:
    return f"{side['model']} on {side['text']}, {side['tokens']:,} tokens of {side['documents']:,} documents"


def _finding(side: Doc, name: str) -> str:
    first, *rest = side["summary"]["sentences"]
    head = f'<h2 class="side">{escape(name)}</h2>' if name else ""
    return f'{head}<p class="finding">{escape(first)}</p><p>{escape(" ".join(rest))}</p>'


def _banners(doc: Doc) -> str:
    notes = [note for side in doc["sides"] for note in side["notes"]]
    if doc["interrupted"]:
        notes.insert(0, "It was interrupted: what is here is of what was read until then.")
    if not notes:
        return ""
    return f'<div class="banner"><ul>{"".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes))}</ul></div>'


def _per_side(sides: Sequence[Doc], names: Sequence[str], render: Callable[[Doc], str]) -> str:
    if len(sides) == 1:
        return render(sides[0])
    parts = (
        f'<div><h3 class="side">{escape(name)}</h3>{render(side)}</div>'
        for side, name in zip(sides, names, strict=True)
    )
    return f'<div class="sides">{"".join(parts)}</div>'


# ---------------------------------------------------------------------------------------------------------------------
# How it was made; what the script draws.


def _made(doc: Doc, names: Sequence[str]) -> str:
    rows = {"Command": f"<code>{escape(doc['command'])}</code>"} if doc["command"] else {}
    for side, name in zip(doc["sides"], names, strict=True):
        a, b = side["halves"]
        rows[escape(name)] = escape(
            f"{side['model']} on {side['text']}: {side['tokens']:,} tokens, in windows of {side['context']:,}; halves "
            f"of {a['documents']:,} and {b['documents']:,} documents, {a['tokens']:,} and {b['tokens']:,} tokens; "
            f"seed {side['seed']}"
        )
    rows["Time"] = duration(doc["seconds"])
    return '<dl class="facts">' + "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows.items()) + "</dl>"


def _view(sides: Sequence[Doc], names: Sequence[str]) -> Doc:
    """What the page's script draws: for each map the values of all sides, layer by layer."""
    kinds = list(dict.fromkeys(k["kind"] for side in sides for k in side["kinds"] if not k["why_not"]))

    def cells(side: Doc, read: Callable[[Doc], Any]) -> list[list[Any]]:
        return [[read(expert) for expert in layer["experts"]] for layer in side["layers"]]

    def follows(kind: str) -> Callable[[Doc], Any]:
        def read(expert: Doc) -> Any:
            found = expert.get(kind)
            if found is None:
                return None
            most = [[visible(top["label"]), *top["lift"]] for top in found["most"][:3]]
            return [found["share"], found["chance"], found["agreement"], found["q"], int(found["follows"]), most]

        return read

    def cost(expert: Doc) -> Any:
        row = expert.get("ablation")
        return None if row is None or row["cost"] is None else [row["cost"], row["error"], row["q"], int(row["beyond"])]

    maps = [{"id": "load", "kind": "load", "cells": [cells(side, lambda e: e["load"]) for side in sides]}]
    maps += [
        {
            "id": re.sub(r"\W+", "-", kind),
            "kind": "follow",
            "name": kind_words(kind),
            "cells": [cells(s, follows(kind)) for s in sides],
        }
        for kind in kinds
    ]
    if any(side["ablation"] for side in sides):
        maps.append({"id": "cost", "kind": "cost", "cells": [cells(side, cost) for side in sides]})
    return {
        "names": list(names),
        "layers": [[layer["layer"] for layer in side["layers"]] for side in sides],
        "maps": maps,
    }
