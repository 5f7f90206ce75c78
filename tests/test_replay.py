"""A recorded routing, replayed: the same logits and gradients; and what replaying another one changes.

Legend: T tokens · K experts per token
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB, dense, moe
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from handful.balance import switch_loss
from handful.config import ModelConfig
from handful.errors import CheckpointError, RoutingError
from handful.experts.grouped import grouped
from handful.model import Decoder
from handful.moe import MoE, NotCausalWarning, Router
from handful.observe import Recorder, Recording
from handful.positions import KVCache
from handful.routing import Choice, Routing

CONFIGS: dict[str, ModelConfig] = {
    "softmax": moe(),
    "sigmoid": moe({"score": "sigmoid", "balance_bias": True, "scale": 2.5, "experts": 6}, shared_width=8),
    "not normalised": moe({"normalize": False, "top_k": 1}),
    "dense first": moe(dense_first=1, ffn=16, layers=3),
    "dropped": moe({"capacity_factor": 0.5, "eval_capacity_factor": 0.75}),
    "many experts": moe({"experts": 300, "top_k": 5}),
}


def decoder(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config)


def tokens(B: int = 2, S: int = 9) -> Tensor:
    return torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(1))


def recorded(routings: list[Routing]) -> Recording:
    recorder = Recorder()
    recorder.add(routings)
    return recorder.recording()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_model_gives_the_same_bits(name: str, training: bool) -> None:
    model = decoder(CONFIGS[name]).train(training)
    want, routings = model(tokens())
    want.sum().backward()
    gradients: dict[str, Any] = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for replayed in (routings, recorded(routings)):
        got, again = model(tokens(), routing=replayed)
        assert got.equal(want)
        for a, b in zip(again, routings, strict=True):
            assert a.experts_TK.equal(b.experts_TK)
            assert a.weights_TK.equal(b.weights_TK)
    got.sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None
        assert p.grad.equal(gradients[key]), key


def test_a_replay_goes_where_it_is_told_whatever_the_scores_say() -> None:
    """Routers whose scores have been turned round still choose what was recorded, and weigh it by their own scores."""
    model = decoder(CONFIGS["softmax"]).double()
    _, routings = model(tokens())
    recording = recorded(routings)
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.router.weight.neg_()
    _, free = model(tokens())
    got, forced = model(tokens(), routing=recording)
    for told, was, other in zip(forced, routings, free, strict=True):
        assert told.experts_TK.equal(was.experts_TK)
        assert not other.experts_TK.equal(was.experts_TK)
        chosen = told.scores_TE.gather(1, told.experts_TK)
        assert told.weights_TK.equal(chosen / (chosen.sum(-1, keepdim=True) + 1e-20))
    # The routers learn from the replay: their weights are made from their scores.
    got.sum().backward()
    assert all(float(layer.router.weight.grad.abs().sum()) > 0 for layer in model.moe_layers)  # type: ignore[union-attr]
    assert float(switch_loss(forced[0]).detach()) > 0


def test_against_the_layer_by_hand() -> None:
    layer = MoE(6, 4, CONFIGS["softmax"].router).double()  # type: ignore[arg-type]
    x_TD = torch.randn(5, 6, dtype=torch.float64)
    choice = Choice(torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 1]]))
    y_TD, routing = layer(x_TD, choice)
    want = torch.zeros_like(x_TD)
    for t in range(5):
        scores = (layer.router.weight @ x_TD[t]).softmax(-1)[choice.experts_TK[t]]
        for k in range(2):
            e = int(choice.experts_TK[t, k])
            gate, up = (layer.experts.gate_up[e] @ x_TD[t]).chunk(2)
            want[t] += scores[k] / scores.sum() * (layer.experts.down[e] @ (torch.nn.functional.silu(gate) * up))
    assert torch.allclose(y_TD, want, rtol=1e-12)
    assert torch.allclose(grouped(x_TD, routing, layer.experts.weights), want, rtol=1e-12)


def test_expert_choice_is_replayed_with_what_it_left_out() -> None:
    with pytest.warns(NotCausalWarning):
        router = Router(6, moe({"choice": "expert", "experts": 4}).router)  # type: ignore[arg-type]
    x_TD = torch.randn(7, 6)
    first = router(x_TD)
    again = router(x_TD, choice=recorded([first])[0])
    assert again.weights_TK.equal(first.weights_TK)
    assert again.dropped_TK is not None
    assert first.dropped_TK is not None
    assert again.dropped_TK.equal(first.dropped_TK)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from(sorted(CONFIGS)))
def test_pass_after_pass_through_the_cache(chunks: list[int], name: str) -> None:
    """Recorded while decoding, replayed while decoding, part by part."""
    model = decoder(CONFIGS[name]).double().eval()
    batch = tokens(1, sum(chunks))
    recorder, want = Recorder(), []
    cache = KVCache(model.config, 1, sum(chunks), dtype=torch.float64)
    for part in batch.split(chunks, dim=1):
        logits, routings = model(part, cache)
        recorder.add(routings)
        want.append(logits)
    recording = recorder.recording(batch[0].tolist())
    assert recording.tokens == sum(chunks)
    cache, start = KVCache(model.config, 1, sum(chunks), dtype=torch.float64), 0
    for part, logits in zip(batch.split(chunks, dim=1), want, strict=True):
        end = start + part.shape[1]
        assert model(part, cache, routing=recording.part(start, end))[0].equal(logits)
        start = end


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_there_and_back(name: str, tmp_path: Path) -> None:
    model = decoder(CONFIGS[name]).eval()
    batch = tokens()
    want, routings = model(batch)
    recorder = Recorder()
    recorder.add(routings)
    recorder.recording(batch.flatten().tolist()).save(tmp_path / "routing.safetensors")
    found = Recording.read(tmp_path / "routing.safetensors")
    assert model(batch, routing=found)[0].equal(want)
    assert found.tokens_T is not None
    assert found.tokens_T.tolist() == batch.flatten().tolist()
    many = name == "many experts"
    for layer, routing in enumerate(routings):
        assert found.experts_TK[layer].dtype == (torch.int16 if many else torch.uint8)
        assert torch.allclose(found.weights_TK[layer].float(), routing.weights_TK, rtol=1e-3)
    # Three bytes for an assignment, four where an expert's number needs two.
    size = sum(t.nbytes for t in load_file(tmp_path / "routing.safetensors").values())
    assignments = sum(routing.experts_TK.numel() for routing in routings)
    assert size == (4 if many else 3) * assignments + 4 * batch.numel() + (assignments if name == "dropped" else 0)


def test_a_part_of_a_batch_is_recorded_alone() -> None:
    model = decoder(CONFIGS["dropped"]).eval()
    _, routings = model(tokens())
    recorder = Recorder()
    recorder.add(routings, 3, 8)
    got = recorder.recording()
    assert got.experts_TK[1].equal(routings[1].experts_TK[3:8].to(torch.uint8))
    assert got.dropped_TK[0] is not None
    assert routings[0].dropped_TK is not None
    assert got.dropped_TK[0].equal(routings[0].dropped_TK[3:8])


def test_routings_of_another_shape_are_refused() -> None:
    model = decoder(CONFIGS["softmax"])
    _, routings = model(tokens())
    with pytest.raises(RoutingError, match=r"^routing is of 1 MoE layers: the model has 2$"):
        model(tokens(), routing=routings[:1])
    with pytest.raises(
        RoutingError, match=r"^choice.experts_TK has shape \(18, 2\): it must be \(10, 2\), or of fewer experts$"
    ):
        model(tokens(2, 5), routing=routings)
    wrong = Choice(torch.full((18, 2), 4))
    with pytest.raises(RoutingError, match=r"^choice names expert 4: there are 4, counted from 0$"):
        model(tokens(), routing=[wrong, wrong])
    with pytest.raises(RoutingError, match=r"^routing is of 2 MoE layers: the model has 0$"):
        decoder(dense())(tokens(), routing=routings)
    recorder = Recorder()
    recorder.add(routings)
    with pytest.raises(RoutingError, match=r"^routings of 1 MoE layers: those before were of 2$"):
        recorder.add(routings[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.weights": None}, "tensor 'layers.1.weights' is missing"),
        ({"colour": torch.ones(2)}, "tensor 'colour' is unexpected"),
        ({"layers.1.weights": torch.ones(18, 3)}, r"tensor 'layers.1.weights' has shape \[18, 3\]: of no recording"),
        ({"layers.0.experts": torch.ones(36)}, "has shape .*: of no recording"),
        ({"tokens": torch.ones(17)}, r"tensor 'tokens' has shape \[17\]: of no recording"),
    ],
)
def test_files_that_are_no_recording(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = decoder(CONFIGS["softmax"])
    file = tmp_path / "routing.safetensors"
    recorder = Recorder()
    recorder.add(model(tokens())[1])
    recorder.recording(tokens().flatten().tolist()).save(file)
    save_file({name: t for name, t in (load_file(file) | change).items() if t is not None}, file)
    with pytest.raises(CheckpointError, match=message):
        Recording.read(file)
