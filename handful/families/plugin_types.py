"""Families that we do not run, and that transformers 5.23 runs with our experts (`handful/transformers.py`)."""

from __future__ import annotations

__all__ = ["PLUGIN_TYPES", "plugin_hint"]

_TYPES = """
afmoe aria axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v32 deepseek_v4 diffusion_gemma dots1
dots3_note ernie4_5_moe ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4 glm4_moe_lite glm4v_moe glm5_next
glm_moe_dsa granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling inkling2 jamba
kimi_linear kolibri1 laguna lfm2_moe mellum mimo_v2_flash minimax minimax_m3_vl mistral4 mistral_large4 muse_spark
nemotron_h openai_privacy_filter phimoe qwen3_5_moe qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp solar_open
unlimited_ocr zaya
"""
PLUGIN_TYPES = frozenset(_TYPES.split())


def plugin_hint(model_type: object) -> str:
    """What to add to a refusal: the plug-in, where it would work."""
    if model_type not in PLUGIN_TYPES:
        return ""
    return "; transformers runs it, with our experts after `import handful.transformers`"
