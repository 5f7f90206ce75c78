"""Several ranks train as one process does: the same losses, whoever goes on from whose checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import calling, dense, moe, of_kind, tiny_data, training
from gang import Gang
from safetensors.torch import load_file

from handful.config import BalanceConfig, ModelConfig, TrainConfig
from handful.data import Data
from handful.errors import CheckpointError, ConfigError
from handful.experts.parallel import Layout
from handful.families.io import load_decoder
from handful.model import Decoder
from handful.ranks import ALONE, Ranks
from handful.spread import spread
from handful.train import train
from handful.train_ranks import check_ranks, layout_line, read_layouts


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    made = Gang()
    yield made
    made.close()


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return tiny_data(tmp_path)


def events(
    ranks: Ranks, config: ModelConfig, settings: TrainConfig, data: Data, out: Path | None, **options: Any
) -> list[dict[str, Any]]:
    """A training's events, as this rank sees them."""
    torch.set_num_threads(1)
    until = options.pop("until", None)
    held = options.pop("held", None)
    if held is not None:
        assert config.router is not None
        options["layouts"] = [Layout(config.router.experts, held) for _ in config.moe_layers]
    found: list[dict[str, Any]] = []
    stop = (lambda: len(of_kind("step", found)) >= until) if until else (lambda: False)
    for event in train(config, settings, data, out, ranks=ranks, stop=stop, **options):
        found.append(event)
    return found


def losses(found: list[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in of_kind("step", found)]


def alike(found: list[dict[str, Any]], want: list[dict[str, Any]], rel: float = 2e-5) -> None:
    """The same numbers up to rounding, and the same experts."""
    assert [event["event"] for event in found] == [event["event"] for event in want]
    for mine, its in zip(found, want, strict=True):
        for name in {"step": ("loss", "balance_loss", "z_loss", "grad_norm"), "eval": ("loss",)}.get(its["event"], ()):
            if its[name] is None:
                assert mine[name] is None
            else:
                assert mine[name] == pytest.approx(its[name], rel=rel), name
        for name in its.keys() & {"choices", "load"}:
            assert mine[name] == its[name], name


BALANCES = [
    BalanceConfig(loss="switch", weight=0.02, z_weight=1e-3),
    BalanceConfig(loss="global", weight=0.02),
    BalanceConfig(loss="sequence", weight=0.02),
    BalanceConfig(loss="gshard", weight=0.02),
    BalanceConfig(bias_rate=0.01),
]


@pytest.mark.parametrize("balance", BALANCES, ids=["switch", "global", "sequence", "gshard", "bias"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_same_training(balance: BalanceConfig, size: int, gang: Gang, data: Data) -> None:
    """Micro-batches of three sequences on up to four ranks: uneven shares, and an empty one."""
    config = moe({"balance_bias": bool(balance.bias_rate)})
    settings = training(batch=6, accumulate=2, steps=4, balance=balance)
    found = gang.run(events, config, settings, data, None, size=size)
    assert all(losses(own) == losses(found[0]) for own in found)
    alike(found[0], events(ALONE, config, settings, data, None))


LAYERS = {
    "a dense model": dense(),
    "shared experts": moe(shared_width=8),
    "more ranks than experts": moe({"experts": 3}),
    "biases of experts": moe({"logits_bias": True}, expert_bias=True, activation="swiglu_clamped"),
    "one expert a token": moe({"top_k": 1, "normalize": False}),
    "a dense layer first": moe(layers=3, dense_layers=(0,), ffn=24),
    "a share for each sequence": moe({"sequence_capacity": 6}),
}


@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
def test_the_same_training_of_any_layer(config: ModelConfig, gang: Gang, data: Data) -> None:
    found = gang.run(events, config, training(steps=3), data, None)
    alike(found[0], events(ALONE, config, training(steps=3), data, None))


def with_options(
    ranks: Ranks, config: ModelConfig, settings: TrainConfig, data: Data, out: Path | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    return events(ranks, config, settings, data, out, **options)


@pytest.mark.parametrize("two_level", [False, True])
def test_copies_learn_as_one(two_level: bool, gang: Gang, data: Data) -> None:
    held = [[0, 1, 2], [0, 3], [1], [0, 2]]
    settings = training(batch=8, steps=4)
    found = gang.run(
        with_options, moe(), settings, data, None, {"held": held}, hosts=[0, 0, 1, 1], two_level=two_level
    )  # fmt: skip
    alike(found[0], events(ALONE, moe(), settings, data, None))
    assert found[0][-1]["waited_for_experts"] >= 0


@pytest.mark.parametrize("only", ["experts", "routers"])
def test_the_same_training_of_a_part(only: str, gang: Gang, data: Data) -> None:
    found = gang.run(with_options, moe(), training(steps=3), data, None, {"only": only}, size=2)
    alike(found[0], events(ALONE, moe(), training(steps=3), data, None, only=only))


def test_activations_computed_again(gang: Gang, data: Data) -> None:
    settings = training(steps=3, activation_checkpoint=True)
    found = gang.run(events, moe(), settings, data, None, size=3)
    alike(found[0], events(ALONE, moe(), settings, data, None))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints know nothing of ranks.


@pytest.mark.parametrize("balance", [BALANCES[0], BALANCES[4]], ids=["switch", "bias"])
@pytest.mark.parametrize(("first", "then"), [(4, 1), (4, 2), (4, 3), (1, 4)])
def test_others_go_on(first: int, then: int, balance: BalanceConfig, gang: Gang, data: Data, tmp_path: Path) -> None:
    """Some steps on so many ranks and the rest on others give the losses of one process that did all."""
    config, out = moe({"balance_bias": bool(balance.bias_rate)}), tmp_path / "run"
    settings = training(batch=8, steps=6, balance=balance)
    want = events(ALONE, config, settings, data, tmp_path / "whole")
    run(gang, first, config, settings, data, out, {"until": 3})
    assert sorted(path.name for path in (out / "checkpoints").iterdir())[-1] == "step-000003"
    found = run(gang, then, config, settings, data, out, {"resume": True})
    assert losses(found) == pytest.approx(losses(want)[3:], rel=2e-5)
    assert found[-1]["loss"] == pytest.approx(want[-1]["loss"], rel=2e-5)


def run(
    gang: Gang, size: int, config: ModelConfig, settings: TrainConfig, data: Data, out: Path, options: dict[str, Any]
) -> list[dict[str, Any]]:
    if size == 1:
        return events(ALONE, config, settings, data, out, **options)
    found: list[dict[str, Any]] = gang.run(with_options, config, settings, data, out, options, size=size)[0]
    return found


def test_the_same_files(gang: Gang, data: Data, tmp_path: Path) -> None:
    """Names, shapes, dtypes of one process's, its values up to rounding, and the same model."""
    settings, held = training(batch=8, steps=2), [[3, 1], [0], [2, 1]]
    events(ALONE, moe(), settings, data, tmp_path / "one")
    gang.run(with_options, moe(), settings, data, tmp_path / "three", {"held": held}, size=3)
    names = sorted(path.name for path in (tmp_path / "one/model/").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "three/model/").iterdir())
    for file in ("model.safetensors", "trainer.safetensors"):
        want, found = (load_file(tmp_path / name / "model" / file) for name in ("one", "three"))
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in want.items()}
        for name, tensor in want.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    logits = [load_decoder(tmp_path / name)(torch.arange(12).view(1, 12))[0] for name in ("one", "three")]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)


def refused(ranks: Ranks, data: Data, out: Path) -> str:
    try:
        events(ranks, moe(), training(steps=2), data, out)
    except CheckpointError as error:
        return str(error)
    return "nothing was wrong"


def test_a_disk_that_refuses_is_told_to_all(gang: Gang, data: Data, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints/.new-step-000002").write_text("in the way")
    said = gang.run(refused, data, out, size=3)
    assert set(said) == {f"{out}/checkpoints/step-000002: cannot be written: File exists"}


def unlike(ranks: Ranks) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("handful.spread.available", lambda: ranks.rank == 1)
        try:
            spread(Decoder(moe()), ranks)
        except ConfigError as error:
            return str(error)
    return "nothing was wrong"


def test_ranks_that_compute_otherwise_are_refused(gang: Gang) -> None:
    said = gang.run(unlike, size=3)
    assert set(said) == {"ranks: some have the native kernels and others do not (handful doctor says why)"}


def test_what_ranks_cannot_share() -> None:
    ranks = Ranks(0, (0, 0))
    with pytest.raises(ConfigError, match=r"^model\.router\.capacity_factor: on several ranks tokens of one would"):
        check_ranks(moe({"capacity_factor": 1.5}), ranks, "cpu")
    with pytest.raises(ConfigError, match=r"^model\.router\.choice = 'expert': on several ranks"):
        check_ranks(moe({"choice": "expert"}), ranks, "cpu")
    check_ranks(moe({"capacity_factor": 1.5}), ALONE, "cuda")
    with pytest.raises(ConfigError, match=r"^device = 'cuda': cpu, on several ranks$"):
        check_ranks(moe(), ranks, "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# A placement that was found before.


def test_a_placement_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As `handful place` writes it."""
    pytest.importorskip("scipy")
    (tmp_path / "load.json").write_text('{"load": [[9, 1, 1, 1], [1, 1, 1, 9]]}')
    file = tmp_path / "placement.json"
    call = calling(monkeypatch, capsys)
    assert call("place", tmp_path / "load.json", "--devices", "2", "--slots", "3", "--out", file).code == 0
    first, last = read_layouts(file, moe(), Ranks(0, (0, 0)))
    assert int(first.copies_E[0]) == int(last.copies_E[3]) == 2
    assert layout_line(moe(), Ranks(0, (0, 0)), [first, last]).startswith("2 ranks on 1 host, ")
    for config, ranks, wrong in (
        (moe(layers=3), Ranks(0, (0, 0)), "placement: 2 layers; the model has 3 with experts"),
        (moe(), Ranks(0, (0, 0, 0)), "placement: of 2 devices; there are 3 ranks"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            read_layouts(file, config, ranks)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no placement that handful place wrote"):
        read_layouts(file, moe(), Ranks(0, (0, 0)))
