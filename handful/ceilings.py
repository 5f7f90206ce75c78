"""What bounds a model's speed on this computer: how fast memory, disk and products are, and what a layer costs whatever
its size. Measured once for each computer and disk and kept in the user's cache, until `ceilings(folder, fresh=True)`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from handful.checkpoint import write_file
from handful.config import ModelConfig, RouterConfig
from handful.data import default_cache
from handful.engine import Engine, Request, Sampling
from handful.errors import HandfulError
from handful.experts.quantized import quantize_model
from handful.machine import Machine, machine, measure
from handful.model import Decoder

__all__ = ["Ceilings", "Overhead", "cache_file", "ceilings", "measure_overhead"]


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What decoding one token costs beside its bytes and products: calls, and sums too small to matter.

    step_seconds        of a step, outside of its layers.
    layer_seconds       of each layer.
    packed_seconds      of each layer, more than that, if its weights are packed.
    sequence_seconds    of each layer, for every further sequence that decodes in the same step.
    """

    step_seconds: float
    layer_seconds: float
    packed_seconds: float
    sequence_seconds: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """A computer, as `plan` sees it.

    cpu, threads            its name, and torch's threads.
    native_error            why the native kernels are not there; None: they are.
    memory_bytes            that a model may take: free now, or freed at once when asked for.
    disk_free_bytes         of the disk that a checkpoint and a pack of its experts would lie on.
    gpus                    name and bytes of memory of each.
    read_bytes_per_second   of memory; disk_bytes_per_second of that disk, None: it could not be measured.
    float32_flops, bfloat16_flops   FLOP/s of torch's product of matrices (see `handful.machine.Measured`).
    overhead                see there.
    measured_at             when the rates were measured, in seconds since 1970.
    """

    cpu: str
    threads: int
    native_error: str | None
    memory_bytes: int
    disk_free_bytes: int
    gpus: tuple[tuple[str, int], ...] = ()
    read_bytes_per_second: float
    disk_bytes_per_second: float | None
    float32_flops: float
    bfloat16_flops: float
    overhead: Overhead
    measured_at: float = 0.0


# What is kept from one call to the next: rates, and not what is free.
KEPT = ("read_bytes_per_second", "disk_bytes_per_second", "float32_flops", "bfloat16_flops", "measured_at")


def cache_file() -> Path:
    """Where measured rates are kept: ceilings.json in $HANDFUL_CACHE, or else in the user's cache folder."""
    return default_cache() / "ceilings.json"


def ceilings(folder: str | Path, *, fresh: bool = False) -> Ceilings:
    """This computer, with the disk that `folder` is on, or would be.

    fresh   measure the rates even if they are known. It takes about five seconds; nothing else should be running.
    """
    place = Path(folder).absolute()
    while not place.is_dir():
        place = place.parent
    found, file = machine(), cache_file()
    known = _read(file)
    key = _key(found, place)
    rates = None if fresh else _rates(known.get(key))
    if rates is None:
        rates = _measure(place)
        with contextlib.suppress(HandfulError):  # a home that cannot be written to: measured again next time
            write_file(file, {**known, key: rates})
    return Ceilings(
        cpu=found.cpu,
        threads=found.threads,
        native_error=found.native_error,
        memory_bytes=found.memory_available_bytes,
        disk_free_bytes=shutil.disk_usage(place).free,
        gpus=tuple((name, torch.cuda.get_device_properties(i).total_memory) for i, name in enumerate(found.gpus)),
        overhead=Overhead(**rates["overhead"]),
        **{name: rates[name] for name in KEPT},
    )


def _key(found: Machine, place: Path) -> str:
    """What tells a computer and disk whose rates are known from others that share the cache."""
    return f"{found.cpu}, {found.threads} threads, {' '.join(found.isa)}, torch {found.torch}, {place.stat().st_dev}"


def _read(file: Path) -> dict[str, Any]:
    """What is kept; nothing if it cannot be read, for it can be measured again."""
    try:
        known = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _rates(entry: Any) -> dict[str, Any] | None:
    """An entry that was kept; None if it is not whole."""

    def right(values: Any, names: Iterable[str]) -> bool:
        return isinstance(values, dict) and all(
            isinstance(values.get(name), int | float) and 0 <= values[name] < float("inf") for name in names
        )

    names = [name for name in KEPT if name != "disk_bytes_per_second"]
    if not right(entry, names) or min(entry[name] for name in names) <= 0:
        return None
    disk = entry.get("disk_bytes_per_second")
    overhead = [field.name for field in fields(Overhead)]
    if not right(entry.get("overhead"), overhead) or set(entry["overhead"]) != set(overhead):
        return None
    if disk is not None and not (isinstance(disk, int | float) and 0 < disk < float("inf")):
        return None
    return {**entry, "disk_bytes_per_second": disk}


def _measure(place: Path) -> dict[str, Any]:
    try:
        rates = measure(place)
    except HandfulError:  # a folder that cannot be written to, or a system that keeps what it has read
        rates = measure()
    return {**vars(rates), "overhead": vars(measure_overhead()), "measured_at": time.time()}


def measure_overhead(repeats: int = 40) -> Overhead:
    """Decode with models so small that neither their bytes nor their products take time. Takes about a second."""
    few, many, sequences = 2, 8, 5
    short, deep, packed = _tiny(few), _tiny(many), _tiny(many)
    quantize_model(packed, bits=4)
    cases = {"short": Engine(short), "deep": Engine(deep), "packed": Engine(packed), "shared": Engine(deep)}
    for name, engine in cases.items():
        for _ in range(sequences if name == "shared" else 1):
            engine.submit(Request(prompt=[1, 2], max_tokens=repeats + 4, sampling=Sampling(temperature=0.0)))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats):
        for name, engine in cases.items():
            began = time.perf_counter()
            engine.step()
            if turn >= 4:
                seconds[name].append(time.perf_counter() - began)
    # Who else runs on the computer makes a step longer, never shorter: the quicker half is nearer to the truth.
    took = {name: statistics.median(sorted(found)[: len(found) // 2]) for name, found in seconds.items()}
    layer = max(0.0, (took["deep"] - took["short"]) / (many - few))
    return Overhead(
        step_seconds=max(0.0, took["short"] - few * layer),
        layer_seconds=layer,
        packed_seconds=max(0.0, (took["packed"] - took["deep"]) / many),
        sequence_seconds=max(0.0, (took["shared"] - took["deep"]) / (many * (sequences - 1))),
    )


def _tiny(layers: int) -> Decoder:
    router = RouterConfig(experts=8, top_k=2)
    shape = ModelConfig(
        vocab=256, width=64, layers=layers, heads=4, router=router, expert_width=32, qk_norm="head", context=128
    )
    # Building a model draws random weights: whoever asks for a plan keeps their own draws.
    with torch.random.fork_rng(devices=[]):
        return Decoder(shape).to(torch.bfloat16).eval()
