"""Upcycling: copies and slices say what the dense model said, a split loses nothing when all are chosen, and what it is
written as.

Legend: B sequences · S tokens in one · T tokens · D width · F hidden width · E experts · K experts per token · G slices
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import VOCAB, dense, moe, tiny_data
from torch import Tensor

from handful.data import Data, heldout_batches
from handful.errors import ConfigError, DataError
from handful.evaluate import evaluate
from handful.experts import FeedForward, activate
from handful.experts.quantize_model import quantize_model
from handful.families import config_to_hf
from handful.families.io import load, save
from handful.model import Decoder
from handful.upcycle import balanced_assignment, balanced_clusters, fit_router, report, upcycle


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return tiny_data(tmp_path_factory.mktemp("upcycle"))


def tokens(batch: int = 4, length: int = 24) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


def model(dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    torch.manual_seed(3)
    return Decoder(dense(**changes)).to(dtype).eval()


def ffn_of(model: Decoder, layer: int) -> FeedForward:
    ffn = model.layers[layer].ffn
    assert isinstance(ffn, FeedForward)
    return ffn


@torch.no_grad()
def difference(made: Decoder, right: Decoder) -> float:
    """‖logits - logits‖ / ‖logits‖ on fresh tokens."""
    ours, theirs = made(tokens())[0], right(tokens())[0]
    return float((ours - theirs).norm() / theirs.norm())


# ---------------------------------------------------------------------------------------------------------------------
# Copies and slices.

BOUND = {torch.float64: 1e-13, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu", "gelu", "swiglu_clamped"])
def test_copies_say_what_the_dense_model_said(activation: str, dtype: torch.dtype) -> None:
    right = model(dtype, activation=activation)
    made = upcycle(right, "copy", experts=4, top_k=3)
    assert difference(made, right) < BOUND[dtype]
    router = made.config.router
    assert router is not None
    assert (router.experts, router.top_k, made.config.expert_width) == (4, 3, 24)
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert not made.training


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("slices", "copies", "top_k"), [(2, 4, 2), (3, 4, 1), (4, 3, 2), (8, 2, 2)])
def test_slices_say_what_the_dense_model_said(slices: int, copies: int, top_k: int, dtype: torch.dtype) -> None:
    right = model(dtype)
    made = upcycle(right, "granular", experts=copies, top_k=top_k, slices=slices)
    assert difference(made, right) < BOUND[dtype]
    router = made.config.router
    assert router is not None
    assert (router.experts, router.top_k) == (copies * slices, top_k * slices)
    assert made.config.expert_width == 24 // slices
    # A token's experts are whole copies, and not the same ones for all tokens.
    with torch.no_grad():
        _, routings = made(tokens())
    for routing in routings:
        copy_TK = (routing.experts_TK // slices).sort(1).values
        assert torch.equal(copy_TK, copy_TK[:, ::slices].repeat_interleave(slices, 1))
        assert all(len(set(row)) == top_k for row in copy_TK.tolist())
        assert top_k == copies or len({tuple(row) for row in copy_TK.tolist()}) > 1


def test_slices_of_networks_without_a_gate() -> None:
    right = model(activation="gelu")
    assert difference(upcycle(right, "granular", experts=3, top_k=2, slices=4), right) < 1e-13


def test_a_slice_left_out_is_seen() -> None:
    """The tests above would fail if a slice stood twice: none of them is idle or alike."""
    right = model()
    made = upcycle(right, "granular", experts=2, top_k=1, slices=2)
    with torch.no_grad():
        made.moe_layers[0].experts.down[1] = 0
        made.moe_layers[0].experts.down[3] = 0
    assert difference(made, right) > 1e-3


def test_the_dense_model_stays_as_it_is() -> None:
    right = model()
    before = copy.deepcopy(right.state_dict())
    made = upcycle(right, "copy", noise=0.1)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(1)
    assert all(torch.equal(before[name], t) for name, t in right.state_dict().items())


def test_noise_is_a_share_of_the_weights() -> None:
    right = model()
    plain, noisy = (upcycle(right, "copy", experts=4, noise=noise) for noise in (0.0, 0.1))
    for ours, theirs in zip(noisy.moe_layers, plain.moe_layers, strict=True):
        assert torch.equal(theirs.experts.gate_up[0], theirs.experts.gate_up[3])
        for name in ("gate_up", "down"):
            weight, changed = (getattr(layer.experts, name).detach() for layer in (theirs, ours))
            for e in range(4):
                share = float((changed[e] - weight[e]).norm() / weight[e].norm())
                assert 0.08 < share < 0.12
            assert not torch.allclose(changed[0] - weight[0], changed[1] - weight[1])


def test_the_seed_draws_the_routers() -> None:
    one, same, other = (upcycle(model(), "granular", seed=seed) for seed in (1, 1, 2))
    pairs = zip(one.moe_layers, same.moe_layers, other.moe_layers, strict=True)
    for a, b, c in pairs:
        assert torch.equal(a.router.weight, b.router.weight)
        assert not torch.equal(a.router.weight, c.router.weight)
    assert not torch.equal(one.moe_layers[0].router.weight, one.moe_layers[1].router.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Split.


@pytest.mark.parametrize("partition", ["coactivation", "weights", "random"])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_all_experts_of_a_split_are_the_dense_model(partition: Any, activation: str) -> None:
    right = model(activation=activation)
    text = None if partition != "coactivation" else tokens()
    made = upcycle(right, "split", experts=4, top_k=4, partition=partition, text_BS=text)
    assert difference(made, right) < 1e-13
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in right.parameters()) + 2 * 4 * 16
    # Every neuron stands in exactly one expert.
    for layer, ours in enumerate(made.moe_layers):
        rows = ffn_of(right, layer).gate_up.weight.view(-1, 24, 16)[0]
        found = ours.experts.gate_up.view(4, -1, 6, 16)[:, 0].flatten(0, 1)
        assert torch.equal(rows[rows[:, 0].argsort()], found[found[:, 0].argsort()])


def test_a_split_sums_the_chosen_experts_nearly_evenly() -> None:
    """Against the dense network with all but the chosen experts' neurons put out."""
    right = model()
    made = upcycle(right, "split", experts=4, top_k=2, text_BS=tokens(8))
    ffn, layer = ffn_of(right, 0), made.moe_layers[0]
    x_TD = torch.randn(50, 16, dtype=torch.float64)
    with torch.no_grad():
        y_TD, routing = layer(x_TD)
        up_EfD = layer.experts.gate_up[:, 6:]
        neurons_Ef = torch.stack([  # where each expert's neurons stood: by their up rows
            (up_EfD[e][:, None] - ffn.gate_up.weight[24:]).abs().sum(-1).argmin(1) for e in range(4)
        ])  # fmt: skip
        assert sorted(neurons_Ef.flatten().tolist()) == list(range(24))
        kept_TF = torch.zeros(50, 24, dtype=torch.float64)
        kept_TF.scatter_(1, neurons_Ef[routing.experts_TK].flatten(1), 1.0)
        h_TF = activate(ffn.gate_up(x_TD), "swiglu") * kept_TF
        right_TD = ffn.down(h_TF)
    assert float((y_TD - right_TD).norm() / right_TD.norm()) < 0.03
    assert len(routing.experts_TK.unique()) == 4


def test_the_fitted_router_beats_a_random_one() -> None:
    """On text that it has not seen: what the chosen experts leave out of the dense network's answer."""
    right, heard = model(width=32, ffn=48, layers=1), tokens(64, 32)
    torch.manual_seed(9)
    unseen = torch.randint(VOCAB, (16, 32))

    @torch.no_grad()
    def left_out(made: Decoder) -> float:
        whole, part = right.hidden_states(unseen)[0], made.hidden_states(unseen)[0]
        return float((whole - part).norm() / whole.norm())

    made = upcycle(right, "split", experts=8, top_k=4, text_BS=heard)
    fitted = left_out(made)
    with torch.no_grad():
        made.moe_layers[0].router.weight.normal_(0, 1e-3)
    assert fitted < 0.9 * left_out(made)


def test_a_router_ranks_experts_by_energy() -> None:
    torch.manual_seed(1)
    x_TD, planted_ED = torch.randn(400, 12), torch.randn(5, 12)
    energy_TE = (4 + x_TD @ planted_ED.mT).clamp_min(0) ** 2
    router_ED = fit_router(x_TD, energy_TE)
    fresh_TD = torch.randn(200, 12)
    right_T, found_T = ((fresh_TD @ r.mT).argmax(1) for r in (planted_ED, router_ED))
    assert float((right_T == found_T).float().mean()) > 0.9
    # Small, so that the chosen weights are nearly even.
    assert 0.005 < float((x_TD @ router_ED.mT).std(1).mean()) < 0.02


def test_a_router_is_fitted_where_an_expert_is_silent() -> None:
    energy_TE = torch.rand(50, 3)
    energy_TE[:, 1] = 0
    assert fit_router(torch.randn(50, 4), energy_TE).isfinite().all()


def test_assignment_by_hand() -> None:
    # Points 0, 1 and 2 all want cluster 0, which has room for two: 1 can do without least.
    cost_FE = torch.tensor([[0.2, 0.9], [0.1, 0.8], [0.3, 0.4], [0.9, 0.5]])
    assert balanced_assignment(cost_FE, 2).tolist() == [0, 0, 1, 1]
    same = torch.zeros(6, 3)  # all alike: still even
    assert balanced_assignment(same, 2).bincount().tolist() == [2, 2, 2]


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_even_and_find_what_was_planted(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    centres = torch.eye(4, 10) * torch.tensor([[1.0], [5.0], [0.1], [1.0]])  # by direction, whatever the size
    owner_F = torch.arange(4).repeat_interleave(6)[torch.randperm(24, generator=draw)]
    points_Fn = centres[owner_F] * (1 + 0.1 * torch.rand(24, 10, generator=draw))
    points_Fn += 0.02 * points_Fn.norm(dim=1, keepdim=True) * torch.randn(24, 10, generator=draw)
    parts = balanced_clusters(points_Fn, 4, draw)
    assert parts.shape == (4, 6)
    assert sorted(parts.flatten().tolist()) == list(range(24))
    # k-means may merge two groups and halve another; then no cluster is pure. Most are.
    pure = [len(set(owner_F[part].tolist())) == 1 for part in parts]
    assert sum(pure) >= 2


def test_coactivation_keeps_neurons_together_that_work_together() -> None:
    """Neurons of four groups, each of which listens to its own two of eight inputs, in a shuffled order."""
    right = model(width=16, ffn=32, layers=1, activation="relu")
    order_F = torch.randperm(32)
    group_F = torch.arange(4).repeat_interleave(8)[order_F]
    ffn = ffn_of(right, 0)
    with torch.no_grad():
        ffn.gate_up.weight.zero_()
        for neuron, group in enumerate(group_F.tolist()):
            ffn.gate_up.weight[neuron, group] = 1.0
    made = upcycle(right, "split", experts=4, top_k=2, text_BS=tokens(16))
    listens_Ef = made.moe_layers[0].experts.gate_up.argmax(-1)
    assert sum(len(set(row)) == 1 for row in listens_Ef.tolist()) >= 2


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of it.


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "mixtral"),
        ({"qk_norm": "head"}, "qwen3_moe"),
        ({"qk_norm": "full"}, "olmoe"),
        ({"activation": "relu"}, "handful"),
    ],
)
@pytest.mark.parametrize("method", ["copy", "granular", "split"])
def test_it_is_written_as_a_public_family(
    method: Any, changes: dict[str, Any], family: str, data: Data, tmp_path: Path
) -> None:
    right = model(torch.float32, ffn=32, **changes)
    right.tokenizer = data.tokenizer
    made = upcycle(right, method, experts=4, text_BS=tokens() if method == "split" else None)
    assert config_to_hf(made.config)["model_type"] == family
    save(made, tmp_path / "made")
    again = load(tmp_path / "made")
    assert isinstance(again, Decoder)
    assert again.tokenizer is not None
    assert again.tokenizer.fingerprint == data.tokenizer.fingerprint
    assert difference(again, made) == 0
    if family == "handful":
        found = report(right, made, None)
        assert (found.written_as, found.before.loss, found.after.bits_per_byte) == ("handful", None, None)
        assert found.why_not_public
    else:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(tokens()).logits, made(tokens())[0], rtol=1e-4, atol=1e-5)


def test_the_report_by_hand(data: Data) -> None:
    right = model(torch.float32)
    made = upcycle(right, "copy", experts=4, top_k=2)
    found = report(right, made, data, context=16, tokens=160)
    count = sum(p.numel() for p in right.parameters())
    ffn = 2 * 3 * 16 * 24  # of both layers
    assert (found.before.total_parameters, found.before.active_parameters) == (count, count)
    assert found.after.total_parameters == count + 3 * ffn + 2 * 4 * 16
    assert found.after.active_parameters == count + ffn + 2 * 4 * 16
    loss = evaluate(right, heldout_batches(data.heldout, 3, 16, 160))
    assert found.before.loss == pytest.approx(loss, rel=1e-6)
    assert found.after.loss == pytest.approx(loss, rel=1e-5)
    assert found.before.bits_per_byte == pytest.approx(
        loss / torch.log(torch.tensor(2.0)).item() / data.evaluated_bytes_per_token(16, 160), rel=1e-5
    )
    assert (found.written_as, found.why_not_public) == ("mixtral", None)
    with pytest.raises(DataError, match="one sequence of context 100000 needs"):
        report(right, made, data, context=100_000)


def test_bfloat16_stays_bfloat16() -> None:
    right = model(torch.bfloat16)
    for method in ("copy", "granular", "split"):
        made = upcycle(right, method, experts=4, text_BS=tokens() if method == "split" else None)
        assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    made = upcycle(right, "granular", experts=4, slices=4)
    assert torch.equal(made.moe_layers[0].experts.down[0], 4 * ffn_of(right, 0).down.weight[:, :6])


def test_progress_counts_the_layers() -> None:
    seen: list[tuple[int, int]] = []
    upcycle(model(), "copy", experts=4, progress=lambda *at: seen.append(at))
    upcycle(model(), "split", experts=4, text_BS=tokens(), progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)] * 2


def test_the_hooks_are_gone_afterwards() -> None:
    right = model()
    upcycle(right, "split", experts=4, text_BS=tokens())
    assert all(not ffn_of(right, i)._forward_pre_hooks for i in range(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "clone"}, "upcycle method = 'clone': one of copy, granular, split"),
        ({"experts": 1}, "upcycle experts = 1: at least 2"),
        ({"experts": 4, "top_k": 5}, "upcycle top_k = 5: from 1 to experts = 4"),
        ({"top_k": 0}, "upcycle top_k = 0: from 1 to experts = 8"),
        ({"top_k": 1}, "upcycle top_k = 1: at least 2: one expert's weight is always 1"),
        ({"slices": 2}, "upcycle slices = 2: for the method granular, not copy"),
        ({"method": "granular", "slices": 5}, "upcycle slices = 5: a divisor of the hidden width, 24"),
        ({"method": "granular", "slices": 1}, "upcycle slices = 1: at least 2"),
        ({"method": "split", "experts": 5}, "upcycle experts = 5: a divisor of the hidden width, 24"),
        ({"method": "split", "noise": 0.1}, "upcycle noise = 0.1: for the methods copy and granular, not split"),
        ({"noise": -1.0}, "upcycle noise = -1.0: at least 0"),
        ({"partition": "random"}, "upcycle partition = 'random': for the method split, not copy"),
        ({"method": "split", "partition": "luck"}, "upcycle partition = 'luck': one of coactivation, weights, random"),
        ({"method": "split"}, "upcycle text = None: tokens to fit the routers on"),
        ({"method": "split", "top_k": 8, "experts": 8}, "upcycle text = None: tokens to fit the routers on"),
    ],
)
def test_what_does_not_go_together(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        upcycle(model(), **arguments)
    assert str(caught.value).startswith(message)


def test_a_quantized_model_is_refused() -> None:
    packed = model(torch.float32, width=32, ffn=32)
    quantize_model(packed, bits=8)
    with pytest.raises(ConfigError, match=r"^upcycle model: its weights are quantized: load it without$"):
        upcycle(packed)


def test_an_moe_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^upcycle model: it is an MoE already; a dense model is needed$"):
        upcycle(Decoder(moe()))


def test_the_loss_of_a_split_rises_as_fewer_are_chosen() -> None:
    right = model(torch.float32)
    found = []
    for top_k in (4, 3, 1):
        made = upcycle(right, "split", experts=4, top_k=top_k, text_BS=tokens(8))
        with torch.no_grad():
            found.append(float(F.mse_loss(made(tokens())[0], right(tokens())[0])))
    assert found == sorted(found)
    assert found[0] < 1e-10
