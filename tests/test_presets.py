"""Presets hold the published values, and every one makes a small model that runs and learns."""

from __future__ import annotations

import warnings

import pytest
import torch

from handful.balance import balance_loss
from handful.config import RouterConfig
from handful.errors import ConfigError
from handful.model import Decoder
from handful.presets import ACTIVE_WIDTH, PRESETS, preset, small_model, small_training

# From the papers and the public configurations: experts, chosen, score, weights normalised, their scale.
PUBLISHED = {
    "switch": (128, 1, "softmax", False, 1.0),
    "gshard": (128, 2, "softmax", True, 1.0),
    "mixtral": (8, 2, "softmax", True, 1.0),
    "olmoe": (64, 8, "softmax", False, 1.0),
    "qwen3": (128, 8, "softmax", True, 1.0),
    "deepseek-moe": (64, 6, "softmax", False, 1.0),
    "deepseek-v3": (256, 8, "sigmoid", True, 2.5),
    "gpt-oss": (32, 4, "softmax", True, 1.0),
    "64x2": (64, 2, "softmax", True, 1.0),
}


def test_published_routers() -> None:
    rows = {
        name: (r.experts, r.top_k, r.score, r.normalize, r.scale)
        for name, r in ((name, p.router) for name, p in PRESETS.items())
    }
    assert rows == PUBLISHED


def test_what_only_some_have() -> None:
    routers = {name: p.router for name, p in PRESETS.items()}

    def who(attribute: str) -> dict[str, object]:
        plain = getattr(RouterConfig(experts=1, top_k=1), attribute)
        return {name: getattr(r, attribute) for name, r in routers.items() if getattr(r, attribute) != plain}

    assert who("balance_bias") == {"deepseek-v3": True}
    assert (who("groups"), who("top_groups")) == ({"deepseek-v3": 8}, {"deepseek-v3": 4})
    assert who("group_score") == {"deepseek-v3": "top2"}
    assert who("logits_bias") == {"gpt-oss": True}
    assert who("jitter") == {"switch": 0.01}
    assert who("random_second") == {"gshard": True}
    assert who("capacity_factor") == {"switch": 1.25, "gshard": 1.0}
    assert who("eval_capacity_factor") == {"switch": 2.0, "gshard": 1.0}
    assert who("drop_order") == {"gshard": "choice"}
    assert who("choice") == who("noisy_top_k") == {}


@pytest.mark.parametrize("name", [name for name, p in PRESETS.items() if p.model])
def test_a_preset_agrees_with_its_model(name: str) -> None:
    like = PRESETS[name]
    assert like.model is not None
    assert like.model.router == like.router
    assert like.model.activation == like.activation
    assert like.model.shared_width == like.shared * like.model.expert_width
    assert (like.model.dense_first, like.model.moe_every) == (like.dense_first, like.moe_every)


def test_an_unknown_name_lists_the_known() -> None:
    assert preset("olmoe") is PRESETS["olmoe"]
    with pytest.raises(ConfigError, match=r"^router preset 'gpt-4': one of switch, gshard, mixtral, olmoe, .*64x2$"):
        preset("gpt-4")


@pytest.mark.parametrize("name", PRESETS)
def test_small_models_have_the_same_active_width(name: str) -> None:
    model, like = small_model(50, PRESETS[name]), PRESETS[name]
    assert model.router == like.router
    used = like.router.top_k * model.expert_width + model.shared_width
    parts = like.router.top_k + like.shared
    assert ACTIVE_WIDTH - parts < used <= max(ACTIVE_WIDTH, 8 * parts)  # an expert has at least 8 neurons
    assert model.activation == like.activation


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_small_models_of_any_depth_have_an_moe_layer(name: str, layers: int) -> None:
    model = small_model(50, PRESETS[name], layers=layers)
    assert model.layers == layers
    assert any(model.is_moe(i) for i in range(layers))


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_groups", "score"),
    [
        (256, 8, 8, 4, "top2"),  # as published
        (16, 8, 8, 4, "top2"),
        (8, 2, 4, 2, "top2"),
        (8, 5, 4, 3, "top2"),  # five experts do not stand in two groups of two
        (12, 2, 6, 3, "top2"),
        (3, 2, 1, 1, "max"),  # no two groups of two
    ],
)
def test_groups_follow_the_number_of_experts(
    experts: int, top_k: int, groups: int, top_groups: int, score: str
) -> None:
    router = small_model(50, PRESETS["deepseek-v3"], experts=experts, top_k=top_k).router
    assert router is not None
    assert (router.groups, router.top_groups, router.group_score) == (groups, top_groups, score)
    assert small_model(50, experts=experts, top_k=top_k).router == RouterConfig(experts=experts, top_k=top_k)


def test_changes_win() -> None:
    model = small_model(50, experts=6, top_k=3, width=32, expert_width=5, tied=False)
    assert model.router == RouterConfig(experts=6, top_k=3)
    assert (model.width, model.expert_width, model.tied) == (32, 5, False)
    assert small_model(50, experts=6, top_k=3).expert_width == ACTIVE_WIDTH // 3
    assert small_training(PRESETS["qwen3"]).balance == PRESETS["qwen3"].balance
    assert small_training().balance == PRESETS["64x2"].balance
    assert small_training(steps=7, dtype="bfloat16").steps == 7


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns(name: str) -> None:
    """One training step's loss and gradients: finite, and no parameter is left out of the graph."""
    like = PRESETS[name]
    with warnings.catch_warnings(action="ignore"):  # GShard is not causal
        model = Decoder(small_model(17, like, experts=16, width=16, expert_width=8, shared_width=8 * like.shared))
    tokens_BS = torch.randint(17, (2, 12))
    logits_BSV, routings = model(tokens_BS)
    loss = torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    (loss + like.balance.weight * balance_loss(like.balance, routings, 2)).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    for moe in model.moe_layers:
        assert moe.router.weight.grad is not None
        assert moe.router.weight.grad.count_nonzero() > 0
