"""What all tests share: repeatable draws, one thread each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# The same examples on every run, however busy the machine.
settings.register_profile("handful", deadline=None, derandomize=True)
settings.load_profile("handful")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
