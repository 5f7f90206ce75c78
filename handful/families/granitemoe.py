"""Granite 3.0 MoE (granite-3.0-1b-a400m): every layer an MoE, with scales on embeddings, scores, layers and logits."""

from __future__ import annotations

from handful.families.attention_fields import AttentionBias, AttentionScale, FullAttention, Rope
from handful.families.config_fields import DECODER, Field, GatedActivation, Implied
from handful.families.family import Family
from handful.families.weights import DECODER_NAMES

FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    rows=(
        *DECODER,
        Rope(),
        GatedActivation(),
        AttentionBias(),
        FullAttention(),
        AttentionScale("attention_multiplier"),
        Field("embedding_multiplier", "embedding_scale", default=1.0),
        Field("residual_multiplier", "residual_scale", default=1.0),
        Field("logits_scaling", "logits_scale", default=1.0),
        Field("num_local_experts", "router.experts", also="num_experts"),
        Field("num_experts_per_tok", "router.top_k"),
        Field("intermediate_size", "expert_width"),
        Implied("router.normalize", True),
    ),
    names=(
        DECODER_NAMES
        | {
            "ffn.router.weight": ("block_sparse_moe.router.layer.weight",),
            "ffn.experts.gate_up": ("block_sparse_moe.input_linear.weight",),
            "ffn.experts.down": ("block_sparse_moe.output_linear.weight",),
        },
        # As transformers 5 holds them in memory.
        {
            "ffn.router.weight": ("block_sparse_moe.router.weight",),
            "ffn.experts.gate_up": ("block_sparse_moe.experts.gate_up_proj",),
            "ffn.experts.down": ("block_sparse_moe.experts.down_proj",),
        },
    ),
)
