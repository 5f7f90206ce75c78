"""Every backend on this computer, in every format and at every level of the native kernels.

The native kernels choose their instructions once per process, so each level of them (avx2, avx_vnni, avx512f,
avx512, amx) is examined in a child process, `python -m handful.verify`, which writes JSON lines. A child that dies is
that level's failure.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from handful.errors import ConfigError
from handful.experts import BACKENDS
from handful.machine import native_error
from handful.verify.cases import FORMATS
from handful.verify.checks import checks_of
from handful.verify.examine import Row, examine, lost
from handful.verify.subjects import Subject

__all__ = ["CASES", "Row", "Verification", "verify"]

CASES = 48  # of each backend, level and format
# The levels that HANDFUL_ISA names, and the features of which they have one at least.
LEVELS = {
    "avx2": {"avx2"},
    "avx_vnni": {"avx_vnni"},
    "avx512f": {"avx512"},
    "avx512": {"avx512_vnni", "avx512_bf16"},
    "amx": {"amx_bf16", "amx_int8"},
}
PACKED_FORMATS = [name for name, kind in FORMATS.items() if kind.bits]
TRAINED_FORMATS = ["float32", "bfloat16", "autocast"]
CHILD_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found. `native_error`: why the native kernels were not examined; None: they were."""

    seed: int
    cases: int
    seconds: float
    native_error: str | None
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: an error that is not finite is None, and among the failures."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        rows = [{**{key: plain(value) for key, value in asdict(row).items()}, "ok": row.ok} for row in self.rows]
        return {**asdict(self), "ok": self.ok, "rows": rows}


Progress = Callable[[int, int, str], object]


def verify(
    seed: int = 0, cases: int = CASES, levels: Sequence[str] | None = None, progress: Progress | None = None
) -> Verification:
    """Examine every backend that works on this computer. Takes about a minute.

    seed      of the random cases; any.
    cases     for each backend, level and format. The first are corner cases; 40 or more meet each activation with and
              without biases in each kind of memory.
    levels    of the native kernels: some of avx2, avx_vnni, avx512f, avx512 and amx. Default: all that this computer
              has, whatever HANDFUL_ISA says.
    progress  called with how many cases and checks are done, of how many, and what is examined.

    Raises ConfigError for a level that this computer does not have, or for less than one case.
    """
    if cases < 1:
        raise ConfigError(f"cases = {cases}: at least 1")
    start = time.perf_counter()
    found, error = _native_levels()
    for level in levels or ():
        if level not in found:
            raise ConfigError(f"level {level!r}: this computer has {', '.join(found) or error}")
    plan: list[tuple[str, list[Subject]]] = [("torch", _torch_subjects())]
    plan += [(level, _native_subjects()) for level in found if levels is None or level in levels]
    total = sum(cases + len(checks_of(*subject)) for _, subjects in plan for subject in subjects)
    done = 0

    def step(level: str, subject: Subject, _: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, f"{subject[0]} {level} {subject[1]}")

    rows: list[Row] = []
    for level, subjects in plan:
        if level == "torch":
            for subject in subjects:
                rows.append(examine(subject, level, seed, cases, partial(step, level, subject)))
        else:
            rows += _in_children(subjects, level, seed, cases, partial(step, level))
    return Verification(
        seed=seed, cases=cases, seconds=time.perf_counter() - start, native_error=error, rows=tuple(rows)
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is there to be examined.


def _torch_subjects() -> list[Subject]:
    subjects = []
    for backend in BACKENDS:
        if backend == "grouped":
            subjects.append((backend, "float64"))
        if backend not in ("auto", "native", "reference"):
            subjects += [(backend, name) for name in TRAINED_FORMATS]
        if backend == "grouped":
            subjects += [(backend, name) for name in PACKED_FORMATS]
    return subjects


def _native_subjects() -> list[Subject]:
    linear = ["float32", "bfloat16", *PACKED_FORMATS]
    return [*(("native", name) for name in [*TRAINED_FORMATS, *PACKED_FORMATS]), *(("linear", name) for name in linear)]


def _native_levels() -> tuple[list[str], str | None]:
    """The levels of this computer, lowest first, whatever HANDFUL_ISA says; or why there are none."""
    code = "from handful.machine import native_error as e; import torch; print(e() or torch.ops.handful.isa())"
    if os.environ.get("HANDFUL_ISA"):
        # It is read once in a process: another one has to tell.
        run = subprocess.run([sys.executable, "-P", "-c", code], env=_environment(None), capture_output=True, text=True)
        said = run.stdout.strip() or f"a child process that asked for the levels ended with status {run.returncode}"
        isa = said if said.startswith("avx2") else ""
        error = None if isa else said
    else:
        error = native_error()
        isa = "" if error else torch.ops.handful.isa()
    return [level for level, features in LEVELS.items() if features & set(isa.split())], error


# ---------------------------------------------------------------------------------------------------------------------
# The native kernels, one level in a process.


def _environment(level: str | None) -> dict[str, str]:
    """A child's: HANDFUL_ISA as asked, and this very package, wherever the child is started."""
    environment = {name: value for name, value in os.environ.items() if name != "HANDFUL_ISA"}
    if level is not None:
        environment["HANDFUL_ISA"] = level
    paths = [str(Path(__file__).parent.parent.parent), os.environ.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _command(subjects: Sequence[Subject], seed: int, cases: int) -> list[str]:
    names = [f"{backend}:{name}" for backend, name in subjects]
    return [sys.executable, "-P", "-m", "handful.verify", str(seed), str(cases), *names]


def _in_children(
    subjects: Sequence[Subject], level: str, seed: int, cases: int, step: Callable[[Subject, str], None]
) -> list[Row]:
    """Examine them in a child process; where it dies, that subject has failed and a new child goes on with the next."""
    rows: list[Row] = []
    while len(rows) < len(subjects):
        left = subjects[len(rows) :]
        found, at, end = _child(left, level, seed, cases, step)
        rows += found
        if len(found) < len(left):
            # A child that did not begin would not begin again: then all that is left has failed.
            for subject in left[len(found) : len(found) + 1] if at or found else left:
                rows.append(lost(subject, level, f"{at}: {end}" if at else end))
    return rows


def _child(
    subjects: Sequence[Subject], level: str, seed: int, cases: int, step: Callable[[Subject, str], None]
) -> tuple[list[Row], str | None, str]:
    """One child: the rows it finished, the case that it was at, and how it ended."""
    rows: list[Row] = []
    at: str | None = None
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            _command(subjects, seed, cases), env=_environment(level), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        clock = threading.Timer(CHILD_SECONDS, process.kill)
        clock.daemon = True
        clock.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    said = json.loads(line)
                except ValueError:  # what a library prints
                    continue
                if "row" in said:
                    at = None
                    rows.append(Row(**{**said["row"], "level": level, "failures": tuple(said["row"]["failures"])}))
                elif "at" in said:
                    at = said["at"]
                    step(subjects[len(rows)], said["at"])
            status = process.wait()
        finally:
            process.kill()
            process.communicate()
            expired = not clock.is_alive()
            clock.cancel()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    if expired:
        return rows, at, f"the process was stopped after {CHILD_SECONDS} s"
    if status < 0:
        return rows, at, f"the process died of {signal.Signals(-status).name}"
    return rows, at, f"the process ended with status {status}: {last}"


def serve(arguments: Sequence[str]) -> None:
    """The child's side: a line before each case, so that one that kills the process is known, and one per row."""
    seed, cases, *names = arguments
    for name in names:
        backend, _, form = name.partition(":")
        row = examine(
            (backend, form), "", int(seed), int(cases), lambda case: print(json.dumps({"at": case}), flush=True)
        )
        print(json.dumps({"row": asdict(row)}), flush=True)
