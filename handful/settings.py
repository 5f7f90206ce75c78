"""From a TOML file, a preset's name and options to a model and its training: what `handful train` is asked for.

    router = "olmoe"            # a preset, or "none" for a dense model
    balance = "loss-free"       # replaces the preset's

    [data]
    source = "texts/*.txt"      # column = "body"; vocab = 4096, or tokenizer = "path"

    [model]                     # ModelConfig's fields, over the small model's; [model.router] replaces the router
    width = 128

    [train]                     # TrainConfig's fields, and `tokens` in place of `steps`
    steps = 1000

An option given on the command line counts before the file, the file before the preset. A training that goes on from a
model has that model's shape and tokenizer, so neither may be given then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from handful import checkpoint
from handful.config import BalanceConfig, ModelConfig, RouterConfig, TrainConfig
from handful.config_io import from_dict, read_toml, to_dict
from handful.data import Data, load_data
from handful.errors import CheckpointError, ConfigError
from handful.families import config_from_hf
from handful.families.io import find_folder
from handful.presets import ACTIVE_WIDTH, PRESETS, Preset, evaluate_every, preset, small_model, small_training
from handful.runs import read_asked, text_behind
from handful.text import SMALLEST_VOCAB
from handful.tokenizer_files import has_tokenizer

__all__ = [
    "Asked", "TrainOnly", "balance_like", "check_training", "named_balance", "resumed_settings", "training_settings",
]  # fmt: skip

TrainOnly = Literal["all", "experts", "routers"]  # what is trained; shared experts are experts

BALANCE_WEIGHT = 0.01
BALANCES = ("none", "switch", "global", "sequence", "gshard", "loss-free")
BIAS_RATE = 0.001  # u in the loss-free paper's experiments
SECTIONS = {"router", "balance", "data", "model", "train"}
DATA_KEYS: dict[str, type] = {"source": str, "column": str, "tokenizer": str, "vocab": int}
START_LR = 3e-4  # going on from a trained model: a tenth of a new one's
# The presets whose balance a public family was trained with; DeepSeek-V2's is near DeepSeekMoE's.
FAMILY_PRESETS = {
    "mixtral": "mixtral", "olmoe": "olmoe", "qwen3_moe": "qwen3", "deepseek": "deepseek-moe",
    "deepseek_v2": "deepseek-moe", "gpt_oss": "gpt-oss",
}  # fmt: skip
LENGTH = {"tokens", "steps"}  # two ways to say it: an option replaces whichever the file has


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to train. The model waits for its vocabulary, which the tokenizer decides.

    start   the checkpoint folder of the model to go on from; None for a new model, and for a run that is resumed.
    only    what is trained.
    said    the training settings that were given by name; the others are defaults.
    """

    origin: Mapping[str, Any]
    model: Callable[[int], ModelConfig]
    train: TrainConfig
    start: Path | None = None
    only: TrainOnly = "all"
    said: frozenset[str] = frozenset()

    def load_data(self, progress: Callable[[str], None] | None = None) -> Data:
        """The text and its tokens."""
        given = {name: value for name, value in self.origin.items() if value is not None}
        return load_data(given.pop("source", None), progress=progress, **given)


def named_balance(kind: str, like: Preset | None) -> BalanceConfig:
    """The balance of a name: a loss at the preset's weight or 0.01, "loss-free" or "none". ConfigError lists them."""
    if kind not in BALANCES:
        raise ConfigError(f"balance = {kind!r}: one of {', '.join(BALANCES)}")
    if kind == "loss-free":
        return BalanceConfig(bias_rate=BIAS_RATE)
    if kind == "none":
        return BalanceConfig()
    weight = (like.balance.weight if like else 0.0) or BALANCE_WEIGHT
    return from_dict(BalanceConfig, {"loss": kind, "weight": weight}, "train.balance")


def balance_like(source: str | Path, folder: Path, config: ModelConfig) -> BalanceConfig:
    """The balance to go on with: the run's own where `source` is a run folder, or else that of the family whose
    config.json `folder` holds: the loss-free bias where the router has one, its preset's loss, or Switch's, at the
    weight that the config.json names (router_aux_loss_coef), or else the preset's, or 0.01."""
    if config.router is None:
        return BalanceConfig()
    if (Path(source) / "run.json").exists():
        asked = read_asked(Path(source))
        if asked.get("only") != "experts":  # such a run had nothing to balance
            return from_dict(TrainConfig, asked["train"], "train").balance
    if config.router.balance_bias:
        return PRESETS["deepseek-v3"].balance
    values = checkpoint.read_json(folder / "config.json")
    name = FAMILY_PRESETS.get(values.get("model_type", ""))
    like = PRESETS[name].balance if name else BalanceConfig(loss="switch", weight=BALANCE_WEIGHT)
    weight = values.get("router_aux_loss_coef")
    if weight is None:
        return like
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < math.inf:
        raise CheckpointError(f"{folder / 'config.json'}: router_aux_loss_coef = {weight!r}: a weight, at least 0")
    return replace(like, weight=float(weight)) if weight else replace(like, loss="none", weight=0.0)


def resumed_settings(folder: Path) -> Asked:
    """What the run in a folder was asked for. ConfigError if it holds none, CheckpointError if run.json is damaged."""
    asked = read_asked(folder)
    model = from_dict(ModelConfig, asked["model"])
    # The model that a run began from may be gone: its tokenizer is in every checkpoint.
    own = {"tokenizer": str(folder / "model")} if asked.get("started") else {}
    return Asked(
        origin={**asked["data"]["origin"], **own}, model=lambda vocab: model,
        train=from_dict(TrainConfig, asked["train"]), only=_only(asked.get("only", "all")),
    )  # fmt: skip


def _only(name: str) -> TrainOnly:
    for known in get_args(TrainOnly):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"only = {name!r}: one of {', '.join(get_args(TrainOnly))}")


def training_settings(
    file: Path | None,
    router: str | None,
    balance: str | None,
    given: Mapping[str, Mapping[str, Any]],
    *,
    start: str | None = None,
    only: str | None = None,
) -> Asked:
    """Join a TOML file (or None) with options. `given` has the sections data, model and train; None is not given.

    start   a run folder, a checkpoint folder or org/name to go on from; only, what to train of it.
    """
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
    trained = _only(only or "all")
    if start is not None:
        own = [
            *model,
            *(["router"] if router or "router" in written else []),
            *sorted(origin.keys() - {"source", "column"}),
        ]
        if own:
            raise ConfigError(f"{own[0]}: the model that --from names has its own")
        kind = _typed("balance", balance or written.get("balance", ""), str)
        return _going_on(start, origin, train, kind, trained)
    name = _typed("router", router or written.get("router", ""), str)
    kind = _typed("balance", balance or written.get("balance", ""), str)
    dense = name == "none"
    like = preset(name) if name and not dense else None
    settings = _train(train, like, named_balance(kind, like) if kind else None, dense)
    needs_bias = bool(settings.balance.bias_rate)
    context = max(settings.context, _typed("model.context", model.get("context", 0), int))

    def of(vocab: int) -> ModelConfig:
        return _model(vocab, {**model, "context": context}, like, dense, needs_bias)

    of(SMALLEST_VOCAB)  # what is wrong is said before any text is read
    return Asked(origin=origin, model=of, train=settings, only=trained, said=frozenset(train))


def _going_on(start: str, origin: dict[str, Any], values: dict[str, Any], kind: str, only: TrainOnly) -> Asked:
    folder = find_folder(start)
    config = config_from_hf(checkpoint.read_json(folder / "config.json"))
    if origin.get("source") is None:  # more of the text that it knows
        origin = {**origin, **(text_behind(start, folder) or {})}
    if not has_tokenizer(folder):
        raise ConfigError(f"from = {start!r}: it has no tokenizer.json, which the text is read by")
    balance = BalanceConfig() if only == "experts" else balance_like(start, folder, config)
    if kind and kind != balance.loss:
        asked = named_balance(kind, None)
        balance = replace(asked, weight=balance.weight) if asked.weight and balance.weight else asked
    base = small_training(dtype="auto", lr=START_LR, balance=balance)
    base = replace(base, context=min(base.context, config.context))
    train = _laid_over(base, values, config.router is None)
    check_training(config, train, only)
    if train.context > config.context:
        raise ConfigError(f"train.context = {train.context}: at most {config.context}, the model's")
    return Asked(
        origin={**origin, "tokenizer": str(folder)}, model=lambda vocab: config, train=train, start=folder, only=only,
    )  # fmt: skip


def check_training(config: ModelConfig, settings: TrainConfig, only: str) -> None:
    """ConfigError for a model, a training and what is trained that do not go together, whatever the text."""
    router, balance = config.router, settings.balance
    if only not in get_args(TrainOnly):
        raise ConfigError(f"only = {only!r}: one of {', '.join(get_args(TrainOnly))}")
    if only != "all" and router is None:
        raise ConfigError(f"only = {only!r}: 'all' for a dense model")
    if only == "experts" and balance != BalanceConfig():
        raise ConfigError("train.balance: none with only = 'experts', which leaves the routers as they are")
    if only != "experts" and router is not None and router.top_k == 1 < router.experts and router.normalize:
        raise ConfigError(
            "model.router.normalize = True: false for top_k = 1, or every weight is 1 and no gradient of "
            "the text reaches the router"
        )
    if balance.bias_rate and router is not None and not router.balance_bias:
        raise ConfigError(f"train.balance.bias_rate = {balance.bias_rate}: needs model.router.balance_bias = true")


def _train(values: dict[str, Any], like: Preset | None, balance: BalanceConfig | None, dense: bool) -> TrainConfig:
    base = small_training(like, dtype="auto", **({"balance": BalanceConfig()} if dense else {}))
    return _laid_over(base if balance is None else replace(base, balance=balance), values, dense)


def _laid_over(base: TrainConfig, values: dict[str, Any], dense: bool) -> TrainConfig:
    values = dict(values)
    tokens = values.pop("tokens", None)
    if tokens is not None and "steps" in values:
        raise ConfigError("train.tokens, train.steps: give one of them")
    if tokens is not None and _typed("train.tokens", tokens, int) < 1:
        raise ConfigError(f"train.tokens = {tokens}: at least 1")
    settings = from_dict(TrainConfig, to_dict(base) | values)
    if tokens is not None:
        settings = replace(settings, steps=max(1, tokens // settings.tokens_per_step))
    if "eval_every" not in values:
        settings = replace(settings, eval_every=evaluate_every(settings.steps))
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
