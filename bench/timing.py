"""Timing side by side: every case once a round, so that all meet the machine's good and bad moments alike."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from handful.machine import machine

__all__ = ["keep", "publish", "rounds", "show"]

RESULTS = Path(__file__).parent / "results"


def rounds(cases: Mapping[str, Callable[[], object]], repeats: int, warm: int = 1) -> dict[str, dict[str, float]]:
    """Milliseconds of each case: median, min and max over `repeats` rounds, after `warm` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm + repeats):
        for name, run in cases.items():
            began = time.perf_counter()
            run()
            if turn >= warm:
                seconds[name].append(time.perf_counter() - began)
            print(f"\rround {turn + 1} of {warm + repeats}: {name:<60}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 80 + "\r", end="", file=sys.stderr)
    return {
        name: {"median": 1e3 * statistics.median(s), "min": 1e3 * min(s), "max": 1e3 * max(s)}
        for name, s in seconds.items()
    }


def publish(name: str, rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any]) -> None:
    """Print rows as a table and keep them as JSON, with the machine, in bench/results/NAME.json."""
    show(rows)
    keep(name, rows, notes)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table that reads well as it is and in Markdown. The columns are the first row's keys."""
    columns = list(rows[0])
    lines = [columns, *([_shown(row[column]) for column in columns] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    right = [any(isinstance(row[column], float | int) for row in rows) for column in columns]
    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)]
    for line in [lines[0], rule, *lines[1:]]:
        padded = (
            text.rjust(width) if r else text.ljust(width) for text, width, r in zip(line, widths, right, strict=True)
        )
        print("| " + " | ".join(padded) + " |")


def keep(name: str, rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any]) -> None:
    """Keep rows as JSON, with the machine, in bench/results/NAME.json."""
    found = machine()
    where = {"cpu": found.cpu, "threads": torch.get_num_threads(), "torch": found.torch, "isa": found.isa}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": where, **notes, "rows": list(rows)}, indent=2) + "\n")
    print(f"\n{path}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return "" if value is None else str(value)
