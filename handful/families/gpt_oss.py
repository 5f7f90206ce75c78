"""gpt-oss (arXiv:2508.10925): attention sinks, every other layer a sliding window, biases, a clamped SwiGLU, YaRN.

The published checkpoints hold their experts in MXFP4, which is read. What is written are plain tensors, which
transformers reads too.
"""

from __future__ import annotations

from handful.families.attention_fields import AttentionBias, Rope, Window
from handful.families.config_fields import DECODER, Field, Implied, Only, Quantized
from handful.families.family import Family
from handful.families.weights import DECODER_NAMES, Stored

FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    rows=(
        *DECODER,
        Rope(
            theta=150000.0,
            scaling={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
        ),
        AttentionBias(default=True),
        Window(default=128, slides=lambda layer, _: layer % 2 == 0),
        Quantized("mxfp4"),
        Field("head_dim", "head_dim", default=64),
        Field("num_local_experts", "router.experts", also="num_experts"),
        Field("num_experts_per_tok", "router.top_k", also="experts_per_token"),
        Field("intermediate_size", "expert_width"),
        Only("hidden_act", "silu"),
        Only("swiglu_alpha", 1.702),
        Only("swiglu_limit", 7.0),
        Implied("router.normalize", True),
        Implied("router.logits_bias", True),
        Implied("activation", "swiglu_clamped"),
        Implied("expert_bias", True),
        Implied("sinks", True),
    ),
    names=(
        {
            **DECODER_NAMES,
            "attn.sinks": ("self_attn.sinks",),
            "ffn.router.weight": ("mlp.router.weight",),
            "ffn.router.bias": ("mlp.router.bias",),
            "ffn.experts.gate_up": (Stored("mlp.experts.gate_up_proj", transposed=True, interleaved=True),),
            "ffn.experts.gate_up_bias": (Stored("mlp.experts.gate_up_proj_bias", interleaved=True),),
            "ffn.experts.down": (Stored("mlp.experts.down_proj", transposed=True),),
            "ffn.experts.down_bias": ("mlp.experts.down_proj_bias",),
        },
        {
            "ffn.experts.gate_up": (Stored("mlp.experts.gate_up_proj", interleaved=True, mxfp4=True),),
            "ffn.experts.down": (Stored("mlp.experts.down_proj", mxfp4=True),),
        },
    ),
)
