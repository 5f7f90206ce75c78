"""Qwen3 (arXiv:2505.09388), dense: grouped-query attention with QK-norm per head. Qwen3-MoE's dense twin."""

from __future__ import annotations

from handful.families.attention_fields import AttentionBias, Rope, Window
from handful.families.config_fields import DECODER, Field, GatedActivation, Implied, get
from handful.families.family import Family
from handful.families.weights import DECODER_NAMES, DENSE_NAMES

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=(
        *DECODER,
        Rope(),
        GatedActivation(),
        AttentionBias(),
        Window(switch=True, slides=lambda layer, values: layer >= get(values, "max_window_layers", 28)),
        Field("head_dim", "head_dim", default=128),
        Field("intermediate_size", "ffn"),
        Implied("qk_norm", "head"),
    ),
    names=(DECODER_NAMES | DENSE_NAMES,),
    dense=True,
)
