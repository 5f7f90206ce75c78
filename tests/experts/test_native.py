"""The kernels are `reference`: in outputs and gradients, at every instruction level, for any threads and any memory.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · G = 2·F gate and up
rows (F without a gate) · I inputs, O outputs of a linear map
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import fresh
import levels
import pytest
import torch
from builders import ACTIVATIONS, Case, Result, activations, agree, case, cases, distance, routing_of, run
from hypothesis import given
from torch import Tensor, nn

from handful.attention import attend
from handful.config import Activation
from handful.errors import ConfigError, HandfulError, RoutingError
from handful.experts import Experts
from handful.experts.native import native
from handful.experts.weights import ExpertWeights
from handful.kernels.extension import available, exact_activations, gemv_max_tokens
from handful.kernels.operations import linear
from handful.machine import native_error
from handful.quantize import Packed, pack, unpack
from handful.routing import Routing

# tests/test_machine.py holds that the kernels are there wherever they can be.
if not available():
    pytest.skip(str(native_error()), allow_module_level=True)

ops: Any = torch.ops.handful

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
DTYPES = [F32, BF16]
# float32: sums of a few hundred terms. bfloat16: what test_experts.py grants `grouped`, for the same reasons.
BOUND = {F32: 5e-6, BF16: 1.2e-2}

LEVELS = levels.here()
# What every level must pass. The process of these tests runs at the highest.
CORE = [
    "test_shapes",
    "test_streaming",
    "test_linear",
    "test_tiles_of_any_width",
    "test_attention_of_many_tokens",
    "test_quantized_experts",
    "test_quantized_experts_stay_exact",
    "test_bytes_for_activations",
    "test_activations_are_exact_where_it_is_asked_for",
    "test_a_quantized_token_is_its_own",
    "test_quantized_tokens_of_any_size",
    "test_threads_change_no_bit",
    "test_a_nan_leaves_nothing_behind",
    "test_large_hidden_values",
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield torch.set_num_threads
    torch.set_num_threads(1)


def rounded(c: Case, dtype: torch.dtype) -> Case:
    """The same with everything that the kernels will see in `dtype` exact in it."""
    for t in (*c.experts.parameters(), c.x_TD, c.up_TD):
        t.data.copy_(t.data.to(dtype))
    return replace(c, routing=replace(c.routing, weights_TK=c.routing.weights_TK.to(F32).to(F64)))


def check(c: Case, dtype: torch.dtype) -> None:
    """Forward and backward, and the forward pass of inference."""
    c = rounded(c, dtype)
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    got = run(c.experts, "native", c.x_TD, c.routing, c.up_TD, dtype)
    assert got.y_TD.dtype == dtype
    assert distance(infer(c, dtype), want.y_TD) <= BOUND[dtype]
    if c.experts.activation == "relu" and dtype == BF16:  # its slope jumps at 0, where a rounding decides it
        got, want = replace(got, gradients={}), replace(want, gradients={})
    agree(got, want, BOUND[dtype])


def infer(c: Case, dtype: torch.dtype) -> Tensor:
    twin = layer(c, dtype)
    routing = replace(c.routing, weights_TK=c.routing.weights_TK.float())
    with torch.inference_mode():
        out: Tensor = twin(c.x_TD.to(dtype), routing)
    return out


def layer(c: Case, dtype: torch.dtype) -> Experts:
    """A copy of the case's experts."""
    experts, width, hidden = c.experts.down.shape[0], c.experts.down.shape[1], c.experts.down.shape[2]
    bias = c.experts.down_bias is not None
    twin = Experts(experts, width, hidden, activation=c.experts.activation, bias=bias, backend="native")
    twin.load_state_dict(c.experts.state_dict())
    return twin.to(dtype)


def same_bits(got: Result, want: Result) -> None:
    assert got.y_TD.equal(want.y_TD)
    for name, gradient in want.gradients.items():
        assert got.gradients[name].equal(gradient), name


# ---------------------------------------------------------------------------------------------------------------------
# native = reference.

# T, E, K, D, F, and what is special. Kernels cut rows by 96, tokens by 32 and by 256, sums by 256 or 512.
SHAPES: dict[str, tuple[tuple[int, int, int, int, int], dict[str, Any]]] = {
    "one of everything": ((1, 1, 1, 1, 1), {}),
    "one token": ((1, 5, 2, 19, 7), {}),
    "no tokens": ((0, 4, 2, 3, 4), {}),
    "no choices": ((3, 4, 0, 5, 4), {}),
    "odd sizes": ((45, 3, 2, 37, 51), {}),
    "whole vectors": ((64, 2, 1, 64, 32), {}),
    "idle experts": ((40, 16, 1, 20, 9), {"load": "skewed"}),
    "an odd load": ((15, 1, 1, 33, 17), {}),
    "beyond half a panel": ((17, 1, 1, 9, 33), {}),
    "beyond one group of panels": ((261, 3, 1, 21, 12), {"load": "one"}),
    "a wide sum in": ((21, 2, 1, 517, 5), {}),
    "a wide sum out": ((21, 2, 1, 6, 523), {}),
    "wider sums yet": ((10, 1, 1, 1030, 3), {}),
    "a long sum over tokens": ((1100, 2, 1, 5, 3), {"load": "one"}),
    "many rows": ((12, 2, 2, 99, 193), {}),
    "rows where they lie": ((190, 5, 2, 64, 160), {"load": "skewed"}),
    "half dropped": ((60, 4, 2, 18, 10), {"drop": 0.5}),
    "all dropped": ((6, 4, 2, 3, 4), {"drop": 1.1}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, dtype: torch.dtype) -> None:
    sizes, special = SHAPES[name]
    check(case(*sizes, bias=True, activation="swiglu", **special), dtype)
    check(case(*sizes, activation="gelu", seed=1, **special), dtype)


@given(cases(tokens=(0, 80), widths=(1, 70)))
def test_native_equals_reference(c: Case) -> None:
    check(c, F32)


@given(cases(tokens=(8, 80), widths=(16, 70)))
def test_native_equals_reference_in_bfloat16(c: Case) -> None:
    check(c, BF16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: Activation, dtype: torch.dtype) -> None:
    check(case(50, 3, 2, 24, 40, activation=activation, bias=True, drop=0.2), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_hidden_values(activation: Activation) -> None:
    """Hidden values of about ±20 and ±200, beyond gpt-oss's clamp, and of ±2e6, where e^x would overflow; there some
    gradients are 0, or nearly."""
    for scale in (20.0, 200.0):
        c = case(30, 2, 1, 8, 24, activation=activation)
        c.x_TD.mul_(scale)
        check(c, F32)
    c.x_TD.mul_(1e4)
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    got = run(c.experts, "native", c.x_TD, c.routing, c.up_TD, F32)
    for one, other in ((got.y_TD, want.y_TD), *((got.gradients[name], want.gradients[name]) for name in got.gradients)):
        assert float((one - other).norm()) <= BOUND[F32] * float(other.norm()) + 1e-20


def test_autocast() -> None:
    """bfloat16 products over float32 parameters, whose gradients stay float32."""
    c = case(40, 4, 2, 24, 40, bias=True, drop=0.1)
    want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD)
    with torch.autocast("cpu", BF16):
        got = run(c.experts, "native", c.x_TD, c.routing, c.up_TD, F32)
        assert infer(c, F32).dtype == BF16
    assert got.y_TD.dtype == BF16
    agree(got, want, BOUND[BF16])


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 128, 129])
def test_streaming(T: int, dtype: torch.dtype, activation: Activation) -> None:
    """Few tokens per expert meet the weights row by row; beside it, an expert with many."""
    some = [case(T, 1, 1, D, F, activation=activation, bias=T % 2 == 0) for D, F in ((19, 37), (128, 70), (9, 300))]
    mixed = case(T + 20, 3, 2, 21, 35, activation=activation, bias=True)
    chosen = [[0, 1] if t < T else [0, 0] for t in range(T + 20)]
    for c in (*some, replace(mixed, routing=routing_of(chosen, 3, mixed.routing.weights_TK))):
        exact = rounded(c, dtype)
        want = run(exact.experts, "reference", exact.x_TD, exact.routing, exact.up_TD).y_TD
        got = infer(exact, dtype)
        assert got.dtype == dtype
        assert float(((got - want).norm(dim=1) / want.norm(dim=1)).max()) <= 2 * BOUND[dtype]


def test_many_tokens_go_in_parts() -> None:
    """Without gradients about 16384 assignments are in memory at once."""
    c = case(9001, 2, 2, 3, 2, bias=True, drop=0.2)
    got, want = infer(c, F32), run(c.experts, "reference", c.x_TD, c.routing, c.up_TD).y_TD
    assert float((got - want).norm(dim=1).max() / want.norm(dim=1).mean()) < 1e-5
    for first in (0, 8189, 9000):
        some = slice(first, first + 5)
        assert c.routing.dropped_TK is not None
        part = replace(
            c,
            x_TD=c.x_TD[some],
            routing=routing_of(c.routing.experts_TK[some], 2, c.routing.weights_TK[some], c.routing.dropped_TK[some]),
        )
        assert distance(infer(part, F32), got[some]) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asked", ["x", "weights", "gate_up", "down_bias"])
def test_gradients_that_nobody_asked_for_change_no_other(asked: str, dtype: torch.dtype) -> None:
    c = rounded(case(40, 3, 2, 18, 20, bias=True, drop=0.1), dtype)
    want = run(c.experts, "native", c.x_TD, c.routing, c.up_TD, dtype)
    twin = layer(c, dtype)
    weights_TK = c.routing.weights_TK.float()
    inputs = {"x": c.x_TD.to(dtype), "weights": weights_TK, **dict(twin.named_parameters())}
    for name, value in inputs.items():
        value.requires_grad_(name == asked)
    y_TD = twin(inputs["x"], replace(c.routing, weights_TK=weights_TK))
    y_TD.backward(c.up_TD.to(dtype))
    assert y_TD.equal(want.y_TD)
    for name, value in inputs.items():
        assert (value.grad is not None) is (name == asked)
    grad = inputs[asked].grad
    assert grad is not None
    assert grad.equal(want.gradients[asked])


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    c = case(5, 3, 2, 18, 20)
    twin = layer(c, F32).requires_grad_(False)
    y_TD = twin(c.x_TD.float(), replace(c.routing, weights_TK=c.routing.weights_TK.float()))
    assert not y_TD.requires_grad
    assert y_TD.equal(infer(c, F32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    c = case(160, 4, 2, 130, 110, bias=True, load="skewed", drop=0.1)
    few = replace(c, x_TD=c.x_TD[:3], routing=routing_of(c.routing.experts_TK[:3], 4, c.routing.weights_TK[:3]))
    packed = pack(c.experts.gate_up[0], 4, 32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        assert torch.get_num_threads() == count
        both = run(c.experts, "native", c.x_TD, c.routing, c.up_TD, dtype)
        others = [infer(c, dtype), infer(few, dtype)]
        others += [linear(c.x_TD[:some].to(dtype), packed) for some in (3, 160)]
        results.append((both, others))
    for both, others in results[1:]:
        same_bits(both, results[0][0])
        for got, want in zip(others, results[0][1], strict=True):
            assert got.equal(want)


# ---------------------------------------------------------------------------------------------------------------------
# One linear map, and quantized weights.


def packings(weight: Tensor) -> dict[str, Tensor | Packed]:
    return {f"{bits} bits by {group}": pack(weight, bits, group) for bits in (8, 4) for group in (32, 128)}


@pytest.mark.parametrize(
    "kind", ["float32", "bfloat16", "8 bits by 32", "8 bits by 128", "4 bits by 32", "4 bits by 128"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(kind: str, dtype: torch.dtype) -> None:
    """Vectors of quantized weights that stream are rounded too, to 16 bits: 1 / 65534 of the largest."""
    quantized = kind.endswith(("32", "128")) and " " in kind
    for I, O in ((1, 1), (100, 97), (300, 18), (1100, 5)):  # noqa: E741
        weight = torch.randn(O, I)
        given = packings(weight)[kind] if quantized else weight.to(getattr(torch, kind))
        exact = unpack(given, F64) if isinstance(given, Packed) else given.to(F64)
        for T in (0, 1, 2, 3, 8, 9, 16, 17, 40, 130):
            x_TI = torch.randn(T, I).to(dtype)
            bias = torch.randn(O).to(dtype) if T % 2 else None
            want = x_TI.to(F64) @ exact.T + (0 if bias is None else bias.to(F64))
            got = linear(x_TI, given, bias)
            assert got.dtype == dtype
            bound = 1.2e-2 if dtype == BF16 else 1e-3 if quantized else BOUND[F32]
            assert distance(got, want) <= bound, (I, O, T)


def test_linear_takes_any_leading_sizes() -> None:
    x, weight = torch.randn(2, 3, 5), torch.randn(5, 4).T
    want = x @ weight.T
    assert distance(linear(x, weight), want) < 1e-6
    assert distance(linear(x[0].T.contiguous().T, weight), want[0]) < 1e-6
    assert linear(x[:0], weight).shape == (0, 3, 4)
    with pytest.raises(ConfigError, match=r"^linear was given x of width 5: its weight takes 9$"):
        linear(x, pack(torch.randn(4, 9)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_quantized_experts(bits: int, group: int, activation: Activation) -> None:
    for T, D, F in ((1, 40, 70), (4, 130, 33), (40, 70, 140), (60, 300, 10)):
        c = case(T, 3, 2, D, F, activation=activation, bias=T > 1, drop=0.1)
        gate_up, down = (pack(w.float(), bits, group) for w in (c.experts.gate_up, c.experts.down))
        with torch.no_grad():
            c.experts.gate_up.copy_(unpack(gate_up, F64))
            c.experts.down.copy_(unpack(down, F64))
        twin = layer(c, F32).requires_grad_(False)
        for dtype in DTYPES:
            c.x_TD.copy_(c.x_TD.to(dtype))
            want = run(c.experts, "reference", c.x_TD, c.routing, c.up_TD).y_TD
            weights = ExpertWeights.packed(gate_up, down, twin.gate_up_bias, twin.down_bias, activation)
            got = native(c.x_TD.to(dtype), c.routing, weights)
            assert got.dtype == dtype
            assert distance(got, want) <= (1e-3 if dtype == F32 else BOUND[BF16]), (T, dtype)


def tokens_like(kind: str, T: int, D: int) -> Tensor:
    """Tokens whose values are hard to round: of heavy tails, or a few that are most of the token."""
    x_TD = torch.randn(T, D)
    if kind == "heavy tails":
        x_TD /= (torch.randn(3, T, D).square().sum(0) / 3).sqrt()  # Student's t with 3 degrees of freedom
    if kind == "an outlier":
        x_TD[:, D // 3] *= 100
    if kind == "an outlier in every group":
        x_TD[:, 5::32] *= 100
    return x_TD.to(BF16)


def silu_layer(x_TD: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    """One expert's output in float64."""
    gate_TF, up_TF = (x_TD.double() @ unpack(gate_up, F64)[0].T).chunk(2, dim=1)
    out_TD: Tensor = nn.functional.silu(gate_TF) * up_TF @ unpack(down, F64)[0].T
    return out_TD


def one_expert(x_TD: Tensor, gate_up: Packed, down: Packed) -> Tensor:
    T = len(x_TD)
    routing = routing_of([[0]] * T, 1, torch.ones(T, 1))
    return native(x_TD, routing, ExpertWeights.packed(gate_up, down, None, None, "swiglu"))


def packed_expert(D: int, F: int, bits: int, group: int) -> tuple[Packed, Packed]:
    return (
        pack(torch.randn(1, 2 * F, D) / D**0.5, bits, group),
        pack(torch.randn(1, D, F) / F**0.5, bits, group),
    )


@pytest.fixture
def exact() -> Iterator[None]:
    """Activations keep more than 8 bits."""
    with activations(exact=True):
        yield


KINDS = ["normal", "heavy tails", "an outlier", "an outlier in every group"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 128), (4, 32), (4, 128)])
def test_quantized_experts_stay_exact(bits: int, group: int, kind: str, exact: None) -> None:
    """With many tokens bfloat16 x may be made bytes, five for four values."""
    for D, F in ((64, 64), (300, 70), (1024, 200)):
        gate_up, down = packed_expert(D, F, bits, group)
        x_TD = tokens_like(kind, 40, D)
        bound = 7.5e-3 if kind == "normal" else 9e-3
        assert distance(one_expert(x_TD, gate_up, down), silu_layer(x_TD, gate_up, down)) <= bound, (D, F)
        few = x_TD[:5]
        assert distance(one_expert(few, gate_up, down), silu_layer(few, gate_up, down)) <= 4e-3, (D, F)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 128), (4, 32), (4, 128)])
def test_bytes_for_activations(bits: int, group: int, kind: str, tokens: int) -> None:
    """A byte for a value: a layer is off by 1.5e-2 at most, of few tokens and of many; a token that would be off by
    more has its coarsest groups twice, or two bytes for each value."""
    assert not exact_activations()
    errors = []
    for D, F in ((64, 64), (300, 70), (1024, 200)):
        gate_up, down = packed_expert(D, F, bits, group)
        x_TD = tokens_like(kind, tokens, D)
        errors.append(distance(one_expert(x_TD, gate_up, down), silu_layer(x_TD, gate_up, down)))
    assert max(errors) <= 1.5e-2, errors


def test_activations_are_exact_where_it_is_asked_for(exact: None) -> None:
    gate_up, down = packed_expert(512, 128, 8, 32)
    x_TD = tokens_like("normal", 3, 512)
    got = one_expert(x_TD, gate_up, down)
    with activations(exact=False):
        rounded = one_expert(x_TD, gate_up, down)
    want = silu_layer(x_TD, gate_up, down)
    assert distance(got, want) <= 4e-3 < distance(rounded, want)
    float32 = one_expert(x_TD.float(), gate_up, down)  # always exact
    assert distance(float32, want) <= 2e-4
    code = "from handful.kernels.extension import exact_activations as on; print(on())"
    for asked, told in (("1", "True"), ("0", "False"), ("", "False"), ("yes", "HANDFUL_EXACT_ACTIVATIONS = 'yes'")):
        done = fresh.python("-c", code, env={**os.environ, "HANDFUL_EXACT_ACTIVATIONS": asked})
        assert told in done.stdout + done.stderr, asked


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_token_is_its_own(bits: int) -> None:
    """Its bits do not depend on the others, and what is wrong in it does not reach them."""
    D, F = 610, 97
    gate_up, down = packed_expert(D, F, bits, 32)
    matrix = Packed(gate_up.codes[0], gate_up.scales[0], bits, 32, D)
    x_TD = tokens_like("normal", 40, D)
    plain_TD, plain_TO = one_expert(x_TD, gate_up, down), linear(x_TD, matrix)
    some = gemv_max_tokens() + 1
    assert one_expert(x_TD[:some], gate_up, down).equal(plain_TD[:some])
    assert linear(x_TD[:some], matrix).equal(plain_TO[:some])
    strange_TD = x_TD.clone()
    strange_TD[2, 7] = 1e4  # most of its token: some of it is multiplied twice
    strange_TD[11, 600] = math.nan
    strange_TD[20, 0] = math.inf
    strange_TD[33] = 0
    rest = [t for t in range(40) if t not in (2, 11, 20, 33)]
    for got, plain in ((one_expert(strange_TD, gate_up, down), plain_TD), (linear(strange_TD, matrix), plain_TO)):
        assert got[rest].equal(plain[rest])
        assert not got[[11, 20]].isfinite().any()
        assert got[2].isfinite().all()
        assert (got[33] == 0).all()
    turned = list(range(39, -1, -1))
    assert one_expert(strange_TD[turned], gate_up, down)[turned][rest].equal(plain_TD[rest])


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_tokens_of_any_size(bits: int) -> None:
    """From beyond what squares in float32 hold to next to nothing, in one batch; and groups far below their token's."""
    packed = pack(torch.randn(40, 130), bits)
    x_TI = tokens_like("normal", 12, 130)
    x_TI *= torch.logspace(-28, 30, 12).to(BF16).unsqueeze(1)
    x_TI[5, 32:64] *= 1e-20
    got, want = linear(x_TI, packed).double(), x_TI.double() @ unpack(packed, F64).T
    assert float(((got - want).norm(dim=1) / want.norm(dim=1)).max()) <= 1.1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Memory.


def shifted(t: Tensor) -> Tensor:
    """A contiguous copy that starts one element after an aligned address."""
    copy = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    return copy.copy_(t.detach())


def raw_arguments(c: Case, dtype: torch.dtype) -> dict[str, Any]:
    """What torch.ops.handful.experts is called with."""
    e = layer(c, dtype).requires_grad_(False)
    return {
        "x": c.x_TD.to(dtype).contiguous(),
        "experts": c.routing.experts_TK,
        "weights": c.routing.weights_TK.float(),
        "dropped": c.routing.dropped_TK,
        "gate_up": e.gate_up.data,
        "down": e.down.data,
        "gate_up_bias": None if e.gate_up_bias is None else e.gate_up_bias.data,
        "down_bias": None if e.down_bias is None else e.down_bias.data,
        "activation": e.activation,
        "bf16": dtype == BF16,
    }


def backward_arguments(forward: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    first = {name: value for name, value in forward.items() if name not in ("activation", "bf16")}
    return {
        "grad_y": torch.ones_like(forward["x"]),
        **first,
        "kept": kept,
        "activation": forward["activation"],
        "bf16": forward["bf16"],
        "for_x": True,
        "for_parameters": True,
    }


def quantized_arguments(c: Case, bits: int = 4, group: int = 32) -> dict[str, Any]:
    forward = raw_arguments(c, F32)
    gate_up, down = pack(forward["gate_up"], bits, group), pack(forward["down"], bits, group)
    return {
        **{name: forward[name] for name in ("x", "experts", "weights", "dropped")},
        "gate_up": gate_up.codes,
        "gate_up_scales": gate_up.scales,
        "down": down.codes,
        "down_scales": down.scales,
        **{name: forward[name] for name in ("gate_up_bias", "down_bias", "activation")},
        "hidden": down.inputs,
        "bits": bits,
        "group": group,
        "bf16": False,
    }


def moved(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: shifted(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [3, 50])
def test_alignment_changes_no_bit(T: int, dtype: torch.dtype) -> None:
    c = case(T, 3, 2, 37, 21, bias=True, drop=0.2)
    forward = raw_arguments(c, dtype)
    assert ops.experts(**moved(forward)).equal(ops.experts(**forward))
    y_TD, kept = ops.experts_forward(**forward)
    moved_y_TD, moved_kept = ops.experts_forward(**moved(forward))
    assert moved_y_TD.equal(y_TD)
    want = ops.experts_backward(**backward_arguments(forward, kept))
    got = ops.experts_backward(**moved(backward_arguments(forward, moved_kept)))
    for one, other in zip(got, want, strict=True):
        assert one.equal(other)
    for bits in (8, 4):
        quantized = quantized_arguments(c, bits)
        assert ops.experts_quantized(**moved(quantized)).equal(ops.experts_quantized(**quantized))


def strided(t: Tensor) -> Tensor:
    """The same values with the last two sizes swapped in memory, or with gaps."""
    if t.dim() >= 2 and min(t.shape[-2:]) > 1:
        return t.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.stack([t.detach(), t.detach()], dim=-1)[..., 0]


def test_strides_change_no_bit() -> None:
    c = case(20, 3, 2, 12, 10, bias=True, drop=0.2)
    assert c.routing.dropped_TK is not None
    want = run(c.experts, "native", c.x_TD, c.routing, c.up_TD, F32)
    twin = layer(c, F32)
    for name, value in list(twin.named_parameters()):
        setattr(twin, name, nn.Parameter(strided(value)))
        assert not getattr(twin, name).is_contiguous()
    x_TD = strided(c.x_TD.float()).requires_grad_()
    weights_TK = strided(c.routing.weights_TK.float()).requires_grad_()
    routing = Routing(
        c.routing.logits_TE,
        c.routing.scores_TE,
        strided(c.routing.experts_TK),
        weights_TK,
        strided(c.routing.dropped_TK),
    )
    y_TD = twin(x_TD, routing)
    y_TD.backward(strided(c.up_TD.float()))
    inputs = {"x": x_TD, "weights": weights_TK, **dict(twin.named_parameters())}
    gradients = {name: value.grad for name, value in inputs.items() if value.grad is not None}
    same_bits(Result(y_TD.detach(), gradients), want)


def test_a_gradient_that_is_one_number_everywhere() -> None:
    """What .sum() gives: a view of one number with strides of 0."""
    c = case(20, 3, 2, 12, 10)
    want = run(c.experts, "native", c.x_TD, c.routing, torch.ones_like(c.up_TD), F32)
    twin = layer(c, F32)
    twin(c.x_TD.float(), replace(c.routing, weights_TK=c.routing.weights_TK.float())).sum().backward()
    assert twin.gate_up.grad is not None
    assert twin.gate_up.grad.equal(want.gradients["gate_up"])


# ---------------------------------------------------------------------------------------------------------------------
# NaN.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [1, 12])
def test_nan_in_an_expert_stays_with_its_tokens(copies: int, dtype: torch.dtype) -> None:
    """Streaming (1 copy of the tokens), and in tiles."""
    c = case(6 * copies, 4, 2, 20, 9, bias=True)
    routing = routing_of([[0, 1], [1, 0], [2, 3], [3, 2], [2, 1], [1, 3]] * copies, 4, c.routing.weights_TK)
    c = replace(c, routing=routing)
    clean = run(c.experts, "native", c.x_TD, routing, c.up_TD, dtype), infer(c, dtype)
    packed = quantized_arguments(c)
    clean_packed = ops.experts_quantized(**packed)
    with torch.no_grad():
        for parameter in c.experts.parameters():
            parameter[0] = math.nan  # used by tokens 0 and 1 of each copy
    uses_T = (routing.experts_TK == 0).any(1)
    packed["gate_up_scales"][0, 3, 0] = math.nan
    for got, want in (
        (run(c.experts, "native", c.x_TD, routing, c.up_TD, dtype).y_TD, clean[0].y_TD),
        (infer(c, dtype), clean[1]),
        (ops.experts_quantized(**packed), clean_packed),
    ):
        assert got[uses_T].isnan().all()
        assert got[~uses_T].equal(want[~uses_T])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_that_is_not_finite_stays_alone_with_quantized_weights(bits: int, bad: float) -> None:
    weight = pack(torch.randn(20, 70), bits, 32)
    for T in (5, 40):
        x_TI = torch.randn(T, 70)
        clean = linear(x_TI, weight)
        x_TI[3, 69] = bad
        got = linear(x_TI, weight)
        assert not got[3].isfinite().any()
        others = torch.arange(T) != 3
        assert got[others].equal(clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_leaves_nothing_behind(dtype: torch.dtype) -> None:
    """Scratch memory is used again, and not cleared: what it held must meet no sum, not even times zero."""
    bad = case(64, 2, 2, 40, 40, bias=True)
    bad.x_TD.fill_(math.nan)
    for T in (1, 7, 15, 17, 31, 33):
        c = case(T, 2, 1, 40, 41, load="one")
        want = run(c.experts, "native", c.x_TD, c.routing, c.up_TD, dtype), infer(c, dtype)
        assert run(bad.experts, "native", bad.x_TD, bad.routing, bad.up_TD, dtype).gradients["gate_up"].isnan().all()
        assert infer(bad, dtype).isnan().all()
        assert infer(c, dtype).equal(want[1])
        same_bits(run(c.experts, "native", c.x_TD, c.routing, c.up_TD, dtype), want[0])


# ---------------------------------------------------------------------------------------------------------------------
# What torch must know of the operations.


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, while it traces
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool) -> None:
    c = case(40, 3, 2, 12, 10, bias=True)
    twin = layer(c, F32)

    def both(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, scores_TE: Tensor) -> Tensor:
        y_TD: Tensor = twin(x_TD + 1, Routing(scores_TE, scores_TE, experts_TK, weights_TK))
        return 2 * y_TD

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for T in (40, 23):
        results = []
        for function in (both, compiled):
            twin.zero_grad()
            x_TD = c.x_TD[:T].float().requires_grad_()
            weights_TK = c.routing.weights_TK[:T].float().requires_grad_()
            y_TD = function(x_TD, weights_TK, c.routing.experts_TK[:T], c.routing.scores_TE[:T].float())
            y_TD.backward(c.up_TD[:T].float())
            leaves = {"x": x_TD, "weights": weights_TK, **dict(twin.named_parameters())}
            gradients = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
            assert len(gradients) == 6
            results.append(Result(y_TD.detach(), gradients))
        same_bits(*results)


def opcheck(op: Any, arguments: dict[str, Any]) -> None:
    assert set(torch.library.opcheck(op.default, (), arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_is_told_the_truth(dtype: torch.dtype) -> None:
    # 31 tokens of one expert: every hidden value that is kept is a token's, or follows from zeros.
    c = case(31, 1, 1, 12, 10, bias=True)
    arguments = raw_arguments(c, dtype)
    for name in ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias"):
        arguments[name].requires_grad_()
    opcheck(ops.experts_forward, arguments)
    arguments = raw_arguments(case(9, 3, 2, 12, 10, drop=0.3), dtype)
    opcheck(ops.experts, arguments)


def test_torch_is_told_the_truth_of_the_others() -> None:
    c = case(9, 3, 2, 12, 10, bias=True)
    forward = raw_arguments(c, F32)
    opcheck(ops.experts_backward, backward_arguments(forward, ops.experts_forward(**forward)[1]))
    opcheck(ops.experts_quantized, quantized_arguments(c))
    maps = {"weights": [torch.randn(4, 5)], "scales": [], "biases": [torch.randn(4)], "bits": 0, "group": 0}
    opcheck(ops.linears, {"x": torch.randn(3, 5), **maps})
    packed = pack(torch.randn(4, 5))
    maps = {"weights": [packed.codes], "scales": [packed.scales], "biases": [], "bits": 4, "group": packed.group}
    opcheck(ops.linears, {"x": torch.randn(3, 5), **maps})


def test_there_is_no_second_derivative() -> None:
    c = case(6, 3, 2, 12, 10)
    x_TD = c.x_TD.float().requires_grad_()
    y_TD = layer(c, F32)(x_TD, replace(c.routing, weights_TK=c.routing.weights_TK.float()))
    (grad_TD,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad_TD.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes.


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("T", [2, 50, 20000])
@pytest.mark.parametrize("wrong", [-1, 4, 2**40, -(2**63)])
def test_an_expert_that_does_not_exist(wrong: int, T: int, keep: bool) -> None:
    """In the last token: also where tokens go in parts."""
    experts = Experts(4, 3, 5, backend="native").requires_grad_(keep)
    routing = routing_of([[0]] * (T - 1) + [[wrong]], 4, torch.ones(T, 1))
    with pytest.raises(RoutingError, match=rf"^routing names expert {wrong}: there are 4, counted from 0$"):
        experts(torch.randn(T, 3), routing)
    gate_up, down = pack(experts.gate_up), pack(experts.down)
    with pytest.raises(RoutingError, match=rf"^routing names expert {wrong}: there are 4, counted from 0$"):
        native(torch.randn(T, 3), routing, ExpertWeights.packed(gate_up, down, None, None, "swiglu"))


@pytest.mark.parametrize(("x", "weights"), [(F64, F64), (F64, F32), (F32, F64), (torch.float16, torch.float16)])
def test_other_dtypes(x: torch.dtype, weights: torch.dtype) -> None:
    experts = Experts(4, 3, 5, backend="native").to(weights)
    names = [str(dtype).removeprefix("torch.") for dtype in (x, weights)]
    with pytest.raises(
        ConfigError,
        match=rf"^experts backend 'native' was given x of {names[0]} on cpu and weights of {names[1]} on cpu: "
        r"it takes float32 and bfloat16 on cpu$",
    ):
        experts(torch.zeros(2, 3, dtype=x), routing_of([[0], [1]], 4, torch.ones(2, 1)))


def wrong_tensors(t: Tensor) -> dict[str, Tensor]:
    """Of another shape, layout or type than `t`."""
    wrong = {
        "one row more": torch.cat([t, t[:1]]),
        "one row less": t[1:],
        "one column more": torch.cat([t, t[..., :1]], dim=-1),
        "one column less": t[..., 1:].contiguous(),
        "one dimension more": t[None],
        "one dimension less": t.flatten(-2) if t.dim() > 1 else t[0],
        "a number": t.flatten()[0],
        "nothing": t.flatten()[:0],
        "half": torch.zeros(t.shape, dtype=torch.float16),
        "int32": torch.zeros(t.shape, dtype=torch.int32),
        "complex": torch.zeros(t.shape, dtype=torch.complex64),
    }
    if t.dim() > 1:
        wrong["strided"] = strided(t)
    return wrong


def refuse(op: Any, arguments: dict[str, Any], name: str, value: Any, names: tuple[str, ...], what: str) -> None:
    """Refused, and the first line names the argument, or one that it does not fit."""
    with pytest.raises(RuntimeError) as caught:
        op(**{**arguments, name: value})
    line = str(caught.value).splitlines()[0]
    assert any(known in line for known in names), (name, what, line)


def refuse_all(op: Any, arguments: dict[str, Any], others: dict[str, list[Any]]) -> None:
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        for what, wrong in wrong_tensors(value).items():
            refuse(op, arguments, name, wrong, tuple(tensors), what)
    for name, values in others.items():
        for value in values:
            refuse(op, arguments, name, value, (name, *tensors), str(value))
    op(**arguments)  # which is right


@pytest.mark.parametrize("op", [ops.experts, ops.experts_forward], ids=str)
def test_experts_refuse_what_does_not_fit(op: Any) -> None:
    arguments = raw_arguments(case(9, 3, 2, 12, 10, bias=True, drop=0.3), F32)
    refuse_all(op, arguments, {"activation": ["", "silu", "gelu"]})


def test_experts_backward_refuses_what_does_not_fit() -> None:
    forward = raw_arguments(case(9, 3, 2, 12, 10, bias=True, drop=0.3), F32)
    arguments = backward_arguments(forward, ops.experts_forward(**forward)[1])
    others: dict[str, list[Any]] = {"activation": ["", "relu"], "bf16": [True], "kept": [torch.zeros(0, 20, 32)]}
    refuse_all(ops.experts_backward, arguments, others)
    outside = {**arguments, "experts": arguments["experts"] + 1}
    with pytest.raises(RuntimeError, match="routing names expert 3: there are 3"):
        ops.experts_backward(**outside)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_experts_refuse_what_does_not_fit(bits: int) -> None:
    arguments = quantized_arguments(case(9, 3, 2, 12, 10, bias=True, drop=0.3), bits)
    refuse_all(
        ops.experts_quantized,
        arguments,
        {
            "activation": ["", "relu"],
            "hidden": [-1, 0, 9, 11, 2**31, 2**62, 2**63 - 1],
            "bits": [0, 12 - bits, 16, -8],
            "group": [0, -32, 64, 128, 2**40],
        },
    )


def one_linear(
    x: Tensor, weight: Tensor, bias: Tensor, scales: Tensor | None = None, bits: int = 0, group: int = 0
) -> list[Tensor]:
    found: list[Tensor] = ops.linears(x, [weight], [] if scales is None else [scales], [bias], bits, group)
    return found


def test_linears_refuse_what_does_not_fit() -> None:
    arguments = {"x": torch.randn(3, 5), "weight": torch.randn(4, 5), "bias": torch.randn(4)}
    for name in ("x", "weight", "bias"):
        for what, wrong in wrong_tensors(arguments[name]).items():
            if (name, what) not in {("x", "one row more"), ("x", "one row less")}:  # other tokens, and right
                refuse(one_linear, arguments, name, wrong, tuple(arguments), what)
    for bits in (8, 4):
        packed = pack(torch.randn(4, 5), bits)
        more = {"x": arguments["x"], "weight": packed.codes, "scales": packed.scales, "bias": arguments["bias"]}
        more |= {"bits": bits, "group": 32}  # type: ignore[dict-item]
        for name in ("weight", "scales", "bias"):
            for what, wrong in wrong_tensors(more[name]).items():
                refuse(one_linear, more, name, wrong, ("weight", "bias"), what)
        for name, values in {"bits": [0, 12 - bits, 3], "group": [0, 64, 128, -32]}.items():
            for value in values:
                refuse(one_linear, more, name, value, (name, "weight"), str(value))
    x, weight = arguments["x"], arguments["weight"]
    lists: dict[str, tuple[list[Tensor], list[Tensor]]] = {
        "no weight": ([], []),
        "scales and biases are not of all weights": ([weight, weight], [arguments["bias"]]),
        "weights are not of one dtype": ([weight, weight.bfloat16()], []),
    }
    for line, (weights, biases) in lists.items():
        with pytest.raises(RuntimeError, match=line):
            ops.linears(x, weights, [], biases, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Other levels, each in a process of its own: the choice is made once.


def python(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    return fresh.python(*arguments, env={**os.environ, "HANDFUL_ISA": isa})


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_lower_levels(level: str) -> None:
    tests = [f"{__file__}::{name}" for name in CORE]
    # Captured in Python alone: what a sanitizer says before it ends the process must come through.
    done = python("-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", *tests, isa=level)
    assert done.returncode == 0, done.stdout + done.stderr


CODES = """
import hashlib
import torch
from handful.kernels.operations import linear
from handful.quantize import pack

torch.manual_seed(0)
x = torch.randn(65, 640).bfloat16()
x[3, 5] = 300  # one number is most of this token, so that it has groups twice
packed = [pack(torch.randn(rows, 640), bits, group) for bits in (8, 4) for group in (32, 128) for rows in (33, 96)]
made = torch.cat([linear(x, matrix).flatten() for matrix in packed])
print(hashlib.sha256(made.view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def test_codes_and_bytes_have_the_same_bits_at_every_level() -> None:
    """Whole numbers, and float sums in one order."""
    done = [python("-c", CODES, isa=level) for level in LEVELS]
    assert len({(run.returncode, run.stdout) for run in done}) == 1, done
    assert done[0].returncode == 0, done[0].stderr


WITHOUT = """
import torch
from handful.errors import HandfulError
from handful.experts import Experts
from handful.routing import Routing

scores_TE = torch.full((2, 4), 0.25)
routing = Routing(scores_TE, scores_TE, torch.tensor([[0], [3]]), torch.ones(2, 1))
experts = Experts(4, 3, 5, backend="native")
try:
    experts(torch.ones(2, 3), routing)
except HandfulError as error:
    print(error)
auto, grouped = (Experts(4, 3, 5, backend=name) for name in ("auto", "grouped"))
grouped.load_state_dict(auto.state_dict())
print(auto(torch.ones(2, 3), routing).equal(grouped(torch.ones(2, 3), routing)))
"""


def test_without_the_kernels() -> None:
    done = python("-c", WITHOUT, isa="none")
    assert done.stdout.splitlines() == ["experts backend 'native': switched off by HANDFUL_ISA = 'none'", "True"]


def test_what_the_kernels_cannot_take_goes_to_grouped() -> None:
    c = case(6, 3, 2, 4, 5)
    want = run(c.experts, "grouped", c.x_TD, c.routing, c.up_TD)
    same_bits(run(c.experts, "auto", c.x_TD, c.routing, c.up_TD), want)
    float32 = [run(c.experts, name, c.x_TD, c.routing, c.up_TD, F32) for name in ("auto", "native")]
    same_bits(*float32)
    with pytest.raises(HandfulError, match="float64 on cpu"):
        run(c.experts, "native", c.x_TD, c.routing, c.up_TD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1056, 1057])
def test_tiles_of_any_width(width: int, dtype: torch.dtype) -> None:
    """With rows that are multiplied where they lie, and with packed ones: a token's bits do not depend on how many
    others there are, whatever the registers hold of them at a time."""
    weight, bias = torch.randn(103, width).to(dtype), torch.randn(103).to(dtype)
    x_TI = torch.randn(520, width).to(dtype)
    whole = linear(x_TI, weight, bias)
    assert distance(whole, x_TI.to(F64) @ weight.to(F64).T + bias.to(F64)) <= BOUND[dtype]
    for T in (17, 24, 25, 33, 40, 48, 49, 57, 64, 65, 72, 80, 97, 130, 257):
        assert linear(x_TI[:T], weight, bias).equal(whole[:T]), T


# B, H, J, S, P, width of keys, of values, window.
ATTENTIONS = {
    "one of everything": (1, 1, 1, 1, 1, 1, 1, 0),
    "whole blocks": (1, 2, 2, 96, 96, 64, 96, 0),
    "grouped queries": (2, 6, 2, 130, 130, 32, 48, 0),
    "a past": (1, 8, 2, 70, 300, 128, 128, 0),
    "odd sizes": (2, 3, 1, 101, 117, 33, 257, 0),
    "a window": (1, 4, 4, 300, 330, 40, 24, 50),
    "a window of one": (1, 2, 1, 40, 200, 16, 8, 1),
    "a window wider than all": (1, 2, 2, 40, 40, 16, 16, 90),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_of_many_tokens(name: str, dtype: torch.dtype) -> None:
    B, H, J, S, P, key_width, value_width, window = ATTENTIONS[name]
    q_BHSd = (2 * torch.randn(B, S, H, key_width)).to(dtype).transpose(1, 2)
    # As they lie in a cache with room for more, which may hold anything.
    widths = key_width, value_width
    k_BJPd, v_BJPv = (torch.full((B, J, P + 3, width), math.nan, dtype=dtype)[:, :, :P] for width in widths)
    k_BJPd.normal_()
    v_BJPv.normal_()
    behind_SP = torch.arange(P - S, P)[:, None] - torch.arange(P)
    mask = (behind_SP >= 0) & (behind_SP < (window or P))
    for sinks_H in (None, torch.randn(H)):
        q, k, v = (t.to(F64).repeat_interleave(H // t.shape[1], 1) for t in (q_BHSd, k_BJPd, v_BJPv))
        want = attend(q, k, v, mask, 0.3, None if sinks_H is None else sinks_H.to(F64)).transpose(1, 2).flatten(2)
        got = ops.prefill_attention(q_BHSd, k_BJPd, v_BJPv, sinks_H, 0.3, window)
        assert got.dtype == dtype
        assert distance(got, want) <= (4e-3 if dtype == BF16 else BOUND[F32])
        # In chunks, as a long prompt comes: the same bits.
        if S > 1:
            ends = [P - S + S // 3, P]
            chunks = [
                ops.prefill_attention(chunk, k_BJPd[:, :, :end], v_BJPv[:, :, :end], sinks_H, 0.3, window)
                for chunk, end in zip(q_BHSd.split([S // 3, S - S // 3], dim=2), ends, strict=True)
            ]
            assert torch.cat(chunks, dim=1).equal(got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_many_tokens_at_the_edges(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    q, k, v = (torch.randn(2, 2, 200, 32).to(dtype) for _ in range(3))
    whole = ops.prefill_attention(q, k, v, None, 1.0, 0)
    threads(3)
    assert ops.prefill_attention(q, k, v, None, 1.0, 0).equal(whole)
    # Scores of thousands, of which one is all of the softmax.
    large = ops.prefill_attention(1000 * q, 10 * k, v, None, 1.0, 0)
    best = (q.to(F64) @ k.to(F64).transpose(2, 3)).masked_fill(
        ~torch.ones(200, 200, dtype=torch.bool).tril(), -math.inf
    )
    assert (
        large - v.gather(2, best.argmax(-1, keepdim=True).expand_as(v)).transpose(1, 2).flatten(2)
    ).abs().median() == 0
    assert large.isfinite().all()
    # What is wrong with one token stays with it.
    bad = q.clone()
    bad[0, 1, 7] = math.nan
    marked = ops.prefill_attention(bad, k, v, None, 1.0, 0)
    assert marked[0, 7, 32:].isnan().all()
    marked[0, 7, 32:] = whole[0, 7, 32:]
    assert marked.equal(whole)
    assert ops.prefill_attention(q[:, :, :0], k, v, None, 1.0, 0).shape == (2, 0, 64)
    assert ops.prefill_attention(q[:0], k[:0], v[:0], None, 1.0, 0).shape == (0, 200, 64)


def test_attention_of_many_tokens_refuses_what_does_not_fit() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "sinks": torch.randn(4), "scale": 1.0, "window": 0}
    for name, values in {
        "q": [q[0], q[:1], q[..., 1:], q[:, 1:], q.half(), q.to(BF16), q.transpose(2, 3), torch.randn(2, 4, 10, 8)],
        "k": [k[0], k[:1], k[..., 1:], k[:, :, 1:], k[:, :0], k.half(), k.to(BF16), k.transpose(2, 3)],
        "v": [v[0], v[:1], v[:, :1], v[:, :, 1:], v.half(), v.to(BF16), v.transpose(2, 3), v[..., :0]],
        "sinks": [arguments["sinks"][1:], arguments["sinks"].to(F64), torch.randn(4, 1), torch.randn(8)[::2]],
        "window": [-1],
    }.items():
        for value in values:
            refuse(ops.prefill_attention, arguments, name, value, ("q is", "k is", "v is", "sinks", "window ="), name)
    ops.prefill_attention(**arguments)
