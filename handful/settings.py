"""From a TOML file, a preset's name and options to a model and its training: what `handful train` is asked for.

    router = "olmoe"            # a preset, or "none" for a dense model
    balance = "loss-free"       # replaces the preset's

    [data]
    source = "texts/*.txt"      # vocab = 4096, or tokenizer = "path"

    [model]                     # ModelConfig's fields, over the small model's; [model.router] replaces the router
    width = 128

    [train]                     # TrainConfig's fields, and `tokens` in place of `steps`
    steps = 1000

An option given on the command line counts before the file, the file before the preset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handful import checkpoint
from handful.config import BalanceConfig, ModelConfig, RouterConfig, TrainConfig, from_dict, read_toml, to_dict
from handful.data import Data, load_data
from handful.errors import ConfigError
from handful.presets import ACTIVE_WIDTH, Preset, preset, small_model, small_training

__all__ = ["Asked", "balance_of", "resumed_settings", "training_settings"]

BALANCE_WEIGHT = 0.01
BIAS_RATE = 0.001  # u in the loss-free paper's experiments
SECTIONS = {"router", "balance", "data", "model", "train"}
DATA_KEYS: dict[str, type] = {"source": str, "tokenizer": str, "vocab": int}
LENGTH = {"tokens", "steps"}  # two ways to say it: an option replaces whichever the file has


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to train. The model waits for its vocabulary, which the tokenizer decides."""

    origin: Mapping[str, Any]
    model: Callable[[int], ModelConfig]
    train: TrainConfig

    def load_data(self, progress: Callable[[str], None] | None = None) -> Data:
        """The text and its tokens."""
        given = {name: value for name, value in self.origin.items() if value is not None}
        return load_data(given.pop("source", None), progress=progress, **given)


def balance_of(kind: str, like: Preset | None) -> BalanceConfig:
    """The balance of a name: a loss at the preset's weight or 0.01, "loss-free" or "none"."""
    if kind == "loss-free":
        return BalanceConfig(bias_rate=BIAS_RATE)
    if kind == "none":
        return BalanceConfig()
    weight = (like.balance.weight if like else 0.0) or BALANCE_WEIGHT
    return from_dict(BalanceConfig, {"loss": kind, "weight": weight}, "train.balance")


def resumed_settings(folder: Path) -> Asked:
    """What the run in a folder was asked for. ConfigError if it holds none."""
    if not (folder / "run.json").exists():
        raise ConfigError(f"out = {str(folder)!r}: holds no run to resume")
    asked = checkpoint.read_json(folder / "run.json")
    model = from_dict(ModelConfig, asked["model"])
    return Asked(
        origin=asked["data"]["origin"], model=lambda vocab: model, train=from_dict(TrainConfig, asked["train"])
    )


def training_settings(
    file: Path | None, router: str | None, balance: str | None, given: Mapping[str, Mapping[str, Any]]
) -> Asked:
    """Join a TOML file (or None) with options. `given` has the sections data, model and train; None is not given."""
    written = read_toml(file) if file is not None else {}
    unknown = sorted(written.keys() - SECTIONS)
    if unknown:
        raise ConfigError(f"{file}: {unknown[0]}: no such setting; there are {', '.join(sorted(SECTIONS))}")

    def section(name: str) -> dict[str, Any]:
        values = written.get(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {name} = {values!r}: a table of settings")
        options = {key: value for key, value in given.get(name, {}).items() if value is not None}
        if options.keys() & LENGTH:
            values = {key: value for key, value in values.items() if key not in LENGTH}
        return values | options

    origin, model, train = section("data"), section("model"), section("train")
    for key, value in origin.items():
        if key not in DATA_KEYS:
            raise ConfigError(f"data.{key}: no such setting; there are {', '.join(DATA_KEYS)}")
        _typed(f"data.{key}", value, DATA_KEYS[key])
    if router is not None:
        model.pop("router", None)
    if balance is not None:
        train.pop("balance", None)
    elif "balance" in written and "balance" in train:
        raise ConfigError(f"{file}: balance, train.balance: give one of them")
    name = _typed("router", router or written.get("router", ""), str)
    kind = _typed("balance", balance or written.get("balance", ""), str)
    dense = name == "none"
    like = preset(name) if name and not dense else None
    settings = _train(train, like, balance_of(kind, like) if kind else None, dense)
    needs_bias = bool(settings.balance.bias_rate)
    context = max(settings.context, _typed("model.context", model.get("context", 0), int))
    return Asked(
        origin=origin, model=lambda vocab: _model(vocab, {**model, "context": context}, like, dense, needs_bias),
        train=settings,
    )  # fmt: skip


def _train(values: dict[str, Any], like: Preset | None, balance: BalanceConfig | None, dense: bool) -> TrainConfig:
    values = dict(values)
    tokens = values.pop("tokens", None)
    if tokens is not None and "steps" in values:
        raise ConfigError("train.tokens, train.steps: give one of them")
    if tokens is not None and _typed("train.tokens", tokens, int) < 1:
        raise ConfigError(f"train.tokens = {tokens}: at least 1")
    base = small_training(like, dtype="auto", **({"balance": BalanceConfig()} if dense else {}))
    if balance is not None:
        base = replace(base, balance=balance)
    settings = from_dict(TrainConfig, to_dict(base) | values)
    if tokens is not None:
        settings = replace(settings, steps=max(1, tokens // settings.tokens_per_step))
    if dense and settings.balance != BalanceConfig():
        raise ConfigError("train.balance: a dense model (router = 'none') has nothing to balance")
    return settings


def _model(vocab: int, values: dict[str, Any], like: Preset | None, dense: bool, needs_bias: bool) -> ModelConfig:
    routed = {name: values.pop(name) for name in ("experts", "top_k") if name in values}
    if dense:
        if routed or "router" in values:
            raise ConfigError("router = 'none': a dense model has no experts, top_k or [model.router]")
        small = small_model(vocab)
        base = {
            "vocab": vocab, "width": small.width, "layers": small.layers, "heads": small.heads, "ffn": ACTIVE_WIDTH,
            "qk_norm": small.qk_norm,
        }  # fmt: skip
        return from_dict(ModelConfig, base | values)
    start = like or preset("64x2")
    router = start.router
    if "router" in values:
        router = from_dict(RouterConfig, _typed("model.router", values.pop("router"), dict), "model.router")
    if needs_bias:
        router = replace(router, balance_bias=True)
    # The small model's other values follow from these; the rest is laid over it.
    leading = routed | {name: values.pop(name) for name in ("layers", "expert_width") if name in values}
    for name, value in leading.items():
        _typed(f"model.{name}", value, int)
    under = to_dict(small_model(vocab, replace(start, router=router), **leading))
    return from_dict(ModelConfig, under | {"kv_heads": None, "head_dim": None} | values)


def _typed(where: str, value: Any, kind: type) -> Any:
    """The value, if it is of that type. A bool is an int to Python, not to a reader of config files."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{where} = {value!r}: of type {kind.__name__}")
    return value
