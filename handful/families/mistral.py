"""Mistral (arXiv:2310.06825), dense: Llama with a sliding window in every layer, or without one."""

from __future__ import annotations

from handful.families.attention_fields import Rope, Window
from handful.families.config_fields import DECODER, Field, GatedActivation
from handful.families.family import Family
from handful.families.weights import DECODER_NAMES, DENSE_NAMES

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rows=(
        *DECODER,
        Rope(),
        GatedActivation(),
        Window(default=4096),
        Field("head_dim", "head_dim", default=None),
        Field("intermediate_size", "ffn"),
    ),
    names=(DECODER_NAMES | DENSE_NAMES,),
    dense=True,
)
