"""MiniMax-M2: sigmoid scores with a balance bias, every layer an MoE, QK-norm over the full projected width."""

from __future__ import annotations

from handful.families.attention_fields import FullAttention, Rope
from handful.families.config_fields import DECODER, Aside, Everywhere, Field, GatedActivation, Implied, Only, Quantized
from handful.families.family import Family
from handful.families.fp8 import BLOCK
from handful.families.weights import DECODER_NAMES, FUSED, moe_names

FAMILY = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    rows=(
        *DECODER,
        Rope(theta=5e6, partial=1.0),
        GatedActivation(),
        FullAttention(),
        Field("head_dim", "head_dim", default=128),
        Field("num_local_experts", "router.experts", also="num_experts"),
        Field("num_experts_per_tok", "router.top_k"),
        Field("intermediate_size", "expert_width"),
        Only("scoring_func", "sigmoid"),
        Only("use_qk_norm", True, counts=True),
        Only("qk_norm_type", "per_layer", counts=True),
        Only("use_routing_bias", True, counts=True),
        Only("shared_intermediate_size", 0, counts=True),
        Everywhere("attn_type_list", 1),
        Aside(("use_mtp", "num_mtp_modules", "mtp_transformer_layers")),
        Implied("qk_norm", "full"),
        Quantized("fp8", (BLOCK, BLOCK)),
        Implied("router.score", "sigmoid"),
        Implied("router.normalize", True),
        Implied("router.balance_bias", True),
    ),
    names=(
        DECODER_NAMES
        | moe_names("block_sparse_moe", gate="w1", up="w3", down="w2")
        | {"ffn.router.balance_bias": ("block_sparse_moe.e_score_correction_bias",)},
        FUSED | {"ffn.router.balance_bias": ("mlp.e_score_correction_bias",)},
    ),
    later_tokens=True,
)
