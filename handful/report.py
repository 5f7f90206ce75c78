"""A comparison, or one training run, as one self-contained HTML file.

Python renders what must be there without JavaScript: the headline and its picture, the finding, the warnings, the
table, the words, the settings. The scripts of `web/` draw curves, load, the lesson and the text sample from a JSON
block in the page. Nothing is fetched.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch

from handful import __version__
from handful.checkpoint import write_file
from handful.config import ModelConfig
from handful.config_io import from_dict
from handful.errors import DataError
from handful.finding import (
    Doc,
    finding,
    finite,
    headline,
    late_routing,
    loss_of,
    mixtures_of,
    team_balance,
    team_experts,
)
from handful.observe import collapsed, kept, touched
from handful.picture import picture
from handful.terms import TERMS
from handful.units import PREFIXES, size

__all__ = [
    "collapse",
    "finding",
    "from_events",
    "headline",
    "routing_history",
    "script_json",
    "speed_range",
    "stability",
    "write",
]

_ROUTING = ("tokens", "load", "max_vio", "dead", "entropy", "dropped")
_DENSE_COLORS = {"dense-active": "var(--dense-active)", "dense-total": "var(--dense-total)"}
_MIXTURE_COLORS = ("var(--moe)", "var(--moe-2)", "var(--moe-3)", "var(--moe-4)", "var(--moe-5)")
# The page's scripts, in this order.
SCRIPTS = ("parts.js", "chart.js", "load.js", "way.js", "experts.js", "teams.js", "report.js")
MAX_SNAPSHOTS = 200  # of the load, kept in a page: more are finer than a slider's pixels and only make the file large


def from_events(
    events: Iterable[Doc], *, title: str = "Training run", command: str = "", machine: Doc | None = None
) -> dict[str, Any]:
    """The comparison document of one run, from its events (the lines of `RUN/events.jsonl`, parsed).

    A resumed run repeats the steps after its last checkpoint: what was recorded later counts. A run that was cut short
    gives what it has; without any evaluation its held-out loss is None. DataError if there is no "start" event.
    """
    events = _kept(events)
    start = next((event for event in events if event["event"] == "start"), None)
    if start is None:
        raise DataError("events: no 'start' event; a run's events begin with one")

    def one_seed(value: float | None) -> Doc:
        return {"mean": value, "spread": 0.0, "values": [] if value is None else [value]}

    router = from_dict(ModelConfig, start["model"]).router
    evals, ends = _of_kind("eval", events), _of_kind("end", events)
    final: Doc = (ends or evals or [{}])[-1]
    speed: Doc = (ends or _of_kind("step", events) or [{}])[-1]
    flops = start["train_flops_per_token"]
    team = {
        "name": "moe" if router else "dense-active",
        "label": f"mixture of {router.experts} experts, {router.top_k} per token" if router else "dense model",
        "model": start["model"],
        "parameters": start["parameters"],
        "train_flops_per_token": flops,
        "weight_bytes": 4 * start["parameters"]["total"],  # trained weights are float32, under bfloat16 autocast too
        "lr": start["train"]["lr"],
        "balance": start["train"]["balance"],
        "heldout_loss": one_seed(final.get("loss")),
        "bits_per_byte": one_seed(final.get("bits_per_byte")),
        "train_tokens_per_second": speed.get("tokens_per_second"),
        "train_range": speed_range(events),
        "decode_tokens_per_second": None,
        "decode_range": None,
        "train_seconds": speed.get("seconds"),
        "reached": None,
        "curve": [
            {key: e[key] for key in ("tokens", "seconds", "loss")}
            | {"flops": e["tokens"] * flops, "low": e["loss"], "high": e["loss"]}
            for e in evals
        ],
        "routing": routing_history(events),
        "stability": stability(events),
        "warnings": [f"step {event['step']}: {event['message']}" for event in _of_kind("warning", events)],
    }
    return {
        "title": title,
        "handful": __version__,
        "machine": dict(machine or {}) | {key: start[key] for key in ("device", "threads", "dtype")},
        "data": start["data"],
        "seeds": [start["train"]["seed"]],
        "train": start["train"],
        "command": command,
        "teams": [team],
        "sample": None,
        "lesson": None,
    }


def speed_range(events: Iterable[Doc]) -> list[float] | None:
    """The slowest and the quickest tenth of a training, in tokens per second. None: fewer than two steps.

    The first step counts for neither: it warms up.
    """
    steps = _of_kind("step", _kept(events))
    at = sorted({round(i * (len(steps) - 1) / 10) for i in range(11)}) if len(steps) > 1 else []
    marks = [(steps[i]["tokens"], steps[i]["seconds"]) for i in at]
    rates = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(marks) if b[1] > a[1]]
    return [min(rates), max(rates)] if rates else None


def routing_history(events: Iterable[Doc]) -> dict[str, Any] | None:
    """A run's routing events as a comparison's `routing`: a list per statistic, an item per event. None: no events."""
    found = _of_kind("routing", _kept(events))
    steps = {"steps": [event["step"] for event in found]}
    return steps | {name: [event[name] for event in found] for name in _ROUTING} if found else None


def stability(events: Iterable[Doc]) -> list[dict[str, Any]]:
    """How much of a run's routing stays: an item per evaluation but the first, a value per MoE layer.

    kept    the share of the choices of one held-out text that are those of the evaluation before.
    final   the share that the last evaluation has too.
    """
    found = [event for event in _of_kind("eval", _kept(events)) if "choices" in event]
    return [
        {
            "step": now["step"],
            "tokens": now["tokens"],
            "kept": [kept(*layers) for layers in zip(before["choices"], now["choices"], strict=True)],
            "final": [kept(*layers) for layers in zip(now["choices"], found[-1]["choices"], strict=True)],
        }
        for before, now in pairwise(found)
    ]


def collapse(routing: Doc, top_k: int) -> dict[int, str]:
    """Why routing collapsed, by the place of the layer among the MoE layers; a layer where it did not is left out.

    Judged by `observe.collapsed` on the load over the last fifth of the record, so that an early stumble is forgiven.
    """
    late = max(1, round(len(routing["load"]) / 5))
    load_LE = torch.tensor(routing["load"][-late:]).mean(0)
    return {layer: why for layer, load_E in enumerate(load_LE) if (why := collapsed(load_E, top_k))}


def _kept(events: Iterable[Doc]) -> list[Doc]:
    """The events without those that a resumed run did again."""
    kept: list[Doc] = []
    for event in events:
        # A "step" opens its step, so that what stands there already is from before the run was cut short.
        first = event.get("step", math.inf) + (event["event"] != "step")
        while kept and kept[-1].get("step", 0) >= first:
            kept.pop()
        if event["event"] != "start" or not kept:
            kept.append(event)
    return kept


def _of_kind(kind: str, events: Iterable[Doc]) -> list[Doc]:
    return [event for event in events if event["event"] == kind]


def write(comparison: Doc, path: str | Path) -> Path:
    """Write the page of a comparison document, whole or not at all, and return its path."""
    write_file(path, _page(comparison).encode("utf-8", "replace"))  # half a surrogate pair becomes "?"
    return Path(path)


def _page(doc: Doc) -> str:
    web = resources.files("handful") / "web"
    seeds, found, head = len(doc["seeds"]), finding(doc), headline(doc)
    how = "Read across: each row is one measure" + (", with its ratio to the small dense model." if _base(doc) else ".")
    if len(mixtures_of(doc)) > 1 and _base(doc):
        how += f" The dense twins match {mixtures_of(doc)[0]['label']}."
    if seeds > 1:
        how += f" Losses are means over {seeds} seeds; their spread is highest minus lowest."
    if len(doc["teams"]) > 1:
        how += " Speeds are this machine’s, from the slowest to the quickest while the teams took turns."
    parts = {
        "title": escape(doc["title"]),
        "byline": escape(f"Handful {doc['handful']} · {doc['data']['name']} · {seeds} seed{'s' * (seeds > 1)}"),
        "headline": escape(head),
        "picture": picture(doc, _colors(doc)),
        "finding": escape(found[0]),
        "more": escape(" ".join(sentence for sentence in found[1:] if sentence != head)),
        "banners": "".join(map(_banners, doc["teams"])),
        "table_title": "Side by side" if len(doc["teams"]) > 1 else "In numbers",
        "table_how": escape(how),
        "table": _table(doc),
        "terms": "".join(
            f'<dt id="{_anchor(name)}">{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in TERMS.items()
        ),
        "made": _made(doc),
        "data": script_json(_view(doc)),
        "css": "".join((web / name).read_text("utf-8") for name in ("report.css", "lesson.css")),
        "js": "".join((web / name).read_text("utf-8") for name in SCRIPTS),
    }
    # One pass: braces in what is filled in stay what they are.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _linked((web / "report.html").read_text("utf-8")))


def _anchor(name: str) -> str:
    return f"term-{name.replace(' ', '-')}"


def _linked(template: str) -> str:
    """A page's own words with its links to what they mean: [[load]], or [[loads|load]] for another form of it."""

    def link(match: re.Match[str]) -> str:
        text, _, name = match[1].partition("|")
        return f'<a class="term" href="#{_anchor(name or text)}">{text}</a>'

    return re.sub(r"\[\[([\w |-]+)\]\]", link, template)


def _view(doc: Doc) -> Doc:
    """What the page's script draws."""
    teams, colors = [], _colors(doc)
    for team in doc["teams"]:
        routing = team["routing"]
        warned = bool(team["warnings"])
        if routing:
            warned = warned or bool(collapse(routing, team["model"]["router"]["top_k"]))
            last = len(routing["steps"]) - 1
            count = min(last + 1, MAX_SNAPSHOTS)
            steps = [round(i * last / max(1, count - 1)) for i in range(count)]
            routing = {key: [values[i] for i in steps] for key, values in routing.items()} | {"layers": _layers(team)}
        shown = {key: team[key] for key in ("name", "label", "curve", "reached")}
        shown |= {"color": colors[team["name"]], "routing": routing, "stability": team.get("stability") or []}
        shown |= {"warned": warned, "balance": team_balance(team), "price": _price(team)}
        teams.append(shown)
    base = _base(doc)
    return {
        "teams": teams,
        "goal": loss_of(base) if base else None,
        "sample": _with_touched(doc["sample"], doc),
        "lesson": doc.get("lesson"),  # a comparison of before there were any has none
        "balances": _with_and_without(doc),
    }


def _price(team: Doc) -> Doc:
    """What a team's final loss cost."""
    values = [value for value in team["heldout_loss"]["values"] if finite(value) is not None]
    loss = loss_of(team)
    return {
        "loss": loss,
        "low": min(values, default=loss),
        "high": max(values, default=loss),
        "memory": team["weight_bytes"],
        "flops": team["train_flops_per_token"],
        "seconds": team["train_seconds"],
    }


def _with_touched(sample: Doc | None, doc: Doc) -> Doc | None:
    """A text's sample with how many experts its tokens touched, of how many, and how many a token has in the mean."""
    if sample is None:
        return None
    mixtures = mixtures_of(doc)
    most = mixtures[0]["model"]["router"]["experts"] if mixtures else 0
    chosen = [sum(expert >= 0 for expert in token) for layer in sample["experts"] for token in layer]
    counts = [touched(layer) for layer in sample["experts"]]
    return {**sample, "touched": counts, "most": most, "each": sum(chosen) / max(1, len(chosen))}


def _with_and_without(doc: Doc) -> list[list[int]]:
    """The places of teams that are alike but for their balance, of which the second has none."""
    found, teams = [], list(enumerate(doc["teams"]))
    for i, team in teams:
        for j, other in teams:
            alike = team["routing"] and other["routing"] and team["model"] == other["model"]
            if alike and team_balance(other) == "none" and team_balance(team) != "none":
                found.append([i, j])
    return found


def _colors(doc: Doc) -> dict[str, str]:
    """A team's name to its colour; mixtures share theirs where there are more than colours."""
    names = [team["name"] for team in doc["teams"] if team["name"] not in _DENSE_COLORS]
    return _DENSE_COLORS | dict(zip(names, cycle(_MIXTURE_COLORS), strict=False))


def _layers(team: Doc) -> list[int]:
    """The indices of a team's MoE layers."""
    model = from_dict(ModelConfig, team["model"])
    return list(model.moe_layers)


def script_json(value: Any) -> str:
    """JSON that may stand in a script element: ASCII, no "<", six digits, null for what is not finite."""

    def clean(x: Any) -> Any:
        if isinstance(x, float):
            return float(f"{x:.6g}") if math.isfinite(x) else None
        if isinstance(x, Mapping):
            return {key: clean(inner) for key, inner in x.items()}
        return [clean(inner) for inner in x] if isinstance(x, list | tuple) else x

    text = json.dumps(clean(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _banners(team: Doc) -> str:
    label, layers, out = escape(team["label"]), _layers(team), ""
    if team["routing"] and (bad := collapse(team["routing"], team["model"]["router"]["top_k"])):
        items = _list(f"Layer {layers[place]}: {why}." for place, why in bad.items())
        out = (
            '<div class="banner alarm" role="alert"><p><strong>Routing collapsed</strong> in '
            f"{len(bad)} of {len(layers)} MoE layers of {label}: the router keeps choosing the same few experts. "
            f"Over the last fifth of the run:</p>{items}</div>"
        )
    if team["warnings"]:
        out += (
            f'<div class="banner"><p>Warnings while training {label}:</p>{_list(dict.fromkeys(team["warnings"]))}</div>'
        )
    return out


_SPANS = {"Training": "train_range", "Decoding": "decode_range"}  # what a speed went up and down between
_REACHED = "Reached the small dense model’s final loss after"
# Group, measure, unit, and how to read the value from a team. {"mean", "spread"} values are losses; a text is itself.
_MEASURES: tuple[tuple[str, str, str, Callable[[Any], Any]], ...] = (
    ("What it is", "Experts", "", team_experts),
    ("What it is", "Balance", "", team_balance),
    ("Size and cost", "Total parameters", "", lambda t: t["parameters"]["total"]),
    ("Size and cost", "Active parameters per token", "", lambda t: t["parameters"]["active"]),
    ("Size and cost", "Training FLOPs per token", "FLOP", lambda t: t["train_flops_per_token"]),
    ("Size and cost", "Weight memory", "B", lambda t: t["weight_bytes"]),
    ("Quality on held-out text", "Loss", "nats/token", lambda t: t["heldout_loss"]),
    ("Quality on held-out text", "Compression", "bits/byte", lambda t: t["bits_per_byte"]),
    ("Speed on this machine", "Training", "tokens/s", lambda t: t["train_tokens_per_second"]),
    ("Speed on this machine", "Decoding", "tokens/s", lambda t: t["decode_tokens_per_second"]),
    ("Speed on this machine", "Time in training", "s", lambda t: t["train_seconds"]),
    ("Routing over the last fifth", "MaxVio", "mean of layers", lambda t: late_routing(t, "max_vio")),
    ("Routing over the last fifth", "Dead experts", "of all layers", lambda t: late_routing(t, "dead")),
    (_REACHED, "Tokens", "", lambda t: (t["reached"] or {}).get("tokens")),
    (_REACHED, "FLOPs", "FLOP", lambda t: (t["reached"] or {}).get("flops")),
    (_REACHED, "Time", "s", lambda t: (t["reached"] or {}).get("seconds")),
)


def _table(doc: Doc) -> str:
    teams, base, group, colors = doc["teams"], _base(doc), "", _colors(doc)
    head = "".join(
        f'<th scope="col"><i class="swatch" style="--c:{colors[t["name"]]}"></i>{escape(t["label"])}</th>'
        for t in teams
    )
    body = ""
    for title, measure, unit, read in _MEASURES:
        if title in ("What it is", "Routing over the last fifth") and len(mixtures_of(doc)) < 2:
            continue  # they are there to tell mixtures apart
        cells = [read(team) for team in teams]
        loss = isinstance(cells[0], Mapping)
        numbers = [finite(cell["mean"] if loss else cell) for cell in cells]
        words = any(isinstance(cell, str) for cell in cells)
        if (not words and all(number is None for number in numbers)) or (title == _REACHED and not base):
            continue
        first = finite(read(base)) if base else None
        if loss:
            texts = ["—" if number is None else f"{number:.3f}" for number in numbers]
            spreads = [finite(cell["spread"]) if len(doc["seeds"]) > 1 else None for cell in cells]
            notes = ["" if spread is None else f"spread {spread:.3f}" for spread in spreads]
        elif words:
            texts, notes = [escape(cell or "—") for cell in cells], [""] * len(cells)
        elif title == "Routing over the last fifth":
            texts, notes = ["—" if n is None else f"{n:.2f}" for n in numbers], [""] * len(cells)
        else:
            spans = [(team.get(_SPANS.get(measure, "")) or (None, None)) for team in teams]
            unit, shown = _row([*numbers, *(low for low, _ in spans), *(high for _, high in spans)], unit)
            texts, lows, highs = (shown[i * len(teams) : (i + 1) * len(teams)] for i in range(3))
            if title == _REACHED:
                at_most = [bool((team["reached"] or {}).get("at_most")) for team in teams]
                texts = [f"≤ {text}" if most else text for text, most in zip(texts, at_most, strict=True)]
            notes = [f"{n / first:.2f}×" if first and n is not None and n != first else "" for n in numbers]
            if measure in _SPANS:
                spread = [f"{a}–{b}" if a != "—" else "" for a, b in zip(lows, highs, strict=True)]
                notes = [", ".join(filter(None, pair)) for pair in zip(notes, spread, strict=True)]
        if title != group:
            group = title
            body += f'<tr class="group"><th scope="rowgroup" colspan="{len(teams) + 1}">{title}</th></tr>'
        both = zip(texts, notes, strict=True)
        values = "".join(f"<td>{text}{f'<small>{note}</small>' if base else ''}</td>" for text, note in both)
        body += f'<tr><th scope="row">{measure} <span class="unit">{unit}</span></th>{values}</tr>'
    style = "measures" + {1: " one", 2: "", 3: ""}.get(len(teams), " many")
    return f'<table class="{style}"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'


def _base(doc: Doc) -> Doc | None:
    """The team that the others are measured against; None for a single run."""
    return next((t for t in doc["teams"] if t["name"] == "dense-active"), None) if len(doc["teams"]) > 1 else None


def _made(doc: Doc) -> str:
    def listed(values: Doc) -> str:
        names = {key: key.removesuffix("_bytes").replace("_", " ") for key in values}
        return escape("; ".join(f"{names[key]} {_plain(key, value)}" for key, value in values.items() if value))

    rows = {
        "Command": doc["command"] and f"<code>{escape(doc['command'])}</code>",
        "Text": listed(doc["data"]),
        "Machine": listed(doc["machine"]),
        "Seeds": ", ".join(map(str, doc["seeds"])),
    }
    facts = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows.items() if value)
    settings = {"Training settings": doc["train"]}
    settings |= {f"Model: {t['label']}, learning rate {t['lr']:.3g}": t["model"] for t in doc["teams"]}
    return f'<dl class="facts">{facts}</dl>' + "".join(
        f"<details><summary>{escape(title)}</summary><pre>{escape(json.dumps(values, indent=2))}</pre></details>"
        for title, values in settings.items()
    )


def _plain(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{count:,} {what}" for what, count in value.items()]
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if key.endswith("_bytes"):
        return size(value, short=True)
    return f"{value:,}" if type(value) is int else f"{value:.4g}" if isinstance(value, float) else str(value)


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _row(numbers: Sequence[float | None], unit: str) -> tuple[str, list[str]]:
    """One unit for a whole row, so that its digits line up: (the unit with its prefix, the numbers in it)."""
    known = [abs(number) for number in numbers if number]
    largest, least = max(known, default=1.0), min(known, default=1.0)
    if unit == "s":
        scale, unit = (3600.0, "h") if largest >= 7200 else (60.0, "min") if largest >= 120 else (1.0, "s")
    else:
        scale, prefix = next((s or 1.0, p) for s, p in PREFIXES if largest >= s)
        unit = f"{prefix} {unit}" if prefix and unit == "tokens/s" else prefix + unit
    decimals = min(3, max(0, 2 - math.floor(math.log10(least / scale))))  # three digits of the smallest
    return unit, ["—" if number is None else f"{number / scale:,.{decimals}f}" for number in numbers]
