"""The chunked loss is cross_entropy of a linear layer: its value and both of its gradients.

Legend: T tokens · D model width · V vocabulary
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from builders import distance
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from handful import loss as module
from handful.config import ModelConfig
from handful.errors import HandfulError
from handful.kernels import operations
from handful.kernels.extension import available
from handful.loss import linear_cross_entropy
from handful.model import Decoder

# Relative to the size of the values, on inputs of ordinary size.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def inputs(T: int, D: int, V: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=random, dtype=torch.float64).to(dtype)
    w_VD = torch.randn(V, D, generator=random, dtype=torch.float64).to(dtype)
    targets_T = torch.randint(V, (T,), generator=random)
    targets_T[0], targets_T[-1] = 0, V - 1  # the edges of the vocabulary
    return x_TD.requires_grad_(), w_VD.requires_grad_(), targets_T


def truth(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own loss and gradients, in float64."""
    x, w = x_TD.detach().double().requires_grad_(), w_VD.detach().double().requires_grad_()
    loss = F.cross_entropy(F.linear(x, w), targets_T)
    (loss * factor).backward()
    assert x.grad is not None
    assert w.grad is not None
    return loss.detach(), x.grad, w.grad


def error(out: Tensor | None, right: Tensor) -> float:
    assert out is not None
    return float((out.double() - right).norm() / right.norm().clamp_min(1e-30))


@given(
    T=st.integers(1, 40),
    D=st.integers(1, 17),
    V=st.integers(2, 50),
    chunk=st.integers(1, 600),
    factor=st.sampled_from([1.0, -0.5, 3.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_value_and_gradients_are_cross_entropys(
    T: int, D: int, V: int, chunk: int, factor: float, dtype: torch.dtype, seed: int
) -> None:
    x_TD, w_VD, targets_T = inputs(T, D, V, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        loss = linear_cross_entropy(x_TD, w_VD, targets_T)
    (loss * factor).backward()
    right, grad_x, grad_w = truth(x_TD, w_VD, targets_T, factor)
    assert loss.dtype == dtype
    # A loss next to nothing is the difference of two numbers of ordinary size: so is its error's.
    assert abs(loss.item() - float(right)) <= BOUNDS[dtype] * (1 + float(right))
    scale_x, scale_w = (abs(factor) * BOUNDS[dtype] * (1 + float(g.norm())) for g in (grad_x, grad_w))
    assert x_TD.grad is not None
    assert w_VD.grad is not None
    assert float((x_TD.grad.double() - grad_x).norm()) <= scale_x
    assert float((w_VD.grad.double() - grad_w).norm()) <= scale_w


@pytest.mark.parametrize("tokens_in_chunk", [1, 7, 10, 64])
def test_every_cut_into_chunks_counts_every_token_once(tokens_in_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, w_VD, targets_T = inputs(64, 8, 30)
    monkeypatch.setattr(module, "CHUNK", 30 * tokens_in_chunk)
    loss = linear_cross_entropy(x_TD, w_VD, targets_T)
    loss.backward()
    right, grad_x, grad_w = truth(x_TD, w_VD, targets_T)
    assert error(loss.detach(), right) < 1e-14
    assert error(x_TD.grad, grad_x) < 1e-13
    assert error(w_VD.grad, grad_w) < 1e-13


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast: bool) -> None:
    """Products in bfloat16, everything else in float32: the error is that of rounding x, w and the differences."""
    x_TD, w_VD, targets_T = inputs(300, 64, 200, torch.float32 if autocast else torch.bfloat16)
    right, grad_x, grad_w = truth(x_TD, w_VD, targets_T)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(x_TD, w_VD, targets_T)
    loss.backward()
    assert loss.dtype == torch.float32
    assert error(loss.detach(), right) < 1e-3
    for tensor, grad in ((x_TD, grad_x), (w_VD, grad_w)):
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        assert error(tensor.grad, grad) < BOUNDS[torch.bfloat16]
        along = float((tensor.grad.double() * grad).sum() / grad.square().sum())
        assert abs(along - 1) < 2e-3  # no bias in its length: the division by T is not rounded to bfloat16


def test_autocast_agrees_with_torchs_own() -> None:
    x_TD, w_VD, targets_T = inputs(128, 32, 100, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(x_TD, w_VD, targets_T)
        theirs = F.cross_entropy(F.linear(x_TD, w_VD).float(), targets_T)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)


def test_by_hand() -> None:
    """Two tokens, logits (0, ln 3) and (0, 0): probabilities 1/4, 3/4 and 1/2, 1/2."""
    x_TD = torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64, requires_grad=True)
    w_VD = torch.tensor([[0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(x_TD, w_VD, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-15)
    loss.backward()
    assert x_TD.grad is not None
    assert x_TD.grad.flatten().tolist() == pytest.approx([-1 / 8, 1 / 4], rel=1e-15)
    assert w_VD.grad is not None
    assert w_VD.grad.flatten().tolist() == pytest.approx([math.log(3) / 8, -math.log(3) / 8], rel=1e-15)


def test_large_logits_do_not_overflow() -> None:
    x_TD = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    w_VD = torch.tensor([[0.0], [1.0]], requires_grad=True)
    loss = linear_cross_entropy(x_TD, w_VD, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 1e4
    assert x_TD.grad is not None
    assert x_TD.grad.flatten().tolist() == [0.5, -0.5]


def test_one_input_may_be_frozen() -> None:
    for frozen in (0, 1):
        x_TD, w_VD, targets_T = inputs(9, 4, 7)
        _, *grads = truth(x_TD, w_VD, targets_T)
        pair = [x_TD, w_VD]
        pair[frozen].requires_grad_(False)
        linear_cross_entropy(x_TD, w_VD, targets_T).backward()
        assert pair[frozen].grad is None
        assert error(pair[1 - frozen].grad, grads[1 - frozen]) < 1e-13


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_computed(off: type[torch.no_grad], monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, w_VD, targets_T = inputs(20, 4, 7)
    right = truth(x_TD, w_VD, targets_T)[0]

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the gradient's product ran")

    monkeypatch.setattr(torch, "mm", forbidden)
    with off():
        loss = linear_cross_entropy(x_TD, w_VD, targets_T)
    assert not loss.requires_grad
    assert error(loss, right) < 1e-14


def test_no_double_backward() -> None:
    """A second derivative is refused, not silently wrong."""
    x_TD, w_VD, targets_T = inputs(5, 3, 4)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(x_TD, w_VD, targets_T) * scale
    (grad,) = torch.autograd.grad(loss, x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    x_TD, w_VD, targets_T = inputs(5, 3, 4)
    for wrong in (4, -1):
        targets_T[2] = wrong
        with pytest.raises((RuntimeError, IndexError)):
            linear_cross_entropy(x_TD, w_VD, targets_T)


def test_tied_embeddings_get_both_gradients() -> None:
    """The embedding is looked up and is the output layer: its gradient is the sum of the two."""
    config = ModelConfig(vocab=31, width=16, layers=1, heads=2, ffn=24, context=12)
    model = Decoder(config).double()
    tokens_BS, targets_BS = torch.randint(31, (3, 12)), torch.randint(31, (3, 12))
    x_BSD, _ = model.hidden_states(tokens_BS)
    linear_cross_entropy(x_BSD.flatten(0, 1), model.output_weight, targets_BS.flatten()).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logits_BSV, _ = model(tokens_BS)
    F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert error(ours[name], p.grad) < 1e-13, name
    # Neither part alone is the whole.
    head = model.embed.weight.detach().clone().requires_grad_()
    with torch.no_grad():
        x_BSD, _ = model.hidden_states(tokens_BS)
    linear_cross_entropy(x_BSD.flatten(0, 1), head, targets_BS.flatten()).backward()
    assert head.grad is not None
    assert model.embed.weight.grad is not None
    assert error(head.grad, model.embed.weight.grad) > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# The kernel.


@pytest.mark.skipif(not available(), reason="no kernels")
def test_a_chunk_s_loss_is_exact_where_probabilities_are_nothing() -> None:
    """A target that float32 gives no probability has its distance from the largest logit as its loss."""
    logits = torch.tensor([[0.0, 1000.0, 3.0], [5.0, 5.0, -2000.0]])
    targets = torch.tensor([0, 2])
    assert operations.softmax_loss(logits, targets) == pytest.approx(1000 + 2005 + math.log(2), rel=1e-6)
    assert distance(logits, torch.tensor([[-1, 1, 0], [0.5, 0.5, -1]])) < 1e-6
    for strange in (float("nan"), float("inf")):
        assert math.isnan(operations.softmax_loss(torch.tensor([[1.0, strange]]), torch.tensor([0])))
    assert operations.softmax_loss(torch.empty(0, 3), torch.empty(0, dtype=torch.long)) == 0


@pytest.mark.skipif(not available(), reason="no kernels")
@pytest.mark.parametrize("V", [1, 7, 8, 33, 1000])
def test_a_chunk_s_loss_and_gradient(V: int) -> None:
    logits, targets = 3 * torch.randn(70, V), torch.randint(V, (70,))
    exact = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, targets, reduction="sum")
    want.backward()
    assert exact.grad is not None
    got = operations.softmax_loss(logits, targets)
    assert got == pytest.approx(float(want.detach()), rel=1e-6, abs=1e-4)
    assert distance(logits, exact.grad) < 2e-6


@pytest.mark.skipif(not available(), reason="no kernels")
def test_a_chunk_that_does_not_fit_is_refused() -> None:
    logits, targets = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for wrong, line in (
        ((logits, torch.tensor([0, 1, 4])), r"^target 4: the vocabulary has 4$"),
        ((logits, torch.tensor([0, -1, 2])), r"^target -1: the vocabulary has 4$"),
        ((logits, targets[:2]), r"^targets are not int64, one for each token$"),
        ((logits, targets.int()), r"^targets are not int64, one for each token$"),
        ((logits.double(), targets), r"^logits are not a contiguous matrix"),
        ((logits.T, targets), r"^logits are not a contiguous matrix"),
    ):
        with pytest.raises(HandfulError, match=line):
            operations.softmax_loss(*wrong)
