"""A disk that goes: who needs an expert from it ends with an error that says so, and who does not gets an answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from serving import Served, chat_model, serving

from handful.memory import attach, pack

COMPLETIONS = "/v1/completions"


def away(served: Served) -> dict[str, list[int]]:
    """The experts of each layer that are not in memory now."""
    layers = served.http.get("/routing/experts").json()["layers"]
    return {name: [e for e, where in enumerate(one["places"]) if where != "m"] for name, one in layers.items()}


def test_a_disk_that_goes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = chat_model(router={"experts": 12, "top_k": 2}, context=1024)
    pack(model, tmp_path / "experts.pack")
    whole, expert = sum(p.nbytes for p in model.parameters()), model.moe_layers[0].experts.weights.gate_up[0].nbytes
    store = attach(model, tmp_path / "experts.pack", whole + 12 * expert)
    assert 16 <= store.capacity < 24  # experts of 24: as many as are needed beside those that are not there
    with store, serving(model, store=store) as served:
        served.post(COMPLETIONS, prompt=[5, 6, 7], max_tokens=30)
        served.idle()
        os.truncate(tmp_path / "experts.pack", 0)
        for number, stream in enumerate([False, True] * 6):  # again and again: what is there stays there
            body = {"prompt": list(range(number, number + 60)), "max_tokens": 5, "stream": stream}
            answer = served.http.post(COMPLETIONS, json=body)
            assert answer.status_code == 500
            error = answer.json()["error"]
            assert error["code"] == "model_failed"
            assert "experts.pack" in error["message"]
            assert str(tmp_path) not in error["message"]
        # An answer by those that are still in memory.
        off = away(served)
        assert all(1 <= len(one) <= 10 for one in off.values())
        asked = {"prompt": [5, 6], "max_tokens": 50, "ignore_eos": True, "experts_off": off}
        assert served.post(COMPLETIONS, **asked)["usage"]["completion_tokens"] == 50
        assert served.http.get("/health").status_code == 200
        assert served.metrics()["handful:request_success_total", "error"] == 12
    assert "Traceback" not in capfd.readouterr().err
