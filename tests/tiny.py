"""A text, models and trainings small enough that a test of training takes a moment."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from handful.config import ModelConfig, RouterConfig, TrainConfig
from handful.data import Data, load_data

Event = dict[str, Any]

WORDS = ["the", "router", "of", "an", "expert", "chooses", "tokens", "when", "weights", "learn", "naïve", "==", "☃"]
VOCAB = 300


def write_text(folder: Path, documents: int = 40, words: int = 60) -> Path:
    """A folder of documents that differ, about 12 kB in all."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        draw = random.Random(number)
        lines = (" ".join(draw.choices(WORDS, k=12)) for _ in range(words // 12))
        (folder / f"{number:03}.txt").write_text("\n".join(lines) + f"\n# {number}\n", encoding="utf-8")
    return folder


def tiny_data(folder: Path) -> Data:
    """The text's tokens, with a tokenizer of 300, cached below the folder too."""
    return load_data(str(write_text(folder / "text")), vocab=VOCAB, cache=folder / "cache")


def dense(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {"vocab": VOCAB, "width": 16, "layers": 2, "heads": 2, "ffn": 24, "context": 32}
    return ModelConfig(**(values | changes))


def moe(router: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Four experts of which two are chosen, with Qwen3-MoE's maths; `router` changes the router's values."""
    routing = RouterConfig(**({"experts": 4, "top_k": 2} | (router or {})))
    return dense(**({"ffn": 0, "router": routing, "expert_width": 12, "qk_norm": "head"} | changes))


def training(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": 6, "batch": 4, "context": 16, "eval_every": 2, "eval_tokens": 128, "checkpoint_every": 2,
        "dtype": "float32", "lr": 1e-2,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def of_kind(kind: str, events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def timeless(events: Iterable[Event]) -> list[Event]:
    """Events without what depends on the clock, and without where they were written."""
    clock = ("seconds", "tokens_per_second", "path", "dtype_reason")
    return [{key: value for key, value in event.items() if key not in clock} for event in events]


def read_lines(file: Path) -> list[Event]:
    """Every line of a file as JSON; all of them must be."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
