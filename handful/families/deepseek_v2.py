"""DeepSeek-V2 (arXiv:2405.04434): latent attention, softmax scores limited to groups of experts, shared experts."""

from __future__ import annotations

from typing import Any

from handful.config import ModelConfig
from handful.families.attention_fields import Latent, Rope, WholeHeads
from handful.families.config_fields import (
    DECODER,
    Field,
    GatedActivation,
    Implied,
    Only,
    SharedExperts,
    TableRow,
    Values,
    get,
    refusal,
    setting,
)
from handful.families.family import Family
from handful.families.weights import DECODER_NAMES, DENSE_NAMES, FUSED, Names, moe_names

METHODS = ("greedy", "group_limited_greedy")


class TopKMethod(TableRow):
    """Whether a token's experts are limited to groups; a group's score is its best expert's."""

    keys = ("topk_method", "n_group", "topk_group")

    def read(self, values: Values) -> dict[str, Any]:
        if get(values, "topk_method", "greedy") == "greedy":
            return {}
        return {"router.groups": get(values, "n_group"), "router.top_groups": get(values, "topk_group")}

    def check(self, values: Values) -> None:
        if get(values, "topk_method", "greedy") not in METHODS:
            raise refusal("topk_method", values["topk_method"], f"must be {' or '.join(METHODS)}")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        groups, top_groups = setting(config, "router.groups"), setting(config, "router.top_groups")
        return {"topk_method": METHODS[groups != 1], "n_group": groups, "topk_group": top_groups}


# What the third model has too.
LATENT_DECODER: tuple[TableRow, ...] = (
    *DECODER,
    Rope(),
    GatedActivation(),
    Latent(),
    Only("attention_bias", False, counts=True),
    Field("n_routed_experts", "router.experts", also="num_local_experts"),
    Field("num_experts_per_tok", "router.top_k"),
    Field("routed_scaling_factor", "router.scale", default=1.0),
    Field("moe_intermediate_size", "expert_width"),
    SharedExperts(optional=False),
    Field("first_k_dense_replace", "dense_first", default=0),
    Field("intermediate_size", "ffn"),
    Only("moe_layer_freq", 1, counts=True),
)
LATENT_NAMES: Names = {
    **DECODER_NAMES,
    **DENSE_NAMES,
    **moe_names(),
    "attn.q_down.weight": ("self_attn.q_a_proj.weight",),
    "attn.q_norm.weight": ("self_attn.q_a_layernorm.weight",),
    "attn.q_up.weight": ("self_attn.q_b_proj.weight",),
    "attn.kv_down.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attn.kv_norm.weight": ("self_attn.kv_a_layernorm.weight",),
    "attn.kv_up": ("self_attn.kv_b_proj.weight",),
    "ffn.shared.gate_up.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "ffn.shared.down.weight": ("mlp.shared_experts.down_proj.weight",),
}

FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    rows=(
        *LATENT_DECODER,
        WholeHeads(),
        TopKMethod(),
        Only("scoring_func", "softmax"),
        Only("norm_topk_prob", False),
        Only("mlp_bias", False, counts=True),
        Implied("router.normalize", False),
        Implied("rope_adjacent", True),
    ),
    names=(LATENT_NAMES, FUSED),
)
