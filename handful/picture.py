"""The small picture over a comparison: of each team its seats, its work and its quality, as HTML that needs no script.

seats     its parameters, which memory must hold: a dot is the same number of them for all teams
work      those that one token uses, which are filled, and the FLOPs of a token
quality   the held-out loss, on a line from the worst team's to the best one's
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from handful.finding import Doc, loss_of
from handful.units import si

__all__ = ["dots", "picture"]

SEATS = 160  # dots of the largest team
COLUMNS = 20


def picture(doc: Doc, colors: Mapping[str, str]) -> str:
    """A figure with a panel for each team. colors: a team's name to a CSS colour."""
    teams = doc["teams"]
    largest = max(team["parameters"]["total"] for team in teams)
    busiest = max(team["train_flops_per_token"] for team in teams)
    losses = [loss for team in teams if (loss := loss_of(team)) is not None]
    panels = "".join(_panel(team, colors[team["name"]], largest, busiest, losses) for team in teams)
    each = si(largest / SEATS, short=True)
    note = (
        f"A dot is {each} parameters, a seat in memory. Filled: at work for one token, with so many FLOPs in training."
        + (" Quality: further right is a lower loss." if len(losses) > 1 else "")
    )
    return (
        f'<figure class="picture"><div class="panels-of-teams">{panels}</div><figcaption>{note}</figcaption></figure>'
    )


def dots(total: int, active: int, largest: int, router: Mapping[str, int] | None) -> list[bool]:
    """A dot for every SEATS-th part of the largest team's parameters, at least one: whether it is filled.

    Where there are experts, those parameters that every token uses stand first, and the chosen ones among the others.
    """
    count = max(1, round(SEATS * total / largest))
    filled = min(count, max(1, round(count * active / total)))
    if router is None or active >= total:
        return [i < filled for i in range(count)]
    share = router["top_k"] / router["experts"]
    experts = (total - active) / max(1e-9, 1 - share)
    always = min(filled, max(0, round(count * (1 - experts / total))))
    rest, chosen = count - always, filled - always
    # Evenly among the others, as a handful of many.
    at = {always + math.floor((i + 0.5) * rest / chosen) for i in range(chosen)} if chosen else set()
    return [i < always or i in at for i in range(count)]


def _panel(team: Doc, color: str, largest: int, busiest: float, losses: list[float]) -> str:
    total, active = team["parameters"]["total"], team["parameters"]["active"]
    seats = dots(total, active, largest, team["model"]["router"])
    off = ' class="off"'
    circles = "".join(
        f'<circle cx="{6 + 10 * (i % COLUMNS)}" cy="{6 + 10 * (i // COLUMNS)}" r="3.6"{"" if on else off}/>'
        for i, on in enumerate(seats)
    )
    height = 10 * math.ceil(len(seats) / COLUMNS) + 2
    flops, loss = team["train_flops_per_token"], loss_of(team)
    part = "all of them" if active >= total else f"{si(active, short=True)} ({active / total:.0%})"
    drawn = f"{si(total, short=True)} parameters, {part} at work for one token"
    quality = "—" if loss is None else f"{loss:.3f}"
    worst, best = (max(losses), min(losses)) if losses else (0.0, 0.0)
    rows = [
        ("seats", si(total, short=True), total / largest),
        ("work", si(flops, "FLOP", short=True), flops / busiest),
    ]
    measures = "".join(
        f'<dt>{name}</dt><dd><i class="bar" style="--w:{share:.1%}"></i><span>{text}</span></dd>'
        for name, text, share in rows
    )
    at = 100 * (worst - loss) / (worst - best) if loss is not None and worst > best else None
    mark = "" if at is None else f'<i class="line" style="--w:{at:.1f}%"></i>'
    measures += f"<dt>quality</dt><dd>{mark}<span>loss {quality}</span></dd>"
    return (
        f'<div class="of-team" style="--c:{color}"><h3>{escape(team["label"])}</h3>'
        f'<svg viewBox="0 0 {10 * COLUMNS + 2} {height}" role="img" aria-label="{escape(drawn)}">{circles}</svg>'
        f"<dl>{measures}</dl></div>"
    )
