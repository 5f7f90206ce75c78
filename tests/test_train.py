"""Training: the schedule, one optimizer step against torch's own, exact accumulation, resuming, refusing what diverged.

Legend: B sequences · S tokens in one · L MoE layers · E experts
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.nn.functional as F
from builders import VOCAB, Event, dense, moe, of_kind, read_lines, timeless, tiny_data, training, write_text
from torch import Tensor

from handful import checkpoint, report
from handful.balance import global_loss, z_loss
from handful.cli import main
from handful.config import BalanceConfig, ModelConfig, TrainConfig
from handful.config_io import from_dict
from handful.data import Batches, Data, heldout_batches, load_data
from handful.errors import CheckpointError, ConfigError, DataError, TrainingError
from handful.evaluate import evaluate
from handful.experts.quantize_model import quantize_model
from handful.families.io import load, save
from handful.model import Decoder
from handful.monitor import TensorBoardWarning, tensorboard
from handful.runs import Run
from handful.train import pick_dtype, train
from handful.train_step import Stepper, lr_at, make_optimizer
from handful.upcycle import upcycle

module: Any = sys.modules["handful.train"]  # `handful.train` is the function

NOISY = {"jitter": 0.1, "noisy_top_k": True, "balance_bias": True}
NOISY_BALANCE = BalanceConfig(loss="switch", weight=0.01, bias_rate=0.01, z_weight=0.001)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return tiny_data(tmp_path_factory.mktemp("train"))


@pytest.fixture(autouse=True)
def _never_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug here: what a process that died has written is there, flushed to the disk or not."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def losses(events: list[Event], kind: str = "step") -> list[float]:
    return [event["loss"] for event in of_kind(kind, events)]


def with_model(monkeypatch: pytest.MonkeyPatch, work: Callable[[Decoder], None]) -> None:
    """Let `work` have the model that is about to be trained."""

    def make(model: Decoder, settings: TrainConfig) -> torch.optim.AdamW:
        work(model)
        return make_optimizer(model, settings)

    monkeypatch.setattr(module, "make_optimizer", make)


# ---------------------------------------------------------------------------------------------------------------------
# The schedule and the optimizer.


def test_cosine_by_hand() -> None:
    settings = training(steps=10, lr=2.0, min_lr_ratio=0.1, warmup=0.2)
    rates = [lr_at(step, settings) for step in range(10)]
    cosine = [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * done / 8)) / 2) for done in range(8)]
    assert rates == pytest.approx([1.0, 2.0, *cosine])
    assert rates[6] == pytest.approx(1.1)  # half-way down: the middle of 2 and 0.2


def test_wsd_by_hand() -> None:
    settings = training(steps=10, lr=2.0, min_lr_ratio=0.1, warmup=0.1, schedule="wsd", decay=0.4)
    rates = [lr_at(step, settings) for step in range(10)]
    assert rates == pytest.approx([2.0] * 7 + [0.2 + 1.8 * left for left in (3 / 4, 2 / 4, 1 / 4)])


@pytest.mark.parametrize(("warmup", "steps", "warm"), [(0.07, 100, 7), (0.05, 500, 25), (0.1, 15, 2), (0.0, 9, 0)])
def test_warm_up_is_the_share_of_steps_rounded_up(warmup: float, steps: int, warm: int) -> None:
    settings = training(steps=steps, lr=1.0, warmup=warmup)
    assert next(step for step in range(steps) if lr_at(step, settings) == 1.0) == max(warm - 1, 0)
    assert [lr_at(step, settings) for step in range(warm)] == pytest.approx([(i + 1) / warm for i in range(warm)])


def test_no_decay_and_no_minimum() -> None:
    settings = training(steps=10, lr=1.0, schedule="wsd", decay=0.0, warmup=0.0, min_lr_ratio=0.0)
    assert [lr_at(step, settings) for step in range(10)] == [1.0] * 10
    assert lr_at(9, training(steps=10, lr=1.0, schedule="wsd", decay=1.0, warmup=0.0, min_lr_ratio=0.0)) > 0


def test_weight_decay_shrinks_matrices_and_nothing_else() -> None:
    model = Decoder(moe({"logits_bias": True}, qkv_bias=True))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    make_optimizer(model, training(lr=0.1, weight_decay=0.5)).step()
    shrunk = {name for name, p in model.named_parameters() if torch.allclose(p, torch.tensor(0.95))}
    same = {name for name, p in model.named_parameters() if bool((p == 1.0).all())}
    assert shrunk | same == {name for name, _ in model.named_parameters()}
    assert same == {name for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name}
    assert {"embed.weight", "layers.0.ffn.router.weight", "layers.1.ffn.experts.down"} <= shrunk


def one_step(model: Decoder, settings: TrainConfig, optimizer: torch.optim.Optimizer, data: Data, step: int = 0) -> Any:
    batches = Batches(data.train, batch=settings.batch, context=settings.context, seed=settings.seed)
    stepper = Stepper(model.config, settings, model, optimizer, "cpu")  # type: ignore[arg-type]
    return stepper.step(step, *batches.at(step))


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_a_step_is_adamw_on_the_clipped_gradient(data: Data, clip: float) -> None:
    """Against the same step spelled out with torch's cross entropy, in float64."""
    settings = training(clip=clip, lr=0.01, warmup=0.0, weight_decay=0.1)
    config = moe()
    ours, theirs = Decoder(config).double(), Decoder(config).double()
    theirs.load_state_dict(ours.state_dict())
    done = one_step(ours, settings, make_optimizer(ours, settings), data)

    inputs_BS, targets_BS = Batches(data.train, batch=4, context=16, seed=0).at(0)
    logits_BSV, _ = theirs(inputs_BS)
    loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters() if p.grad is not None))
    assert done.plain["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert done.plain["grad_norm"] == pytest.approx(norm, rel=1e-12)  # before it is clipped
    assert norm > 0.05
    for p in theirs.parameters():
        assert p.grad is not None
        p.grad *= min(1.0, clip / norm)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95)).step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Adam divides a gradient by its own size, so a gradient near zero makes a rounding error large.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation.


def accumulated(
    config: ModelConfig, balance: BalanceConfig, data: Data, dtype: torch.dtype, accumulate: int, steps: int = 1
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """A model's state after plain gradient steps of length 1, and what they reported."""
    settings = training(balance=balance, batch=8, accumulate=accumulate, clip=1e9, steps=100, lr=0.5, warmup=0.0)
    torch.manual_seed(1)
    model = Decoder(config).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    done = [one_step(model, settings, optimizer, data, step).plain for step in range(steps)]
    return model.state_dict(), done


BALANCES = {
    "none": BalanceConfig(),
    "sequence": BalanceConfig(loss="sequence", weight=0.3),
    "global": BalanceConfig(loss="global", weight=0.3),
    "z": BalanceConfig(z_weight=0.1),
    "loss-free": BalanceConfig(bias_rate=0.01),
    "all": BalanceConfig(loss="global", weight=0.3, z_weight=0.1, bias_rate=0.01),
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", BALANCES)
def test_accumulation_is_exact(data: Data, name: str, dtype: torch.dtype, bound: float) -> None:
    balance = BALANCES[name]
    config = moe({"experts": 6, "balance_bias": bool(balance.bias_rate)})
    before = accumulated(config, balance, data, dtype, 1, steps=0)[0]
    whole, (done,) = accumulated(config, balance, data, dtype, 1)
    parts, (same,) = accumulated(config, balance, data, dtype, 4)
    for key in before:
        if key.endswith("balance_bias"):
            assert torch.equal(whole[key], parts[key]), key  # to the digit
            assert (whole[key] != 0).any()
            continue
        change, other = whole[key] - before[key], parts[key] - before[key]
        assert change.norm() > 0, key
        assert float((change - other).norm() / change.norm()) < bound, key
    for key in ("loss", "grad_norm", "balance_loss", "z_loss"):
        assert same[key] == (None if done[key] is None else pytest.approx(done[key], rel=bound)), key


def test_accumulation_stays_exact_over_steps(data: Data) -> None:
    config = moe({"experts": 6, "balance_bias": True})
    whole, done = accumulated(config, BALANCES["all"], data, torch.float64, 1, steps=4)
    parts, same = accumulated(config, BALANCES["all"], data, torch.float64, 8, steps=4)
    assert [d["loss"] for d in same] == pytest.approx([d["loss"] for d in done], rel=1e-10)
    for key in whole:
        if key.endswith("balance_bias"):
            assert torch.equal(whole[key], parts[key])
            assert sorted({round(abs(b), 6) for b in whole[key].tolist()} - {0.0, 0.02, 0.04}) == []


def test_the_global_loss_is_that_of_the_whole_batch(data: Data) -> None:
    config = moe({"experts": 6})
    torch.manual_seed(1)
    model = Decoder(config).double().train()
    inputs_BS, _ = Batches(data.train, batch=8, context=16, seed=0).at(0)
    _, routings = model(inputs_BS)
    right = sum(global_loss(r, r.chosen_E).item() for r in routings) / len(routings)
    _, (done,) = accumulated(config, BALANCES["global"], data, torch.float64, 4)
    assert done["balance_loss"] == pytest.approx(right, rel=1e-12)
    _, (done,) = accumulated(config, BALANCES["z"], data, torch.float64, 4)
    assert done["z_loss"] == pytest.approx(sum(z_loss(r).item() for r in routings) / len(routings), rel=1e-12)


def test_the_switch_loss_is_per_micro_batch(data: Data) -> None:
    """By definition: so cutting the batch changes it. The test above would not see a loss that is never computed."""
    balance = BalanceConfig(loss="switch", weight=0.3)
    values = [accumulated(moe(), balance, data, torch.float64, n)[1][0]["balance_loss"] for n in (1, 4)]
    assert abs(values[0] - values[1]) > 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# What a run is made of.


def test_events(data: Data, tmp_path: Path) -> None:
    seen: list[Event] = []
    events = list(train(moe(), training(), data, tmp_path / "run", sinks=[seen.append]))
    assert seen == events == read_lines(tmp_path / "run/events.jsonl")
    each = ["step", "step", "routing", "eval", "checkpoint"]
    assert [event["event"] for event in events] == ["start", "eval", *each * 3, "end"]
    start, end = events[0], events[-1]
    assert start["parameters"]["active"] < start["parameters"]["total"]
    assert start["parameters"]["total"] == sum(p.numel() for p in Decoder(moe()).parameters())
    assert [event["step"] for event in of_kind("step", events)] == [1, 2, 3, 4, 5, 6]
    assert [event["tokens"] for event in of_kind("step", events)] == [64, 128, 192, 256, 320, 384]
    clock = [event["seconds"] for event in of_kind("step", events)]
    assert clock == sorted(clock)
    assert clock[0] > 0
    assert [event["step"] for event in of_kind("eval", events)] == [0, 2, 4, 6]
    assert end["loss"] == losses(events, "eval")[-1] < losses(events, "eval")[1] < losses(events, "eval")[0]
    assert losses(events, "eval")[0] == pytest.approx(math.log(VOCAB), rel=0.1)  # it has learnt nothing yet
    for event in of_kind("routing", events):
        assert [sum(load) for load in event["load"]] == pytest.approx([1, 1], abs=1e-5)
    # The choices of an evaluation's first batch, by the model that it judged.
    inputs_BS, _ = next(heldout_batches(data.heldout, 4, 16, 128))
    model = load(tmp_path / "run")
    with torch.no_grad():
        right = [routing.experts_TK.tolist() for routing in model(inputs_BS)[1]]
    assert of_kind("eval", events)[-1]["choices"] == right
    assert of_kind("eval", events)[0]["choices"] != right
    held = data.evaluated_bytes_per_token(16, 128)
    assert end["bits_per_byte"] == pytest.approx(end["loss"] / math.log(2) / held)


def test_the_same_command_gives_the_same_numbers(data: Data) -> None:
    one, two = (list(train(moe(NOISY), training(balance=NOISY_BALANCE), data)) for _ in range(2))
    assert timeless(one) == timeless(two)
    other = list(train(moe(NOISY), training(balance=NOISY_BALANCE, seed=1), data))
    assert losses(one) != losses(other)


def test_evaluations_and_checkpoints_change_nothing(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: Any) -> float:
        calls.append(args)
        return evaluate(*args)

    monkeypatch.setattr(module, "evaluate", counted)
    quiet = list(train(moe(NOISY), training(eval_every=0, checkpoint_every=0), data))
    busy = list(train(moe(NOISY), training(eval_every=1, checkpoint_every=1), data, tmp_path / "run"))
    assert losses(quiet) == losses(busy)
    assert of_kind("end", quiet)[0]["loss"] == of_kind("end", busy)[0]["loss"]
    assert len(of_kind("eval", quiet)) == 1
    assert len(of_kind("eval", busy)) == 7
    assert len(calls) == 8  # none is done twice


def test_routing_events_cover_ten_steps(data: Data) -> None:
    events = list(train(moe({"capacity_factor": 0.5}), training(steps=23, checkpoint_every=0, eval_every=0), data))
    assert [event["step"] for event in of_kind("routing", events)] == [10, 20, 23]
    assert all(0.4 < share < 0.9 for event in of_kind("routing", events) for share in event["dropped"])


def test_evaluate_is_the_mean_over_all_targets(data: Data) -> None:
    model = Decoder(moe({"jitter": 0.5})).double().train()
    batches = list(heldout_batches(data.heldout, 3, 16, 160))
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 3, 1]  # the last one counts less
    loss = evaluate(model, batches)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(inputs)[0].flatten(0, 1) for inputs, _ in batches])
        right = F.cross_entropy(logits, torch.cat([targets.flatten() for _, targets in batches]))
    assert loss == pytest.approx(right.item(), rel=1e-12)


def test_bfloat16_trains_float32_weights(data: Data, tmp_path: Path) -> None:
    run = tmp_path / "run"
    half = list(train(moe(), training(dtype="bfloat16", steps=12), data, run))
    whole = list(train(moe(), training(steps=12), data))
    assert half[0]["dtype"] == "bfloat16"
    assert losses(half) != losses(whole)
    assert losses(half) == pytest.approx(losses(whole), rel=0.02)
    assert {p.dtype for p in load(run).parameters()} == {torch.float32}


def test_activation_checkpointing_changes_no_loss(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = list(train(moe(NOISY), training(), data))
    model_module, blocks = sys.modules["handful.model"], []
    real = model_module.checkpoint

    def counted(block: Any, *args: Any, **kwargs: Any) -> Any:
        blocks.append(id(block))
        return real(block, *args, **kwargs)

    monkeypatch.setattr(model_module, "checkpoint", counted)
    again = list(train(moe(NOISY), training(activation_checkpoint=True), data))
    assert losses(again) == losses(plain)
    assert len(set(blocks)) == 2
    assert blocks == blocks[:2] * 6  # in training, not in evaluation


# Where a graph is cut, torch itself looks at activations' .grad, and warns itself of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compile(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing alone: making kernels takes most of a minute, and is torch's own affair."""
    real, traced = torch.compile, []

    def trace(function: Any) -> Any:
        traced.append(function)
        return real(function, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    plain = list(train(dense(layers=1), training(steps=3), data))
    compiled = list(train(dense(layers=1), training(steps=3, compile=True), data))
    assert len(traced) == 1
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-6)


def test_pick_dtype() -> None:
    settings = training(dtype="auto", accumulate=2)
    dtype, reason = pick_dtype(moe(), settings)
    assert dtype in ("float32", "bfloat16")
    assert "ms a micro-batch in float32" in reason
    assert "ms a micro-batch in bfloat16" in reason
    assert pick_dtype(moe(), training(dtype="bfloat16")) == ("bfloat16", "as asked")


@pytest.mark.parametrize(("speed", "taken"), [(0.8, "bfloat16"), (0.9, "float32"), (2.0, "float32")])
def test_bfloat16_must_be_a_fifth_quicker(speed: float, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    real = module.batch_loss

    def timed(model: Decoder, inputs_BS: Tensor, targets_BS: Tensor, dtype: str) -> Any:
        nonlocal clock
        clock += speed if dtype == "bfloat16" else 1.0
        assert inputs_BS.shape == (2, 16)  # a micro-batch
        return real(model, inputs_BS, targets_BS, dtype)

    monkeypatch.setattr(module, "batch_loss", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    dtype, reason = pick_dtype(dense(layers=1), training(dtype="auto", accumulate=2))
    assert dtype == taken
    assert reason.startswith("measured 1000 ms a micro-batch in float32, ")


def test_auto_is_told_and_kept(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pick_dtype", lambda *args: ("bfloat16", "measured so"))
    settings = training(dtype="auto")
    stream = train(moe(), settings, data, tmp_path / "run")
    start = next(stream)
    assert (start["dtype"], start["dtype_reason"], start["train"]["dtype"]) == ("bfloat16", "measured so", "bfloat16")
    for event in stream:
        if event["event"] == "checkpoint":
            break
    stream.close()  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "pick_dtype", lambda *args: pytest.fail("timed again"))
    again = list(train(moe(), settings, data, tmp_path / "run", resume=True))
    assert (again[0]["dtype"], again[0]["dtype_reason"]) == ("bfloat16", "as the run began")


def test_any_seed(data: Data) -> None:
    for seed in (2**31, 2**63, 10**30):
        assert len(losses(list(train(moe(NOISY), training(steps=1, seed=seed), data)))) == 1


def test_a_device_may_have_a_number(data: Data, tmp_path: Path) -> None:
    settings = training(dtype="bfloat16", steps=4)
    plain = list(train(moe(), settings, data))
    there = list(train(moe(), settings, data, tmp_path / "run", device="cpu:0"))
    assert losses(there) == losses(plain)


def test_outside_the_main_thread(data: Data) -> None:
    found: list[Event] = []
    worker = threading.Thread(target=lambda: found.extend(train(moe(), training(steps=1), data)))
    worker.start()
    worker.join()
    assert found[-1]["event"] == "end"


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes.


def test_refusals(data: Data, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"model\.vocab = 299: the tokenizer has 300"):
        next(train(dense(vocab=299), training(), data, run))
    with pytest.raises(ConfigError, match=r"train\.balance\.bias_rate = 0\.1: needs model\.router\.balance_bias"):
        next(train(moe(), training(balance=BalanceConfig(bias_rate=0.1)), data, run))
    for context in (6000, 400):  # longer than the training part, and than the held-out part
        with pytest.raises(DataError, match=f"one sequence of context {context} needs"):
            next(train(dense(), training(context=context), data, run))
    # None of them left a run that stands in the way of the next one.
    assert list(train(moe(), training(steps=1), data, run))[-1]["event"] == "end"


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite.


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """One gradient entry of a parameter becomes nan in a step, counted from 1."""
    calls = 0

    def hook(grad: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return grad.index_fill(0, torch.tensor([0]), math.nan) if calls == step else grad

    def watch(model: Decoder) -> None:
        dict(model.named_parameters())[name].register_hook(hook)

    with_model(monkeypatch, watch)


def check_last_good(run: Path, stream: Iterator[Event], message: str, events: list[Event]) -> None:
    """The stream ends in that error, and the checkpoint of step 2 is as it was."""
    before: dict[str, Tensor] = {}

    def follow() -> None:
        for event in stream:
            events.append(event)
            if event["event"] == "checkpoint":
                before.update({name: t.clone() for name, t in load(run).state_dict().items()})

    with pytest.raises(TrainingError, match=message) as caught:
        follow()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"the last good checkpoint is {run}/checkpoints/step-000002")
    after = load(run).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(t.isfinite().all() for t in after.values())


@pytest.mark.parametrize("name", ["layers.1.ffn.router.weight", "layers.0.attn.k_norm.weight", "embed.weight"])
def test_a_bad_gradient_is_named(name: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, name, step=4)
        events: list[Event] = []
        stream = train(moe(), training(), data, tmp_path / "run")
        check_last_good(tmp_path / "run", stream, f"^step 4: the gradient of {name} is not finite; ", events)
    assert losses(events) == losses(read_lines(tmp_path / "run/events.jsonl"))
    assert len(losses(events)) == 3
    # What was spoilt was the gradient alone: the run can go on.
    again = list(train(moe(), training(), data, tmp_path / "run", resume=True))
    assert losses(events) + losses(again)[1:] == losses(list(train(moe(), training(), data)))


@pytest.mark.parametrize(
    ("part", "function"),
    [("loss", "linear_cross_entropy"), ("balance_loss", "balance_loss"), ("z_loss", "z_loss")],
)
def test_a_bad_loss_is_named(
    part: str, function: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = sys.modules["handful.evaluate" if part == "loss" else "handful.train_step"]
    real, training_calls = getattr(owner, function), 0

    def broken(*args: Any) -> Tensor:
        nonlocal training_calls
        out: Tensor = real(*args)
        training_calls += torch.is_grad_enabled()
        # Two MoE layers make two z-losses a micro-batch, and two micro-batches a step.
        return out * math.inf if training_calls > (14 if part == "z_loss" else 7) else out

    monkeypatch.setattr(owner, function, broken)
    balance = BalanceConfig(loss="switch", weight=0.1, z_weight=0.1)
    stream = train(moe(), training(accumulate=2, balance=balance), data, tmp_path / "run")
    check_last_good(tmp_path / "run", stream, rf"^step 4: {part} is inf \(micro-batch 2 of 2\); ", [])


def test_a_bad_held_out_loss_stops_before_the_checkpoint(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = evaluate, 0

    def broken(*args: Any) -> float:
        nonlocal calls
        calls += 1
        return math.nan if calls == 3 else real(*args)

    monkeypatch.setattr(module, "evaluate", broken)
    stream = train(moe(), training(steps=4), data, tmp_path / "run")
    check_last_good(tmp_path / "run", stream, "^step 4: the held-out loss is nan; ", [])


def test_an_absurd_learning_rate(data: Data, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^step \d: .*; there is no checkpoint$"):
        list(train(moe(), training(lr=1e30, checkpoint_every=0, eval_every=0), data, tmp_path / "run"))
    assert all(math.isfinite(value) for value in losses(read_lines(tmp_path / "run/events.jsonl")))
    with pytest.raises(TrainingError, match=r"^step 1: the held-out loss is nan; there is no checkpoint$"):
        list(train(moe(), training(lr=1e39, steps=1), data, tmp_path / "one"))


# ---------------------------------------------------------------------------------------------------------------------
# Collapse.


def favour_one(model: Decoder) -> None:
    """The router of the second layer gives all to experts 0 and 1."""
    bias = model.moe_layers[1].router.bias
    assert bias is not None
    with torch.no_grad():
        bias[:2] += 10.0


def test_collapse_is_told_while_it_happens(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = moe({"experts": 8, "logits_bias": True})
    settings = training(steps=50, checkpoint_every=10, eval_every=20)
    with monkeypatch.context() as patch:
        with_model(patch, favour_one)
        events = list(train(config, settings, data, tmp_path / "run"))
    (warning,) = of_kind("warning", events)  # once, though it stays collapsed
    assert (warning["step"], warning["layer"]) == (30, 1)  # after three windows of ten steps
    assert warning["message"].startswith("routing collapsed in layer 1: 6 of 8 experts are dead")
    assert events.index(warning) < events.index(of_kind("step", events)[30])
    page = report.write(report.from_events(events), tmp_path / "report.html").read_text()
    assert "<strong>Routing collapsed</strong>" in page
    assert "6 of 8 experts are dead" in page

    # A run that is resumed before tells it at the same step; one that is resumed after does not tell it again.
    again = tmp_path / "again"
    for stop in (20, 40):
        with monkeypatch.context() as patch:
            with_model(patch, favour_one if stop == 20 else lambda model: None)
            with closing(train(config, settings, data, again, resume=stop == 40)) as stream:  # type: ignore[type-var]
                for event in stream:
                    if event["event"] == "checkpoint" and event["step"] == stop:
                        break
    assert of_kind("warning", list(train(config, settings, data, again, resume=True))) == []
    assert timeless(read_lines(again / "events.jsonl")) == timeless(events)


def test_no_warning_where_routing_is_balanced(data: Data, tmp_path: Path) -> None:
    balance = BalanceConfig(loss="switch", weight=0.1)
    settings = training(steps=30, lr=3e-3, checkpoint_every=0, balance=balance)
    events = list(train(moe({"logits_bias": True}), settings, data))
    assert of_kind("warning", events) == []
    page = report.write(report.from_events(events), tmp_path / "report.html").read_text()
    assert "<strong>Routing collapsed</strong>" not in page


# ---------------------------------------------------------------------------------------------------------------------
# Killed, interrupted, resumed.

RESUMED: dict[str, tuple[ModelConfig, TrainConfig]] = {
    "dense": (dense(), training()),
    "plain": (moe(), training()),
    "everything": (moe(NOISY), training(balance=NOISY_BALANCE, accumulate=2, schedule="wsd")),
    "public router with jitter": (moe({"jitter": 0.1}), training(accumulate=2, activation_checkpoint=True)),
    "bfloat16": (moe({"experts": 8}), training(dtype="bfloat16", balance=BalanceConfig(loss="global", weight=0.1))),
    "dropped and drawn": (
        moe({"random_second": True, "capacity_factor": 1.0}),
        training(balance=BalanceConfig(loss="gshard", weight=0.01)),
    ),
}


def state_of(run: Path) -> dict[str, Tensor]:
    """The weights and moments of a run's last checkpoint."""
    last = Run.open(run, resume=True).last()
    assert last is not None
    assert (run / "model").resolve() == last.resolve()
    return dict(load(run).state_dict()) | dict(checkpoint.read_tensors(last / "trainer.safetensors"))


@functools.cache
def what_became_of(run: Path) -> tuple[list[Event], dict[str, Tensor]]:
    """The events of a finished run, and the state that it left."""
    return timeless(read_lines(run / "events.jsonl")), state_of(run)


def check_same(run: Path, right: Path) -> None:
    """Two finished runs have the same events, weights and moments, to the bit."""
    (events, ours), (right_events, theirs) = what_became_of(run), what_became_of(right)
    assert events == right_events
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(name: str, data: Data, tmp_path: Path) -> None:
    config, settings = RESUMED[name]
    list(train(config, settings, data, tmp_path / "whole"))
    run = tmp_path / "run"
    for stop_after in (1, 3, 5):  # steps; checkpoints are at 2, 4 and 6
        resume = (run / "run.json").exists()
        with closing(train(config, settings, data, run, resume=resume)) as stream:  # type: ignore[type-var]
            for event in stream:
                if event["event"] == "step" and event["step"] == stop_after:
                    break
    assert [event["step"] for event in list(train(config, settings, data, run, resume=True))][1] == 5
    check_same(run, tmp_path / "whole")


class Killed(BaseException):
    """Stands for SIGKILL: nothing here catches it."""


def kill_at(patch: pytest.MonkeyPatch, place: int) -> list[int]:
    """Die before the place-th time that something is put on the disk. Returns the count of them, as it grows."""
    count = [0]

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == place:
                raise Killed
            return function(*args, **kwargs)

        return call

    written = ((checkpoint, "_flush"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (Run, "write"))
    for owner, name in written:
        patch.setattr(owner, name, wrapped(getattr(owner, name)))
    return count


def test_killed_at_any_write(data: Data, tmp_path: Path) -> None:
    config = moe(layers=1)
    settings = training(steps=3, checkpoint_every=1, eval_every=3, batch=2, eval_tokens=32)
    whole = tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        places = kill_at(patch, -1)
        list(train(config, settings, data, whole))
    # All that is written before the first step, and from the last step's checkpoint to the end.
    assert places[0] > 50
    for place in [*range(1, 6), *range(places[0] - 22, places[0] + 1)]:
        run = tmp_path / f"run-{place}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, place)
            with pytest.raises(Killed):
                list(train(config, settings, data, run))
        list(train(config, settings, data, run, resume=(run / "run.json").exists()))
        check_same(run, whole)


def test_resuming_a_finished_run_repeats_nothing(data: Data, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = list(train(moe(), training(), data, run))
    again = list(train(moe(), training(), data, run, resume=True))
    assert [event["event"] for event in again] == ["start", "end"]
    assert timeless(again[1:]) == timeless(first[-1:])
    assert timeless(read_lines(run / "events.jsonl")) == timeless(first)


def test_ctrl_c_finishes_the_step_and_saves(data: Data, tmp_path: Path) -> None:
    settings = training(checkpoint_every=0, eval_every=0)
    whole = list(train(moe(NOISY), settings, data, tmp_path / "whole"))
    run, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    events = []
    for event in train(moe(NOISY), settings, data, run):
        events.append(event)
        if event["event"] == "step" and event["step"] == 3:
            signal.raise_signal(signal.SIGINT)
    assert [event["event"] for event in events[-3:]] == ["routing", "checkpoint", "interrupted"]
    assert [event["step"] for event in events[-3:]] == [3, 3, 3]
    assert signal.getsignal(signal.SIGINT) is before
    rest = list(train(moe(NOISY), settings, data, run, resume=True))
    assert losses(events) + losses(rest) == losses(whole)
    assert rest[-1]["loss"] == whole[-1]["loss"]
    kinds = [event["event"] for event in read_lines(run / "events.jsonl")]
    steps = ["step", "step", "step"]
    assert kinds == ["start", *steps, "routing", "checkpoint", *steps, "routing", "eval", "checkpoint", "end"]
    ours, theirs = state_of(run), state_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ctrl_c_in_the_last_step_is_the_end(data: Data, tmp_path: Path) -> None:
    events = []
    for event in train(moe(), training(steps=2), data, tmp_path / "run"):
        events.append(event["event"])
        if event.get("step") == 2 and event["event"] == "step":
            signal.raise_signal(signal.SIGINT)
    assert events[-2:] == ["checkpoint", "end"]


def test_a_second_ctrl_c_does_not_wait(data: Data, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    stream = train(moe(), training(), data, tmp_path / "run")
    next(stream), next(stream)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    stream.close()  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGINT) is before


CONFIG = """
[data]
source = {text!r}
vocab = 300

[model]
width = 16
layers = 2
heads = 2
expert_width = 12

[model.router]
experts = 4
top_k = 2
jitter = 0.1
noisy_top_k = true
balance_bias = true

[train]
steps = 40
batch = 4
context = 16
accumulate = 2
lr = 0.01
dtype = "float32"
eval_every = 5
eval_tokens = 128
checkpoint_every = 2
balance = {{ loss = "switch", weight = 0.01, bias_rate = 0.01, z_weight = 0.001 }}
"""


def goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`handful train --resume`, in this process."""
    monkeypatch.setattr(sys, "argv", ["handful", "train", "--resume", "--out", str(run)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


def test_sigkill_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, killed while a checkpoint is written, and at an odd moment; then it ends."""
    run, text = tmp_path / "run", write_text(tmp_path / "text")
    (tmp_path / "config.toml").write_text(CONFIG.format(text=str(text)))
    environment = os.environ | {"HANDFUL_CACHE": str(tmp_path / "cache")}
    command = ["-m", "handful", "train"]
    begin = [*command, str(tmp_path / "config.toml"), "--out", str(run)]
    resume = [*command, "--resume", "--out", str(run)]
    folder = run / "checkpoints"

    moments: list[Callable[[], bool]] = [
        lambda: steps_done(run) >= 3 and any(folder.glob(".new-*")),
        lambda: steps_done(run) >= 12,
    ]
    reached = 0
    for number, moment in enumerate(moments):
        process = fresh.Process(*(resume if number else begin), env=environment)
        limit = time.monotonic() + 300
        while not moment():
            assert process.poll() is None, process.wait()
            assert time.monotonic() < limit
            time.sleep(0.0005)
        process.kill()
        assert process.wait().returncode == -signal.SIGKILL
        assert reached < steps_done(run) < 40
        reached = steps_done(run)
    monkeypatch.setenv("HANDFUL_CACHE", environment["HANDFUL_CACHE"])
    goes_on(run, monkeypatch)

    asked = checkpoint.read_json(run / "run.json")
    data = load_data(str(text), vocab=300, cache=tmp_path / "cache")
    model, settings = from_dict(ModelConfig, asked["model"]), training(**asked["train"] | {"balance": NOISY_BALANCE})
    assert dataclasses.asdict(settings) == asked["train"]
    list(train(model, settings, data, tmp_path / "whole"))
    check_same(run, tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Going on from a model.


def trained_dense(data: Data, **changes: Any) -> Decoder:
    torch.manual_seed(2)
    model = Decoder(dense(**changes))
    model.tokenizer = data.tokenizer
    return model.eval()


def mixture(data: Data) -> Decoder:
    return upcycle(trained_dense(data), "granular", experts=3, top_k=1, slices=2)


def test_it_goes_on_from_the_models_weights(data: Data) -> None:
    model = mixture(data)
    settings = training(steps=1, lr=1e-9, warmup=0.0, weight_decay=0.0)
    before = evaluate(model, heldout_batches(data.heldout, 4, 16, 128))
    events = list(train(model, settings, data))
    assert events[-1]["loss"] == pytest.approx(before, rel=1e-6)
    longer = list(train(model, training(steps=20, lr=1e-2), data))
    assert longer[-1]["loss"] < before  # in place: the same object
    assert evaluate(model, heldout_batches(data.heldout, 4, 16, 128)) == pytest.approx(longer[-1]["loss"], rel=1e-6)
    # The rows of a copy's slices began equal; the text itself told them apart.
    rows_ED = model.moe_layers[0].router.weight
    assert not torch.equal(rows_ED[0], rows_ED[1])


@pytest.mark.parametrize("backend", ["reference", "grouped", "auto"])
@pytest.mark.parametrize("only", ["all", "experts", "routers"])
def test_only_some_is_trained(only: Any, backend: str, data: Data, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = Decoder(moe({"logits_bias": True}, shared_width=8), backend=backend)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    list(train(model, training(steps=2), data, tmp_path / "run", only=only))
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    parts = {"all": ("",), "experts": (".ffn.experts.", ".ffn.shared."), "routers": (".ffn.router.",)}[only]
    assert changed == {name for name in before if any(part in name for part in parts)}
    # Moments of what is trained, and no others.
    moments = checkpoint.read_tensors(tmp_path / "run/checkpoints/step-000002/trainer.safetensors")
    assert {name.split(".", 1)[1] for name in moments} == changed
    assert read_lines(tmp_path / "run/events.jsonl")[0]["only"] == only


def test_frozen_parameters_get_no_gradient(data: Data) -> None:
    """The step on the routers is that of the whole model's gradient, without the rest: clipped by its own norm."""
    gradients: dict[str, dict[str, Tensor]] = {}
    for only in ("all", "routers"):
        torch.manual_seed(4)
        model = Decoder(moe()).double()
        module._train_only(model, only)
        settings = training(clip=1e9, warmup=0.0, lr=1.0)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        one_step(model, settings, optimizer, data)
        gradients[only] = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    for name, gradient in gradients["routers"].items():
        right = gradients["all"][name] if ".router." in name else torch.zeros_like(gradient)
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-14)


def test_a_lower_precision_model_is_trained_in_float32(data: Data, tmp_path: Path) -> None:
    model = mixture(data).to(torch.bfloat16)
    list(train(model, training(steps=2), data, tmp_path / "run"))
    assert {p.dtype for p in load(tmp_path / "run").parameters()} == {torch.float32}


def test_a_vocabulary_with_rows_to_spare(data: Data) -> None:
    model = upcycle(trained_dense(data, vocab=VOCAB + 20), "copy", experts=4)
    assert list(train(model, training(steps=1), data))[-1]["event"] == "end"


@pytest.mark.parametrize(
    ("only", "changes", "message"),
    [
        ("gates", {}, r"^only = 'gates': one of all, experts, routers$"),
        ("experts", {"balance": BalanceConfig(z_weight=0.1)}, r"^train\.balance: none with only = 'experts'"),
        ("all", {"context": 64}, r"^train\.context = 64: at most 32, the model's$"),
    ],
)
def test_what_a_model_cannot_go_on_with(
    only: Any, changes: dict[str, Any], message: str, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        next(train(mixture(data), training(**changes), data, tmp_path / "run", only=only))
    assert not (tmp_path / "run").exists()


def test_other_tokenizers_and_dense_models(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^only = 'experts': 'all' for a dense model$"):
        next(train(trained_dense(data), training(), data, only="experts"))
    other = load_data(str(write_text(tmp_path / "text", documents=30)), vocab=300, cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"^data: its tokenizer is not the model's$"):
        next(train(mixture(data), training(), other))
    packed = trained_dense(data, width=32, ffn=32)
    quantize_model(packed, bits=8)
    with pytest.raises(ConfigError, match=r"^model: its weights are quantized, and cannot be trained$"):
        next(train(packed, training(), data))
    small = trained_dense(data, vocab=VOCAB - 1)
    with pytest.raises(ConfigError, match=r"^model\.vocab = 299: the tokenizer has 300$"):
        next(train(small, training(), data))


def test_killed_at_any_write_after_a_model(data: Data, tmp_path: Path) -> None:
    """The run goes on from its folder alone, whatever was on the disk; the model that it began from is not asked."""
    settings = training(steps=2, checkpoint_every=1, eval_every=2, batch=2, eval_tokens=32)
    whole = tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        places = kill_at(patch, -1)
        list(train(mixture(data), settings, data, whole, only="experts"))
    config = mixture(data).config
    assert places[0] > 40
    resumed = 0
    # From step 0's checkpoint, just there, to the first events after run.json; the rest is as in any run.
    for place in range(14, 22):
        run = tmp_path / f"run-{place}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, place)
            with pytest.raises(Killed):
                list(train(mixture(data), settings, data, run, only="experts"))
        if (run / "run.json").exists():
            resumed += 1
            list(train(config, settings, data, run, only="experts", resume=True))
        else:
            list(train(mixture(data), settings, data, run, only="experts"))
        check_same(run, whole)
    assert 3 <= resumed <= 6


def test_a_run_that_began_from_a_model_needs_its_checkpoint(data: Data, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with closing(train(mixture(data), training(), data, run)) as stream:  # type: ignore[type-var]
        next(stream)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000"]
    with pytest.raises(ConfigError, match=r"^only = 'routers': the run in .* has 'all'$"):
        next(train(mixture(data).config, training(), data, run, only="routers", resume=True))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"run: its checkpoints are gone, and with them the model it began from$"):
        next(train(mixture(data).config, training(), data, run, resume=True))


def test_a_new_run_takes_nothing_from_an_attempt_that_was_cut_off(data: Data, tmp_path: Path) -> None:
    """Killed between the checkpoint of step 0 and run.json; then the folder is used for a new model."""
    run = tmp_path / "run"
    with closing(train(mixture(data), training(), data, run)) as stream:  # type: ignore[type-var]
        next(stream)
    (run / "run.json").unlink()
    with closing(train(mixture(data).config, training(), data, run)) as stream:  # type: ignore[type-var]
        next(stream)
    assert list((run / "checkpoints").iterdir()) == []
    whole = list(train(mixture(data).config, training(), data))
    assert losses(list(train(mixture(data).config, training(), data, run, resume=True))) == losses(whole)


def test_one_process_at_a_time(data: Data, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with closing(train(moe(), training(), data, run)) as stream:  # type: ignore[type-var]
        for event in stream:
            if event["event"] == "checkpoint":
                break
        before = (run / "events.jsonl").read_bytes()
        with pytest.raises(ConfigError, match=r"^out = '.*/run': another process is training this run$"):
            next(train(moe(), training(), data, run, resume=True))
        assert (run / "events.jsonl").read_bytes() == before
    # Whoever stops, lets go.
    assert list(train(moe(), training(), data, run, resume=True))[-1]["event"] == "end"


FROM = """
[data]
source = {text!r}

[train]
steps = 40
batch = 4
context = 16
lr = 0.01
dtype = "float32"
eval_every = 5
eval_tokens = 128
checkpoint_every = 2
"""


def test_sigkill_of_a_run_from_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, killed as soon as there is a run, its model taken away; then it ends as if nothing had been."""
    text, start, run = write_text(tmp_path / "text"), tmp_path / "start", tmp_path / "run"
    data = load_data(str(text), vocab=300, cache=tmp_path / "cache")
    save(mixture(data), start)
    (tmp_path / "from.toml").write_text(FROM.format(text=str(text)))
    environment = os.environ | {"HANDFUL_CACHE": str(tmp_path / "cache")}
    begin: list[str | Path] = [
        "-m",
        "handful",
        "train",
        tmp_path / "from.toml",
        "--from",
        start,
        "--only",
        "experts",
        "--out",
        run,
    ]
    process = fresh.Process(*begin, env=environment)
    limit = time.monotonic() + 300
    while not (run / "run.json").exists():
        assert process.poll() is None, process.wait()
        assert time.monotonic() < limit
        time.sleep(0.0005)
    process.kill()
    assert process.wait().returncode == -signal.SIGKILL
    assert steps_done(run) < 40
    start.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("HANDFUL_CACHE", environment["HANDFUL_CACHE"])
    goes_on(run, monkeypatch)

    settings = from_dict(TrainConfig, checkpoint.read_json(run / "run.json")["train"])
    assert (settings.lr, settings.steps, settings.balance) == (0.01, 40, BalanceConfig())
    again = load(tmp_path / "elsewhere")
    assert isinstance(again, Decoder)
    list(train(again, settings, data, tmp_path / "whole", only="experts"))
    check_same(run, tmp_path / "whole")


def steps_done(run: Path) -> int:
    return max((int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")), default=0)


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_scalars(data: Data, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    settings = training(balance=BalanceConfig(loss="switch", weight=0.1))
    with tensorboard(tmp_path / "run") as sink:
        events = list(train(moe(), settings, data, tmp_path / "run", sinks=[sink]))
    found = event_accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()

    def scalars(name: str) -> list[float]:
        return [value for scalar in found.Scalars(name) for value in (scalar.step, scalar.value)]

    for kind, name in (("step", "loss"), ("step", "lr"), ("step", "balance_loss"), ("eval", "bits_per_byte")):
        right = [value for event in of_kind(kind, events) for value in (event["step"], event[name])]
        assert scalars(f"{kind}/{name}") == pytest.approx(right, rel=1e-6)
    right = [value for event in of_kind("routing", events) for value in (event["step"], event["entropy"][1])]
    assert scalars("routing/entropy/1") == pytest.approx(right, rel=1e-6)
    assert not any("z_loss" in tag for tag in found.Tags()["scalars"])


def test_without_tensorboard_nothing_is_missed(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it is an ImportError
    with tensorboard(tmp_path / "run") as sink:
        list(train(moe(), training(steps=1), data, sinks=[sink]))
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_leaves_a_refused_run_alone(tmp_path: Path) -> None:
    with tensorboard(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_disk_that_refuses_tensorboard_takes_no_run_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line, once, and no traceback of its thread."""
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem  # type: ignore[import-untyped]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "_write", full)
    monkeypatch.setattr(LocalFileSystem, "append", full)
    with warnings.catch_warnings(record=True) as told, tensorboard(tmp_path / "run") as sink:
        warnings.simplefilter("always")
        for step in range(50):
            sink({"event": "step", "step": step, "loss": 1.0})
    said = [str(w.message) for w in told if w.category is TensorBoardWarning]
    assert said == [f"{tmp_path / 'run/tensorboard'}: cannot be written: No space left on device"]
    assert "Traceback" not in capfd.readouterr().err
