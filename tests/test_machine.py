from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fresh
import pytest
import torch

from handful import machine as module
from handful.machine import machine, measure, native_error

GIB = 1 << 30

kernels = pytest.mark.skipif(native_error() is not None, reason=f"no kernels: {native_error()}")

# The features that each level of HANDFUL_ISA adds, and the flags of /proc/cpuinfo that make a feature.
LEVELS = {
    "none": {},
    "avx2": {"avx2": "avx2 fma f16c"},
    "avx_vnni": {"avx_vnni": "avx_vnni"},
    "avx512f": {"avx512": "avx512f avx512bw avx512dq avx512vl"},
    "avx512": {"avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16"},
    "amx": {"amx_bf16": "amx_tile amx_bf16", "amx_int8": "amx_tile amx_int8"},
}


def granted_features() -> dict[str, set[str]]:
    """Each level's features here, by the kernel's account: its flags, and whether this process may use AMX."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return {level: set() for level in LEVELS}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    if ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) != 0:
        flags.discard("amx_tile")
    return {
        level: {name for name, needed in features.items() if set(needed.split()) <= flags}
        for level, features in LEVELS.items()
    }


def run_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own: HANDFUL_ISA is read once."""
    return fresh.python("-c", code, env={**os.environ, "HANDFUL_ISA": isa})


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_native_library", lambda: None)
    module._load.cache_clear()
    yield
    module._load.cache_clear()


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes a quarter of what is available: 32 MiB here, which is quick."""
    monkeypatch.setattr(module, "_memory", lambda: (1 << 30, 128 << 20))


# ---------------------------------------------------------------------------------------------------------------------
# What is there.


def test_machine_describes_this_computer() -> None:
    here = machine()
    assert here.cpu
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert here.threads == torch.get_num_threads()
    assert 0 < here.memory_available_bytes <= here.memory_bytes
    assert here.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert here.torch == torch.__version__
    assert len(here.gpus) == torch.cuda.device_count()
    assert set(here.isa) == set().union(*granted_features().values())


def test_extension_is_there_where_it_can_be() -> None:
    if os.environ.get("HANDFUL_ISA") == "none":
        assert native_error() == "switched off by HANDFUL_ISA = 'none'"
    elif any(granted_features().values()):
        assert native_error() is None
    else:
        assert native_error()


CODE = """
import json, torch
from handful.errors import ConfigError
from handful.machine import machine, native_error
try:
    error = native_error()
    here = machine()
    data = torch.arange(1003).view(torch.uint8)
    total = None if error else torch.ops.handful.read_bandwidth(data, 1)[1]
    print(json.dumps({"error": error, "isa": here.isa, "sum": total}))
except ConfigError as error:
    print(json.dumps({"refused": str(error)}))
"""


@pytest.mark.parametrize("level", ["none", "avx2", "avx512f", "avx512", "amx", "sse9"])
def test_handful_isa_forces_a_level(level: str) -> None:
    granted = granted_features()
    run = run_with_isa(level, CODE)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    if not granted["avx2"]:
        assert told["error"]
        assert told["isa"] == []
    elif level == "none":
        assert told["error"] == "switched off by HANDFUL_ISA = 'none'"
    elif granted.get(level):
        below = list(LEVELS)[: list(LEVELS).index(level) + 1]
        assert told == {
            "error": None,
            "isa": [name for lower in below for name in LEVELS[lower] if name in granted[lower]],
            "sum": 1002 * 1003 // 2,
        }
    else:
        here = ", ".join(name for name in LEVELS if name == "none" or granted[name])
        assert told == {"refused": f"HANDFUL_ISA = {level!r}: one of {here} on this computer"}


def test_without_the_extension(no_extension: None, little_memory: None) -> None:
    assert native_error()
    here = machine()
    assert here.native_error == native_error()
    assert set(here.isa) >= set().union(*granted_features().values())
    assert module._read_rate() > 1e8


def test_a_broken_extension_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(module, "_native_library", lambda: broken)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    module._load.cache_clear()
    try:
        assert str(native_error()).startswith("the native extension does not load: ")
    finally:
        module._load.cache_clear()


@pytest.mark.parametrize(("system", "processor"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_other_computers_are_told(system: str, processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: processor)
    module._load.cache_clear()
    try:
        assert native_error() == f"the native extension is for Linux on x86-64, and this is {system} on {processor}"
    finally:
        module._load.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Control groups, on made-up folders.


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_cgroup_v2_takes_the_tightest_of_a_group_and_its_ancestors(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "cgroup.controllers": "cpu memory",
            "a/cpu.max": "150000 100000",
            "a/memory.max": str(8 * GIB),
            "a/memory.current": str(7 * GIB),
            "a/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 5",
            "a/b/cpu.max": "max 100000",
            "a/b/memory.max": str(4 * GIB),
            "a/b/memory.current": str(GIB),
            "other/memory.max": "1",
        },
    )
    limits = module._cgroup_limits("0::/a/b\n", root)
    # a leaves 8 - (7 - 1) = 2 GiB, b leaves 4 - 1 = 3.
    assert limits == module._Limits(cpus=1.5, memory=4 * GIB, memory_free=2 * GIB)


def test_cgroup_v1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "cpu/box/cpu.cfs_quota_us": "250000",
            "cpu/box/cpu.cfs_period_us": "100000",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/box/memory.limit_in_bytes": str(3 * GIB),
            "memory/box/memory.usage_in_bytes": str(2 * GIB),
            "memory/box/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
            "memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    membership = "9:name=systemd:/\n4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n"
    assert module._cgroup_limits(membership, root) == module._Limits(2.5, 3 * GIB, 2 * GIB)


def test_cgroup_of_a_container_that_sees_the_host_path(tmp_path: Path) -> None:
    root = write(tmp_path, {"memory.max": str(GIB), "memory.current": "0", "cpu.max": "50000 100000"})
    assert module._cgroup_limits("0::/host/path/of/it\n", root) == module._Limits(0.5, GIB, GIB)


def test_no_cgroup_is_no_limit(tmp_path: Path) -> None:
    assert module._cgroup_limits("0::/\n", tmp_path) == module._Limits(None, None, None)
    assert module._cgroup_limits("", tmp_path) == module._Limits(None, None, None)


@pytest.mark.parametrize(("cpus", "cores"), [(None, 8), (0.5, 1), (1.5, 2), (4.0, 4), (64.0, 8)])
def test_cores_are_within_quota_and_affinity(cpus: float | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert module._cores(module._Limits(cpus, None, None)) == cores


def test_limits_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cgroup_limits", lambda: module._Limits(None, 64 << 20, 32 << 20))
    here = machine()
    assert (here.memory_bytes, here.memory_available_bytes) == (64 << 20, 32 << 20)


# ---------------------------------------------------------------------------------------------------------------------
# Rates. Their bounds hold on any computer that can run torch at all.


def test_measure_gives_plausible_rates(little_memory: None) -> None:
    rates = measure()
    assert 1e8 < rates.read_bytes_per_second < 1e13
    assert 1e8 < rates.float32_flops < 1e15
    assert 1e7 < rates.bfloat16_flops < 1e16


@kernels
@pytest.mark.parametrize("bytes_", [8, 64, 256, 264, 4096 + 8, 1 << 20, 3_000_008])
@pytest.mark.parametrize("start", [0, 8])
def test_read_bandwidth_reads_every_byte_once(bytes_: int, start: int) -> None:
    assert native_error() is None
    buffer = torch.randint(0, 256, (start + bytes_,), dtype=torch.uint8)[start:]
    rate, total = torch.ops.handful.read_bandwidth(buffer, 3)
    assert rate > 0
    assert total == buffer.clone().view(torch.int64).sum().item()


@kernels
@pytest.mark.parametrize(
    ("buffer", "repeats", "message"),
    [
        (torch.zeros(16), 1, "not of type uint8"),
        (torch.zeros(32, dtype=torch.uint8)[::2], 1, "not contiguous"),
        (torch.zeros(12, dtype=torch.uint8), 1, "not a multiple of 8"),
        (torch.zeros(16, dtype=torch.uint8), 0, "repeats = 0: at least 1"),
    ],
)
def test_read_bandwidth_refuses(buffer: torch.Tensor, repeats: int, message: str) -> None:
    assert native_error() is None
    with pytest.raises(RuntimeError, match=message):
        torch.ops.handful.read_bandwidth(buffer, repeats)


def test_an_extension_of_an_older_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from handful import machine as module

    module._load.cache_clear()
    monkeypatch.setattr(module, "NEWEST", ("decode_attention", "of_tomorrow"))
    try:
        error = module.native_error()
        if module._native_library() is not None and "HANDFUL_ISA" not in os.environ:
            assert error == "the native extension is an older one, without of_tomorrow: install Handful again"
    finally:
        module._load.cache_clear()
