"""DeepSeekMoE 16B (arXiv:2401.06066): many small experts, shared ones, the first layer dense, plain attention.

The first DeepSeek family, before MLA. Transformers itself does not have it; other engines do.
"""

from __future__ import annotations

from handful.families.attention_fields import AttentionBias, FullAttention, Rope
from handful.families.config_fields import DECODER, Field, GatedActivation, Only, SharedExperts
from handful.families.family import Family
from handful.families.weights import DECODER_NAMES, DENSE_NAMES, moe_names

FAMILY = Family(
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    rows=(
        *DECODER,
        Rope(),
        GatedActivation(),
        AttentionBias(),
        FullAttention(),
        Field("n_routed_experts", "router.experts"),
        Field("num_experts_per_tok", "router.top_k"),
        Field("norm_topk_prob", "router.normalize", default=False),
        Field("moe_intermediate_size", "expert_width"),
        SharedExperts(),
        Field("first_k_dense_replace", "dense_first", default=0),
        Field("intermediate_size", "ffn"),
        Only("moe_layer_freq", 1, counts=True),
        Only("scoring_func", "softmax"),
    ),
    names=(
        DECODER_NAMES
        | DENSE_NAMES
        | moe_names()
        | {
            "ffn.shared.gate_up.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
            "ffn.shared.down.weight": ("mlp.shared_experts.down_proj.weight",),
        },
    ),
)
