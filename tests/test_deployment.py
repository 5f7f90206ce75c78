"""A step on many devices: by hand on routings that leave nothing to chance, and as `cost` has it in the mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Call, calling, mistake, moe

from handful.ceilings import Ceilings, Overhead
from handful.config import RouterConfig
from handful.cost import cost
from handful.count import counted
from handful.deployment import Device, Rates, _chosen, deploy, zipf
from handful.errors import ConfigError
from handful.forecast import EFFICIENCY
from handful.placement import Link, Placement, Topology

CONFIG = moe({"experts": 4, "top_k": 2})  # two layers, width 16, experts of 3 · 16 · 12 numbers
MODEL = counted(CONFIG)
ONE = 3 * 16 * 12
PAIR = Topology.even(2, slots=2, link=Link(1e6))
IN_ORDER = Placement(((0, 1), (2, 3)))
LAPTOP = Ceilings(
    cpu="a laptop",
    threads=8,
    native_error=None,
    memory_bytes=12_000_000_000,
    disk_free_bytes=200_000_000_000,
    read_bytes_per_second=50e9,
    disk_bytes_per_second=3e9,
    float32_flops=0.5e12,
    bfloat16_flops=1e12,
    overhead=Overhead(
        step_seconds=2e-4, layer_seconds=2e-4, packed_seconds=5e-5, sequence_seconds=5e-5, stored_seconds=2e-5,
        fetch_seconds=3e-4,
    ),
)  # fmt: skip
# Reading takes no time, then neither do products.
PRODUCTS = Device.alike(1e30, 1e6)
READING = Device.alike(1e6, 1e30)


def step(device: Device = PRODUCTS, topology: Topology = PAIR, **changes: Any) -> Any:
    values: dict[str, Any] = {"dtype": "bfloat16", "when": "decode", "tokens": 8, "context": 16}
    return deploy(MODEL, device, topology, **(values | changes))


def test_by_hand() -> None:
    """All tokens choose experts 0 and 1, which device 0 has: it computes 32 assignments of 16 tokens, device 1
    none. The 8 tokens of device 1 are sent there once, and come back twice."""
    always = [np.array([[0, 1]])]
    found = step(recorded=always, placements=[IN_ORDER])
    busiest = 2 * 32 * 2 * ONE / 1e6  # two layers
    assert found.experts == pytest.approx(busiest / 2)
    assert found.waiting == pytest.approx(busiest / 2)
    assert found.busiest == 2
    row, answer = 16 * 2 + 2 * 4, 16 * 4
    assert found.exchange == pytest.approx(2 * (8 * row + 16 * answer) / 1e6)
    assert found.sent == pytest.approx(2 * (8 * row + 16 * answer) / 16)
    assert found.crossing == 0
    assert found.spread == pytest.approx(0)
    assert found.tokens == 16
    parts = (found.matrices, found.attention, found.experts, found.waiting, found.exchange, found.overhead)
    assert found.seconds == pytest.approx(sum(parts))
    assert found.rate == pytest.approx(16 / sum(parts))
    assert found.overlapped == pytest.approx(max(found.exchange, sum(parts) - found.exchange))


def test_each_expert_that_is_used_is_read_once() -> None:
    found = step(READING, recorded=[np.array([[0, 1]])], placements=[IN_ORDER])
    assert found.experts + found.waiting == pytest.approx(2 * 2 * ONE * 2 / 1e6)
    price = cost(CONFIG, context=16).bytes
    routed = 2 * 4 * ONE * 2
    # All else but norms and the embedding that is looked up is read in every step; and the cache of 8 sequences.
    assert found.matrices == pytest.approx((price.weights - routed) / 1e6, rel=0.1)
    assert found.attention == pytest.approx(8 * price.cache / 1e6)


def test_between_nodes() -> None:
    """Two devices on a node each: everything that is sent crosses, with its home's number, over the slow link."""
    apart = Topology.even(2, 2, slots=2, link=Link(1e6), node_link=Link(1e3))
    found = step(topology=apart, recorded=[np.array([[0, 1]])], placements=[IN_ORDER])
    assert found.crossing == found.sent > 0
    near = step(recorded=[np.array([[0, 1]])], placements=[IN_ORDER])
    assert found.exchange == pytest.approx(1000 * near.exchange * found.sent / near.sent)
    assert near.sent < found.sent < 1.1 * near.sent


def test_even_routers_send_what_their_config_says() -> None:
    model = moe({"experts": 16, "top_k": 3})
    priced = cost(model, ranks=4, hosts=2).communication
    topology = Topology.even(4, 2, slots=4, link=Link(1e9))
    found = deploy(counted(model), PRODUCTS, topology, dtype="bfloat16", when="decode", tokens=2000, context=8, draws=2)
    assert found.crossing == pytest.approx(priced.between_hosts.forward, rel=0.02)
    one = deploy(
        counted(model), PRODUCTS, Topology.even(4, slots=4, link=Link(1e9)), dtype="bfloat16", when="decode",
        tokens=2000, context=8, draws=2,
    )  # fmt: skip
    assert one.sent == pytest.approx(priced.exchange.forward, rel=0.02)
    assert one.busiest < 1.05


def test_copies_shorten_the_wait_for_the_busiest() -> None:
    """Under a Zipf law; more draws than a batch has tokens are like it."""
    load = zipf(4, 1.5)
    without = step(tokens=4000, loads=load)
    copied = step(tokens=4000, loads=load, topology=replace(PAIR, slots=(4, 4)))
    assert without.busiest > 1.1
    assert copied.busiest < 1.02
    assert copied.waiting < without.waiting
    assert copied.held > without.held


def test_one_rank_is_a_whole_model() -> None:
    alone = Topology.even(1, slots=4, link=Link(1.0))
    found = step(topology=alone)
    assert (found.exchange, found.sent, found.waiting, found.busiest) == (0, 0, 0, 1)
    assert found.held == cost(CONFIG, context=16).bytes.weights


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert step(loads=zipf(4, 1)) == step(loads=zipf(4, 1))
    assert step(loads=zipf(4, 1)) != step(loads=zipf(4, 1), seed=1)


def test_experts_are_drawn_by_their_loads() -> None:
    draw, router = np.random.default_rng(0), RouterConfig(experts=4, top_k=1)
    found = _chosen(draw, [4, 3, 0, 1], None, 40_000, Topology.even(1, slots=4), router)
    assert np.bincount(found.ravel(), minlength=4) / 40_000 == pytest.approx([0.5, 0.375, 0, 0.125], abs=0.01)
    pairs = _chosen(draw, [4, 3, 2, 1], None, 1000, Topology.even(1, slots=4), replace(router, top_k=2))
    assert (pairs[:, 0] != pairs[:, 1]).all()


def test_a_router_of_groups_keeps_to_them() -> None:
    router = RouterConfig(experts=12, top_k=3, groups=4, top_groups=2, group_score="top2")
    found = _chosen(np.random.default_rng(0), [1.0] * 12, None, 500, Topology.even(2, slots=6), router)
    assert max(len(set(row // 3)) for row in found) == 2
    assert np.bincount(found.ravel(), minlength=12) / 3000 == pytest.approx(np.full(12, 1 / 12), abs=0.02)


def test_this_computer_among_ranks() -> None:
    one, four = Device.here(LAPTOP, "int8"), Device.here(LAPTOP, "int8", ranks=4)
    share = EFFICIENCY["int8"]
    assert one.experts == Rates(LAPTOP.read_bytes_per_second * share.experts, 1e12 * share.experts_product)
    assert four.experts.read == pytest.approx(one.experts.read / 4)
    assert one.layer_seconds == pytest.approx(LAPTOP.overhead.layer_seconds + LAPTOP.overhead.packed_seconds)
    with pytest.raises(ConfigError, match="quant = 'fp8'"):
        Device.here(LAPTOP, "fp8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"topology": Topology.even(2, slots=2)}, "link: what a device sends"),
        ({"tokens": 0}, "tokens = 0: at least 1"),
        ({"loads": [[1, 2]]}, "load: of 2 experts; the model has 4"),
        ({"dtype": "fp9"}, "dtype = 'fp9': one of float32"),
        ({"placements": [Placement(((0, 1, 2, 3),))]}, "placement: of 1 devices; there are 2"),
        ({"placements": [IN_ORDER] * 2, "loads": [[1] * 4]}, "placement: 2 layers; the load has 1"),
        ({"placements": [Placement(((0, 1), (2,)))]}, "placement: of 3 experts; the model has 4"),
        ({"topology": Topology.even(2, slots=1, link=Link(1.0))}, "4 experts do not fit"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        step(**changes)


# ---------------------------------------------------------------------------------------------------------------------
# `handful plan --ranks`.


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return calling(monkeypatch, capsys)


CLUSTER = ["--ranks", "8", "--nodes", "2", "--link", "200GB/s", "--node-link", "50GB/s,5us", "--rates", "3TB/s,500T"]


def test_a_plan_for_many_devices(call: Call, tmp_path: Path) -> None:
    found = json.loads(call("plan", "mixtral", *CLUSTER, "--load", "zipf:0.5", "--batch", "4", "--json").out)
    for when, tokens in (("decode", 32), ("prefill", 8 * 4096)):
        one = found[when]
        parts = ("matrices", "attention", "experts", "waiting", "exchange", "overhead")
        assert one["seconds"] == pytest.approx(sum(one[part] for part in parts))
        assert one["tokens"] == tokens
        assert one["tokens_per_second"] == pytest.approx(tokens / one["seconds"])
    (tmp_path / "load.json").write_text(json.dumps({"load": [[1, 1, 1, 1, 1, 1, 1, 9]]}))
    out = tmp_path / "placement.json"
    call("place", tmp_path / "load.json", "--devices", "8", "--slots", "2", "--out", out)
    files = ["--load", str(tmp_path / "load.json"), "--placement", str(out)]
    placed = json.loads(call("plan", "mixtral", *CLUSTER, *files, "--context", "64", "--json").out)
    bare = json.loads(call("plan", "mixtral", *CLUSTER, *files[:2], "--context", "64", "--json").out)
    assert placed["prefill"]["busiest"] < bare["prefill"]["busiest"]
    shown = call("plan", "mixtral", *CLUSTER, "--copies", "1", "--context", "64")
    assert "waiting for the busiest" in shown.out
    assert "on 8 devices" in shown.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["mixtral", "--ranks", "8"], "link: what a device sends a second"),
        (["mixtral", *CLUSTER, "--memory", "8GB"], "memory: not with --ranks"),
        (["mixtral", *CLUSTER, "--load", "zipf:much"], "load = 'zipf:much': zipf: and an exponent"),
        (["mixtral", *CLUSTER[:-1], "3TB"], "rates = '3TB'"),
        (["mixtral", *CLUSTER[:-1], "3TB/s"], "rates = ''"),
    ],
)
def test_options_that_do_not_fit(options: list[str], said: str, call: Call) -> None:
    assert said in mistake(call("plan", *options))
