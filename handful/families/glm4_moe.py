"""GLM-4.5 (arXiv:2508.06471): DeepSeek-V3's router (sigmoid, balance bias, groups) over grouped-query attention."""

from __future__ import annotations

from handful.families.attention_fields import AttentionBias, FullAttention, HeadNorm, Rope
from handful.families.config_fields import DECODER, Field, GatedActivation, Groups, Implied, Quantized, SharedExperts
from handful.families.family import Family
from handful.families.fp8 import BLOCK
from handful.families.weights import DECODER_NAMES, DENSE_NAMES, FUSED, moe_names

FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    rows=(
        *DECODER,
        Rope(partial=0.5),
        GatedActivation(),
        AttentionBias(output=False),
        FullAttention(),
        HeadNorm(),
        Field("head_dim", "head_dim", default=None),
        Field("n_routed_experts", "router.experts", also="num_local_experts"),
        Field("num_experts_per_tok", "router.top_k"),
        Field("norm_topk_prob", "router.normalize", default=True),
        Field("routed_scaling_factor", "router.scale", default=1.0),
        Groups(score="top2"),
        Field("moe_intermediate_size", "expert_width"),
        SharedExperts(optional=False),
        Field("first_k_dense_replace", "dense_first", default=1),
        Field("intermediate_size", "ffn"),
        Quantized("fp8", (BLOCK, BLOCK)),
        Implied("router.score", "sigmoid"),
        Implied("router.balance_bias", True),
    ),
    names=(
        DECODER_NAMES
        | DENSE_NAMES
        | moe_names()
        | {
            "ffn.router.balance_bias": ("mlp.gate.e_score_correction_bias",),
            "ffn.shared.gate_up.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
            "ffn.shared.down.weight": ("mlp.shared_experts.down_proj.weight",),
        },
        FUSED,
    ),
    later_tokens=True,
)
