"""Families that can be counted (`cost.py`) but not run: each says what our decoder lacks. Tensors are not read."""

from __future__ import annotations

from handful.families.attention_fields import Rope
from handful.families.config_fields import DECODER, Field, GatedActivation, Implied, Inside, Only, SharedExperts
from handful.families.family import Family

COUNT_ONLY: tuple[Family, ...] = (
    Family(
        model_type="ernie4_5_moe",
        architecture="Ernie4_5_MoeForCausalLM",
        rows=(
            *DECODER,
            Rope(theta=500000.0),
            GatedActivation(),
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
        lacks="tensors that are not read here",
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
                    Field("rope_theta", "rope_theta", default=500000.0),
                    GatedActivation(),
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
        lacks="chunked attention and layers without RoPE",
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
        lacks="LayerNorm and clipped projections",
    ),
)
