"""Published routers as rows of values, the models they stand in, and the small model that the rest starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from handful.config import Activation, BalanceConfig, MLAConfig, ModelConfig, RopeScaling, RouterConfig, TrainConfig
from handful.errors import ConfigError

__all__ = ["PRESETS", "Preset", "evaluate_every", "preset", "small_model", "small_training"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published MoE: its router, its balance, where its MoE layers stand, and the whole model.

    `shared` counts shared experts of the routed experts' width. `model` is the published decoder, None where that is
    not a decoder (Switch and GShard are encoder-decoders) or no published model has the shape. `published` is how
    its checkpoint stores weights: a dtype, or a name of `cost.PACKED`.
    """

    source: str
    router: RouterConfig
    balance: BalanceConfig
    activation: Activation = "swiglu"
    shared: int = 0
    dense_first: int = 0
    moe_every: int = 1
    model: ModelConfig | None = None
    published: str = "bfloat16"


def _published(router: RouterConfig, **shape: Any) -> ModelConfig:
    return ModelConfig(router=router, tied=False, **shape)


_MIXTRAL = RouterConfig(experts=8, top_k=2)
_OLMOE = RouterConfig(experts=64, top_k=8, normalize=False)
_QWEN3 = RouterConfig(experts=128, top_k=8)
_DEEPSEEK_MOE = RouterConfig(experts=64, top_k=6, normalize=False)
_DEEPSEEK_V3 = RouterConfig(
    experts=256, top_k=8, score="sigmoid", scale=2.5, balance_bias=True, groups=8, top_groups=4, group_score="top2"
)
_GPT_OSS = RouterConfig(experts=32, top_k=4, logits_bias=True)

PRESETS: dict[str, Preset] = {
    "switch": Preset(
        source="Switch-Base/128, arXiv:2101.03961: capacity 1.25 in training and 2 in evaluation, jitter 0.01",
        router=RouterConfig(
            experts=128, top_k=1, normalize=False, jitter=0.01, capacity_factor=1.25, eval_capacity_factor=2.0
        ),
        balance=BalanceConfig(loss="switch", weight=0.01),
        activation="relu",
        moe_every=2,
    ),
    "gshard": Preset(
        source="GShard with 128 experts, arXiv:2006.16668: capacity 2·T/E, first choices served first",
        router=RouterConfig(
            experts=128, top_k=2, random_second=True, capacity_factor=1.0, eval_capacity_factor=1.0, drop_order="choice"
        ),
        balance=BalanceConfig(loss="gshard", weight=0.01),
        activation="relu",
        moe_every=2,
    ),
    "mixtral": Preset(
        source="Mixtral 8x7B, arXiv:2401.04088",
        router=_MIXTRAL,
        balance=BalanceConfig(loss="switch", weight=0.02),
        model=_published(
            _MIXTRAL, vocab=32000, width=4096, layers=32, heads=32, kv_heads=8, expert_width=14336, rope_theta=1e6,
            norm_eps=1e-5, context=32768,
        ),
    ),
    "olmoe": Preset(
        source="OLMoE-1B-7B, arXiv:2409.02060",
        router=_OLMOE,
        balance=BalanceConfig(loss="switch", weight=0.01, z_weight=0.001),
        model=_published(
            _OLMOE, vocab=50304, width=2048, layers=16, heads=16, expert_width=1024, qk_norm="full", norm_eps=1e-5,
            context=4096,
        ),
    ),
    "qwen3": Preset(
        source="Qwen3-30B-A3B, arXiv:2505.09388, with its global-batch balance (arXiv:2501.11873)",
        router=_QWEN3,
        balance=BalanceConfig(loss="global", weight=0.001),
        model=_published(
            _QWEN3, vocab=151936, width=2048, layers=48, heads=32, kv_heads=4, head_dim=128, expert_width=768,
            qk_norm="head", rope_theta=1e6, context=40960,
        ),
    ),
    "deepseek-moe": Preset(
        source="DeepSeekMoE 16B, arXiv:2401.06066: two shared experts, the first layer dense",
        router=_DEEPSEEK_MOE,
        balance=BalanceConfig(loss="sequence", weight=0.001),
        shared=2,
        dense_first=1,
        model=_published(
            _DEEPSEEK_MOE, vocab=102400, width=2048, layers=28, heads=16, ffn=10944, expert_width=1408,
            shared_width=2816, dense_first=1, context=4096,
        ),
    ),
    "deepseek-v3": Preset(
        published="fp8",
        source="DeepSeek-V3, arXiv:2412.19437: loss-free bias, a light sequence-wise loss, four of eight groups",
        router=_DEEPSEEK_V3,
        balance=BalanceConfig(loss="sequence", weight=0.0001, bias_rate=0.001),
        shared=1,
        dense_first=3,
        model=_published(
            _DEEPSEEK_V3, vocab=129280, width=7168, layers=61, heads=128, ffn=18432, expert_width=2048,
            shared_width=2048, dense_first=3, mla=MLAConfig(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64,
            v_dim=128), rope_adjacent=True, rope_scaling=RopeScaling(kind="yarn", factor=40.0, original_context=4096,
            mscale=1.0, mscale_all_dim=1.0), context=163840,
        ),
    ),
    "gpt-oss": Preset(
        published="mxfp4",
        source="gpt-oss-20b, arXiv:2508.10925; how it was balanced is not published: the Switch loss stands in",
        router=_GPT_OSS,
        balance=BalanceConfig(loss="switch", weight=0.01),
        activation="swiglu_clamped",
        model=_published(
            _GPT_OSS, vocab=201088, width=2880, layers=24, heads=64, kv_heads=8, head_dim=64, expert_width=2880,
            activation="swiglu_clamped", expert_bias=True, qkv_bias=True, o_bias=True, sinks=True, window=128,
            full_layers=tuple(range(1, 24, 2)), rope_theta=150000.0, rope_scaling=RopeScaling(kind="yarn", factor=32.0,
            original_context=4096, truncate=False), norm_eps=1e-5, context=131072,
        ),
    ),
    "64x2": Preset(
        source="the textbook shape: 64 experts of which 2 are chosen",
        router=RouterConfig(experts=64, top_k=2),
        balance=BalanceConfig(loss="switch", weight=0.03),
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of that name. ConfigError lists the names if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"router preset {name!r}: one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ---------------------------------------------------------------------------------------------------------------------
# The small model: what `handful compare` and `handful train` use where nothing else is said.

ACTIVE_WIDTH = 64  # hidden width that a token uses in every layer, whatever the router


def small_model(vocab: int, like: Preset | None = None, **changes: Any) -> ModelConfig:
    """A small MoE with a preset's router, balance bias, shared experts and activation (None: `64x2`).

    An expert's width makes the active width about the same for every preset. `changes` are ModelConfig fields, and
    `experts` and `top_k` of the router; expert width and groups of experts follow them. Where `top_k` becomes 1
    its weight is not normalised: it would be 1 whatever the router says, and the router would learn nothing.
    """
    like = like or PRESETS["64x2"]
    routed = {name: changes.pop(name) for name in ("experts", "top_k") if name in changes}
    router = replace(like.router, **_groups(like.router, **routed), **routed)
    if router.top_k == 1 < router.experts:
        router = replace(router, normalize=False)
    layers = changes.get("layers", 3)
    expert_width = changes.get("expert_width", max(8, ACTIVE_WIDTH // (router.top_k + like.shared)))
    dense_first = min(like.dense_first, layers - 1)
    values: dict[str, Any] = {
        "vocab": vocab,
        "width": 64,
        "layers": layers,
        "heads": 4,
        "ffn": ACTIVE_WIDTH if dense_first or like.moe_every > 1 else 0,
        "router": router,
        "expert_width": expert_width,
        "shared_width": like.shared * expert_width,
        "dense_first": dense_first,
        "moe_every": like.moe_every if layers >= like.moe_every else 1,
        "activation": like.activation,
        "qk_norm": "head",
        "context": 128,
    }
    return ModelConfig(**(values | changes))


def _groups(like: RouterConfig, experts: int | None = None, top_k: int | None = None) -> dict[str, Any]:
    """The groups of a router with other numbers of experts: as many of the published ones as leave two experts in each,
    and the published share of them, or what top_k experts take up."""
    experts, top_k = experts or like.experts, top_k or like.top_k
    if like.groups == 1:
        return {}
    groups = max(g for g in range(1, like.groups + 1) if g == 1 or (experts % g == 0 and experts // g >= 2))
    if groups == 1:
        return {"groups": 1, "top_groups": 1, "group_score": "max"}
    share = -(-like.top_groups * groups // like.groups)
    return {"groups": groups, "top_groups": min(groups, max(share, -(-top_k * groups // experts)))}


def evaluate_every(steps: int) -> int:
    """Steps between held-out evaluations: 50, and in a short run as many as make ten of them."""
    return max(1, min(50, steps // 10))


def small_training(like: Preset | None = None, **changes: Any) -> TrainConfig:
    """How the small model is trained, with a preset's balance (None: `64x2`'s)."""
    steps = changes.get("steps", 500)
    values: dict[str, Any] = {
        "steps": steps,
        "batch": 32,
        "context": 128,
        "eval_every": evaluate_every(steps),
        "eval_tokens": 65536,
        "dtype": "float32",
    }
    return TrainConfig(**(values | {"balance": (like or PRESETS["64x2"]).balance} | changes))
