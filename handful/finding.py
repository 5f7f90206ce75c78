"""What a comparison says, in sentences and in words: nothing that its document does not hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from handful.config import ModelConfig
from handful.config_io import from_dict
from handful.units import si
from handful.verdict import CHANCE, Verdict, judge, tokens_per_expert_weight

__all__ = [
    "Doc",
    "describe_balance",
    "finding",
    "finite",
    "headline",
    "late_routing",
    "loss_of",
    "mixtures_of",
    "team_balance",
    "team_experts",
]

Doc = Mapping[str, Any]


def finding(comparison: Doc) -> list[str]:
    """What the numbers say, in sentences, with chance and price: nothing that the document does not hold. The first
    one is the finding itself."""
    teams = {team["name"]: team for team in comparison["teams"]}
    small, big = teams.get("dense-active"), teams.get("dense-total")
    mixtures = mixtures_of(comparison)
    if small is None or not mixtures:
        return [sentence for team in comparison["teams"] for sentence in _alone(team)]
    for team in (small, *mixtures):
        if loss_of(team) is None:
            return [f"The {_called(team)} has no finite held-out loss: its training diverged or was cut short."]
    seeds = len(comparison["seeds"])
    first = mixtures[0]
    out = _ranking(small, mixtures, seeds) if len(mixtures) > 1 else _verdict(small, first, seeds)
    if first["reached"] and small["curve"]:
        end = small["curve"][-1]
        tokens, flops, seconds = (_times(first["reached"][k], end[k], ".0%") for k in ("tokens", "flops", "seconds"))
        most = "at most " if first["reached"].get("at_most") else ""
        share = f"{tokens} of its tokens, {flops} of its FLOPs and {seconds} of its time"
        out.append(f"The {_called(first)} reached the small dense model’s final loss with {most}{share}.")
    else:
        out.append(f"The {_called(first)} did not reach the small dense model’s final loss.")
    if big is not None and (most_loss := loss_of(big)) is not None:
        found = _judge(big, first)
        doubt = ", within chance" if found.kind == "level" else ""
        out.append(
            f"The dense model with {_as_many('total', big, first)} parameters ends at {most_loss:.3f}, "
            f"{_versus(found.lead)} the {_called(first)}{doubt}, at "
            f"{_times(big['train_flops_per_token'], first['train_flops_per_token'])} its FLOPs per token."
        )
    price = [f"{_times(first['weight_bytes'], small['weight_bytes'])} the weight memory"]
    for key, span, what in (
        ("train_tokens_per_second", "train_range", "training"),
        ("decode_tokens_per_second", "decode_range", "decoding"),
    ):
        if finite(first[key]) and finite(small[key]):
            overlap = _overlap(first.get(span), small.get(span))
            unsure = " (their ups and downs overlap)" if overlap else ""
            price.append(f"{_times(first[key], small[key], '.2f')} the {what} speed{unsure}")
    return [*out, f"The price of the {_called(first)}, next to the small dense model: {', '.join(price)}."]


def headline(comparison: Doc) -> str:
    """Who won, by how much, and whether that is more than chance, in one sentence."""
    teams = {team["name"]: team for team in comparison["teams"]}
    small, mixtures, seeds = teams.get("dense-active"), mixtures_of(comparison), len(comparison["seeds"])
    if small is None or not mixtures or any(loss_of(team) is None for team in (small, *mixtures)):
        first, *rest = finding(comparison)
        return rest[0] if rest and (small is None or not mixtures) else first
    ranked = sorted(mixtures, key=lambda team: loss_of(team) or math.inf)
    best = ranked[0]
    fewest = min(map(_tokens_per_weight, mixtures))
    found = _judge(best, small, fewest)
    who = f"the {_called(best)}"
    ahead = f"{abs(found.lead):.3f} nats per token {'ahead of' if found.lead > 0 else 'behind'} the small dense model"
    if found.kind == "too short":
        said = f"Too short to judge: {who} is {ahead} so far"
    elif found.kind == "level":
        said = (
            f"No difference beyond chance between {who} and the small dense model: {abs(found.lead):.3f} nats per token"
        )
    else:
        verb = "beats" if found.kind == "lower" else "loses to"
        against = CHANCE if seeds == 1 else max(_spread(small), _spread(best))
        source = "that by which seeds differ" if seeds == 1 else f"the spread over {seeds} seeds"
        real = f"{abs(found.lead) / against:.1f} times {source}" if against else f"more than {source}"
        said = f"{who} {verb} the small dense model by {abs(found.lead):.3f} nats per token, {real}"
        said += ", from one seed" if seeds == 1 else ""
    if len(ranked) > 1:
        gap = _judge(best, ranked[1], fewest)
        beside = {"lower": f"{gap.lead:.3f} ahead of", "level": "level with"}
        said += f"; it is {beside[gap.kind]} {ranked[1]['name']}" if gap.kind in beside else ""
    return f"{said[:1].upper()}{said[1:]}."


def mixtures_of(doc: Doc) -> list[Doc]:
    return [team for team in doc["teams"] if team["model"]["router"] is not None]


def _called(team: Doc) -> str:
    """A team in a sentence: "mixture of experts", "small dense model", or a mixture's own name."""
    fixed = {"dense-active": "small dense model", "moe": "mixture of experts", "dense-total": "big dense model"}
    return fixed.get(team["name"], f"mixture {team['name']}")


def _judge(team: Doc, other: Doc, fewest: float = math.inf) -> Verdict:
    """A team beside another: see `verdict.py`. fewest: tokens for each weight of an expert that others were given."""
    points = {point["tokens"]: point["loss"] for point in other["curve"]}
    both = [
        (float(point["tokens"]), point["loss"], points[point["tokens"]])
        for point in team["curve"]
        if point["tokens"] and finite(point["loss"]) and finite(points.get(point["tokens"]))
    ]
    return judge(
        team["heldout_loss"]["values"],
        other["heldout_loss"]["values"],
        tokens_per_weight=min(_tokens_per_weight(team), _tokens_per_weight(other), fewest),
        curves=both,
    )


def _tokens_per_weight(team: Doc) -> float:
    router, model = team["model"]["router"], from_dict(ModelConfig, team["model"])
    if router is None or not team["curve"]:
        return math.inf
    weights = (3 if model.gated else 2) * model.width * model.expert_width
    return tokens_per_expert_weight(team["curve"][-1]["tokens"], router["top_k"], router["experts"], weights)


def _verdict(small: Doc, moe: Doc, seeds: int) -> list[str]:
    found = _judge(moe, small)
    chance = _chance(small, moe, seeds=seeds)
    said = {
        "lower": chance,
        "higher": chance,
        "level": f"{chance}, so these runs show no difference",
        "too short": f"{chance}; too short to judge: {' and '.join(found.why)}",
    }[found.kind]
    return [
        f"With {_as_many('active', moe, small)} parameters of the small dense model, the {_called(moe)} ends at a "
        f"held-out loss of {loss_of(moe):.3f} nats per token, {_versus(found.lead)} the small dense model’s "
        f"{loss_of(small):.3f}; {said}."
    ]


def _chance(*teams: Doc, seeds: int) -> str:
    if seeds == 1:
        return f"this is one seed, and seeds of the default comparison differ by {CHANCE}"
    return f"the spread over {seeds} seeds is {max(map(_spread, teams)):.3f}"


def _ranking(small: Doc, mixtures: Sequence[Doc], seeds: int) -> list[str]:
    """Several mixtures, the lowest loss first, and what stands against it."""
    order = sorted(mixtures, key=lambda team: loss_of(team) or math.inf)
    best, second = order[:2]
    listed = ", ".join(f"{team['name']} {loss_of(team):.3f}" for team in order)
    theirs = f"the small dense model’s {loss_of(small):.3f}"
    # One mixture that was too short makes the order one that is.
    fewest = min(map(_tokens_per_weight, mixtures))
    gap, found = (_judge(best, other, fewest) for other in (second, small))
    if gap.kind == "too short" or found.kind == "too short":
        why = " and ".join(dict.fromkeys([*gap.why, *found.why]))
        first = f"Too short to judge: {why}. Held-out loss so far, nats per token: {listed}, beside {theirs}"
    else:
        lead = "is level with" if gap.kind == "level" else f"leads by {gap.lead:.3f}, before"
        beside = "level with" if found.kind == "level" else _versus(found.lead)
        first = (
            f"Held-out loss, nats per token: {listed}. {best['name']} {lead} {second['name']}, and is {beside} {theirs}"
        )
    return [
        f"{first}; {_chance(small, *mixtures, seeds=seeds)}.",
        f"The dense twins have the active and the total parameters of {mixtures[0]['name']}, the first.",
    ]


def _overlap(one: Any, other: Any) -> bool:
    return bool(one and other) and one[0] <= other[1] and other[0] <= one[1]


def _alone(team: Doc) -> list[str]:
    loss, bits = loss_of(team), finite(team["bits_per_byte"]["mean"])
    total, active = team["parameters"]["total"], team["parameters"]["active"]
    label = team["label"][:1].upper() + team["label"][1:]
    part = f"{si(active, short=True)} of its" if active < total else "all of its"
    uses = f"{part} {si(total, short=True)} parameters"
    out = [f"{label}: every token uses {uses}."]
    if loss is None:
        return [*out, "There is no finite held-out loss: the training diverged or was cut short."]
    after = f"After {si(team['curve'][-1]['tokens'], short=True)} tokens the" if team["curve"] else "The"
    return [
        *out,
        f"{after} held-out loss is {loss:.3f} nats per token" + (f", {bits:.3f} bits per byte." if bits else "."),
    ]


def _as_many(which: str, a: Doc, b: Doc) -> str:
    times = a["parameters"][which] / b["parameters"][which]
    same = {"active": "the active", "total": "as many total"}[which]
    return same if 0.95 <= times <= 1.05 else f"{times:.2f}× the {which}"


def _versus(gap: float) -> str:
    return "the same as" if abs(gap) < 0.0005 else f"{abs(gap):.3f} {'lower' if gap > 0 else 'higher'} than"


def _times(a: Any, b: Any, form: str = ".1f") -> str:
    top, bottom = finite(a), finite(b)
    if top is None or not bottom:
        return "an unknown share"
    return format(top / bottom, form) + ("" if form.endswith("%") else "×")


def loss_of(team: Doc) -> float | None:
    return finite(team["heldout_loss"]["mean"])


def _spread(team: Doc) -> float:
    return finite(team["heldout_loss"]["spread"]) or 0.0


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def team_experts(team: Doc) -> str | None:
    """A mixture's experts in words: "64, 2 a token"."""
    router = team["model"]["router"]
    return None if router is None else f"{router['experts']}, {router['top_k']} a token"


def team_balance(team: Doc) -> str | None:
    """What keeps a mixture's experts busy, in words: "switch 0.03", "none"."""
    if team["model"]["router"] is None:
        return None
    return describe_balance(team["balance"])


def describe_balance(balance: Doc) -> str:
    """A BalanceConfig's values in words."""
    parts = [f"{balance['loss']} {balance['weight']:g}"] if balance["loss"] != "none" else []
    parts += [f"bias {balance['bias_rate']:g}"] if balance["bias_rate"] else []
    parts += [f"z {balance['z_weight']:g}"] if balance["z_weight"] else []
    return ", ".join(parts) or "none"


def late_routing(team: Doc, name: str) -> float | None:
    """A statistic of a mixture's routing over the last fifth of its record: MaxVio as the mean of the layers, dead
    experts as their sum."""
    if not team["routing"]:
        return None
    late = team["routing"][name][-max(1, round(len(team["routing"]["steps"]) / 5)) :]
    each = [sum(layers) if name == "dead" else statistics.mean(layers) for layers in late]
    return float(statistics.mean(each))
