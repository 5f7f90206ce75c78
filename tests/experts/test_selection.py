"""What "auto" means, and that it does what it says."""

from __future__ import annotations

import pytest
import torch

from handful.experts import Experts, selection
from handful.experts.selection import choose, time_backends
from handful.machine import native_error
from handful.routing import Routing

HERE, TRAINED = ("native", "native") if native_error() is None else ("reference", "grouped")


def routing_of(T: int, E: int, K: int) -> Routing:
    scores_TE = torch.rand(T, E)
    weights_TK, experts_TK = scores_TE.topk(K)
    return Routing(scores_TE, scores_TE, experts_TK, weights_TK)


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        ("cpu", torch.float32, HERE),
        ("cpu", torch.bfloat16, HERE),
        ("cpu", torch.float64, "reference"),
        ("cpu", torch.float16, "reference"),
        ("cuda", torch.float32, "grouped"),
        ("cuda", torch.bfloat16, "grouped"),
    ],
)
def test_choice_and_its_reason(device: str, dtype: torch.dtype, backend: str) -> None:
    chosen = choose(device, dtype)
    assert chosen.backend == backend
    assert chosen.reason
    assert "\n" not in chosen.reason


def test_without_the_extension_the_reason_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "native_error", lambda: "it was not built")
    assert choose() == selection.Selection("reference", "it was not built")
    assert choose(gradients=True) == selection.Selection("grouped", "it was not built")
    assert [list(row.milliseconds) for row in time_backends(seconds=0.0)] == [["grouped", "reference"]] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("extension", [True, False])
def test_auto_is_the_backend_that_is_chosen(
    dtype: torch.dtype, gradients: bool, extension: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not extension:
        monkeypatch.setattr("handful.experts.backends.available", lambda: False)
        monkeypatch.setattr(selection, "native_error", lambda: "it was not built")
    experts = Experts(5, 24, 12, backend="auto").to(dtype)
    x_TD, routing = torch.randn(40, 24, dtype=dtype), routing_of(40, 5, 2)
    with torch.set_grad_enabled(gradients):
        y_TD = experts(x_TD, routing)
        experts.backend = choose("cpu", dtype, gradients=gradients).backend
        assert torch.equal(y_TD, experts(x_TD, routing))


def test_timed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = {"width": 16, "hidden": 8, "experts": 4, "top_k": 2}
    monkeypatch.setattr(selection, "TIMED", (("decoding", 1, layer), ("training", 8, layer)))
    rows = time_backends(seconds=0.0)
    assert [(row.use, row.dtype) for row in rows] == [
        (use, dtype) for use in ("decoding", "training") for dtype in ("float32", "bfloat16")
    ]
    for row in rows:
        assert row.picked == (TRAINED if row.use == "training" else HERE)
        assert row.picked in row.milliseconds
        assert all(ms > 0 for ms in row.milliseconds.values())
