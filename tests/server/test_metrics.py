"""What Prometheus reads: its own parser takes it, the numbers are right, and the dashboard asks for what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import moe, routing_of
from prometheus_client.parser import text_string_to_metric_families as prometheus
from serving import Served, chat_model, serving
from serving_ranks import running

from handful.families.io import save
from handful.memory import attach, pack
from handful.model import Decoder
from handful.observe import dead, entropy, max_vio
from handful.routing import Routing
from handful.server.load import HALF_LIFE, LoadWatch

COMPLETIONS = "/v1/completions"
DASHBOARD = Path(__file__).parent.parent.parent / "docs" / "grafana.json"

# vLLM's names, without its prefix: what its dashboards ask for.
STEMS = {
    "num_requests_running": "gauge", "num_requests_waiting": "gauge", "kv_cache_usage_perc": "gauge",
    "prompt_tokens": "counter", "generation_tokens": "counter", "request_success": "counter",
    "time_to_first_token_seconds": "histogram", "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram", "request_queue_time_seconds": "histogram",
    "spec_decode_num_draft_tokens": "counter", "spec_decode_num_accepted_tokens": "counter",
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Decoder:
    return chat_model()


def test_the_parser_takes_it(model: Decoder) -> None:
    with serving(model) as served:
        served.post(COMPLETIONS, prompt="the cat", max_tokens=4)
        for accept in ("", "application/openmetrics-text; version=1.0.0", "text/plain; version=1.0.0"):
            answer = served.http.get("/metrics", headers={"Accept": accept})
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            families = {family.name: family for family in prometheus(answer.text)}
            kinds = {name: family.type for name, family in families.items()}
            assert {f"handful:{stem}": kind for stem, kind in STEMS.items()}.items() <= kinds.items()
            for family in families.values():
                assert family.documentation
                assert all(sample.labels["model_name"] == "tiny" for sample in family.samples)
                assert all(len(sample.labels) <= 2 for sample in family.samples)


def test_drafts_are_counted(model: Decoder) -> None:
    asked = {"prompt": [5, 6, 7] * 8, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with serving(model, speculate=False) as served:
        want = served.post(COMPLETIONS, **asked)["choices"]
    with serving(model, speculate=True) as served:
        engine = served.server.worker.engine
        assert engine._costs is not None
        engine._costs.steps = lambda sequences, tokens: 1.0  # type: ignore[method-assign]
        assert served.post(COMPLETIONS, **asked)["choices"] == want
        found, stats = served.metrics(), engine.stats()
    assert found["handful:spec_decode_num_draft_tokens_total", ""] == stats.draft_tokens
    assert found["handful:spec_decode_num_accepted_tokens_total", ""] == stats.accepted_tokens
    assert 0 < stats.accepted_tokens <= stats.draft_tokens


def test_numbers(model: Decoder) -> None:
    with serving(model) as served:
        assert served.metrics()["handful:time_to_first_token_seconds_count", ""] == 0
        served.post(COMPLETIONS, prompt=[5, 6, 7], max_tokens=4, n=2, ignore_eos=True)
        served.post(COMPLETIONS, prompt=[5], max_tokens=9, temperature=0, stop_token_ids=list(range(300)))
        found = served.metrics()
        assert found["handful:prompt_tokens_total", ""] == 7
        assert found["handful:generation_tokens_total", ""] == 8
        assert found["handful:request_success_total", "length"] == 2
        assert found["handful:request_success_total", "stop"] == 1
        assert found["handful:time_to_first_token_seconds_count", ""] == 2
        assert found["handful:inter_token_latency_seconds_count", ""] == 6
        assert found["handful:e2e_request_latency_seconds_count", ""] == 3
        assert found["handful:request_queue_time_seconds_count", ""] == 3
        first, whole = (
            found[f"handful:{name}_sum", ""] for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds")
        )
        assert 0 < first < whole
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert found[f"handful:{name}", ""] == 0


def routed(experts_TK: torch.Tensor, dropped_TK: torch.Tensor | None = None) -> Routing:
    return routing_of(experts_TK, 4, torch.ones(experts_TK.shape), dropped_TK)


def test_load_of_the_last_tokens() -> None:
    """As `observe` measures it, of the layers that are mixtures; what is long past no longer counts."""
    watch = LoadWatch(moe(layers=3, dense_layers=(1,), ffn=8))
    assert watch.layers == (0, 2)
    layers = len(watch.layers)
    assert {layer: int(counts.sum()) for layer, counts in watch.counts().items()} == dict.fromkeys(watch.layers, 0)
    want = torch.zeros(layers, 4, dtype=torch.float64)
    for _ in range(150):
        chosen = [torch.randint(4, (3, 2)) for _ in range(layers)]
        watch((), [2, 1], [routed(one) for one in chosen])
        want += torch.stack([one.flatten().bincount(minlength=4) for one in chosen])
    found = torch.stack(list(watch.counts().values()))
    assert found == pytest.approx(want, rel=450 / HALF_LIFE)
    # What was not computed is none of it.
    watch((), [3], [routed(torch.full((3, 2), 1), torch.ones(3, 2, dtype=torch.bool))] * layers)
    assert torch.stack(list(watch.counts().values())) == pytest.approx(want, rel=460 / HALF_LIFE)
    for _ in range(12):
        watch((), [8192], [routed(torch.full((8192, 2), 1)) for _ in range(layers)])
    for counts_E in watch.counts().values():
        assert max_vio(counts_E) == pytest.approx(3, abs=0.01)
        assert entropy(counts_E) < 0.01
        assert dead(counts_E) == 3


def test_load_is_told_by_layer(model: Decoder) -> None:
    seen: list[Routing] = []
    with serving(model) as served:
        load = served.server.worker.engine.on_routing
        assert load is not None

        def watch(jobs: Any, new: Any, routings: list[Routing]) -> None:
            seen.extend(routings)
            load(jobs, new, routings)

        served.server.worker.engine.on_routing = watch
        served.post(COMPLETIONS, prompt=[5, 6, 7], max_tokens=20)
        found = served.metrics()
        for layer in (0, 1):
            counts_E = torch.stack([routing.chosen_E for routing in seen[layer::2]]).sum(0)
            assert found["handful:expert_load_max_vio", str(layer)] == pytest.approx(max_vio(counts_E), rel=1e-2)
            assert found["handful:expert_load_entropy", str(layer)] == pytest.approx(entropy(counts_E), rel=1e-2)
        assert ("handful:dead_experts", "0") not in found  # of so few tokens nobody can tell
        served.post(COMPLETIONS, prompt=[[start, *[5, 6, 7] * 30] for start in range(10)], max_tokens=1)
        assert served.metrics()["handful:dead_experts", "0"] == 0
        names = {name for name, _ in found}
        assert not any("expert_cache" in name or "bytes" in name for name in names)


@pytest.fixture
def offloaded(tmp_path: Path) -> Any:
    """A server whose experts have half the memory that they need."""
    model = chat_model()
    pack(model, tmp_path / "experts.pack")
    size = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    whole = sum(p.nbytes for p in model.parameters())
    store = attach(model, tmp_path / "experts.pack", whole - size // 2)
    with store, serving(model, store=store) as served:
        yield served


def test_experts_under_a_budget(offloaded: Served) -> None:
    store = offloaded.server.metrics.store
    assert store is not None
    offloaded.post(COMPLETIONS, prompt=[5, 6, 7], max_tokens=20)
    found, stats = offloaded.metrics(), store.stats()
    assert found["handful:expert_slots", ""] == stats.slots < stats.experts
    for layer, counts in enumerate(stats.layers.values()):
        assert found["handful:expert_cache_hits_total", str(layer)] == counts.hits
        assert found["handful:expert_cache_misses_total", str(layer)] == counts.misses > 0
        assert found["handful:expert_read_bytes_total", str(layer)] == counts.bytes_read > 0
        assert found["handful:expert_wait_seconds_total", str(layer)] == counts.wait_seconds


def test_the_dashboard_asks_for_what_is_there(offloaded: Served, tmp_path: Path) -> None:
    """On a server under a budget, or on one with ranks."""
    offloaded.post(COMPLETIONS, prompt=[[5, 6, 7] * 30] * 10, max_tokens=2)
    save(chat_model(), tmp_path / "tiny")
    with running(tmp_path / "tiny", "--no-measure", ranks=1) as ranks:
        scraped = [served.http.get("/metrics").text for served in (offloaded, ranks)]
    there = {sample.name for text in scraped for family in prometheus(text) for sample in family.samples}
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(r"handful:\w+", query)}
    assert asked <= there
    assert {name.removesuffix("_total").removesuffix("_bucket") for name in asked} >= {f"handful:{s}" for s in STEMS}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])]
    assert len(set(cells)) == len(cells)  # none lies on another
    assert max(x for x, _ in cells) < 24
