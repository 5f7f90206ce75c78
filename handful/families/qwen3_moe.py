"""Qwen3-MoE (arXiv:2505.09388): softmax over all experts, weights normalised over the chosen, QK-norm per head."""

from __future__ import annotations

from handful.families.attention_fields import AttentionBias, Rope, Window
from handful.families.config_fields import DECODER, Field, GatedActivation, Implied, Only, Quantized, SparseLayers
from handful.families.family import Family
from handful.families.fp8 import BLOCK
from handful.families.weights import DECODER_NAMES, DENSE_NAMES, FUSED, moe_names

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=(
        *DECODER,
        Rope(),
        GatedActivation(),
        AttentionBias(),
        Window(switch=True),
        SparseLayers(),
        Field("head_dim", "head_dim", default=None),
        Field("num_experts", "router.experts", also="num_local_experts"),
        Field("num_experts_per_tok", "router.top_k"),
        Field("norm_topk_prob", "router.normalize", default=False),
        Field("moe_intermediate_size", "expert_width"),
        Field("intermediate_size", "ffn"),
        Quantized("fp8", (BLOCK, BLOCK)),
        Only("use_qk_norm", True, counts=True),
        Implied("qk_norm", "head"),
    ),
    names=(DECODER_NAMES | DENSE_NAMES | moe_names(), FUSED),
)
