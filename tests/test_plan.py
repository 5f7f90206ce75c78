"""The plan of a model: sizes are those of the real thing, seconds those of hand arithmetic, hit rates the store's."""

from __future__ import annotations

import io
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BASE, JAMBA, Call, calling, document, mistake, moe
from rich.console import Console

from handful import ceilings, memory
from handful.cache_replay import check_recording, replay
from handful.ceilings import Ceilings, Overhead, cache_file, measure_overhead
from handful.config import EncoderDecoderConfig, ModelConfig, RouterConfig
from handful.console import plan_line, plan_tables
from handful.engine import Engine, Request
from handful.errors import ConfigError, HandfulError
from handful.experts import Experts
from handful.experts.expert_file import PackFile
from handful.experts.offload import OffloadedExperts
from handful.experts.quantize_model import quantizable_weights, quantize_model
from handful.experts.store import Store, StoreStats
from handful.families.pricing import count_from_hf
from handful.forecast import EFFICIENCY, FORMATS, STREAM
from handful.machine import Measured, machine
from handful.model import Decoder, KVCache
from handful.observe import Recorder, Recording
from handful.plan import PROCESS, Plan, plan
from handful.presets import PRESETS
from handful.sampling import Sampling
from handful.units import parse_bytes

NONE = Overhead(**{field.name: 0.0 for field in fields(Overhead)})
# Rates so high that nothing but what a test lowers takes time.
QUICK = Ceilings(
    cpu="a processor",
    threads=2,
    native_error=None,
    memory_bytes=10**12,
    disk_free_bytes=10**12,
    read_bytes_per_second=1e30,
    disk_bytes_per_second=1e30,
    float32_flops=1e30,
    bfloat16_flops=1e30,
    overhead=NONE,
    measured_at=1.0,
)
READS = replace(QUICK, read_bytes_per_second=1e9)
MULTIPLIES = replace(QUICK, bfloat16_flops=1e9, float32_flops=1e9)

# 2 layers of width 64: 4 heads of 16, 4 experts of 32 of which 2 are chosen.
SHAPE = ModelConfig(
    vocab=100,
    width=64,
    layers=2,
    heads=4,
    router=RouterConfig(experts=4, top_k=2),
    expert_width=32,
    context=128,
    tied=False,
)
EXPERT = 3 * 64 * 32  # weights of one


def total(found: Plan) -> float:
    assert found.decode is not None
    rate = found.decode_tokens_per_second()
    assert rate is not None
    return found.batch / rate


# ---------------------------------------------------------------------------------------------------------------------
# Sizes are the real ones.

REAL = moe({"experts": 6}, layers=3, tied=False, dense_first=1, ffn=24, shared_width=8, window=20)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [REAL, replace(REAL, expert_bias=True, tied=True)], ids=["plain", "biases"])
def test_a_plan_knows_what_a_store_holds(shape: ModelConfig, dtype: str, tmp_path: Path) -> None:
    bits, wide = FORMATS[dtype], torch.float32 if dtype == "float32" else torch.bfloat16
    model = Decoder(shape).to(wide).eval()
    layout = memory.pack(model, tmp_path / "pack", quantize=bits or None)
    found = plan(shape, QUICK, dtype=dtype, batch=3)
    assert found.expert == layout.record_bytes
    assert found.experts == layout.records == 12
    assert found.cache == KVCache(shape, 3, shape.context, dtype=wide).nbytes
    assert plan(shape, QUICK, dtype=dtype, batch=3, context=3000).cache == KVCache(shape, 3, 3000, dtype=wide).nbytes
    held = KVCache(shape, 3, 3000, dtype=torch.int8)
    assert plan(shape, QUICK, dtype=dtype, kv_cache_dtype="int8", batch=3, context=3000).cache == held.nbytes
    if bits:
        quantize_model(Decoder(shape).to(wide), bits)
        with pytest.MonkeyPatch.context() as patch:
            # Experts are packed apart: everything else is quantized in place.
            patch.setattr("handful.experts.quantize_model.quantizable_weights", only_linear)
            quantize_model(model, bits)
    assert found.resident == memory.resident_bytes(model)
    for slots in (2, 5, 7, 11, 12):
        budget = found.resident + slots * found.expert
        planned = plan(shape, QUICK, dtype=dtype, memory=budget)
        store = Store(PackFile(tmp_path / "pack"), budget - found.resident, top_k=2)
        assert planned.slots == store.slots == store.capacity
        assert planned.pack == (tmp_path / "pack").stat().st_size
        store.close()
    with pytest.raises(ConfigError, match="at least"):
        Store(PackFile(tmp_path / "pack"), found.least - 1 - found.resident, top_k=2)
    assert plan(shape, QUICK, dtype=dtype, memory=found.least).verdict == "fits with memory"
    assert plan(shape, QUICK, dtype=dtype, memory=found.least - 1).verdict == "does not fit"


def only_linear(module: torch.nn.Module) -> tuple[str, ...]:
    return () if isinstance(module, Experts) else quantizable_weights(module)


@pytest.mark.parametrize("dtype", FORMATS)
def test_weights_are_those_of_a_model(dtype: str) -> None:
    model = Decoder(SHAPE).to(torch.float32 if dtype == "float32" else torch.bfloat16)
    if FORMATS[dtype]:
        quantize_model(model, FORMATS[dtype])
    assert plan(SHAPE, QUICK, dtype=dtype).weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_the_cache_grows_with_context_and_batch() -> None:
    # 2 layers, keys and values of 64 numbers, bfloat16.
    assert plan(SHAPE, QUICK).cache == 128 * 2 * 2 * 64 * 2
    assert plan(SHAPE, QUICK, context=10, batch=7).cache == 7 * 10 * 2 * 2 * 64 * 2
    assert plan(replace(SHAPE, context=10**5), QUICK).context == 4096
    assert plan(SHAPE, QUICK).context == 128


# ---------------------------------------------------------------------------------------------------------------------
# Does it fit?

SIZES = plan(SHAPE, QUICK)
BESIDE = SIZES.cache + SIZES.working
PACK = plan(SHAPE, QUICK, memory=SIZES.least).pack


def test_the_working_allowance() -> None:
    # 512 tokens, 2 experts each, of a width of 64 and a hidden width of 32, in float32.
    assert SIZES.working == PROCESS + 512 * 2 * (64 + 32) * 4


@pytest.mark.parametrize(
    ("free", "budget", "verdict"),
    [
        (SIZES.weights + BESIDE, None, "fits"),
        (SIZES.weights + BESIDE - 1, None, "fits with memory"),
        (SIZES.least + BESIDE, None, "fits with memory"),
        (SIZES.least + BESIDE - 1, None, "does not fit"),
        (SIZES.least + BESIDE, SIZES.least, "fits with memory"),
        (SIZES.least + BESIDE - 1, SIZES.least, "does not fit"),
        (SIZES.weights + BESIDE, SIZES.least - 1, "does not fit"),
        (SIZES.resident + 8 * SIZES.expert + BESIDE, 10**9, "fits with memory"),
        (SIZES.resident + 8 * SIZES.expert + BESIDE - 1, 10**9, "does not fit"),
    ],
)
def test_verdicts(free: int, budget: int | None, verdict: str) -> None:
    found = plan(SHAPE, replace(QUICK, memory_bytes=free), memory=budget)
    assert found.verdict == verdict
    assert verdict == "does not fit" or found.needed <= free
    line = plan_line(found)
    assert line.startswith(f"bfloat16: {verdict.replace('memory', '--memory')}")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("budget", "typed"),
    [
        (7 * 10**9, "7GB"),
        (12_345_000_000, "12.345GB"),
        (3_000_000, "3MB"),
        (1_234_567_000, "1234.567MB"),
        (99_999, "99999"),
    ],
)
def test_a_budget_is_shown_as_it_is_typed(budget: int, typed: str) -> None:
    found = replace(plan(SHAPE, QUICK, memory=SIZES.least), memory=budget)
    assert plan_line(found).startswith(f"bfloat16: fits with --memory {typed}: ")
    assert parse_bytes(typed) == budget


def test_a_budget_is_suggested_in_round_figures_that_fit() -> None:
    shape = PRESETS["olmoe"].model
    assert shape is not None
    found = plan(shape, replace(QUICK, memory_bytes=8_123_456_789))
    assert found.memory is not None
    assert found.memory % 10**8 == 0
    assert found.needed <= 8_123_456_789 < found.memory + 10**8 + found.cache + found.working
    assert parse_bytes(plan_line(found).split("--memory ")[1].split(":")[0]) == found.memory


@pytest.mark.parametrize(
    ("budget", "download", "disk", "verdict"),
    [
        (None, 100, 100, "fits"),
        (None, 101, 100, "does not fit"),
        (SIZES.least, 0, PACK, "fits with memory"),
        (SIZES.least, 0, PACK - 1, "does not fit"),
        (SIZES.least, 1, PACK, "does not fit"),
    ],
)
def test_the_disk_has_room(budget: int | None, download: int, disk: int, verdict: str) -> None:
    found = plan(SHAPE, replace(QUICK, disk_free_bytes=disk), memory=budget, download=download)
    assert found.verdict == verdict
    assert ("of disk are free" in found.reason) == (verdict == "does not fit")


def test_large_sizes_are_in_their_own_unit() -> None:
    found = plan(SHAPE, replace(QUICK, disk_free_bytes=1_342 * 10**9), download=2 * 10**12)
    assert found.reason == "1.34 TB of disk are free: it takes 2 TB of checkpoint"


def test_a_dense_model_has_nothing_that_could_wait_on_disk() -> None:
    dense = ModelConfig(vocab=100, width=64, layers=2, heads=4, ffn=128)
    found = plan(dense, QUICK)
    assert (found.verdict, found.experts, found.held_share, found.hit_rate) == ("fits", 0, 1.0, 1.0)
    assert found.decode_tokens_per_second()
    small = plan(dense, replace(QUICK, memory_bytes=PROCESS))
    assert (small.verdict, "no experts" in small.reason) == ("does not fit", True)
    asked = plan(dense, QUICK, memory=10**9)
    assert (asked.verdict, "a memory budget is for experts" in asked.reason) == ("does not fit", True)


def test_the_largest_gpu_counts() -> None:
    needs = SIZES.weights + BESIDE
    assert SIZES.fits_gpu is None
    assert plan(SHAPE, replace(QUICK, gpus=(("small", 1), ("large", needs)))).fits_gpu is True
    assert plan(SHAPE, replace(QUICK, gpus=(("large", needs - 1),))).fits_gpu is False


def test_what_is_not_run_is_counted() -> None:
    counted = count_from_hf({"model_type": "jamba", **BASE, **JAMBA})
    found = plan(counted, QUICK, dtype="int4")
    assert (found.verdict, found.decode, found.prefill) == ("not run", None, None)
    assert found.lacks == found.reason == found.unforecast == "it has Mamba layers"
    assert found.weights > 0
    assert found.cache > 0
    assert found.decode_tokens_per_second() is None
    assert plan_line(found) == "int4: not run: it has Mamba layers"


def test_an_encoder_decoder_is_planned() -> None:
    shape = EncoderDecoderConfig(
        vocab=100, width=64, encoder_layers=2, decoder_layers=2, heads=4, head_dim=16, ffn=32,
        router=RouterConfig(experts=4, top_k=1),
    )  # fmt: skip
    found = plan(shape, READS, memory=10**9)
    assert found.verdict == "fits with memory"
    assert found.experts == 4 * sum(map(shape.encoder_is_moe, range(2))) + 4 * sum(map(shape.decoder_is_moe, range(2)))
    assert found.decode_tokens_per_second()


def test_without_the_native_kernels_no_speed_is_forecast() -> None:
    found = plan(SHAPE, replace(QUICK, native_error="this CPU has no AVX2"))
    assert (found.verdict, found.decode, found.unforecast) == ("fits", None, "no native kernels: this CPU has no AVX2")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "int3"}, r"quant = 'int3': one of float32, bfloat16, int8, int4"),
        ({"memory": 0}, r"memory = 0: at least 1"),
        ({"context": 0}, r"context = 0: at least 1"),
        ({"batch": 0}, r"batch = 0: at least 1"),
    ],
)
def test_wrong_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        plan(SHAPE, QUICK, **setting)


# ---------------------------------------------------------------------------------------------------------------------
# Seconds, by hand.


def test_decoding_reads_every_weight_that_a_token_uses() -> None:
    step = plan(SHAPE, READS).decode
    share = EFFICIENCY["bfloat16"]
    assert step is not None
    # 4 projections of 64 x 64 and a router of 4 x 64 in each layer, an output layer of 100 x 64; the embedding is
    # looked up. 2 bytes each, 1e9 bytes a second.
    assert step.resident == pytest.approx(2 * (2 * (4 * 64 * 64 + 4 * 64) + 100 * 64) / 1e9 / share.matrices)
    assert step.experts == pytest.approx(2 * 2 * 2 * EXPERT / 1e9 / share.experts)
    assert step.attention == pytest.approx(128 * 2 * 2 * 64 * 2 / 1e9 / share.attention)
    assert step.overhead == 0
    assert total(plan(SHAPE, READS)) == pytest.approx(step.resident + step.experts + step.attention)
    # Keys and values in 8 bits: rows of 16 codes and a scale.
    packed = plan(SHAPE, READS, kv_cache_dtype="int8").decode
    assert packed is not None
    row = 16 + 2
    assert packed.attention == pytest.approx(128 * 2 * 2 * 4 * row / 1e9 / share.attention)
    assert packed.resident == step.resident


@pytest.mark.parametrize(("dtype", "row64", "row32"), [("int8", 68, 68), ("int4", 36, 36)])
def test_decoding_reads_codes_and_scales(dtype: str, row64: int, row32: int) -> None:
    # A row of 64 codes and 2 scales; one of 32 is filled up to as much.
    step = plan(SHAPE, READS, dtype=dtype).decode
    share, plain = EFFICIENCY[dtype], EFFICIENCY["bfloat16"]
    assert step is not None
    packed = 2 * 4 * 64 * row64 + 100 * row64
    routers = 2 * 4 * 64 * 2
    assert step.resident == pytest.approx((packed / share.matrices + routers / plain.matrices) / 1e9)
    assert step.experts == pytest.approx(2 * 2 * (64 * row64 + 64 * row32) / 1e9 / share.experts)


def test_sequences_share_the_experts_that_they_choose() -> None:
    one, three = plan(SHAPE, READS).decode, plan(SHAPE, READS, batch=3).decode
    assert one is not None
    assert three is not None
    assert three.tokens == 3
    # Of 4 experts, 3 tokens that choose 2 evenly use 4 · (1 - (1/2)^3) = 3.5, where one uses 2.
    assert three.experts == pytest.approx(one.experts * 3.5 / 2)
    assert three.resident == pytest.approx(one.resident)
    assert three.attention == pytest.approx(3 * one.attention)
    rate = plan(SHAPE, READS, batch=3).decode_tokens_per_second()
    # Two more tokens pass the norms and sums of two layers.
    assert three.overhead == pytest.approx(2 * 2 * 64 * STREAM / 1e9)
    assert rate == pytest.approx(3 / (three.experts + three.resident + three.attention + three.overhead))


def test_many_sequences_are_bound_by_their_products() -> None:
    step = plan(SHAPE, MULTIPLIES, batch=4, context=1).decode
    share = EFFICIENCY["bfloat16"]
    assert step is not None
    # 4 tokens, 2 experts each, 2 layers, a multiplication and an addition for each weight.
    assert step.experts == pytest.approx(4 * 2 * 2 * 2 * EXPERT / 1e9 / share.experts_product)


def test_reading_a_prompt_multiplies() -> None:
    found = plan(SHAPE, MULTIPLIES)
    step, share = found.prefill, EFFICIENCY["bfloat16"]
    assert step is not None
    assert step.tokens == 128
    # Only the last token is given logits.
    flops = 2 * (2 * 128 * (4 * 64 * 64 + 4 * 64) + 100 * 64)
    assert step.resident == pytest.approx(flops / 1e9 / share.matrices_product)
    # 128 tokens of 2 experts are 64 to each of 4, and 4 for the last step, which is half full on average.
    assert step.experts == pytest.approx(2 * 4 * (64 + 4) * 2 * EXPERT / 1e9 / share.experts_product)
    # Each of 128 tokens attends to itself and all before it: 4 heads of 16, 2 products, 2 layers.
    assert step.attention == pytest.approx(2 * 128 * 129 / 2 * 4 * 16 * 4 / 1e9 / share.attention_product)
    assert found.prefill_tokens_per_second() == pytest.approx(128 / (step.resident + step.experts + step.attention))
    assert plan(replace(SHAPE, context=4096), MULTIPLIES).prefill.tokens == 512  # type: ignore[union-attr]


def test_float32_has_its_own_product() -> None:
    wide = plan(SHAPE, replace(QUICK, float32_flops=1e9), dtype="float32").prefill
    assert wide is not None
    assert wide.experts > 0.001
    narrow = plan(SHAPE, replace(QUICK, float32_flops=1e9), dtype="int8").prefill
    assert narrow is not None
    assert narrow.experts < 1e-9


def test_overhead() -> None:
    calls = replace(NONE, step_seconds=0.5, layer_seconds=0.01, packed_seconds=0.002, sequence_seconds=0.003)
    machine = replace(QUICK, overhead=calls)
    assert total(plan(SHAPE, machine)) == pytest.approx(0.5 + 2 * 0.01)
    assert total(plan(SHAPE, machine, dtype="int4")) == pytest.approx(0.5 + 2 * (0.01 + 0.002))
    assert total(plan(SHAPE, machine, batch=5)) == pytest.approx(0.5 + 2 * (0.01 + 4 * 0.003))
    prefill = plan(SHAPE, replace(READS, overhead=calls)).prefill
    assert prefill is not None
    assert prefill.overhead == pytest.approx(0.5 + 2 * (0.01 + 127 * 64 * STREAM / 1e9))


def test_overhead_of_a_store() -> None:
    machine = replace(QUICK, overhead=replace(NONE, layer_seconds=0.01, stored_seconds=0.002, fetch_seconds=0.1))
    assert total(plan(SHAPE, machine)) == pytest.approx(2 * 0.01)
    whole = plan(SHAPE, machine, memory=10**9)
    assert whole.slots == whole.experts
    assert total(whole) == pytest.approx(2 * 0.012)
    # A layer that misses either of its 2 experts waits once: 1 - 0.5² of all layers do.
    part = plan(SHAPE, machine, memory=SIZES.least)
    assert part.decode is not None
    assert part.decode.seconds(0.5) == pytest.approx(2 * (0.012 + 0.75 * 0.1))
    # Layers without experts have no store.
    mixed = plan(replace(SHAPE, dense_first=1, ffn=64), machine, memory=10**9)
    assert total(mixed) == pytest.approx(2 * 0.01 + 0.002)


# ---------------------------------------------------------------------------------------------------------------------
# From disk.


def test_what_is_not_held_is_read_from_disk() -> None:
    machine = replace(QUICK, disk_bytes_per_second=1e6)
    budget = SIZES.resident + 4 * SIZES.expert
    found = plan(SHAPE, machine, memory=budget)
    assert (found.slots, found.held_share) == (4, 0.5)
    assert found.hit_rate == 4 / 8
    step = found.decode
    assert step is not None
    assert step.disk is not None
    assert step.disk == pytest.approx(2 * 2 * SIZES.expert / 1e6)
    assert total(found) == pytest.approx(step.disk / 2)
    assert found.decode_tokens_per_second(hit_rate=0.75) == pytest.approx(4 / step.disk)
    # A prompt needs all experts.
    assert found.prefill_tokens_per_second() == pytest.approx(128 / (2 * 2 * SIZES.expert / 1e6), rel=1e-3)
    assert found.needed == budget + BESIDE


def test_reading_and_waiting_are_added_to_computing() -> None:
    machine = replace(READS, disk_bytes_per_second=1e6, overhead=replace(NONE, fetch_seconds=0.1))
    step = plan(SHAPE, machine, memory=SIZES.resident + 4 * SIZES.expert).decode
    assert step is not None
    assert step.disk is not None
    assert (step.layers, step.chosen, step.fetch) == (2, 2, 0.1)
    computing = step.resident + step.experts + step.attention
    assert step.seconds(1.0) == pytest.approx(computing)
    # Every layer waits, for all.
    assert step.seconds(0.0) == pytest.approx(computing + 2 * 0.1 + step.disk)
    # One layer in four misses neither of its two.
    assert step.seconds(0.5) == pytest.approx(computing + 2 * 0.75 * 0.1 + step.disk / 2)
    assert step.rate(0.5) == pytest.approx(1 / (computing + 2 * 0.75 * 0.1 + step.disk / 2))


def test_what_is_read_ahead_is_read_while_others_compute() -> None:
    machine = replace(READS, disk_bytes_per_second=1e6, overhead=replace(NONE, fetch_seconds=0.1))
    step = plan(SHAPE, machine, memory=SIZES.resident + 4 * SIZES.expert).decode
    assert step is not None
    assert step.disk is not None
    computing = step.resident + step.experts + step.attention
    # Of the missing half, half was guessed, and as many wrong ones: a layer in four does without both of its two.
    rest = 2 * (1 - 0.75**2) * 0.1 + step.disk / 4
    assert step.disk / 2 > computing
    assert step.seconds(0.5, guessed=0.5, right=0.25) == pytest.approx(step.disk / 2 + rest)
    quick = replace(step, disk=computing)
    assert quick.seconds(0.5, guessed=0.5, right=0.25) == pytest.approx(computing + rest - (step.disk - computing) / 4)
    # A wrong guess beside nothing that misses.
    assert step.seconds(1.0, guessed=0.5) == pytest.approx(step.disk / 2)
    with pytest.raises(ConfigError, match=r"^right = 0.6: from 0 to guessed = 0.7 and 1 - hit_rate = 0.5$"):
        step.seconds(0.5, guessed=0.7, right=0.6)


def test_what_does_not_multiply_bfloat16_multiplies_float32() -> None:
    # A prompt is bound by products here: torch's rate for bfloat16 is not what the kernels reach on such a CPU.
    machine = replace(READS, float32_flops=1e9, bfloat16_flops=1e8)
    slow, right = (plan(SHAPE, replace(machine, bfloat16_flops=rate)).prefill for rate in (1e8, 1e9))
    assert slow == right
    assert plan(SHAPE, replace(machine, bfloat16_flops=4e9)).prefill != right


def test_what_was_read_is_read_again_for_its_checksum() -> None:
    quick = plan(SHAPE, replace(QUICK, disk_bytes_per_second=1e6), memory=SIZES.least).decode
    slow = plan(SHAPE, replace(READS, disk_bytes_per_second=1e6), memory=SIZES.least).decode
    assert quick is not None
    assert quick.disk == pytest.approx(2 * 2 * SIZES.expert / 1e6)
    assert slow is not None
    assert slow.disk == pytest.approx(2 * 2 * SIZES.expert * (1e-6 + 1e-9))


def test_a_disk_that_was_not_measured() -> None:
    machine = replace(QUICK, disk_bytes_per_second=None)
    found = plan(SHAPE, machine, memory=SIZES.least)
    assert found.verdict == "fits with memory"
    assert found.decode_tokens_per_second() is None
    assert found.decode_tokens_per_second(hit_rate=1.0)
    assert plan(SHAPE, machine).decode_tokens_per_second()


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_hit_rate_is_a_share(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"hit_rate = .*: from 0 to 1"):
        SIZES.decode_tokens_per_second(rate)


def test_efficiencies_are_the_benches() -> None:
    """The table holds what bench/results/experts.json says, to a tenth."""
    file = Path(__file__).parent.parent / "bench" / "results" / "experts.json"
    rows = json.loads(file.read_text())["rows"]
    by = {(row["section"], row["T"], row["case"]): row for row in rows}
    names = {"bfloat16": "native bf16", "int8": "native int8/32", "int4": "native int4/32"}
    for dtype, name in names.items():
        assert EFFICIENCY[dtype].experts == pytest.approx(by["decode", 1, name]["of ceiling"], abs=0.1)
        seen = []
        for section, per_expert in (("prefill olmoe", 64), ("prefill mixtral", 128)):
            product = by[section, None, "product bf16 1024×2048×2048"]["GFLOP/s"]
            half = 4 if dtype == "bfloat16" else 8  # of the last step
            seen.append(by[section, 512, name]["GFLOP/s"] * (1 + half / per_expert) / product)
        assert EFFICIENCY[dtype].experts_product == pytest.approx(sum(seen) / 2, abs=0.1)


def test_the_page_shows_the_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "plan.md").read_text("utf-8")
    for dtype, share in EFFICIENCY.items():
        assert f"| {dtype} | {' | '.join(map(str, vars(share).values()))} |" in page


# ---------------------------------------------------------------------------------------------------------------------
# Traces.


def recorded(*tokens: list[list[int]]) -> Recording:
    """tokens: for each layer, the experts of each."""
    experts = [torch.tensor(layer, dtype=torch.uint8) for layer in zip(*tokens, strict=True)]
    return Recording(experts, [torch.ones(layer.shape).half() for layer in experts], [None] * len(experts))


def test_a_replay_by_hand() -> None:
    # One layer, one expert a token, one place. Each policy keeps the last; who knows the future keeps expert 0.
    found = replay(recorded(*([[expert]] for expert in (0, 1, 0, 2, 0))), 1)
    assert (found.tokens, found.capacity, found.hit_rate, found.best) == (5, 1, 0.0, 2 / 5)
    # Layers share the places, and have experts of their own.
    found = replay(recorded([[0], [0]], [[0], [0]], [[0], [0]]), 2)
    assert (found.hit_rate, found.best) == (4 / 6, 4 / 6)


def test_a_replay_plays_no_more_than_it_has_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handful.cache_replay.USES", 7)
    assert replay(recorded(*[[[0, 1]]] * 20), 4).tokens == 3
    assert replay(recorded(*[[[0, 1], [0, 1], [0, 1], [0, 1]]] * 20), 4).tokens == 1


def test_replays_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="capacity = 0: at least 1 expert"):
        replay(recorded([[0]]), 0)
    with pytest.raises(ConfigError, match="no token's routing"):
        replay(recorded([[0]]).part(0, 0), 1)
    with pytest.raises(ConfigError, match="policy = 'fifo'"):
        replay(recorded([[0]]), 1, policy="fifo")


@pytest.mark.parametrize("read_ahead", [False, True])
def test_a_replay_hits_as_the_store_does(read_ahead: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    shape = moe({"experts": 8}, layers=3, context=128)
    model = Decoder(shape).eval()
    memory.pack(model, tmp_path / "pack")
    found = plan(shape, QUICK, dtype="float32", memory=memory.resident_bytes(model) + 13 * 4096)
    assert found.expert == 4096
    recorder = Recorder()
    with memory.attach(model, tmp_path / "pack", found.memory or 0, read_ahead=read_ahead) as store:
        engine = Engine(model, on_routing=lambda *seen: recorder.add(seen[2]))
        engine.submit(Request(prompt=[5], max_tokens=100, sampling=Sampling(temperature=1.0, seed=1)))
        engine.run([])
        stats = store.stats()
        played = replay(recorder.recording(), store.capacity)
    assert played.tokens == 100
    assert played.hit_rate == stats.hit_rate
    assert played.hit_rate < played.best


def test_a_recording_of_another_model() -> None:
    check_recording(recorded([[0, 3], [1, 2]]), SHAPE, "x")
    for other, wrong in (
        (recorded([[0, 3]]), "of 1 MoE layers with 2 experts a token, the highest 3"),
        (recorded([[0], [1]]), "of 2 MoE layers with 1 experts a token, the highest 1"),
        (recorded([[0, 4], [1, 2]]), "of 2 MoE layers with 2 experts a token, the highest 4"),
    ):
        with pytest.raises(ConfigError, match=rf"^trace = 'x': {wrong}: the model has 2, with 2 of 4$"):
            check_recording(other, SHAPE, "x")


# ---------------------------------------------------------------------------------------------------------------------
# Ceilings, measured once.

MEASURED = Measured(read_bytes_per_second=2e10, float32_flops=1e11, bfloat16_flops=2e11)
FETCHES = replace(NONE, fetch_seconds=0.25)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Measuring takes no time, and every folder that it is done in is listed."""
    calls: list[Any] = []

    def measure_disk(folder: Path, fetch_seconds: float) -> float:
        calls.append(folder)
        assert fetch_seconds == FETCHES.fetch_seconds
        return 1e9

    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("handful.ceilings.measure", lambda: MEASURED)
    monkeypatch.setattr("handful.ceilings.measure_disk", measure_disk)
    monkeypatch.setattr("handful.ceilings.measure_overhead", lambda folder=None: FETCHES)
    return calls


def test_a_computer_is_measured_once(measured: list[Any], tmp_path: Path) -> None:
    first = ceilings.ceilings(tmp_path / "not" / "there")
    assert measured == [tmp_path]
    assert first.read_bytes_per_second == 2e10
    assert first.disk_bytes_per_second == 1e9
    assert first.disk_free_bytes > 0
    again = ceilings.ceilings(tmp_path)
    assert len(measured) == 1
    assert again.measured_at == first.measured_at > 1e9
    assert ceilings.ceilings(tmp_path, fresh=True).measured_at > first.measured_at
    assert len(measured) == 2
    assert cache_file().parent == tmp_path / "cache"


def test_another_computer_or_disk_is_measured_too(
    measured: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ceilings.ceilings(tmp_path)
    here = machine()
    monkeypatch.setattr("handful.ceilings.machine", lambda: replace(here, threads=here.threads + 1))
    ceilings.ceilings(tmp_path)
    assert len(measured) == 2
    # Both are kept.
    assert len(json.loads(cache_file().read_text())) == 2
    monkeypatch.setattr("handful.ceilings.machine", lambda: here)
    ceilings.ceilings(tmp_path)
    assert len(measured) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace('"measured_at"', '"measured"'),
        lambda text: text.replace("20000000000.0", "0.0"),
        lambda text: text.replace("20000000000.0", '"quick"'),
        lambda text: text.replace("1000000000.0", "-1"),
        lambda text: text.replace("step_seconds", "steps"),
        lambda text: text.replace('"layer_seconds"', '"more": 1, "layer_seconds"'),
        lambda text: text.replace('"fetch_seconds": 0.25', '"fetch": 0.25'),
        lambda text: text.replace("20000000000.0", "NaN"),
    ],
)
def test_what_is_not_whole_is_measured_again(damage: Any, measured: list[Any], tmp_path: Path) -> None:
    ceilings.ceilings(tmp_path)
    text = cache_file().read_text()
    assert damage(text) != text
    cache_file().write_text(damage(text))
    assert ceilings.ceilings(tmp_path).read_bytes_per_second == 2e10
    assert len(measured) == 2


def test_a_disk_that_cannot_be_measured_and_a_home_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[Any]
) -> None:
    def measure_overhead(folder: Path | None = None) -> Overhead:
        if folder is not None:
            raise HandfulError(f"folder {folder}: Permission denied")
        return FETCHES

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("handful.ceilings.measure_overhead", measure_overhead)
    found = ceilings.ceilings(tmp_path)
    assert (found.disk_bytes_per_second, found.overhead) == (None, FETCHES)


def test_overhead_is_measured(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    found = measure_overhead(tmp_path, repeats=12)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert min(vars(found).values()) >= 0
    assert all(map(math.isfinite, vars(found).values()))
    assert found.step_seconds + 8 * found.layer_seconds > 1e-6
    assert not list(tmp_path.iterdir())


def test_overhead_is_what_steps_take_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 10 ms, 1 for each layer, 2 more where it is packed, 3 for each further sequence, 4 where experts are
    stored and 5 where they are fetched: found again from the six steps alone, in seconds."""
    took = {"short": 12, "deep": 18, "packed": 34, "shared": 18 + 8 * 4 * 3, "held": 34 + 8 * 4, "away": 34 + 8 * 9}
    monkeypatch.setattr(ceilings, "_step_seconds", lambda cases, repeats: {name: took[name] / 1000 for name in cases})
    found = measure_overhead(tmp_path)
    assert vars(found) == pytest.approx(
        {
            "step_seconds": 0.010,
            "layer_seconds": 0.001,
            "packed_seconds": 0.002,
            "sequence_seconds": 0.003,
            "stored_seconds": 0.004,
            "fetch_seconds": 0.005,
        }
    )


def test_every_layer_of_the_model_that_is_away_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `fetch_seconds` is measured with misses both experts of every layer in every step, what it is compared to
    none."""
    seen: dict[str, list[StoreStats]] = {}
    steps = ceilings._step_seconds

    def looked_at(cases: dict[str, tuple[Decoder, int]], repeats: int) -> dict[str, float]:
        took = steps(cases, repeats)
        for name, (model, _) in cases.items():
            experts = [layer.experts for layer in model.moe_layers]
            if isinstance(experts[0], OffloadedExperts):
                seen.setdefault(name, []).append(experts[0].store.stats())
        return took

    monkeypatch.setattr(ceilings, "_step_seconds", looked_at)
    measure_overhead(tmp_path, repeats=12)
    assert set(seen) == {"held", "away"}
    (away,), (held,) = seen["away"], seen["held"]
    assert away.hit_rate == 0
    assert away.total("misses") >= 12 * 8 * 2
    assert held.total("misses") <= held.experts
    assert held.total("hits") > 0


def test_a_disk_is_measured_as_a_store_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    one = PackFile.read

    def counted(self: PackFile, layer: int, expert: int, into: memoryview) -> None:
        read.append((expert, len(into)))
        one(self, layer, expert, into)

    monkeypatch.setattr(PackFile, "read", counted)
    assert 1e6 < ceilings.measure_disk(tmp_path, repeats=40) < 1e12
    # Every one of them from the disk: after all 64 it begins again, and finds none.
    assert len(read) == 80
    assert {expert for expert, _ in read} == set(range(64))
    assert {size for _, size in read} == {4 << 20}
    assert not list(tmp_path.iterdir())
    with pytest.raises(HandfulError, match=r"not there.*No such file"):
        ceilings.measure_disk(tmp_path / "not there")


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


@pytest.fixture
def handful_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measured: list[Any]) -> Call:
    monkeypatch.setenv("COLUMNS", "200")
    here = replace(machine(), memory_available_bytes=8 * 10**9, native_error=None)
    monkeypatch.setattr("handful.ceilings.machine", lambda: here)
    return calling(monkeypatch, capsys)


def test_the_command_line_plans_every_format(handful_: Call) -> None:
    found = document(handful_("plan", "olmoe", "--json"))
    assert [each["dtype"] for each in found["plans"]] == ["bfloat16", "int8", "int4"]
    assert found["model"] == "olmoe"
    assert found["machine"]["read_bytes_per_second"] == 2e10
    shape = PRESETS["olmoe"].model
    assert shape is not None
    for each in found["plans"]:
        machine = replace(
            Ceilings(**{**found["machine"], "gpus": (), "overhead": Overhead(**found["machine"]["overhead"])}),
            gpus=tuple(map(tuple, found["machine"]["gpus"])),
        )
        again = plan(shape, machine, dtype=each["dtype"], download=2 * 6_919_161_856)
        assert {**again.to_dict(), "trace": None} == each


def test_the_command_line_says_it_in_a_line(handful_: Call) -> None:
    result = handful_("plan", "olmoe", "--context", "1024")
    assert result.code == 0
    lines = result.out.splitlines()[-3:]
    assert lines[0].startswith("bfloat16: fits with --memory 7.")
    assert lines[2] == "int4: fits: it takes 4.63 GB of the 8 GB of memory that are free"
    assert "least --memory" in result.out
    assert "decode tokens/s" in result.out
    assert "OLMoE-1B-7B" in result.err


def test_a_budget_a_format_and_a_trace(handful_: Call, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shape = moe({"experts": 8}, layers=2)
    values = {
        "model_type": "qwen3_moe", "vocab_size": shape.vocab, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "rms_norm_eps": 1e-6, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "max_position_embeddings": 32, "norm_topk_prob": True,
        "intermediate_size": 12, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    tokens = [[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 5], [2, 3]], [[4, 5], [2, 3]]
    recorded(*tokens).save(tmp_path / "trace.safetensors")
    options = ["--memory", "50kB", "--quant", "bfloat16", "--trace", str(tmp_path / "trace.safetensors")]
    (found,) = document(handful_("plan", folder, *options, "--json"))["plans"]
    assert (found["dtype"], found["memory"], found["verdict"]) == ("bfloat16", 50_000, "fits with memory")
    assert found["trace"]["hit_rate"] == found["trace"]["best"] == 10 / 16
    assert found["trace"]["decode_tokens_per_second"] > found["decode_tokens_per_second"] > 0
    assert found["download"] > 0
    (folder / "model.safetensors").write_bytes(b"")
    assert document(handful_("plan", folder, *options, "--json"))["plans"][0]["download"] == 0
    assert document(handful_("plan", folder / "config.json", *options, "--json"))["plans"][0]["download"] == 0
    text = handful_("plan", folder, *options).out
    assert "hits at best" in text
    assert "50 %" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["olmoe", "--memory", "much"], "memory = 'much': a size such as 4GB, 3.5GiB or 500MB"),
        (["olmoe", "--quant", "int3"], "quant = 'int3': one of float32, bfloat16, int8, int4"),
        (["olmoes"], "'olmoes': no such file or folder"),
        (["olmoe", "--kv-cache-dtype", "fp8"], "kv_cache_dtype = 'fp8': auto or int8"),
        (["deepseek-v3", "--kv-cache-dtype", "int8"], "kv_cache_dtype = 'int8': not with latent attention"),
        (["olmoe", "--ranks", "2", "--kv-cache-dtype", "int8"], "kv-cache-dtype = 'int8': not with --ranks"),
        (["olmoe", "--trace", "nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, handful_: Call) -> None:
    assert message in mistake(handful_("plan", *arguments, "--json"))


def test_why_there_is_no_speed(handful_: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(machine(), native_error="this CPU has no AVX2")
    monkeypatch.setattr("handful.ceilings.machine", lambda: here)
    result = handful_("plan", "olmoe", "--quant", "int4")
    assert result.code == 0
    assert "tokens/s" not in result.out
    assert "no speed is forecast: no native kernels: this CPU has no AVX2" in result.err


def test_measure_measures_again(handful_: Call, measured: list[Any]) -> None:
    for options, times in (([], 1), ([], 1), (["--measure"], 2)):
        assert handful_("plan", "olmoe", *options).code == 0
        assert len(measured) == times


def test_tables_of_what_is_not_known() -> None:
    machine = replace(QUICK, disk_bytes_per_second=None, gpus=(("a card", 10**9),), measured_at=0.0)
    plans = [plan(SHAPE, machine, memory=SIZES.least, batch=2), plan(SHAPE, machine, dtype="int4", memory=1)]
    console = Console(width=200, record=True, file=io.StringIO())
    for found in plan_tables("x", machine, plans, [None, None]):
        console.print(found)
    text = console.export_text()
    for words in ("not measured", "not known", "days ago", "a card, 1.00 GB", "KV cache, 2 × 128 tokens", "–"):
        assert words in text
