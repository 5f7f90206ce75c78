"""How even is a placement on the load that comes after the one it was made from, and what does it take to go there?

Placed on one window of tokens, scored on the next, window after window: experts as they come, DeepSeek's balancing over
all devices and by nodes, ours with equal shares, with split ones, staying near the placement before, and putting
together what tokens use together. Beside them the bound of the window itself, which no placement made beforehand knows.

    trained    a mixture of 64 experts that is trained for `--steps` steps here, on texts that training held out
    zipf       64 experts whose loads stay a Zipf law's
    drifting   the same, and in every window each expert's load changes by 20 %
    bursty     even, and in every window other two experts have ten times as much

    python bench/placement.py [--steps 200] [--windows 12]

Then the time to plan 61 layers of 256 experts on 1,024 devices.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from timing import show

from handful.config import ModelConfig, RouterConfig
from handful.data import Data, load_data
from handful.families.io import load_decoder
from handful.observe import Recorder
from handful.placement import (
    Placement,
    Topology,
    lower_bound,
    near,
    place,
    rebalance_experts,
    sent,
    shares,
)
from handful.placement.layer import as_they_come
from handful.placement.placement import Floats, Ints
from handful.presets import small_training
from handful.train import train

EXPERTS, DEVICES, NODES, SLOTS = 64, 8, 2, 10
GROUPS = 8  # of experts, for the balancing by nodes
TOKENS = 8192  # of a window
EXPERT_BYTES = 3 * 7168 * 2048  # DeepSeek-V3's, in a byte a weight
TOPOLOGY = Topology.even(DEVICES, NODES, slots=SLOTS)
ROOM = TOPOLOGY.room()

Window = tuple[Floats, Ints | None]  # of a layer: every expert's load, and the experts of every token
# How a window is placed: its load, its tokens, the placement before.
Way = Callable[[Floats, Ints | None, Placement | None], Placement]


def published(load: Floats, groups: int, nodes: int) -> Placement:
    physical, _, _ = rebalance_experts(torch.from_numpy(load)[None], DEVICES * SLOTS, groups, nodes, DEVICES)
    return Placement(tuple(map(tuple, physical[0].reshape(DEVICES, SLOTS).tolist())))


WAYS: dict[str, Way] = {
    "as they come": lambda load, tokens, before: as_they_come(EXPERTS, ROOM),
    "EPLB, all devices": lambda load, tokens, before: published(load, 1, 1),
    "EPLB, by nodes": lambda load, tokens, before: published(load, GROUPS, NODES),
    "ours": lambda load, tokens, before: place(load, ROOM),
    "ours, split": lambda load, tokens, before: place(load, ROOM),
    "ours, staying near": lambda load, tokens, before: place(load, ROOM, before),
    "ours, used together": lambda load, tokens, before: near(load, place(load, ROOM), TOPOLOGY, ROOM, tokens, 0.02),
}


def trained(steps: int, windows: int) -> list[list[Window]]:
    """The windows of every layer of a small model, on what its training held out."""
    data = load_data(None, vocab=2048)
    router = RouterConfig(experts=EXPERTS, top_k=4)
    model = ModelConfig(
        vocab=data.tokenizer.vocab_size, width=128, layers=3, heads=4, router=router, expert_width=64,
        qk_norm="head", context=256,
    )  # fmt: skip
    settings = replace(small_training(dtype="float32"), steps=steps, batch=16, context=256, eval_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        for _ in train(model, settings, data, f"{folder}/run"):
            pass
        return recorded(f"{folder}/run", data, windows)


def recorded(run: str, data: Data, windows: int) -> list[list[Window]]:
    model, recorder = load_decoder(run).eval(), Recorder()
    text = torch.from_numpy(np.asarray(data.heldout[: TOKENS * windows], np.int64)).view(-1, 256)
    with torch.inference_mode():
        for part in text.split(16):
            recorder.add(model(part)[1])
    found = [experts_TK.long().numpy() for experts_TK in recorder.recording().experts_TK]
    return [[window_of(part) for part in np.split(layer, windows)] for layer in found]


def window_of(experts_TK: Ints) -> Window:
    return np.bincount(experts_TK.ravel(), minlength=EXPERTS).astype(np.float64), experts_TK


def drawn(chances: Sequence[Floats], seed: int) -> list[list[Window]]:
    """Windows of one layer, whose tokens take 4 experts each by these chances."""
    draw = np.random.default_rng(seed)
    found: list[Window] = []
    for chance in chances:
        # The 4 with the largest of log chance + Gumbel noise: without putting back.
        keys = np.log(chance) + draw.gumbel(size=(TOKENS, EXPERTS))
        found.append(window_of(np.argpartition(-keys, 4, 1)[:, :4].astype(np.int64)))
    return [found]


def made_up(kind: str, windows: int) -> list[list[Window]]:
    draw = np.random.default_rng(0)
    chance = draw.permutation(1 / np.arange(1, EXPERTS + 1) ** 0.8)
    chances = []
    for _ in range(windows):
        if kind == "drifting":
            chance = chance * np.exp(draw.normal(0, 0.2, EXPERTS))
        if kind == "bursty":
            chance = np.ones(EXPERTS)
            chance[draw.choice(EXPERTS, 2, replace=False)] = 10
        chances.append(chance)
    return drawn(chances, 1)


def scored(layers: Sequence[Sequence[Window]], name: str, way: Way) -> dict[str, str]:
    """Max/mean on the next window, experts moved a window, their bytes, and where tokens are sent; means."""
    ratios, moved, devices, nodes = [], [], [], []
    for windows in layers:
        before: Placement | None = None
        for (load, tokens), (after, later) in itertools.pairwise(windows):
            made = way(load, tokens, before)
            split = shares(load, made) if name == "ours, split" else None
            ratios.append(float(made.loads(after, split).max()) / (after.sum() / DEVICES))
            if before is not None:
                moved.append(made.moved(before))
            before = made
            if later is not None and not name.startswith("EPLB"):  # which may have an expert twice on a device
                found = sent(made, TOPOLOGY, later, split)
                devices.append(found.devices)
                nodes.append(found.nodes)
    rows = {
        "": name,
        "max/mean": f"{statistics.mean(ratios):.3f}",
        "worst": f"{max(ratios):.3f}",
        "moved": f"{statistics.mean(moved):.1f}",
        "GB": f"{statistics.mean(moved) * EXPERT_BYTES / 1e9:.2f}",
    }
    told = {"devices": devices, "nodes": nodes}
    return rows | {name: f"{statistics.mean(found):.2f}" if found else "" for name, found in told.items()}


def compared(kind: str, layers: Sequence[Sequence[Window]]) -> None:
    rows = [scored(layers, name, way) for name, way in WAYS.items()]
    bounds = [lower_bound(load, ROOM) / (load.sum() / DEVICES) for windows in layers for load, _ in windows[1:]]
    best = {"": "the bound", "max/mean": f"{statistics.mean(bounds):.3f}", "worst": f"{max(bounds):.3f}"}
    print(f"\n{kind}")
    show([*rows, dict.fromkeys(rows[0], "") | best])


def planning() -> None:
    """61 layers of 256 experts on 1,024 devices of 2."""
    layers, experts, devices, slots = 61, 256, 1024, 2
    draw = np.random.default_rng(0)
    loads = [draw.permutation(1 / np.arange(1, experts + 1) ** 0.8) for _ in range(layers)]
    began = time.perf_counter()
    physical, _, counts = rebalance_experts(torch.from_numpy(np.stack(loads)), devices * slots, 1, 1, devices)
    theirs = time.perf_counter() - began
    began = time.perf_counter()
    made = [place(load, [slots] * devices) for load in loads]
    ours = time.perf_counter() - began
    began = time.perf_counter()
    split = [shares(load, one) for load, one in zip(loads, made, strict=True)]
    linear = time.perf_counter() - began
    ratios: dict[str, list[float]] = {"EPLB": [], "ours": [], "ours, split": [], "the bound": []}
    for i, (load, one) in enumerate(zip(loads, made, strict=True)):
        mean = load.sum() / devices
        each = (load / counts[i].numpy())[physical[i].numpy()].reshape(devices, slots)
        ratios["EPLB"].append(each.sum(1).max() / mean)
        ratios["ours"].append(one.loads(load).max() / mean)
        ratios["ours, split"].append(one.loads(load, split[i]).max() / mean)
        ratios["the bound"].append(lower_bound(load, [slots] * devices) / mean)
    took = {"EPLB": f"{theirs:.1f}", "ours": f"{ours:.1f}", "ours, split": f"{linear:.1f} more", "the bound": ""}
    print(f"\n{layers} layers of {experts} experts on {devices:,} devices of {slots}")
    show([{"": name, "seconds": took[name], "max/mean": f"{statistics.mean(ratios[name]):.4f}"} for name in took])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    compared("trained", trained(arguments.steps, arguments.windows))
    for kind in ("zipf", "drifting", "bursty"):
        compared(kind, made_up(kind, arguments.windows))
    planning()


if __name__ == "__main__":
    main()
