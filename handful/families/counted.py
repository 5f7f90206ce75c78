"""Families that can be counted (`cost.py`) but not run: each says what our decoder lacks. Tensors are not read."""

from __future__ import annotations

from handful.families.family import Family
from handful.families.rows import (
    DECODER,
    Activation,
    AttentionBias,
    Field,
    Groups,
    Implied,
    Inside,
    Only,
    Rope,
    Row,
    SharedExperts,
)

MLA: tuple[Row, ...] = (
    Field("q_lora_rank", "mla.q_rank", default=None),
    Field("kv_lora_rank", "mla.kv_rank"),
    Field("qk_nope_head_dim", "mla.nope_dim"),
    Field("qk_rope_head_dim", "mla.rope_dim"),
    Field("v_head_dim", "mla.v_dim"),
    Only("attention_bias", False, counts=True),
)
DEEPSEEK: tuple[Row, ...] = (
    *DECODER,
    Rope(),
    Activation(),
    *MLA,
    Field("n_routed_experts", "router.experts"),
    Field("num_experts_per_tok", "router.top_k"),
    Field("routed_scaling_factor", "router.scale", default=1.0),
    Field("moe_intermediate_size", "expert_width"),
    SharedExperts(),
    Field("first_k_dense_replace", "dense_first"),
    Field("intermediate_size", "ffn"),
    Only("moe_layer_freq", 1, counts=True),
)

COUNTED: tuple[Family, ...] = (
    Family(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        rows=(*DEEPSEEK, Groups(score="max"), Field("norm_topk_prob", "router.normalize", default=False)),
        counted_only="multi-head latent attention",
    ),
    Family(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        rows=(
            *DEEPSEEK,
            Groups(score="top2"),
            Field("norm_topk_prob", "router.normalize", default=True),
            Implied("router.score", "sigmoid"),
            Implied("router.balance_bias", True),
        ),
        counted_only="multi-head latent attention",
    ),
    Family(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        rows=(
            *DECODER,
            Rope(theta=150000.0),
            AttentionBias(),
            Field("head_dim", "head_dim", default=64),
            Field("num_local_experts", "router.experts"),
            Field("num_experts_per_tok", "router.top_k"),
            Field("intermediate_size", "expert_width"),
            Implied("router.logits_bias", True),
            Implied("activation", "swiglu_clamped"),
            Implied("expert_bias", True),
            Implied("sinks", True),
        ),
        counted_only="attention sinks and sliding windows",
    ),
    Family(
        model_type="granitemoe",
        architecture="GraniteMoeForCausalLM",
        rows=(
            *DECODER,
            Rope(),
            Activation(),
            AttentionBias(),
            Field("num_local_experts", "router.experts"),
            Field("num_experts_per_tok", "router.top_k"),
            Field("intermediate_size", "expert_width"),
        ),
        counted_only="multipliers on embeddings, attention, residuals and logits",
    ),
    Family(
        model_type="ernie4_5_moe",
        architecture="Ernie4_5_MoeForCausalLM",
        rows=(
            *DECODER,
            Rope(theta=500000.0),
            Activation(),
            Field("moe_num_experts", "router.experts"),
            Field("moe_k", "router.top_k"),
            Field("moe_intermediate_size", "expert_width"),
            SharedExperts("moe_num_shared_experts"),
            Field("moe_layer_start_index", "dense_first"),
            Field("moe_layer_interval", "moe_every", default=1),
            Field("intermediate_size", "ffn"),
            Only("moe_layer_end_index", -1, counts=True),
            Only("use_bias", False, counts=True),
            Implied("router.balance_bias", True),
        ),
        counted_only="RoPE over interleaved pairs",
    ),
    Family(
        model_type="llama4",
        architecture="Llama4ForConditionalGeneration",
        rows=(
            # The text model; a published config.json has a vision model beside it, which is not counted.
            Inside(
                "text_config",
                (
                    *DECODER,
                    Rope(theta=500000.0),
                    Activation(),
                    Field("head_dim", "head_dim", default=128),
                    Field("num_local_experts", "router.experts"),
                    Field("num_experts_per_tok", "router.top_k"),
                    Field("interleave_moe_layer_step", "moe_every", default=1),
                    Field("intermediate_size", "expert_width"),
                    Field("intermediate_size", "shared_width"),
                    Field("intermediate_size_mlp", "ffn"),
                    Only("attention_bias", False, counts=True),
                    Implied("router.score", "sigmoid"),
                    Implied("router.normalize", False),
                ),
            ),
        ),
        counted_only="chunked attention and layers without RoPE",
    ),
    Family(
        model_type="dbrx",
        architecture="DbrxForCausalLM",
        rows=(
            Field("vocab_size", "vocab"),
            Field("d_model", "width"),
            Field("n_layers", "layers"),
            Field("n_heads", "heads"),
            Field("max_seq_len", "context"),
            Field("tie_word_embeddings", "tied", default=False),
            Inside("attn_config", (Field("kv_n_heads", "kv_heads"), Rope())),
            Inside(
                "ffn_config",
                (
                    Field("moe_num_experts", "router.experts"),
                    Field("moe_top_k", "router.top_k"),
                    Field("ffn_hidden_size", "expert_width"),
                ),
            ),
        ),
        counted_only="LayerNorm and clipped projections",
    ),
)
