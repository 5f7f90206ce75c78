"""Proof on this computer: every experts backend computes what the plain loop computes in float64.

cases     what is tried: shapes, loads, memory; formats and their bounds.
subjects  what is examined: a backend in one format, run on a case; the reference; how far off it may be.
checks    what must hold besides the values.
examine   one backend in one format: every case and every check, as a row of the table.
run       all of them, and the native kernels at each level of instructions in a process of its own.
"""

from __future__ import annotations

from handful.verify.examine import Row
from handful.verify.run import Verification, verify

__all__ = ["Row", "Verification", "verify"]
