"""Llama (arXiv:2302.13971, arXiv:2307.09288), dense. Llama 3.1 and later scale RoPE."""

from __future__ import annotations

from handful.families.attention_fields import AttentionBias, FullAttention, Rope, WholeHeads
from handful.families.config_fields import DECODER, Field, GatedActivation, Only
from handful.families.family import Family
from handful.families.weights import DECODER_NAMES, DENSE_NAMES

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=(
        *DECODER,
        WholeHeads(),
        Rope(),
        GatedActivation(),
        AttentionBias(),
        FullAttention(),
        Field("head_dim", "head_dim", default=None),
        Field("intermediate_size", "ffn"),
        Only("mlp_bias", False, counts=True),
    ),
    names=(DECODER_NAMES | DENSE_NAMES,),
    dense=True,
)
