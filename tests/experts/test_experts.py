"""`reference` is the formula; `grouped` is `reference`, in its output and in every gradient, in every layout.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from builders import ACTIVATIONS, Case, agree, case, cases, distance, routing_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from handful.config import Activation
from handful.errors import RoutingError
from handful.experts import Experts, FeedForward, activate
from handful.kernels.extension import available
from handful.routing import Routing

# The module, and not the function of its name.
grouped_module: Any = importlib.import_module("handful.experts.grouped")

F64 = torch.float64
BACKENDS = [*(["native"] if available() else []), "grouped", "reference"]
EXACT = {"native": torch.float32, "grouped": F64, "reference": F64}  # the widest that each computes in
# ---------------------------------------------------------------------------------------------------------------------
# The truth.


def test_activations_by_hand() -> None:
    phi = 0.8413447460685429  # of the standard normal, at 1
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=F64)
    assert activate(x, "relu").tolist() == [0, 0, 1]
    assert activate(x, "gelu").tolist() == pytest.approx([phi - 1, 0, phi], rel=1e-12)
    pair = torch.tensor([1.0, -1.0, 3.0, 5.0], dtype=F64)  # gates 1 and -1, ups 3 and 5
    silu = 0.7310585786300049  # of 1: 1 / (1 + 1/e)
    assert activate(pair, "swiglu").tolist() == pytest.approx([3 * silu, 5 * (silu - 1)], rel=1e-12)
    assert activate(pair, "geglu").tolist() == pytest.approx([3 * phi, 5 * (phi - 1)], rel=1e-12)
    # gpt-oss: gates 10 and -10 become 7 and stay; ups 9 and -9 become 7 and -7.
    clamped = activate(torch.tensor([10.0, -10.0, 9.0, -9.0], dtype=F64), "swiglu_clamped").tolist()
    high, low = 7 / (1 + math.exp(-1.702 * 7)), -10 / (1 + math.exp(17.02))
    assert clamped == pytest.approx([high * 8, low * -6], rel=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation: Activation, bias: bool) -> None:
    """y_t = Σ_k w_tk · (down_e · act(gate_up_e · x_t + b_e) + c_e), token after token, choice after choice."""
    c = case(7, 4, 2, 3, 5, activation=activation, bias=bias, drop=0.3)
    got = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD).y_TD
    assert c.routing.dropped_TK is not None
    for t in range(7):
        want_D = torch.zeros(3, dtype=F64)
        for k in range(2):
            e = int(c.routing.experts_TK[t, k])
            if c.routing.dropped_TK[t, k]:
                continue
            _, _, first, second = c.experts.weights.expert(e, torch.float64)
            hidden = c.experts.gate_up[e].detach() @ c.x_TD[t] + (0 if first is None else first.detach())
            out_D = c.experts.down[e].detach() @ activate(hidden, activation) + (
                0 if second is None else second.detach()
            )
            want_D += c.routing.weights_TK[t, k] * out_D
        assert distance(got[t], want_D) < 1e-14


def test_feed_forward_is_the_formula() -> None:
    dense = FeedForward(3, 4, "geglu").to(F64)
    x_BSD = torch.randn(2, 5, 3, dtype=F64)
    gate, up = (x_BSD @ dense.gate_up.weight.T).chunk(2, -1)
    assert distance(dense(x_BSD), (nn.functional.gelu(gate) * up) @ dense.down.weight.T) < 1e-14
    assert FeedForward(3, 4, "relu").gate_up.weight.shape == (4, 3)


# ---------------------------------------------------------------------------------------------------------------------
# grouped = reference.


@settings(max_examples=100)
@given(cases())
def test_grouped_equals_reference(c: Case) -> None:
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    agree(run(c.experts, "grouped", c.x_TD, c.routing, c.up_TD), want, 1e-12)


@settings(max_examples=40)
@given(cases(tokens=(1, 20), widths=(4, 12)))
def test_grouped_equals_reference_in_float32(c: Case) -> None:
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    agree(run(c.experts, "grouped", c.x_TD, c.routing, c.up_TD, torch.float32), want, 1e-5)


@settings(max_examples=40)
@given(cases(tokens=(8, 80), widths=(16, 40)))
def test_grouped_in_bfloat16(c: Case) -> None:
    """Against float64 on the same, already rounded inputs. bfloat16 rounds by at most 2^-9 = 0.2 %; a value meets about
    six roundings on its way out and ten on its way back, independent of each other: √10 · 0.2 % = 0.6 %. The bound
    leaves a factor of two for sums in which terms cancel. relu's slope jumps at 0, where a rounding decides it: of
    relu the output alone is compared."""
    for t in (*c.experts.parameters(), c.x_TD, c.up_TD):
        t.data.copy_(t.data.to(torch.bfloat16))
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    got = run(c.experts, "grouped", c.x_TD, c.routing, c.up_TD, torch.bfloat16)
    assert got.y_TD.dtype == torch.bfloat16
    if c.experts.activation == "relu":
        got, want = replace(got, gradients={}), replace(want, gradients={})
    agree(got, want, 1.2e-2)


def test_sums_over_experts_are_in_float32() -> None:
    """300 experts that each give 1: a sum kept in bfloat16, which has no 257, would stay at 256."""
    E = 300
    ones = torch.ones(1, E, dtype=torch.bfloat16)
    for backend in BACKENDS:
        experts = Experts(E, 1, 1, activation="relu", backend=backend).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.fill_(1.0)
        x_TD = ones[:, :1].clone().requires_grad_()
        y_TD = experts(x_TD, routing_of([list(range(E))], E, ones.float()))
        assert y_TD.tolist() == [[300]]
        if backend != "reference":
            y_TD.sum().backward()
            assert x_TD.grad is not None
            assert x_TD.grad.tolist() == [[300]]


# T, E, K, D, F, and what is special.
SHAPES: dict[str, tuple[tuple[int, int, int, int, int], dict[str, Any]]] = {
    "one token": ((1, 5, 2, 3, 4), {}),
    "one expert": ((9, 1, 1, 3, 4), {}),
    "one of everything": ((1, 1, 1, 1, 1), {}),
    "all experts chosen": ((9, 5, 5, 3, 4), {}),
    "all on one expert": ((9, 5, 1, 3, 4), {"load": "one"}),
    "odd sizes": ((13, 7, 3, 5, 11), {}),
    "skewed": ((40, 8, 2, 4, 4), {"load": "skewed"}),
    "empty experts": ((3, 16, 1, 4, 4), {}),
    "no tokens": ((0, 4, 2, 3, 4), {}),
    "half dropped": ((30, 4, 2, 3, 4), {"drop": 0.5}),
    "all dropped": ((6, 4, 2, 3, 4), {"drop": 1.1}),
    "strided x": ((12, 4, 2, 3, 4), {"strided": True}),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_corners(name: str, bias: bool) -> None:
    sizes, special = SHAPES[name]
    c = case(*sizes, bias=bias, **special)
    if name == "strided x":
        assert not c.x_TD.is_contiguous()
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    agree(run(c.experts, "grouped", c.x_TD, c.routing, c.up_TD), want, 1e-12)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("load", ["even", "skewed", "one"])
def test_every_depth_gives_the_same(load: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the plain loop (0) through batch and tail together to the plain batch (the largest count), and beyond."""
    c = case(60, 5, 2, 16, 16, bias=True, load=load, drop=0.1)
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    lay_out = grouped_module.lay_out
    highest = int(c.routing.plan().counts_E.max())
    for depth in (0, 1, 8, highest // 2, highest - 1, highest, highest + 3):
        monkeypatch.setattr(grouped_module, "lay_out", partial(lay_out, depth=depth))
        layout = grouped_module.lay_out(c.routing, dtype)
        assert layout.depth == depth
        assert bool(layout.tail) == (depth < highest)
        agree(run(c.experts, "grouped", c.x_TD, c.routing, c.up_TD, dtype), want, 1e-12 if dtype == F64 else 1.2e-2)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 2, 4]),
)
def test_the_depth_chosen_is_the_cheapest(counts: list[int], dtype: torch.dtype, grid: int) -> None:
    def cost(depth: int) -> float:
        tail = [math.ceil((count - depth) / grid) * grid for count in counts if count > depth]
        start, row = int(grouped_module.TAIL_START), float(grouped_module.TAIL_ROW.get(dtype, 1.0))
        return len(counts) * depth + len(tail) * start + row * sum(tail)

    depth = grouped_module.choose_depth(torch.tensor(counts), dtype, grid)
    assert cost(depth) == min(cost(d) for d in range(0, max(counts) + grid, grid))


@pytest.mark.parametrize("name", ["all experts chosen", "all on one expert", "skewed", "half dropped", "no tokens"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layout_for_grouped_mm_gives_the_same(name: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's layout and products; `grouped_mm` also runs on a CPU, in float32, where rows are multiples of 16 bytes."""
    (T, E, K, _, _), special = SHAPES[name]
    c = case(T, E, K, 8, 12, bias=bias, **special)
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    laid_out = []

    def sorted_instead(routing: Routing, dtype: torch.dtype) -> Any:
        laid_out.append(grouped_module.lay_out_sorted(routing))
        return laid_out[-1]

    monkeypatch.setattr(grouped_module, "lay_out", sorted_instead)
    agree(run(c.experts, "grouped", c.x_TD, c.routing, c.up_TD, torch.float32), want, 1e-5)
    assert len(laid_out) == 1


def test_idle_experts_get_no_gradient_from_a_kernel_that_leaves_it_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some GPUs' grouped_mm leaves whatever memory held where a sum has no terms."""
    kernel = torch.nn.functional.grouped_mm

    def careless(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        out = kernel(a, b, offs=offs)
        if b.dim() == 2:  # one sum per expert
            out[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = math.nan
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", careless)
    monkeypatch.setattr(grouped_module, "lay_out", lambda routing, dtype: grouped_module.lay_out_sorted(routing))
    c = case(9, 6, 2, 8, 12, load="one")
    gradients = run(c.experts, "grouped", c.x_TD, c.routing, c.up_TD, torch.float32).gradients
    for name in ("gate_up", "down"):
        assert gradients[name][:4].count_nonzero() == 0
        assert gradients[name][4:].isfinite().all()


@pytest.mark.parametrize(
    ("device", "width", "hidden", "dtype", "has"),
    [
        ("cuda", 8, 8, torch.bfloat16, True),
        ("cuda", 4, 4, torch.float32, True),
        ("cuda", 4, 8, torch.bfloat16, False),
        ("cuda", 8, 6, torch.float32, False),
        ("cuda", 8, 8, F64, False),
        ("cpu", 8, 8, torch.float32, False),
    ],
)
def test_which_experts_the_cuda_kernel_takes(
    device: str, width: int, hidden: int, dtype: torch.dtype, has: bool
) -> None:
    """Rows must be multiples of 16 bytes, and float64 is not among its dtypes: `grouped_mm` itself is asked."""
    assert grouped_module.has_kernel(Experts(2, width, hidden).weights, device, dtype) is has
    a, offsets = torch.zeros(3, hidden, dtype=dtype), torch.tensor([1, 3], dtype=torch.int32)
    w = torch.zeros(2, hidden, width, dtype=dtype)
    if device == "cuda" and not has:
        with pytest.raises(RuntimeError, match=r"multiple of 16 bytes|Expected mat_a to be"):
            torch.nn.functional.grouped_mm(a, w, offs=offsets)
    else:
        torch.nn.functional.grouped_mm(a, w, offs=offsets)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: Activation) -> None:
    """grouped's own backward against finite differences, every input and parameter."""
    c = case(4, 3, 2, 3, 2, activation=activation, bias=True, drop=0.3)
    names = [name for name, _ in c.experts.named_parameters()]

    def layer(x_TD: Tensor, weights_TK: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        out: Tensor = torch.func.functional_call(c.experts, named, (x_TD, replace(c.routing, weights_TK=weights_TK)))
        return out

    inputs = [t.detach().requires_grad_() for t in (c.x_TD, c.routing.weights_TK, *c.experts.parameters())]
    assert torch.autograd.gradcheck(layer, inputs)


def test_gradients_that_nobody_asked_for_are_not_needed() -> None:
    c = case(6, 3, 2, 3, 4, bias=True)
    c.experts.requires_grad_(False)
    x_TD = c.x_TD.clone().requires_grad_()
    c.experts(x_TD, c.routing).backward(c.up_TD)
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    assert x_TD.grad is not None
    assert distance(x_TD.grad, want.gradients["x"]) < 1e-12
    with torch.inference_mode():
        assert distance(c.experts(c.x_TD, c.routing), want.y_TD) < 1e-12


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients() -> None:
    c = case(40, 4, 2, 16, 16, bias=True)
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    experts = c.experts.float()
    x_TD = c.x_TD.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = experts(x_TD, replace(c.routing, weights_TK=c.routing.weights_TK.float()))
    assert y_TD.dtype == torch.bfloat16
    assert distance(y_TD, want.y_TD) < 1.2e-2
    y_TD.backward(c.up_TD.to(torch.bfloat16))
    for name, parameter in (("x", x_TD), *experts.named_parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert distance(parameter.grad, want.gradients[name]) < 1.2e-2, name


# ---------------------------------------------------------------------------------------------------------------------
# What is not chosen has no part in it.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_no_assignments_no_gradient(backend: str, dtype: torch.dtype | None) -> None:
    weights_TK = torch.rand(5, 2, dtype=F64)
    routing = routing_of([[0, 2], [2, 0], [0, 2], [4, 2], [2, 4]], 6, weights_TK)  # not 1, 3, 5
    c = case(5, 6, 2, 4, 4, bias=True)
    gradients = run(c.experts, backend, c.x_TD, routing, c.up_TD, dtype or EXACT[backend]).gradients
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        for e in (1, 3, 5):
            assert gradients[name][e].count_nonzero() == 0
        for e in (0, 2, 4):
            assert gradients[name][e].count_nonzero() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_assignments_have_no_part(backend: str) -> None:
    dropped = [[0, 1], [1, 1], [0, 0], [0, 1]]
    c = case(4, 4, 2, 3, 5, bias=True)
    chosen = [[0, 1], [2, 3], [1, 0], [0, 3]]  # 3 is chosen and dropped each time
    routing = routing_of(chosen, 4, c.routing.weights_TK, dropped)
    got = run(c.experts, backend, c.x_TD, routing, c.up_TD, EXACT[backend])
    assert got.y_TD[1].count_nonzero() == 0
    assert got.gradients["x"][1].count_nonzero() == 0
    assert got.gradients["weights"][torch.tensor(dropped).bool()].count_nonzero() == 0
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        assert got.gradients[name][2:].count_nonzero() == 0
    # What they would have been, and what they weigh, changes no bit; nor does NaN.
    weights_TK = c.routing.weights_TK.masked_fill(torch.tensor(dropped).bool(), math.nan)
    again = routing_of([[0, 2], [0, 1], [1, 0], [0, 2]], 4, weights_TK, dropped)
    other = run(c.experts, backend, c.x_TD, again, c.up_TD, EXACT[backend])
    assert other.y_TD.equal(got.y_TD)
    for name, gradient in got.gradients.items():
        assert other.gradients[name].equal(gradient), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["loop", "batch", "both", "chosen"])
def test_nan_in_a_token_stays_with_its_experts(backend: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = {"loop": 0, "batch": 4, "both": 2, "chosen": None}[layout]
    monkeypatch.setattr(grouped_module, "lay_out", partial(grouped_module.lay_out, depth=depth))
    c = case(6, 4, 2, 3, 5, bias=True)
    routing = routing_of([[0, 1], [1, 0], [2, 3], [3, 2], [0, 1], [0, 3]], 4, c.routing.weights_TK)
    clean = run(c.experts, backend, c.x_TD, routing, c.up_TD, EXACT[backend])
    x_TD, up_TD = c.x_TD.clone(), c.up_TD.clone()
    x_TD[1] = math.nan  # routed to 0 and 1
    up_TD[1] = math.nan
    got = run(c.experts, backend, x_TD, routing, up_TD, EXACT[backend])
    others = [0, 2, 3, 4, 5]
    assert got.y_TD[1].isnan().all()
    assert distance(got.y_TD[others], clean.y_TD[others]) < 1e-14
    for name in ("x", "weights"):
        assert distance(got.gradients[name][others], clean.gradients[name][others]) < 1e-14
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        assert got.gradients[name][:2].isnan().any()
        assert distance(got.gradients[name][2:], clean.gradients[name][2:]) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_an_expert_stays_with_its_tokens(backend: str) -> None:
    c = case(6, 4, 2, 3, 5, bias=True)
    routing = routing_of([[0, 1], [1, 0], [2, 3], [3, 2], [2, 1], [1, 3]], 4, c.routing.weights_TK)
    clean = run(c.experts, backend, c.x_TD, routing, c.up_TD, EXACT[backend])
    with torch.no_grad():
        for parameter in c.experts.parameters():
            parameter[0] = math.nan  # used by tokens 0 and 1
    got = run(c.experts, backend, c.x_TD, routing, c.up_TD, EXACT[backend])
    assert got.y_TD[:2].isnan().all()
    assert distance(got.y_TD[2:], clean.y_TD[2:]) < 1e-14
    assert distance(got.gradients["x"][2:], clean.gradients["x"][2:]) < 1e-14
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        assert distance(got.gradients[name][1:], clean.gradients[name][1:]) < 1e-14, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_named_twice_counts_twice(backend: str) -> None:
    c = case(3, 2, 2, 3, 4)
    twice = routing_of([[0, 0], [1, 1], [0, 1]], 2, torch.full((3, 2), 0.5, dtype=F64))
    once = routing_of([[0], [1], [0]], 2, torch.ones(3, 1, dtype=F64))
    got = run(c.experts, backend, c.x_TD, twice, c.up_TD, EXACT[backend]).y_TD
    want = run(c.experts, backend, c.x_TD, once, c.up_TD, EXACT[backend]).y_TD
    assert distance(got[:2], want[:2]) < 1e-14


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_expert_that_does_not_exist(backend: str, wrong: int) -> None:
    experts = Experts(4, 3, 5, backend=backend)
    with pytest.raises(RoutingError, match=rf"^routing names expert {wrong}: there are 4, counted from 0$"):
        experts(torch.randn(2, 3), routing_of([[0, 1], [wrong, 2]], 4, torch.ones(2, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x_TD", "routing", "message"),
    [
        (torch.zeros(2, 5), (2, 4), r"^experts were given x of shape \(2, 5\): it must be \(tokens, 3\)$"),
        (torch.zeros(1, 2, 3), (2, 4), r"^experts were given x of shape \(1, 2, 3\): it must be \(tokens, 3\)$"),
        (torch.zeros(3, 3), (2, 4), r"^routing is for 2 tokens and 4 experts: there are 3 and 4$"),
        (torch.zeros(2, 3), (2, 5), r"^routing is for 2 tokens and 5 experts: there are 2 and 4$"),
    ],
)
def test_shapes_that_do_not_fit(backend: str, x_TD: Tensor, routing: tuple[int, int], message: str) -> None:
    tokens, count = routing
    experts = Experts(4, 3, 5, backend=backend)
    with pytest.raises(RoutingError, match=message):
        experts(x_TD, routing_of([[0]] * tokens, count, torch.ones(tokens, 1)))
