"""Mixtral (arXiv:2401.04088): every layer an MoE, softmax weights normalised over the chosen experts."""

from __future__ import annotations

from handful.families.attention_fields import Rope, Window
from handful.families.config_fields import DECODER, Field, GatedActivation, Implied
from handful.families.family import Family
from handful.families.weights import DECODER_NAMES, FUSED, moe_names

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=(
        *DECODER,
        Rope(theta=1e6),
        GatedActivation(),
        Window(),
        Field("head_dim", "head_dim", default=None),
        Field("num_local_experts", "router.experts", also="num_experts"),
        Field("num_experts_per_tok", "router.top_k"),
        Field("intermediate_size", "expert_width"),
        Implied("router.normalize", True),
    ),
    names=(DECODER_NAMES | moe_names("block_sparse_moe", gate="w1", up="w3", down="w2"), FUSED),
)
