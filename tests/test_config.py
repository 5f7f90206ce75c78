"""Each rule of each config refuses what it should, naming the field and the value; plain values make the round trip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from handful.config import BalanceConfig, MLAConfig, ModelConfig, RouterConfig, TrainConfig
from handful.config_io import from_dict, read_toml, to_dict
from handful.errors import ConfigError
from handful.presets import PRESETS, small_model, small_training

INF, NAN = float("inf"), float("nan")

ROUTER: dict[str, Any] = {"experts": 8, "top_k": 2}
DENSE: dict[str, Any] = {"vocab": 11, "width": 8, "layers": 4, "heads": 2, "ffn": 16}
MOE: dict[str, Any] = DENSE | {"ffn": 0, "router": RouterConfig(**ROUTER), "expert_width": 4}


def refused(make: Any, base: Mapping[str, Any], changes: Mapping[str, Any], field: str) -> str:
    """The message of the ConfigError, after checking that it opens with the field and the value that it has."""
    with pytest.raises(ConfigError) as caught:
        make(**{**base, **changes})
    message = str(caught.value)
    owner = make.__name__.removesuffix("Config").lower()
    default = next(f.default for f in dataclasses.fields(make) if f.name == field)
    value = changes.get(field, base.get(field, default))
    assert message.startswith(f"{owner}.{field} = {value!r}: "), message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("field", "changes", "right"),
    [
        ("experts", {"experts": 0}, "at least 1"),
        ("top_k", {"top_k": 0}, "from 1 to experts = 8"),
        ("top_k", {"top_k": 9}, "from 1 to experts = 8"),
        ("choice", {"choice": "both"}, "'token' or 'expert'"),
        ("score", {"score": "tanh"}, "'softmax' or 'sigmoid'"),
        ("scale", {"scale": 0.0}, "above 0"),
        ("scale", {"scale": -1.0}, "above 0"),
        ("scale", {"scale": NAN}, "above 0"),
        ("scale", {"scale": INF}, "above 0"),
        ("groups", {"groups": 0}, "a divisor of experts = 8"),
        ("groups", {"groups": 3}, "a divisor of experts = 8"),
        ("groups", {"groups": 16}, "a divisor of experts = 8"),
        ("top_groups", {"groups": 4, "top_groups": 0}, "from 1 to groups = 4"),
        ("top_groups", {"groups": 4, "top_groups": 5}, "from 1 to groups = 4"),
        ("group_score", {"group_score": "mean"}, "'max' or 'top2'"),
        ("group_score", {"groups": 8, "top_groups": 4, "group_score": "top2"}, "'max', for groups of 1 expert"),
        ("top_k", {"top_k": 3, "groups": 4}, "at most 2: 1 groups of 2 experts"),
        ("jitter", {"jitter": -0.1}, "from 0 to below 1"),
        ("jitter", {"jitter": 1.0}, "from 0 to below 1"),
        ("jitter", {"jitter": NAN}, "from 0 to below 1"),
        ("capacity_factor", {"capacity_factor": 0.0}, "above 0, or none for dropless"),
        ("capacity_factor", {"capacity_factor": INF}, "above 0, or none for dropless"),
        ("eval_capacity_factor", {"eval_capacity_factor": -1.0}, "above 0, or none for dropless"),
        ("drop_order", {"drop_order": "random"}, "'token' or 'choice'"),
        ("random_second", {"top_k": 1, "random_second": True}, "false unless top_k = 2"),
        ("balance_bias", {"choice": "expert", "balance_bias": True}, "False with choice = 'expert'"),
        ("groups", {"choice": "expert", "groups": 2, "top_groups": 2}, "1 with choice = 'expert'"),
        ("noisy_top_k", {"choice": "expert", "noisy_top_k": True}, "False with choice = 'expert'"),
        ("random_second", {"choice": "expert", "random_second": True}, "False with choice = 'expert'"),
        ("capacity_factor", {"choice": "expert", "capacity_factor": 1.0}, "none with choice = 'expert'"),
        ("eval_capacity_factor", {"choice": "expert", "eval_capacity_factor": 1.0}, "none with choice = 'expert'"),
    ],
)
def test_router_rules(field: str, changes: dict[str, Any], right: str) -> None:
    assert right in refused(RouterConfig, ROUTER, changes, field)


@pytest.mark.parametrize(
    ("field", "base", "changes", "right"),
    [
        *[(name, DENSE, {name: 0}, "at least 1") for name in ("vocab", "width", "layers", "heads", "moe_every")],
        ("context", DENSE, {"context": 0}, "at least 1"),
        *[(name, MOE, {name: -1}, "at least 0") for name in ("ffn", "expert_width", "shared_width", "dense_first")],
        ("kv_heads", DENSE, {"heads": 4, "kv_heads": 3}, "a divisor of 4 heads"),
        ("kv_heads", DENSE, {"kv_heads": 0}, "a divisor of 2 heads"),
        ("heads", DENSE, {"heads": 3}, "a divisor of width = 8, or give head_dim"),
        ("head_dim", DENSE, {"head_dim": 0}, "at least 1"),
        ("head_dim", DENSE, {"head_dim": 5}, "even within the part that RoPE turns"),
        ("head_dim", DENSE, {"head_dim": 8, "rotary_fraction": 0.2}, "even within the part that RoPE turns"),
        ("rotary_fraction", DENSE, {"rotary_fraction": 0.0}, "above 0, at most 1"),
        ("rotary_fraction", DENSE, {"rotary_fraction": 1.5}, "above 0, at most 1"),
        ("activation", DENSE, {"activation": "silu"}, "one of swiglu, geglu, relu, gelu, swiglu_clamped"),
        ("qk_norm", DENSE, {"qk_norm": "half"}, "'none', 'head' or 'full'"),
        ("norm_eps", DENSE, {"norm_eps": 0.0}, "above 0"),
        ("rope_theta", DENSE, {"rope_theta": -1.0}, "above 0"),
        ("shared_gate", MOE, {"shared_gate": True}, "false without shared_width"),
        ("ffn", DENSE, {"ffn": 0}, "at least 1 in a dense model"),
        ("expert_width", DENSE, {"expert_width": 4}, "0 without a router"),
        ("shared_width", DENSE, {"shared_width": 4}, "0 without a router"),
        ("expert_width", MOE, {"expert_width": 0}, "at least 1 with a router"),
        ("dense_first", MOE, {"ffn": 8, "dense_first": 4}, "few enough to leave an MoE layer"),
        ("dense_first", MOE, {"ffn": 8, "moe_every": 5}, "few enough to leave an MoE layer"),
        ("ffn", MOE, {"dense_first": 1}, "at least 1 when some layers are dense"),
        ("ffn", MOE, {"moe_every": 2}, "at least 1 when some layers are dense"),
    ],
)
def test_model_rules(field: str, base: dict[str, Any], changes: dict[str, Any], right: str) -> None:
    assert right in refused(ModelConfig, base, changes, field)


@pytest.mark.parametrize(
    ("field", "changes", "right"),
    [
        ("weight", {"weight": -1.0}, "at least 0"),
        ("bias_rate", {"bias_rate": -1.0}, "at least 0"),
        ("z_weight", {"z_weight": NAN}, "at least 0"),
        ("loss", {"loss": "even"}, "one of none, switch, global, sequence, gshard"),
        ("weight", {"loss": "switch"}, "above 0 for 'switch'"),
    ],
)
def test_balance_rules(field: str, changes: dict[str, Any], right: str) -> None:
    assert right in refused(BalanceConfig, {}, changes, field)


@pytest.mark.parametrize(
    ("field", "changes", "right"),
    [
        *[(name, {name: 0}, "at least 1") for name in ("steps", "batch", "accumulate", "eval_tokens")],
        ("context", {"context": 1}, "at least 2"),
        ("accumulate", {"batch": 8, "accumulate": 3}, "a divisor of batch = 8"),
        ("lr", {"lr": 0.0}, "above 0"),
        ("min_lr_ratio", {"min_lr_ratio": 1.5}, "from 0 to 1"),
        ("schedule", {"schedule": "linear"}, "'cosine' or 'wsd'"),
        ("warmup", {"warmup": 1.0}, "from 0 to below 1"),
        ("decay", {"decay": -0.1}, "from 0 to 1"),
        ("weight_decay", {"weight_decay": -0.1}, "at least 0"),
        ("beta1", {"beta1": 1.0}, "from 0 to below 1"),
        ("beta2", {"beta2": -0.1}, "from 0 to below 1"),
        ("clip", {"clip": 0.0}, "above 0"),
        ("dtype", {"dtype": "float16"}, "'auto', 'float32' or 'bfloat16'"),
        ("seed", {"seed": -1}, "at least 0"),
        ("eval_every", {"eval_every": -1}, "at least 0"),
        ("checkpoint_every", {"checkpoint_every": -1}, "at least 0"),
    ],
)
def test_train_rules(field: str, changes: dict[str, Any], right: str) -> None:
    assert right in refused(TrainConfig, {}, changes, field)


def test_the_edges_of_the_rules_are_inside() -> None:
    RouterConfig(experts=1, top_k=1)
    RouterConfig(experts=8, top_k=8, groups=4, top_groups=4, group_score="top2")
    RouterConfig(experts=8, top_k=2, groups=4, top_groups=1, jitter=0.99, capacity_factor=1e-3)
    RouterConfig(experts=8, top_k=8, choice="expert", score="sigmoid", jitter=0.1)
    ModelConfig(**DENSE | {"heads": 3, "head_dim": 2})
    ModelConfig(**MOE | {"ffn": 1, "dense_first": 3})
    ModelConfig(**MOE | {"ffn": 1, "moe_every": 4})
    BalanceConfig(loss="global", weight=1e-9)
    TrainConfig(warmup=0.0, min_lr_ratio=1.0, decay=1.0, eval_every=0, checkpoint_every=0)


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RouterConfig(**ROUTER).top_k = 3  # type: ignore[misc]


def test_what_follows_from_a_model_config() -> None:
    model = ModelConfig(**DENSE)
    assert (model.kv_heads, model.head_dim, model.n_kv_heads, model.d_head, model.rotary_dim) == (2, 4, 2, 4, 4)
    assert ModelConfig(**DENSE | {"head_dim": 16, "rotary_fraction": 0.25}).rotary_dim == 4
    assert model.gated
    assert not ModelConfig(**DENSE | {"activation": "gelu"}).gated
    assert TrainConfig(batch=6, context=7).tokens_per_step == 42


@pytest.mark.parametrize(
    ("dense_first", "moe_every", "moe"),
    [(0, 1, [0, 1, 2, 3]), (1, 1, [1, 2, 3]), (0, 2, [1, 3]), (2, 2, [3]), (0, 3, [2]), (3, 1, [3])],
)
def test_where_moe_layers_stand(dense_first: int, moe_every: int, moe: list[int]) -> None:
    model = ModelConfig(**MOE | {"ffn": 8, "dense_first": dense_first, "moe_every": moe_every})
    assert [i for i in range(model.layers) if model.is_moe(i)] == moe
    assert not any(ModelConfig(**DENSE).is_moe(i) for i in range(4))


# ---------------------------------------------------------------------------------------------------------------------
# To and from plain values.


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_of_every_preset(name: str) -> None:
    preset = PRESETS[name]
    configs = [preset.router, preset.balance, small_model(50, preset), small_training(preset)]
    for config in [*configs, *([preset.model] if preset.model else [])]:
        plain = json.loads(json.dumps(to_dict(config)))
        assert from_dict(type(config), plain) == config


def test_round_trip_of_nested_and_absent_tables() -> None:
    mla = ModelConfig(**DENSE, mla=MLAConfig(q_rank=None, kv_rank=4, nope_dim=2, rope_dim=2, v_dim=2))
    assert from_dict(ModelConfig, to_dict(mla)) == mla
    dense = ModelConfig(**DENSE)
    assert to_dict(dense)["router"] is None
    assert from_dict(ModelConfig, to_dict(dense)) == dense


def test_a_whole_number_may_stand_for_a_float() -> None:
    scale = from_dict(RouterConfig, ROUTER | {"scale": 2}).scale
    assert scale == 2.0
    assert isinstance(scale, float)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (RouterConfig, {"expert": 8}, "router.expert: no such setting; there are balance_bias, capacity_factor, "),
        (RouterConfig, {"experts": 8}, "router.top_k: needed and not given"),
        (RouterConfig, {}, "router.experts: needed and not given"),
        (RouterConfig, ROUTER | {"experts": "8"}, "router.experts = '8': of type int"),
        (RouterConfig, ROUTER | {"experts": 8.0}, "router.experts = 8.0: of type int"),
        (RouterConfig, ROUTER | {"experts": True}, "router.experts = True: of type int"),
        (RouterConfig, ROUTER | {"experts": None}, "router.experts = None: of type int"),
        (RouterConfig, ROUTER | {"scale": True}, "router.scale = True: of type float"),
        (RouterConfig, ROUTER | {"scale": "2"}, "router.scale = '2': of type float"),
        (RouterConfig, ROUTER | {"capacity_factor": True}, "router.capacity_factor = True: of type float"),
        (RouterConfig, ROUTER | {"normalize": 1}, "router.normalize = 1: of type bool"),
        (RouterConfig, ROUTER | {"score": "tanh"}, "router.score = 'tanh': one of softmax, sigmoid"),
        (RouterConfig, ROUTER | {"score": ["softmax"]}, "router.score = ['softmax']: one of softmax, sigmoid"),
        (ModelConfig, DENSE | {"router": 3}, "model.router = 3: a table of settings"),
        (ModelConfig, DENSE | {"router": {"experts": 8, "k": 2}}, "model.router.k: no such setting; there are "),
        (ModelConfig, DENSE | {"router": {"experts": 8}}, "model.router.top_k: needed and not given"),
        (TrainConfig, {"balance": {"loss": "even"}}, "train.balance.loss = 'even': one of none, switch, "),
        (TrainConfig, {"balance": None}, "train.balance = None: a table of settings"),
    ],
)
def test_from_dict_refuses(make: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(make, values)
    assert str(caught.value).startswith(message)


def test_read_toml(tmp_path: Path) -> None:
    file = tmp_path / "good.toml"
    file.write_text("[train]\nsteps = 3\nlr = 1e-3\n")
    assert read_toml(file) == {"train": {"steps": 3, "lr": 1e-3}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "no such file"), (b"a = = 1", "not TOML: "), (b"a = '\xff'", "not TOML: "), ("folder", "Is a directory")],
)
def test_read_toml_refuses(tmp_path: Path, content: bytes | str | None, reason: str) -> None:
    path = tmp_path / "a.toml"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_toml(path)
    assert str(caught.value).startswith(f"config {str(path)!r}: {reason}")
    assert "\n" not in str(caught.value)
