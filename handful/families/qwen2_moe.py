"""Qwen2-MoE (Qwen1.5-MoE, arXiv:2407.10671): a shared expert behind a sigmoid gate, biases on queries, keys, values."""

from __future__ import annotations

from handful.families.family import Family
from handful.families.rows import DECODER, Activation, Field, FullAttention, Implied, Rope, SparseLayers
from handful.families.weights import DECODER_NAMES, DENSE_NAMES, FUSED, moe_names

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    rows=(
        *DECODER,
        Rope(),
        Activation(),
        FullAttention(switch=True),
        SparseLayers(),
        Field("qkv_bias", "qkv_bias", default=True),
        Field("num_experts", "router.experts", also="num_local_experts"),
        Field("num_experts_per_tok", "router.top_k"),
        Field("norm_topk_prob", "router.normalize", default=False),
        Field("moe_intermediate_size", "expert_width"),
        Field("shared_expert_intermediate_size", "shared_width"),
        Field("intermediate_size", "ffn"),
        Implied("shared_gate", True),
    ),
    names=(
        DECODER_NAMES
        | DENSE_NAMES
        | moe_names()
        | {
            "ffn.shared.gate_up.weight": ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
            "ffn.shared.down.weight": ("mlp.shared_expert.down_proj.weight",),
            "ffn.shared_gate.weight": ("mlp.shared_expert_gate.weight",),
        },
        FUSED,
    ),
)
