"""What does an MoE's training step cost beside its dense-active twin's? Ours, and transformers', in one run.

    python bench/train_step.py [--shape small fine] [--repeats 5] [--without eager]

6 layers, 8 sequences of 256 tokens, vocabulary 4096, AdamW; two shapes of experts, measured one after the other:
small   D=256, 32 experts of width 192 of which 4 are chosen.
fine    D=384, 64 experts of width 128 of which 8 are chosen.

Everybody has tied embeddings and QK-norm over the full width, and starts from its own initialisation. transformers' MoE
is OLMoE, its dense model OLMo 2, which has the same parts. Where `handful moe` runs on the native kernels, `handful moe
grouped` is the same model on torch alone. The slow cases can take minutes: `--without eager`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import publish, rounds
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM, OlmoeConfig, OlmoeForCausalLM

from handful.config import ModelConfig, RouterConfig
from handful.loss import linear_cross_entropy
from handful.machine import native_error
from handful.model import Decoder

V, LAYERS, B, S = 4096, 6, 8, 256


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What differs between the shapes; an expert's hidden width is `expert_width`."""

    D: int
    heads: int
    experts: int
    top_k: int
    expert_width: int


SHAPES = {
    "small": Shape(D=256, heads=8, experts=32, top_k=4, expert_width=192),
    "fine": Shape(D=384, heads=6, experts=64, top_k=8, expert_width=128),
}


def ours(config: ModelConfig, tokens_BS: torch.Tensor, dtype: str, backend: str = "auto") -> Callable[[], None]:
    model = Decoder(config, backend=backend)
    return stepper(model, lambda: our_loss(model, tokens_BS), dtype)


def our_loss(model: Decoder, tokens_BS: torch.Tensor) -> torch.Tensor:
    x_BSD, _ = model.hidden_states(tokens_BS[:, :-1])
    return linear_cross_entropy(x_BSD.flatten(0, 1), model.output_weight, tokens_BS[:, 1:].flatten())


def theirs(model: nn.Module, tokens_BS: torch.Tensor, dtype: str) -> Callable[[], None]:
    def loss() -> torch.Tensor:
        logits_BSV = model(tokens_BS[:, :-1]).logits
        return F.cross_entropy(logits_BSV.float().flatten(0, 1), tokens_BS[:, 1:].flatten())

    return stepper(model, loss, dtype)


def stepper(model: nn.Module, loss: Callable[[], torch.Tensor], dtype: str) -> Callable[[], None]:
    """One optimizer step, the same for everybody: loss under autocast or not, backward, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer(shape: Shape, experts: str | None) -> nn.Module:
    common: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": shape.D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": S,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    if experts is None:
        return Olmo2ForCausalLM(Olmo2Config(intermediate_size=shape.top_k * shape.expert_width, **common))
    config = OlmoeConfig(
        intermediate_size=shape.expert_width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        **common,
    )
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation(experts)
    return model


def makers(shape: Shape, tokens_BS: torch.Tensor, dtype: str) -> dict[str, Callable[[], Callable[[], None]]]:
    """What makes each case's step; nothing is made that is not asked for."""
    base: dict[str, Any] = {
        "vocab": V,
        "width": shape.D,
        "layers": LAYERS,
        "heads": shape.heads,
        "qk_norm": "full",
        "context": S,
    }
    dense = ModelConfig(ffn=shape.top_k * shape.expert_width, **base)
    router = RouterConfig(experts=shape.experts, top_k=shape.top_k)
    moe = ModelConfig(expert_width=shape.expert_width, router=router, **base)
    total = ModelConfig(ffn=shape.experts * shape.expert_width, **base)
    cases = {
        "handful dense-active": lambda: ours(dense, tokens_BS, dtype),
        "handful moe": lambda: ours(moe, tokens_BS, dtype),
        "handful moe grouped": lambda: ours(moe, tokens_BS, dtype, "grouped"),
        "handful dense-total": lambda: ours(total, tokens_BS, dtype),
        "transformers dense-active": lambda: theirs(peer(shape, None), tokens_BS, dtype),
        "transformers moe grouped_mm": lambda: theirs(peer(shape, "grouped_mm"), tokens_BS, dtype),
        "transformers moe eager": lambda: theirs(peer(shape, "eager"), tokens_BS, dtype),
    }
    if native_error() is not None:
        del cases["handful moe grouped"]  # "auto" is grouped
    return {f"{name} {dtype}": make for name, make in cases.items()}


def measured(shape: Shape, repeats: int, without: list[str]) -> dict[str, dict[str, float]]:
    """Each case's milliseconds, as `rounds` gives them; the shape's models live for this long only."""
    tokens_BS = torch.randint(V, (B, S + 1))
    found = makers(shape, tokens_BS, "float32") | makers(shape, tokens_BS, "bfloat16")
    return rounds({n: make() for n, make in found.items() if not any(part in n for part in without)}, repeats)


def ratio(times: dict[str, dict[str, float]], name: str, other: str) -> float | None:
    return times[name]["median"] / times[other]["median"] if other in times else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=[], help="parts of case names to leave out")
    asked = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for shape in asked.shape:
        times = measured(SHAPES[shape], asked.repeats, asked.without)
        for name, ms in times.items():
            team, dtype = name.split()[0], name.split()[-1]
            rows.append(
                {
                    "shape": shape,
                    "step": name,
                    "median ms": ms["median"],
                    "min": ms["min"],
                    "max": ms["max"],
                    "÷ own dense-active": ratio(times, name, f"{team} dense-active {dtype}"),
                    "÷ handful moe": ratio(times, name, f"handful moe {dtype}"),
                }
            )
    shapes = {shape: asdict(SHAPES[shape]) | {"layers": LAYERS, "batch": B, "context": S} for shape in asked.shape}
    publish("train_step", rows, {"shapes": shapes, "repeats": asked.repeats})


if __name__ == "__main__":
    main()
