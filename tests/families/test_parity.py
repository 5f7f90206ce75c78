"""Every family beside transformers, on random checkpoints of many shapes: logits, chosen experts, generation, bytes.

A case is a family and a seed. The seed draws the shape: odd widths, one expert of a token or all of them, tied or not,
with biases or without, RoPE whole or partial and scaled in every way, windows, groups.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from handful.checkpoint import read_json
from handful.families import config_from_hf, config_to_hf, save, tensors_to_hf
from handful.families.convert import RUN
from handful.families.io import load_decoder
from handful.model import Decoder
from handful.positions import KVCache

transformers: Any = importlib.import_module("transformers")  # its types know less than its configs accept
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SEEDS = range(6)
CONTEXT = 48  # of the models; prompts are shorter, and longer than windows and the contexts of scaled RoPEs
NEW = 20  # tokens that are generated


# ---------------------------------------------------------------------------------------------------------------------
# Shapes.


def rope(draw: random.Random, **more: Any) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 12, "low_freq_factor": 1.0,
         "high_freq_factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24, "beta_fast": 4.0,
         "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12, "mscale": 0.7,
         "mscale_all_dim": 1.1},
    ]  # fmt: skip
    return {"rope_theta": draw.choice([100.0, 10000.0, 5e5]), **draw.choice(kinds), **more}


def decoder(draw: random.Random, *, free_heads: bool = True, divided: bool = False) -> dict[str, Any]:
    """What every family has. `free_heads`: a head's width need not be the model's over the heads; with `divided`,
    transformers asks that the heads divide the model's width all the same."""
    heads, head_dim = draw.choice([2, 4, 6]), draw.choice([4, 6, 8])
    out = {
        "vocab_size": draw.choice([53, 61, 64]),
        "hidden_size": draw.choice([17, 24, 31]) if free_heads else heads * head_dim,
        "num_hidden_layers": draw.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2, heads) if heads % n == 0]),
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.5,
        "hidden_act": draw.choice(["silu", "silu", "gelu"]),
        "rope_parameters": rope(draw),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if divided:
        out["hidden_size"] = heads * draw.choice([3, 5, 7])
    return out | {"head_dim": head_dim} if free_heads else out


def experts(draw: random.Random, key: str) -> dict[str, int]:
    """One expert of a token, all of them, or some."""
    count = draw.choice([2, 3, 5, 8])
    return {key: count, "num_experts_per_tok": draw.choice([1, count, draw.randint(1, count)])}


def coin(draw: random.Random) -> bool:
    return draw.random() < 0.5


def window(draw: random.Random) -> int | None:
    return draw.choice([None, 3, 8])


def sparse(draw: random.Random, layers: int) -> dict[str, Any]:
    """Which layers are dense."""
    dense: dict[str, Any] = draw.choice(
        [{}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}]
    )
    return dense if layers > 1 else {}


def groups(draw: random.Random, at_least: int) -> dict[str, int]:
    """Groups of experts, of which a token's are taken from some."""
    count, size = draw.choice([1, 2, 4]), draw.choice([at_least, 3])
    top = draw.randint(1, count)
    return {
        "n_routed_experts": count * size,
        "n_group": count,
        "topk_group": top,
        "num_experts_per_tok": draw.randint(1, top * size),
    }


def latent(draw: random.Random, *, even: bool = False) -> dict[str, Any]:
    """`even`: transformers' V2 turns pairs as complex numbers, which must lie at even places."""
    shape = decoder(draw, divided=even)
    del shape["head_dim"]
    return shape | {
        "num_key_value_heads": shape["num_attention_heads"],
        "q_lora_rank": draw.choice([None, 5, 12]),
        "kv_lora_rank": draw.choice([6, 10] if even else [6, 9]),
        "qk_nope_head_dim": draw.choice([4, 8] if even else [3, 8]),
        "qk_rope_head_dim": draw.choice([4, 6]),
        "v_head_dim": draw.choice([5, 8]),
        "intermediate_size": 20,
        "moe_intermediate_size": draw.choice([7, 12]),
        "n_shared_experts": draw.choice([1, 2]),
        "first_k_dense_replace": draw.choice([0, 1]),
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
    }


def mixtral(draw: random.Random) -> Any:
    more = {
        **experts(draw, "num_local_experts"),
        "intermediate_size": draw.choice([7, 12]),
        "sliding_window": window(draw),
    }
    return transformers.MixtralConfig(**decoder(draw), **more)


def olmoe(draw: random.Random) -> Any:
    more = {"intermediate_size": draw.choice([7, 12]), "norm_topk_prob": coin(draw), "attention_bias": coin(draw)}
    return transformers.OlmoeConfig(**decoder(draw, free_heads=False), **experts(draw, "num_experts"), **more)


def qwen2_moe(draw: random.Random) -> Any:
    shape = decoder(draw, free_heads=False)
    size = window(draw)
    more = {
        "intermediate_size": 20,
        "moe_intermediate_size": draw.choice([7, 12]),
        "shared_expert_intermediate_size": draw.choice([9, 16]),
        "norm_topk_prob": coin(draw),
        "qkv_bias": coin(draw),
        "use_sliding_window": size is not None,
        "sliding_window": size,
        "max_window_layers": draw.choice([1, 28]),
    }
    return transformers.Qwen2MoeConfig(
        **shape, **experts(draw, "num_experts"), **sparse(draw, shape["num_hidden_layers"]), **more
    )


def qwen3_moe(draw: random.Random) -> Any:
    shape = decoder(draw)
    size = window(draw)
    more = {
        "intermediate_size": 20,
        "moe_intermediate_size": draw.choice([7, 12]),
        "norm_topk_prob": coin(draw),
        "attention_bias": coin(draw),
        "use_sliding_window": size is not None,
        "sliding_window": size,
    }
    return transformers.Qwen3MoeConfig(
        **shape, **experts(draw, "num_experts"), **sparse(draw, shape["num_hidden_layers"]), **more
    )


def granitemoe(draw: random.Random) -> Any:
    more = {
        "intermediate_size": draw.choice([7, 12]),
        "attention_bias": coin(draw),
        "embedding_multiplier": draw.choice([1.0, 12.0]),
        "attention_multiplier": draw.choice([1.0, 0.25]),
        "residual_multiplier": draw.choice([1.0, 0.22]),
        "logits_scaling": draw.choice([1.0, 6.0]),
    }
    return transformers.GraniteMoeConfig(
        **decoder(draw, free_heads=False), **experts(draw, "num_local_experts"), **more
    )


def deepseek_v2(draw: random.Random) -> Any:
    grouped = groups(draw, at_least=2)
    method = "group_limited_greedy" if grouped["n_group"] > 1 else "greedy"
    return transformers.DeepseekV2Config(**latent(draw, even=True), **grouped, topk_method=method)


def deepseek_v3(draw: random.Random) -> Any:
    more = {"norm_topk_prob": coin(draw), "rope_interleave": coin(draw)}
    return transformers.DeepseekV3Config(**latent(draw), **groups(draw, at_least=2), **more)


def glm4_moe(draw: random.Random) -> Any:
    shape = decoder(draw) | {"head_dim": 8}
    shape["rope_parameters"] = rope(draw, partial_rotary_factor=draw.choice([0.5, 1.0]))
    more = {
        "intermediate_size": 20,
        "moe_intermediate_size": draw.choice([7, 12]),
        "n_shared_experts": draw.choice([1, 2]),
        "first_k_dense_replace": draw.choice([0, 1]),
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "norm_topk_prob": coin(draw),
        "attention_bias": coin(draw),
        "use_qk_norm": coin(draw),
    }
    return transformers.Glm4MoeConfig(**shape, **groups(draw, at_least=2), **more)


def minimax_m2(draw: random.Random) -> Any:
    shape = decoder(draw) | {"head_dim": 8}
    shape["rope_parameters"] = rope(draw, partial_rotary_factor=draw.choice([0.5, 1.0]))
    return transformers.MiniMaxM2Config(
        **shape, **experts(draw, "num_local_experts"), intermediate_size=draw.choice([7, 12])
    )


def gpt_oss(draw: random.Random) -> Any:
    shape = decoder(draw) | {"hidden_act": "silu"}
    kinds = [draw.choice(["sliding_attention", "full_attention"]) for _ in range(shape["num_hidden_layers"])]
    more = {
        "intermediate_size": draw.choice([7, 12]),
        "sliding_window": draw.choice([3, 8]),
        "layer_types": draw.choice([None, kinds]),
        "attention_bias": coin(draw),
    }
    return transformers.GptOssConfig(**shape, **experts(draw, "num_local_experts"), **more)


def qwen3(draw: random.Random) -> Any:
    size = window(draw)
    more = {
        "attention_bias": coin(draw),
        "use_sliding_window": size is not None,
        "sliding_window": size,
        "max_window_layers": draw.choice([0, 1, 28]),
    }
    return transformers.Qwen3Config(**decoder(draw), **more, intermediate_size=draw.choice([19, 24]))


def llama(draw: random.Random) -> Any:
    return transformers.LlamaConfig(
        **decoder(draw, divided=True), intermediate_size=draw.choice([19, 24]), attention_bias=coin(draw)
    )


def mistral(draw: random.Random) -> Any:
    return transformers.MistralConfig(
        **decoder(draw), intermediate_size=draw.choice([19, 24]), sliding_window=window(draw)
    )


DRAWN: dict[str, Callable[[random.Random], Any]] = {
    draw.__name__: draw
    for draw in (
        mixtral, olmoe, qwen2_moe, qwen3_moe, granitemoe, deepseek_v2, deepseek_v3, glm4_moe, minimax_m2, gpt_oss,
        qwen3, llama, mistral,
    )
}  # fmt: skip


def test_every_family_is_here() -> None:
    # Transformers does not have the first DeepSeek family; its names are tested in test_families.py.
    assert set(DRAWN) == {family.model_type for family in RUN} - {"deepseek"}


# ---------------------------------------------------------------------------------------------------------------------
# One case.


def fill(model: nn.Module, seed: int) -> None:
    """Numbers of ordinary size everywhere, so that none (a bias, a norm, a sink) could be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if tensor.dim() == 1 and "norm" in name else 0.3 * noise)


def watched(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What each experts module of a transformers model is told, as it is told: (experts_TK, weights_TK)."""
    told: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, experts_TK, weights_TK = (*args, *kwargs.values())
        told.append((experts_TK, weights_TK))

    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(note, with_kwargs=True)
    return told


def by_expert(experts_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    order = experts_TK.argsort(dim=-1)
    return experts_TK.gather(1, order), weights_TK.gather(1, order)


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())


def greedy(model: Decoder, tokens_BS: Tensor, padding_B: Tensor) -> Tensor:
    """NEW tokens after a batch of prompts that are padded in front."""
    B, S = tokens_BS.shape
    cache = KVCache(model.config, B, S + NEW)
    made = [model(tokens_BS, cache, padding_B=padding_B)[0][:, -1].argmax(-1)]
    while len(made) < NEW:
        made.append(model(made[-1][:, None], cache)[0][:, -1].argmax(-1))
    return torch.stack(made, dim=1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", DRAWN)
@torch.no_grad()
def test_a_family_is_transformers(family: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{family} {seed}")
    config = DRAWN[family](draw)
    # Their grouped products refuse odd widths; their loop over experts does not.
    theirs = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    fill(theirs, seed)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=draw.choice(["20KB", "1GB"]))
    ours = load_decoder(tmp_path / "theirs")

    # Logits, and what every router chose.
    tokens_BS = torch.randint(config.vocab_size, (3, 27), generator=torch.Generator().manual_seed(seed))
    told = watched(theirs)
    want = theirs(tokens_BS).logits
    got, routings = ours(tokens_BS)
    close(got, want)
    assert len(routings) == len(told)
    for routing, (experts_TK, weights_TK) in zip(routings, told, strict=True):
        mine, their = by_expert(routing.experts_TK, routing.weights_TK), by_expert(experts_TK, weights_TK)
        assert mine[0].equal(their[0])
        close(mine[1], their[1])

    # Generation, through the cache, of prompts of three lengths.
    padding_B = torch.tensor([0, 5, 16])
    prompt_BS = tokens_BS[:, :17]
    mask_BS = (torch.arange(17) >= padding_B[:, None]).long()
    made = theirs.generate(
        prompt_BS, attention_mask=mask_BS, max_new_tokens=NEW, do_sample=False, pad_token_id=0, use_cache=True
    )
    assert greedy(ours, prompt_BS, padding_B).equal(made[:, 17:])

    # What is written back: the same bytes, and a model of transformers' with the same logits.
    saved = {name: t for file in (tmp_path / "theirs").glob("*.safetensors") for name, t in load_file(file).items()}
    back = tensors_to_hf(ours.config, ours.state_dict())
    assert set(back) == set(saved)
    assert all(back[name].equal(saved[name]) for name in saved)
    values = json.loads(json.dumps(config_to_hf(ours.config)))
    assert config_from_hf(values) == ours.config
    # Without a window, Mistral is Llama, which transformers takes where the heads divide the width.
    llama = family == "mistral" and ours.config.window is None and config.hidden_size % config.num_attention_heads == 0
    assert values["model_type"] == ("llama" if llama else family)
    save(ours, tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()), info
    close(again(tokens_BS).logits, want)
    assert read_json(tmp_path / "ours" / "config.json")["model_type"] == values["model_type"]
