"""Qwen2-MoE (Qwen1.5-MoE, arXiv:2407.10671): a shared expert behind a sigmoid gate, biases on queries, keys, values."""

from __future__ import annotations

from handful.families.attention_fields import Rope, Window
from handful.families.config_fields import DECODER, Field, GatedActivation, Implied, SparseLayers, Values, get
from handful.families.family import Family
from handful.families.weights import DECODER_NAMES, DENSE_NAMES, FUSED, moe_names


def _slides(layer: int, values: Values) -> bool:
    return layer % 2 == 0 and layer < get(values, "max_window_layers", 28)


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    rows=(
        *DECODER,
        Rope(),
        GatedActivation(),
        Window(switch=True, slides=_slides),
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
