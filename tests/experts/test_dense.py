"""A dense network in training, and of many tokens, is one expert by the kernels: outputs and gradients are those of the
formula, and what a user does to its matrices is honoured.

Legend: T tokens · D model width · F hidden width
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from builders import ACTIVATIONS, F64, distance
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from handful.config import Activation
from handful.experts import FeedForward, Linear
from handful.kernels.extension import ROUTER_KERNEL_MAX_TOKENS, available, native_max_tokens

if not available():
    pytest.skip("without the kernels there is one way alone", allow_module_level=True)

# The module, and not the function of its name.
native_module: Any = importlib.import_module("handful.experts.native")

# As in test_native.py.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 1.2e-2}


def passed(network: FeedForward, x: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x and of what requires one."""
    x = x.detach().requires_grad_()
    network.zero_grad()
    y = network(x)
    y.backward(up)
    assert x.grad is not None
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def is_one_operation(network: FeedForward, x: Tensor) -> bool:
    """Whether the graph of its output has the kernels' node and no product of torch's."""
    seen, left = set[str](), [network(x).grad_fn]
    while left:
        node = left.pop()
        if node is not None and node.name() not in seen:
            seen.add(node.name())
            left += [following for following, _ in node.next_functions]
    ours = any("handful" in name.lower() for name in seen)
    assert ours is not any("mm" in name.lower() for name in seen), seen
    return ours


@given(
    tokens=st.integers(0, 70),
    width=st.integers(1, 40),
    hidden=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_shapes(tokens: int, width: int, hidden: int, activation: Activation) -> None:
    exact = FeedForward(width, hidden, activation).to(F64)
    x_TD, up_TD = torch.randn(tokens, width, dtype=F64), torch.randn(tokens, width, dtype=F64)
    want = passed(exact, x_TD, up_TD)
    got = passed(copy.deepcopy(exact).float(), x_TD.float(), up_TD.float())
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape
        assert distance(got[name], want[name]) < BOUND[torch.float32], name


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_autocast(activation: Activation) -> None:
    """Products in bfloat16 give an output in it; weights stay float32, and so do their gradients."""
    network = FeedForward(24, 40, activation)
    for value in network.parameters():
        value.data.copy_(value.data.bfloat16())
    x, up = torch.randn(3, 17, 24).bfloat16().float(), torch.randn(3, 17, 24).bfloat16().float()
    want = passed(copy.deepcopy(network).to(F64), x.double(), up.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert is_one_operation(network, x)
        got = passed(network, x, up.bfloat16())
    assert got["y"].dtype == torch.bfloat16
    for name in want:
        assert name == "y" or got[name].dtype == torch.float32
        assert distance(got[name], want[name]) < BOUND[torch.bfloat16], name


def test_one_operation_where_gradients_are_asked_for() -> None:
    network, x = FeedForward(8, 12), torch.randn(2, 5, 8)
    assert is_one_operation(network, x)
    network.requires_grad_(False)
    assert network(x).grad_fn is None
    assert is_one_operation(network, x.requires_grad_())
    assert passed(network, x, torch.ones_like(x)).keys() == {"y", "x"}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that networks were given to."""
    names: list[str] = []
    real = native_module._call

    def spy(operation: Any, *given: Any) -> Any:
        names.append(str(operation).rpartition(".")[2])
        return real(operation, *given)

    monkeypatch.setattr(native_module, "_call", spy)
    return names


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_many_tokens_without_gradients(activation: Activation, dtype: torch.dtype, called: list[str]) -> None:
    """They are the formula, and each has the same bits among any number of others that is more than a few."""
    network, x_TD = FeedForward(40, 72, activation).to(dtype), torch.randn(150, 40).to(dtype)
    want = copy.deepcopy(network).to(F64)(x_TD.double()).detach()
    ours = dtype == torch.float32 or native_max_tokens(dtype) is None
    with torch.inference_mode():
        for count in (ROUTER_KERNEL_MAX_TOKENS + 1, 64, 150):
            got = network(x_TD[:count])
            assert got.dtype == dtype
            assert distance(got, want[:count]) < BOUND[dtype]
            if ours:
                assert got.equal(network(x_TD)[:count])
        assert called == ["experts"] * (6 if ours else 0)
        called.clear()
        assert distance(network(x_TD[:ROUTER_KERNEL_MAX_TOKENS]), want[:ROUTER_KERNEL_MAX_TOKENS]) < BOUND[dtype]
        assert called == []


def test_other_dtypes_are_torchs() -> None:
    assert not is_one_operation(FeedForward(8, 12).double(), torch.randn(5, 8, dtype=F64))
    with pytest.raises(RuntimeError, match="dtype"):
        FeedForward(8, 12)(torch.randn(5, 8).bfloat16())
    with pytest.raises(RuntimeError, match="shape"):
        FeedForward(8, 12)(torch.randn(5, 9))


class Doubled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _replaced(network: FeedForward) -> None:
    network.down = Doubled(12, 8, bias=False)


def _hooked(network: FeedForward) -> None:
    network.gate_up.register_forward_hook(lambda module, given, made: made * 2)


def _watched(network: FeedForward) -> None:
    network.down.register_full_backward_hook(lambda module, given, got: None)


def _biased(network: FeedForward) -> None:
    network.gate_up.bias = nn.Parameter(torch.ones(24))


@pytest.mark.parametrize("change", [_replaced, _hooked, _watched, _biased])
def test_what_a_user_does_to_its_matrices_is_honoured(change: Any) -> None:
    torch.manual_seed(0)
    network, x = FeedForward(8, 12), torch.randn(5, 8)
    change(network)
    assert not is_one_operation(network, x)
    for some in (x, torch.randn(50, 8)):
        with torch.no_grad():  # its body
            want = network.down(nn.functional.silu((h := network.gate_up(some))[:, :12]) * h[:, 12:])
            assert distance(network(some), want) < 1e-6


def test_a_forward_that_is_replaced_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = FeedForward(8, 12), torch.randn(50, 8)
    seen, real = list[Linear](), Linear.forward

    def noted(self: Linear, x: Tensor) -> Tensor:
        seen.append(self)
        return real(self, x)

    monkeypatch.setattr(Linear, "forward", noted)
    with torch.no_grad():
        network(x)
    network(x)
    assert seen == [network.gate_up, network.down] * 2


def test_what_the_backward_pass_needs_is_kept_apart() -> None:
    """Of networks whose forward passes came one after another, in memory that was used before."""
    networks, xs = [FeedForward(16, 300) for _ in range(3)], [torch.randn(400, 16) for _ in range(3)]
    want = [passed(network, x, x) for network, x in zip(networks, xs, strict=True)]
    for network in networks:
        network.zero_grad()
    made = [network(x.requires_grad_()) for network, x in zip(networks, xs, strict=True)]
    for y, x, network, right in reversed([*zip(made, xs, networks, want, strict=True)]):
        y.backward(x.detach())
        assert y.equal(right["y"])
        assert network.down.weight.grad is not None
        assert network.down.weight.grad.equal(right["down.weight"])
