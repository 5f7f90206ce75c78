"""Proof on this computer: every experts backend computes what the plain loop computes in float64.

cases     what is tried: shapes, loads, memory; formats and their bounds.
examine   one backend in one format: every output, every gradient, and what must never happen.
run       all of them, and the native kernels at each level of instructions in a process of its own.
"""

from __future__ import annotations

from handful.verify.examine import Row
from handful.verify.run import Verification, verify

__all__ = ["Row", "Verification", "verify"]
