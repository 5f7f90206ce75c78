"""What bounds a model's speed on this computer: how fast memory, disk and products are, and what a layer costs whatever
its size. Measured once for each computer and disk and kept in the user's cache, until `ceilings(folder, fresh=True)`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from handful.checkpoint import write_file
from handful.config import ModelConfig, RouterConfig
from handful.data import default_cache
from handful.engine import Engine, Request
from handful.errors import HandfulError
from handful.experts.expert_file import PackFile, layout_of, write_pack
from handful.experts.quantize_model import quantize_model
from handful.experts.store import Store
from handful.machine import Machine, machine, measure
from handful.memory import attach, pack, resident_bytes
from handful.model import Decoder
from handful.sampling import Sampling

__all__ = ["Ceilings", "Overhead", "cache_file", "ceilings", "measure_disk", "measure_overhead"]


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What decoding one token costs beside its bytes and products: calls, and sums too small to matter.

    step_seconds        of a step, outside of its layers.
    layer_seconds       of each layer.
    packed_seconds      of each layer, more than that, if its weights are packed.
    sequence_seconds    of each layer, for every further sequence that decodes in the same step.
    stored_seconds      of each layer with experts, more than that, if they are in a store (`handful.memory`) and there.
    fetch_seconds       of each layer, more than that, if it waits for experts from disk: whatever their size.
    """

    step_seconds: float
    layer_seconds: float
    packed_seconds: float
    sequence_seconds: float
    stored_seconds: float
    fetch_seconds: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """A computer, as `plan` sees it.

    cpu, threads            its name, and torch's threads.
    native_error            why the native kernels are not there; None: they are.
    memory_bytes            that a model may take: free now, or freed at once when asked for.
    disk_free_bytes         of the disk that a checkpoint and a pack of its experts would lie on.
    gpus                    name and bytes of memory of each.
    read_bytes_per_second   of memory; disk_bytes_per_second of that disk, as a store of experts reads it, None: it
                            could not be measured.
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

    def product_flops(self, dtype: str) -> float:
        """FLOP/s of products in a dtype. A CPU that does not multiply bfloat16 does as well in float32."""
        return self.float32_flops if dtype == "float32" else max(self.float32_flops, self.bfloat16_flops)


TOP_K = 2  # of the models that overhead is measured with

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
    known = _kept(file)
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


def _kept(file: Path) -> dict[str, Any]:
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
    rates, disk = vars(measure()), None
    try:
        overhead = measure_overhead(place)
        disk = measure_disk(place, overhead.fetch_seconds)
    except HandfulError:  # a folder that cannot be written to, or a system that keeps what it has read
        overhead = measure_overhead()
    return {**rates, "disk_bytes_per_second": disk, "overhead": vars(overhead), "measured_at": time.time()}


def measure_disk(folder: str | Path, fetch_seconds: float = 0.0, repeats: int = 96) -> float:
    """Bytes a second that a store of experts reads from a disk: two records of 4 MiB, of 64, at a time. Takes about a
    second, and 256 MiB of disk.

    fetch_seconds   of each time, that are not the bytes' (see `Overhead`).

    HandfulError if `folder` cannot be written to, or the system cannot drop its cached pages.
    """
    if not hasattr(os, "posix_fadvise"):
        raise HandfulError("the disk is measured where a file's cached pages can be dropped, as on Linux")
    side, experts, together, stride = 1024, 64, 2, 37
    layout = layout_of(("",), (experts, side, side), (experts, side, side), torch.bfloat16, bias=False)
    # Random bytes: a disk that compresses would read zeros at no cost.
    noise = torch.frombuffer(bytearray(os.urandom(2 * side * side)), dtype=torch.bfloat16).view(side, side)
    seconds = []
    with _folder_in(folder) as place:
        file = place / "experts.pack"
        write_pack(file, layout, lambda layer, expert: {"gate_up": noise, "down": noise})
        opened = os.open(file, os.O_RDONLY)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)
        # What was not used for the longest time gives way: whoever goes through all of them never finds one.
        slots = 16 * layout.record_bytes
        with Store(PackFile(file), slots, top_k=together, policy="lru", read_ahead=False) as store:
            for turn in range(repeats):
                first = turn * together  # here and there in the file
                wanted = [stride * (first + i) % experts for i in range(together)]
                began = time.perf_counter()
                for _ in store.fetch(0, wanted):
                    pass
                seconds.append(time.perf_counter() - began)
    # The first ones found memory that nobody had used yet.
    took = statistics.median(seconds[16:])
    return together * layout.record_bytes / max(took - fetch_seconds, took / 8)


@contextlib.contextmanager
def _folder_in(folder: str | Path | None) -> Iterator[Path]:
    """A temporary folder. HandfulError if it cannot be made, or what is done in it fails for the system's reasons."""
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            yield Path(place)
    except OSError as error:
        where = tempfile.gettempdir() if folder is None else str(folder)
        raise HandfulError(f"folder {where!r}: {error.strerror}") from None


def measure_overhead(folder: str | Path | None = None, repeats: int = 40) -> Overhead:
    """Decode with models so small that neither their bytes nor their products take time. Takes about a second.

    folder   on the disk that experts are to be read from; None: the system's for temporary files. HandfulError if it
             cannot be written to.
    """
    few, many, sequences = 2, 8, 5
    short, deep, packed, held, away = _tiny(few), _tiny(many), _tiny(many), _tiny(many), _tiny(many)
    quantize_model(packed, bits=4)
    with _folder_in(folder) as place, contextlib.ExitStack() as stores:
        layout = pack(held, place / "experts.pack", quantize=4)
        for model, slots in ((held, layout.records), (away, TOP_K)):  # all experts, or those of a layer alone
            budget = resident_bytes(model) + slots * layout.record_bytes
            stores.enter_context(attach(model, place / "experts.pack", budget, read_ahead=False))
        cases = {"short": (short, 1), "deep": (deep, 1), "packed": (packed, 1), "shared": (deep, sequences)}
        took = _step_seconds({**cases, "held": (held, 1)}, repeats)
        # Apart from the others: threads that have waited for a disk begin the next step more slowly.
        took |= _step_seconds({"away": (away, 1)}, repeats)
    layer = max(0.0, (took["deep"] - took["short"]) / (many - few))
    return Overhead(
        step_seconds=max(0.0, took["short"] - few * layer),
        layer_seconds=layer,
        packed_seconds=max(0.0, (took["packed"] - took["deep"]) / many),
        sequence_seconds=max(0.0, (took["shared"] - took["deep"]) / (many * (sequences - 1))),
        stored_seconds=max(0.0, (took["held"] - took["packed"]) / many),
        fetch_seconds=max(0.0, (took["away"] - took["held"]) / many),
    )


def _step_seconds(cases: dict[str, tuple[Decoder, int]], repeats: int) -> dict[str, float]:
    """Of a model that decodes so many sequences, by turns with the others."""
    engines = {name: Engine(model, speculate=False) for name, (model, _) in cases.items()}
    for name, engine in engines.items():
        for _ in range(cases[name][1]):
            engine.submit(Request(prompt=[1, 2], max_tokens=repeats + 4, sampling=Sampling(temperature=0.0)))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats):
        for name, engine in engines.items():
            began = time.perf_counter()
            engine.step()
            if turn >= 4:
                seconds[name].append(time.perf_counter() - began)
    # Who else runs on the computer makes a step longer, never shorter: the quicker half is nearer to the truth.
    return {name: statistics.median(sorted(found)[: len(found) // 2]) for name, found in seconds.items()}


def _tiny(layers: int) -> Decoder:
    router = RouterConfig(experts=8, top_k=TOP_K)
    shape = ModelConfig(
        vocab=256, width=64, layers=layers, heads=4, router=router, expert_width=32, qk_norm="head", context=128
    )
    # Building a model draws random weights: whoever asks for a plan keeps their own draws, and equals come out equal.
    with torch.random.fork_rng(devices=[]):
        return Decoder(shape).to(torch.bfloat16).eval()
