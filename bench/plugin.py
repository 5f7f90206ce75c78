"""What do our experts gain a transformers model, beside the implementations that transformers has? One layer, one run.

    python bench/plugin.py [--repeats 5]

The experts modules of two families, alone, in bfloat16:
olmoe     D=2048, 64 experts of width 1024 of which 8 are chosen: wholly ours, by the native kernels where they are.
gpt_oss   D=2880, 32 experts of width 2880 of which 4 are chosen: stored turned, with a gate of its own.

One token and 256 tokens without gradients; with `--train`, 256 tokens forward and backward too. "eager" is left out of
training: its loop over experts makes a gradient of the size of all experts for each of them, and takes seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timing import publish, rounds
from torch import nn
from transformers import GptOssConfig, OlmoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

import handful.transformers

SHAPES: dict[str, tuple[Any, Any]] = {
    "olmoe": (OlmoeExperts, OlmoeConfig(num_experts=64)),
    "gpt_oss": (GptOssExperts, GptOssConfig(num_local_experts=32)),
}
TOP_K = {"olmoe": 8, "gpt_oss": 4}


def forward(module: Any, name: str, tokens: int, top_k: int) -> Callable[[], torch.Tensor]:
    """Run the module on one draw of tokens and experts."""
    x_TD = torch.randn(tokens, module.config.hidden_size, dtype=torch.bfloat16)
    experts_TK = torch.rand(tokens, module.num_experts).topk(top_k).indices
    weights_TK = torch.rand(tokens, top_k, dtype=torch.bfloat16)

    def run() -> torch.Tensor:
        module.config._experts_implementation = name
        y_TD: torch.Tensor = module(x_TD, experts_TK, weights_TK)
        return y_TD

    return run


def unrecorded(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return torch.no_grad()(run)


def step(run: Callable[[], torch.Tensor], module: Any) -> Callable[[], None]:
    def train() -> None:
        run().float().square().sum().backward()
        module.zero_grad(set_to_none=True)

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="forward and backward as well")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    names = ("eager", "grouped_mm", handful.transformers.NAME)
    for shape, (kind, config) in SHAPES.items():
        torch.manual_seed(0)
        module = kind(config).bfloat16()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        cases: dict[str, Callable[[], object]] = {}
        for name in names:
            for tokens in (1, 256):
                cases[f"{tokens} {name}"] = unrecorded(forward(module, name, tokens, TOP_K[shape]))
            if arguments.train and name != "eager":
                cases[f"256 train {name}"] = step(forward(module, name, 256, TOP_K[shape]), module)
        times = rounds(cases, arguments.repeats)
        for what in ("1", "256", "256 train") if arguments.train else ("1", "256"):
            found = {name: times[f"{what} {name}"]["median"] for name in names if f"{what} {name}" in times}
            ours = found[handful.transformers.NAME]
            row = {"experts": shape, "tokens": what, **{f"{name}, ms": found.get(name) for name in names}}
            rows.append(row | {"grouped_mm ÷ handful": found["grouped_mm"] / ours})
        del module, cases  # before the next is made
    publish("plugin", rows, {"dtype": "bfloat16", "repeats": arguments.repeats})


if __name__ == "__main__":
    main()
