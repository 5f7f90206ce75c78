"""What this computer can do: its cores, memory and instruction sets (`machine`), and how fast they are (`measure`).

It also loads the native extension, whose kernels choose their instructions by what is found here. HANDFUL_ISA caps that
choice: `none` (no native kernels), `avx2`, `avx512f` (AVX-512 without VNNI and BF16), `avx512` or `amx`. HANDFUL_NATIVE
names another build of the extension, such as the one with sanitizers that `make sanitize` tests.
"""

from __future__ import annotations

import functools
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from handful.errors import ConfigError

__all__ = ["Machine", "Measured", "SlowWarning", "machine", "measure", "native_error", "warn_if_slow"]

# What /proc/cpuinfo must list for a feature, in the order of the levels: the same table as in csrc/isa.cpp.
CPUINFO_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx_vnni": {"avx2", "avx_vnni"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "avx512_vnni": {"avx512f", "avx512_vnni"},
    "avx512_bf16": {"avx512f", "avx512_bf16"},
    "amx_bf16": {"amx_tile", "amx_bf16"},
    "amx_int8": {"amx_tile", "amx_int8"},
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this process can use of this computer.

    cpu                       the processor's name.
    cores                     usable ones: within the process's affinity and its control group's quota.
    threads                   that torch computes with.
    memory_bytes              total, or the control group's limit if that is lower.
    memory_available_bytes    of that, free or freed at once when asked for.
    isa                       vector instructions, lowest first: those that the native kernels may use, within
                              HANDFUL_ISA; where there are no native kernels, those that the CPU has.
    torch                     its version.
    gpus                      the names of those that torch can use.
    native_error              why the native kernels are not there, in one line; None: they are.
    """

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    memory_available_bytes: int
    isa: tuple[str, ...]
    torch: str
    gpus: tuple[str, ...]
    native_error: str | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rates of this computer's CPU with torch's threads, medians of several runs.

    read_bytes_per_second       of memory, streaming through a buffer larger than the usual caches.
    float32_flops               FLOP/s of a matrix product; a multiplication and an addition are two.
    bfloat16_flops              the same in bfloat16.
    """

    read_bytes_per_second: float
    float32_flops: float
    bfloat16_flops: float


def machine() -> Machine:
    """Describe this computer. Takes as long as importing torch does.

    Raises ConfigError if HANDFUL_ISA names a level that this computer does not have.
    """
    import torch

    limits = _cgroup_limits()
    total, available = _memory()
    error = native_error()
    return Machine(
        cpu=_cpu_name(),
        cores=_cores(limits),
        threads=torch.get_num_threads(),
        memory_bytes=total if limits.memory is None else min(total, limits.memory),
        memory_available_bytes=available if limits.memory_free is None else min(available, limits.memory_free),
        isa=_cpuinfo_isa(_read("/proc/cpuinfo")) if error else tuple(torch.ops.handful.isa().split()),
        torch=str(torch.__version__),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        native_error=error,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The native extension.


# Operations of this version that an extension built from an older one lacks.
NEWEST = ("limits",)


class SlowWarning(UserWarning):
    """All works, and several times slower than this computer could."""


def native_error() -> str | None:
    """Load the native extension, once, as torch.ops.handful. Returns None, or in one line why it is not there.

    Raises ConfigError if HANDFUL_ISA names a level that this computer does not have.
    """
    return _load()[0]


def warn_if_slow() -> None:
    """A SlowWarning, the first time, where the native extension is missing from a computer that could have it."""
    error, can_be_mended = _load()
    if error and can_be_mended and not _warned:
        _warned.append(error)
        warnings.warn(f"computing through torch alone, several times slower: {error}", SlowWarning, stacklevel=3)


_warned: list[str] = []


@functools.cache
def _load() -> tuple[str | None, bool]:
    """Why the extension is not there, None if it is; and whether that could be mended on this computer."""
    import torch

    system, processor = platform.system(), platform.machine()
    if (system, processor) != ("Linux", "x86_64"):
        return f"the native extension is for Linux on x86-64, and this is {system} on {processor}", False
    library = _native_library()
    if library is None:
        why = _read(Path(__file__).parent / "_native_error.txt").strip()  # written by setup.py
        why = why or "install Handful again, with torch and a C++ compiler there"
        return f"the native extension was not built: {why}", True
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the native extension does not load: {str(error.__cause__ or error).splitlines()[0]}", True
    missing = [name for name in NEWEST if not hasattr(torch.ops.handful, name)]
    if missing:
        return f"the native extension is an older one, without {missing[0]}: install Handful again", True
    try:
        isa = torch.ops.handful.isa()
    except RuntimeError as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    if not isa:
        forced = os.environ.get("HANDFUL_ISA")
        return f"switched off by HANDFUL_ISA = {forced!r}" if forced else "this CPU has no AVX2", False
    return None, False


def _native_library() -> Path | None:
    if named := os.environ.get("HANDFUL_NATIVE"):
        return Path(named)
    return next(iter(sorted(Path(__file__).parent.glob("_native*.so"))), None)


# ---------------------------------------------------------------------------------------------------------------------
# Cores, memory and instruction sets, as the system tells them.


@dataclass(frozen=True)
class _Limits:
    """What the control groups of this process allow. None: as much as there is."""

    cpus: float | None
    memory: int | None
    memory_free: int | None


def _read(path: str | Path) -> str:
    """A small system file's text; empty if it is not there."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _fields(text: str) -> dict[str, str]:
    """`key value` or `key: value` lines, the first of each key."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":" if ":" in line else " ")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _cpu_name() -> str:
    name = _fields(_read("/proc/cpuinfo")).get("model name")
    return name or platform.processor() or platform.machine()


def _cpuinfo_isa(cpuinfo: str) -> tuple[str, ...]:
    flags = set(_fields(cpuinfo).get("flags", "").split())
    return tuple(name for name, needed in CPUINFO_FLAGS.items() if needed <= flags)


def _cores(limits: _Limits) -> int:
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return count if limits.cpus is None else max(1, min(count, math.ceil(limits.cpus)))


def _memory() -> tuple[int, int]:
    """Total and available bytes. Where the system does not tell what is available, that is the total."""
    meminfo = _fields(_read("/proc/meminfo"))
    if "MemTotal" in meminfo:
        total = 1024 * int(meminfo["MemTotal"].split()[0])
        return total, 1024 * int(meminfo["MemAvailable"].split()[0]) if "MemAvailable" in meminfo else total
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total


def _cgroup_folders(membership: str, root: Path) -> Iterator[Path]:
    """The control group folders of a process and of their ancestors, versions 1 and 2.

    In a container the path in `membership` may be the host's, while `root` shows the container's own group. The
    ancestors reach up to `root`, and folders that are not there hold no files, so both cases come out right.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",") if controllers else ["", "unified"]
        for name in {"", "unified", "cpu", "memory"}.intersection(names):
            folder = root / name / path.lstrip("/")
            yield folder
            for parent in folder.parents:
                if not parent.is_relative_to(root / name):
                    break
                yield parent


def _cgroup_limits(membership: str | None = None, root: Path = Path("/sys/fs/cgroup")) -> _Limits:
    """The tightest limits of this process's control groups."""
    cpus: list[float] = []
    memory: list[int] = []
    free: list[int] = []
    for folder in _cgroup_folders(_read("/proc/self/cgroup") if membership is None else membership, root):
        quota = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us").strip(),
            _read(folder / "cpu.cfs_period_us").strip(),
        ]
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
            cpus.append(int(quota[0]) / int(quota[1]))
        limit = (_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")).strip()
        if not limit.isdigit():  # "max", or not there
            continue
        memory.append(int(limit))
        used = (_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")).strip()
        # A file's pages that nobody has used of late count as used, and are given back when memory is short.
        stat = _fields(_read(folder / "memory.stat"))
        cached = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
        free.append(max(0, int(limit) - max(0, int(used or "0") - cached)))
    return _Limits(min(cpus, default=None), min(memory, default=None), min(free, default=None))


# ---------------------------------------------------------------------------------------------------------------------
# Rates.


def measure() -> Measured:
    """Measure memory and the matrix product. Takes two seconds, and up to 1 GiB of memory and a quarter of what is
    available."""
    import torch

    with torch.inference_mode():
        return Measured(
            read_bytes_per_second=_read_rate(),
            float32_flops=_product_rate(torch.float32),
            bfloat16_flops=_product_rate(torch.bfloat16),
        )


def _median_seconds(run: Callable[[], object], budget: float = 0.5) -> float:
    """The median time of `run`, warm, over about `budget` seconds: three runs or more, but for a very slow one."""
    run()
    seconds: list[float] = []
    while sum(seconds) < budget or (len(seconds) < 3 and sum(seconds) < 4 * budget):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _read_rate() -> float:
    import torch

    available = machine().memory_available_bytes
    size = max(1 << 20, min(1 << 30, available // 4) // 4096 * 4096)
    # Written before it is read: pages that nobody wrote to are all the same page of zeros.
    buffer = torch.ones(size, dtype=torch.uint8)
    if native_error() is None:
        rate, _ = torch.ops.handful.read_bandwidth(buffer, 7)
        return float(rate)
    values = buffer.view(torch.float32)
    return size / _median_seconds(lambda: values.sum())


def _product_rate(dtype: object) -> float:
    import torch

    m, k, n = 1024, 2048, 2048
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)  # type: ignore[call-overload]
    return 2 * m * k * n / _median_seconds(lambda: torch.nn.functional.linear(x, w))
