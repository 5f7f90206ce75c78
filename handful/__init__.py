"""Handful: mixture-of-experts language models, built, trained, compared, loaded and served.

The public names are below. Each is imported when it is first asked for, so that `import handful` is instant.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handful.chat import chat
    from handful.compare import compare
    from handful.config import BalanceConfig, EncoderDecoderConfig, ModelConfig, RouterConfig, TrainConfig
    from handful.cost import cost
    from handful.encoder_decoder import EncoderDecoder
    from handful.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        HandfulError,
        MissingExtraError,
        RoutingError,
        TrainingError,
    )
    from handful.experts import Experts
    from handful.experts.quantize_model import quantize_model
    from handful.families.io import load, save
    from handful.generate import generate
    from handful.inspection import inspect_model
    from handful.model import Decoder
    from handful.moe import MoE, Router
    from handful.plan import plan
    from handful.presets import PRESETS
    from handful.routing import Routing
    from handful.train import train
    from handful.upcycle import upcycle
    from handful.verify import verify

__version__ = "0.1.0"

# The module of each public name.
_HOMES = {
    "BalanceConfig": "config",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Decoder": "model",
    "EncoderDecoder": "encoder_decoder",
    "EncoderDecoderConfig": "config",
    "Experts": "experts",
    "HandfulError": "errors",
    "MissingExtraError": "errors",
    "MoE": "moe",
    "ModelConfig": "config",
    "PRESETS": "presets",
    "Router": "moe",
    "RouterConfig": "config",
    "Routing": "routing",
    "RoutingError": "errors",
    "TrainConfig": "config",
    "TrainingError": "errors",
    "chat": "chat",
    "compare": "compare",
    "cost": "cost",
    "generate": "generate",
    "inspect_model": "inspection",
    "load": "families.io",
    "plan": "plan",
    "quantize_model": "experts.quantize_model",
    "save": "families.io",
    "train": "train",
    "upcycle": "upcycle",
    "verify": "verify",
}

__all__ = [
    "PRESETS",
    "BalanceConfig",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Decoder",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Experts",
    "HandfulError",
    "MissingExtraError",
    "MoE",
    "ModelConfig",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingError",
    "TrainConfig",
    "TrainingError",
    "__version__",
    "chat",
    "compare",
    "cost",
    "generate",
    "inspect_model",
    "load",
    "plan",
    "quantize_model",
    "save",
    "train",
    "upcycle",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps `handful.train` the function: importing handful/train.py would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
