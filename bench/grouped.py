"""How should `grouped` lay its rows out on a CPU? Loop, padded batch, the layout that it chooses, and grouped_mm.

    python bench/grouped.py [--repeats 7]

Forward and backward of one layer's experts. "even" routes at random, "skewed" sends half of all tokens to one expert.
Loads are drawn anew in every round, as in training: a library that compiles a product for each shape pays for it here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import publish, rounds

import handful.experts.grouped as backend
from handful.experts import Experts, FeedForward, activate
from handful.routing import Routing

SHAPES = [(2048, 256, 192, 32, 4), (2048, 384, 128, 64, 8), (4096, 64, 48, 64, 2)]


def routing_of(T: int, E: int, K: int, skewed: bool) -> Routing:
    scores_TE = torch.rand(T, E)
    if skewed:
        scores_TE[: T // 2, 0] += 1
    weights_TK, experts_TK = scores_TE.topk(K)
    return Routing(scores_TE, scores_TE, experts_TK, weights_TK)


def with_depth(x_TD: torch.Tensor, experts: Experts, draw: Callable[[], Routing], depth: str) -> None:
    routing, chosen = draw(), backend.choose_depth
    fixed = {"loop": lambda counts_E, *_: 0, "batch": lambda counts_E, *_: int(counts_E.max()), "chosen": chosen}
    backend.choose_depth = fixed[depth]
    try:
        experts(x_TD, routing).float().sum().backward()
    finally:
        backend.choose_depth = chosen


def with_grouped_mm(x_TD: torch.Tensor, experts: Experts, draw: Callable[[], Routing]) -> None:
    routing = draw()
    plan = routing.plan()
    offsets_E = plan.offsets_E.int()
    h_NG = F.grouped_mm(x_TD[plan.token_N], experts.gate_up.mT, offs=offsets_E)
    weight_N1 = routing.weights_TK.flatten()[plan.order_N, None].to(x_TD.dtype)
    out_ND = F.grouped_mm(activate(h_NG, "swiglu") * weight_N1, experts.down.mT, offs=offsets_E)
    torch.zeros_like(x_TD).index_add(0, plan.token_N, out_ND).float().sum().backward()


def dense(x_TD: torch.Tensor, ffn: FeedForward) -> None:
    ffn(x_TD).float().sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for T, D, width, E, K in SHAPES:
            for skewed in (False, True):
                x_TD = torch.randn(T, D, dtype=dtype, requires_grad=True)
                experts, ffn = Experts(E, D, width).to(dtype), FeedForward(D, K * width).to(dtype)
                draw = partial(routing_of, T, E, K, skewed)
                cases = {name: partial(with_depth, x_TD, experts, draw, name) for name in ("loop", "batch", "chosen")}
                cases["grouped_mm"] = partial(with_grouped_mm, x_TD, experts, draw)
                cases["dense of K·F"] = partial(dense, x_TD, ffn)
                times = rounds(cases, asked.repeats)
                shape = f"T={T} D={D} F={width} E={E} K={K} {'skewed' if skewed else 'even'} {str(dtype)[6:]}"
                rows.append({"ms": shape} | {name: t["median"] for name, t in times.items()})
    publish("grouped", rows, {"repeats": asked.repeats})


if __name__ == "__main__":
    main()
