"""Comparisons as `compare` makes them, without a training: what the report's tests draw."""

from __future__ import annotations

import copy
import math
import random
import re
from typing import Any

from handful.config import BalanceConfig, ModelConfig, RouterConfig, TrainConfig
from handful.config_io import to_dict

SOURCE = '''def read(path, *, limit=None):
    """Yield the lines of `path`; </script><script>alert("no")</script> & <b>'s stay text."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if limit is not None and number >= limit:
                return
            yield line.rstrip("\\n")


class Counter(dict):
    def __missing__(self, key):
        return 0

    def update(self, items):
        for item in items:
            self[item] += 1  # naïve, 数える
\tindented_by_a_tab = True
'''


def even_load(rng: random.Random, experts: int, unevenness: float) -> list[float]:
    raw = [math.exp(unevenness * rng.gauss(0, 1)) for _ in range(experts)]
    return [value / sum(raw) for value in raw]


def routing_of(loads: list[list[list[float]]], every: int = 10, tokens_per_step: int = 8192) -> dict[str, Any]:
    """A team's routing, its statistics worked out from the loads [step][layer][expert]."""

    def entropy(load: list[float]) -> float:
        return -sum(p * math.log(p) for p in load if p > 0) / math.log(len(load))

    steps = [every * (i + 1) for i in range(len(loads))]
    return {
        "steps": steps,
        "tokens": [step * tokens_per_step for step in steps],
        "load": loads,
        "max_vio": [[max(load) * len(load) - 1 for load in layers] for layers in loads],
        "dead": [[sum(p * len(load) < 0.01 for p in load) for load in layers] for layers in loads],
        "entropy": [[entropy(load) for load in layers] for layers in loads],
        "dropped": [[0.0 for _ in layers] for layers in loads],
    }


def document(*, collapsed: bool = False) -> dict[str, Any]:
    """A comparison as `compare` makes it: 3 teams, 2 seeds, 3 layers of 64 experts, 40 evaluations."""
    rng = random.Random(5)
    experts, layers, evals, tokens_per_eval = 64, 3, 40, 102_400
    data = {
        "name": "Python standard library",
        "documents": 1843,
        "skipped": {"not UTF-8": 11, "empty": 1},
        "train_tokens": 10_412_877,
        "heldout_tokens": 131_072,
        "bytes_per_token": 3.127,
    }

    def team(name: str, label: str, router: RouterConfig | None, **numbers: float) -> dict[str, Any]:
        model = ModelConfig(
            vocab=2048,
            width=64,
            layers=layers,
            heads=4,
            ffn=0 if router else int(numbers["ffn"]),
            router=router,
            expert_width=64 if router else 0,
        )
        curves = []
        for seed in range(2):
            shift = 0.004 * (seed - 0.5)
            curves.append(
                [
                    numbers["end"] + shift + 4.1 * math.exp(-5.5 * t) + 0.35 * (1 - t) ** 2 + rng.gauss(0, 0.003)
                    for t in ((i + 1) / evals for i in range(evals))
                ]
            )
        curves = [[*losses[:-1], numbers["end"] + 0.004 * (seed - 0.5)] for seed, losses in enumerate(curves)]
        curve = [
            {
                "tokens": (i + 1) * tokens_per_eval,
                "flops": (i + 1) * tokens_per_eval * numbers["flops"],
                "seconds": (i + 1) * tokens_per_eval / numbers["speed"],
                "loss": (a + b) / 2,
                "low": min(a, b),
                "high": max(a, b),
            }
            for i, (a, b) in enumerate(zip(*curves, strict=True))
        ]
        finals = [losses[-1] for losses in curves]
        return {
            "name": name,
            "label": label,
            "model": to_dict(model),
            "parameters": {"total": int(numbers["total"]), "active": int(numbers["active"])},
            "train_flops_per_token": numbers["flops"],
            "weight_bytes": int(numbers["total"]) * 4,
            "lr": 0.003,
            "balance": to_dict(BalanceConfig(loss="switch", weight=0.03) if router else BalanceConfig()),
            "heldout_loss": {"mean": sum(finals) / 2, "spread": max(finals) - min(finals), "values": finals},
            "bits_per_byte": {"mean": sum(finals) / 2 / math.log(2) / 3.127, "spread": 0.002, "values": finals},
            "train_tokens_per_second": numbers["speed"],
            "train_range": [0.95 * numbers["speed"], 1.05 * numbers["speed"]],
            "decode_tokens_per_second": numbers["decode"],
            "decode_range": [0.8 * numbers["decode"], 1.1 * numbers["decode"]],
            "train_seconds": curve[-1]["seconds"],
            "reached": None,
            "curve": curve,
            "routing": None,
            "stability": [],
            "warnings": [],
        }

    small = team(
        "dense-active", "Team 1 · small dense", None, ffn=192, end=3.513, total=291_776, active=291_776,
        flops=1.42e6, speed=28_500, decode=910,
    )  # fmt: skip
    moe = team(
        "moe", "Team 2 · mixture of experts", RouterConfig(experts=experts, top_k=2), end=3.393, total=3_743_296,
        active=304_064, flops=1.49e6, speed=22_400, decode=742,
    )  # fmt: skip
    big = team(
        "dense-total", "Team 3 · big dense", None, ffn=6144, end=3.241, total=3_719_744, active=3_719_744,
        flops=2.2e7, speed=5_100, decode=301,
    )  # fmt: skip
    goal = small["heldout_loss"]["mean"]
    for each in (small, moe, big):
        first = next(point for point in each["curve"] if point["loss"] <= goal + 1e-9)
        each["reached"] = {key: first[key] for key in ("tokens", "flops", "seconds")}
    loads = []
    for i in range(50):
        at_step = [even_load(rng, experts, 0.12 + 1.3 * math.exp(-i / 5) + 0.06 * layer) for layer in range(layers)]
        if collapsed:
            favoured = [3.0 * i if e in (5, 23, 24) else 0.02 * max(0, 30 - i) for e in range(experts)]
            at_step[1] = [value / sum(favoured) for value in favoured] if i else [1 / experts] * experts
        loads.append(at_step)
    moe["routing"] = routing_of(loads)
    moe["stability"] = [
        {
            "step": 50 * (i + 1),
            "tokens": 409_600 * (i + 1),
            "kept": [0.3 + 0.06 * i] * layers,
            "final": [0.1 * (i + 1)] * layers,
        }
        for i in range(10)
    ]
    if collapsed:
        moe["warnings"] = ["step 120: layer 1's busiest expert has 21× the even load; try balance.loss = 'switch' <b>"]
    pieces = re.findall(r" ?\w{1,6}|\n *|\t|[^\w\s]{1,2}| ", SOURCE)
    assert "".join(pieces) == SOURCE
    chosen = [[rng.sample(range(experts), 2) for _ in pieces] for _ in range(layers)]
    first_weights = [[0.5 + 0.45 * rng.random() for _ in pieces] for _ in range(layers)]
    return {
        "title": "Three teams on the Python standard library",
        "handful": "0.1.0",
        "machine": {"cpu": "Some CPU @ 2.9 GHz", "cores": 2, "threads": 2, "memory_bytes": 8_234_567_680},
        "data": data,
        "seeds": [0, 1],
        "train": to_dict(TrainConfig()),
        "command": "handful compare --seeds 2 --out runs/demo",
        "teams": [small, moe, big],
        "sample": {
            "pieces": pieces,
            "layers": [0, 1, 2],
            "experts": chosen,
            "weights": [[[w, 1 - w] for w in layer] for layer in first_weights],
        },
        "lesson": lesson_of(rng, pieces, layers, experts),
    }


def lesson_of(rng: random.Random, pieces: list[str], layers: int, experts: int) -> dict[str, Any]:
    """What `lesson.lesson` makes, of random numbers that keep its promises."""

    def step() -> dict[str, Any]:
        scores = [rng.random() ** 6 for _ in range(experts)]
        scores = [score / sum(scores) for score in scores]
        one, two = sorted(range(experts), key=lambda e: -scores[e])[:2]
        share = scores[one] / (scores[one] + scores[two])
        outputs = [[rng.gauss(0, 4) for _ in range(6)] for _ in range(2)]
        return {
            "scores": scores,
            "experts": [one, two],
            "weights": [share, 1 - share],
            "outputs": outputs,
            "blend": [share * a + (1 - share) * b for a, b in zip(*outputs, strict=True)],
            "shares": [0.9, 0.1],
            "sizes": {"parts": [20.0, 3.0], "blend": 21.5, "before": 40.0, "after": 52.0},
        }

    def card(expert: int) -> dict[str, Any]:
        return {
            "load": 1 / experts,
            "tokens": [[rng.choice(pieces), 3, 4], ["<b>&", 2, 9]],
            "partners": [[(expert + 1) % experts, 0.4, 0.05]],
            "cost": 0.001 * expert if expert != 1 else None,
            "error": 0.0005 if expert != 1 else None,
            "beyond": expert > experts - 4,
        }

    words = [{"before": "went to ", "after": " and then", "experts": [[1, 2], [3, 4], [5, 6]]},
             {"before": "the </pre> of ", "after": "\n", "experts": [[2, 9], [3, 8], [7, 10]]}]  # fmt: skip
    tokens = [
        {"at": at, "layers": [step() for _ in range(layers)], "next": [["<i>", 0.5], ["a", 0.25]]}
        for at in range(4, 12)
    ]
    names = ("dense-active", "moe", "dense-total")
    return {
        "way": {"layers": list(range(layers)), "tokens": tokens},
        "word": {
            "word": " Paris",
            "asked": "Paris",
            "count": 7,
            "shared": 2,
            "of": 6,
            "mean": 3.5,
            "any": 0.25,
            "places": words,
        },
        "experts": {
            "tokens": 4096,
            "off_tokens": 2048,
            "off_windows": 16,
            "layers": [{"layer": layer, "cards": [card(e) for e in range(experts)]} for layer in range(layers)],
        },
        "losses": {name: [None, *(rng.expovariate(0.3) for _ in pieces[1:])] for name in names},
        "continuations": {"prompt": "def read(", "real": "path):", "teams": dict.fromkeys(names, "self, </pre><b>")},
    }


def several() -> dict[str, Any]:
    """A comparison with three mixtures: the document's, one that is better, one that is level with that."""
    doc = document()
    small, moe, big = doc["teams"]
    others = []
    for name, shift in (("free", -0.05), ("wide", -0.0495)):
        other = copy.deepcopy(moe)
        other["name"], other["label"] = name, f"Team · {name}"
        other["heldout_loss"] = dict(moe["heldout_loss"])
        other["heldout_loss"]["values"] = [value + shift for value in moe["heldout_loss"]["values"]]
        other["heldout_loss"]["mean"] = moe["heldout_loss"]["mean"] + shift
        for point in other["curve"]:
            point["loss"] += shift
        others.append(other)
    moe["name"], others[0]["balance"] = "even", to_dict(BalanceConfig())
    doc["teams"] = [small, moe, *others, big]
    return doc
