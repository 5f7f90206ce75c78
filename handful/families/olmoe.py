"""OLMoE (arXiv:2409.02060): every layer an MoE, softmax weights as they are, QK-norm over the full projected width."""

from __future__ import annotations

from handful.families.attention_fields import AttentionBias, FullAttention, Rope
from handful.families.config_fields import DECODER, Field, GatedActivation, Implied, Only
from handful.families.family import Family
from handful.families.weights import DECODER_NAMES, FUSED, moe_names

FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    rows=(
        *DECODER,
        Rope(),
        GatedActivation(),
        AttentionBias(),
        FullAttention(),
        Only("clip_qkv", None),
        Field("num_experts", "router.experts", also="num_local_experts"),
        Field("num_experts_per_tok", "router.top_k"),
        Field("norm_topk_prob", "router.normalize", default=False),
        Field("intermediate_size", "expert_width"),
        Implied("qk_norm", "full"),
    ),
    names=(DECODER_NAMES | moe_names(), FUSED),
)
