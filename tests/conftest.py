"""What all tests share: repeatable draws, one thread each, and which levels of the kernels they went through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import levels
import pytest
import torch
from hypothesis import settings

# A failure in what tests share is told as one of their own.
pytest.register_assert_rewrite("builders")

# The same examples on every run, however busy the machine.
settings.register_profile("handful", deadline=None, derandomize=True)
settings.load_profile("handful")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _level(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Tests of the kernels say at which level they ran; one of a level in a process of its own has it as parameter."""
    if request.path.name in levels.FILES:
        own = (levels.here() or ["none"])[-1]
        of = getattr(getattr(request.node, "callspec", None), "params", {}).get("level", own)
        record_property("level", of)
    elif not levels.here():
        record_property("level", "none")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    passed = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    ran = [str(value) for report in passed for name, value in report.user_properties if name == "level"]
    if ran:
        terminalreporter.section("levels of the kernels")
        for line in levels.summary(ran):
            terminalreporter.write_line(line)
