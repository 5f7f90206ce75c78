"""DeepSeek-V3 and R1 (arXiv:2412.19437) and Kimi-K2 (arXiv:2507.20534): V2's shape with another router.

Scores are sigmoids, selection alone sees a balance bias, and a group's score is that of its two best experts.
"""

from __future__ import annotations

from handful.families.config_fields import Field, Groups, Implied, Only, Quantized
from handful.families.deepseek_v2 import LATENT_DECODER, LATENT_NAMES
from handful.families.family import Family
from handful.families.fp8 import BLOCK
from handful.families.weights import FUSED

FAMILY = Family(
    model_type="deepseek_v3",
    also=("kimi_k2",),
    architecture="DeepseekV3ForCausalLM",
    rows=(
        *LATENT_DECODER,
        Groups(score="top2"),
        Field("norm_topk_prob", "router.normalize", default=True),
        Field("rope_interleave", "rope_adjacent", default=True),
        Only("scoring_func", "sigmoid"),
        Only("topk_method", "noaux_tc"),
        Quantized("fp8", (BLOCK, BLOCK)),
        Implied("router.score", "sigmoid"),
        Implied("router.balance_bias", True),
    ),
    names=({**LATENT_NAMES, "ffn.router.balance_bias": ("mlp.gate.e_score_correction_bias",)}, FUSED),
    later_tokens=True,
)
