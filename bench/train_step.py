"""What does an MoE's training step cost beside its dense-active twin's? Ours, and transformers', in one run.

    python bench/train_step.py [--repeats 5] [--without eager]

D=256, 6 layers, 32 experts of width 192 of which 4 are chosen, 8 sequences of 256 tokens, vocabulary 4096, AdamW. Both
have tied embeddings and QK-norm over the full width, and start from their own initialisation. transformers' MoE is
OLMoE, its dense model OLMo 2, which has the same parts. Their slow cases can take minutes: `--without eager`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import publish, rounds
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM, OlmoeConfig, OlmoeForCausalLM

from handful.config import ModelConfig, RouterConfig
from handful.loss import linear_cross_entropy
from handful.model import Decoder

V, D, LAYERS, HEADS, E, K, WIDTH, B, S = 4096, 256, 6, 8, 32, 4, 192, 8, 256
BASE: dict[str, Any] = {"vocab": V, "width": D, "layers": LAYERS, "heads": HEADS, "qk_norm": "full", "context": S}
PEER: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": S,
    "tie_word_embeddings": True,
    "use_cache": False,
}


def ours(config: ModelConfig, tokens_BS: torch.Tensor, dtype: str) -> Callable[[], None]:
    model = Decoder(config)
    return stepper(model, lambda: our_loss(model, tokens_BS), dtype)


def our_loss(model: Decoder, tokens_BS: torch.Tensor) -> torch.Tensor:
    x_BSD, _ = model.hidden(tokens_BS[:, :-1])
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


def peer(experts: str | None) -> nn.Module:
    if experts is None:
        return Olmo2ForCausalLM(Olmo2Config(intermediate_size=K * WIDTH, **PEER))
    model = OlmoeForCausalLM(
        OlmoeConfig(intermediate_size=WIDTH, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True, **PEER)
    )
    model.set_experts_implementation(experts)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="*", default=[], help="parts of case names to leave out")
    asked = parser.parse_args()
    torch.manual_seed(0)
    tokens_BS = torch.randint(V, (B, S + 1))
    dense = ModelConfig(ffn=K * WIDTH, **BASE)
    moe = ModelConfig(expert_width=WIDTH, router=RouterConfig(experts=E, top_k=K), **BASE)
    total = ModelConfig(ffn=E * WIDTH, **BASE)
    cases: dict[str, Callable[[], None]] = {}
    for dtype in ("float32", "bfloat16"):
        cases[f"handful dense-active {dtype}"] = ours(dense, tokens_BS, dtype)
        cases[f"handful moe {dtype}"] = ours(moe, tokens_BS, dtype)
        cases[f"handful dense-total {dtype}"] = ours(total, tokens_BS, dtype)
        cases[f"transformers dense-active {dtype}"] = theirs(peer(None), tokens_BS, dtype)
        cases[f"transformers moe grouped_mm {dtype}"] = theirs(peer("grouped_mm"), tokens_BS, dtype)
        cases[f"transformers moe eager {dtype}"] = theirs(peer("eager"), tokens_BS, dtype)
    cases = {name: run for name, run in cases.items() if not any(part in name for part in asked.without)}
    times = rounds(cases, asked.repeats)
    rows = []
    for name, ms in times.items():
        dtype = name.split()[-1]
        twin = times[f"{name.split()[0]} dense-active {dtype}"]["median"]
        mine = times[f"handful moe {dtype}"]["median"]
        rows.append(
            {
                "step": name,
                "median ms": ms["median"],
                "min": ms["min"],
                "max": ms["max"],
                "÷ own dense-active": ms["median"] / twin,
                "÷ handful moe": ms["median"] / mine,
            }
        )
    shape = {"D": D, "layers": LAYERS, "experts": E, "top_k": K, "expert_width": WIDTH, "batch": B, "context": S}
    publish("train_step", rows, {"shape": shape, "repeats": asked.repeats})


if __name__ == "__main__":
    main()
