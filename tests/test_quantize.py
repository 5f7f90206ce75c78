"""The packed bytes are what the format says; quantised experts, layers and models are the same maths on the unpacked
weights; the report counts every byte.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · O outputs · I inputs
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import dense, moe
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from handful import quantize
from handful.config import Activation, ModelConfig
from handful.engine import Sampling, generate_tokens
from handful.errors import ConfigError, HandfulError, RoutingError
from handful.experts import Experts
from handful.experts.native import available
from handful.experts.quantized import (
    PackedWeight,
    QuantizationReport,
    QuantizedExperts,
    QuantizedLinear,
    quantize_model,
)
from handful.experts.reference import reference
from handful.model import Decoder
from handful.quantize import Packed, error, pack, unpack
from handful.routing import Routing
from handful.train import evaluate

F64, BF16 = torch.float64, torch.bfloat16
ACTIVATIONS: Sequence[Activation] = get_args(Activation)
FORMATS = [(4, 32), (4, 128), (8, 32), (8, 128)]
LARGEST = {8: 127, 4: 7}
KERNELS = 2e-4  # what the native kernels may be off by in float32, relative to the size of the values


def distance(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖; where nothing is wanted, nothing may come."""
    assert got.shape == want.shape
    got, want = got.detach().to(F64), want.detach().to(F64)
    size, off = float(want.norm()), float((got - want).norm())
    return off / size if size else (0.0 if off == 0 else math.inf)


def same(a: Packed, b: Packed) -> bool:
    forms = [(packed.bits, packed.group, packed.inputs) for packed in (a, b)]
    return a.codes.equal(b.codes) and a.scales.equal(b.scales) and forms[0] == forms[1]


# ---------------------------------------------------------------------------------------------------------------------
# The format, by hand.


def test_eight_bits_by_hand() -> None:
    """A scale of 1, ties to the even number, and 59 columns of padding whose second group is no group at all."""
    packed = pack(torch.tensor([[127.0, -64.0, 0.5, 1.5, 2.5]]), bits=8, group=32)
    assert packed.codes.dtype == torch.int8
    assert packed.codes.tolist() == [[127, -64, 0, 2, 2] + [0] * 59]
    assert packed.scales.dtype == BF16
    assert packed.scales.tolist() == [[1.0, 0.0]]
    assert (packed.bits, packed.group, packed.inputs, packed.shape) == (8, 32, 5, (1, 5))
    assert packed.nbytes == 64 + 2 * 2


def test_four_bits_by_hand() -> None:
    """Byte j of a block: column j low, column j + 32 high, each with 8 added."""
    first = torch.arange(32) % 15 - 7  # -7 … 7, -7 … 7, -7, -6
    second = 7 - torch.arange(32) % 15
    third = torch.tensor([7, -1])
    packed = pack(torch.cat([first * 1.0, second * 0.5, third * 4.0]).unsqueeze(0), bits=4, group=32)
    assert packed.codes.dtype == torch.uint8
    assert packed.codes.shape == (1, 64)
    bytes_ = packed.codes[0].tolist()
    assert bytes_[0] == 0xF1  # -7 + 8 low, 7 + 8 high
    assert bytes_[7] == 0x88
    assert bytes_[14] == 0x1F
    assert bytes_[:32] == [
        (low + 8) | (high + 8) << 4 for low, high in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert bytes_[32:] == [0x8F, 0x87] + [0x88] * 30
    assert packed.scales.tolist() == [[1.0, 0.5, 4.0, 0.0]]


def test_a_group_of_128_by_hand() -> None:
    weight = torch.zeros(1, 130)
    weight[0, 127], weight[0, 128], weight[0, 0] = -14.0, 0.25, 3.0
    packed = pack(weight, bits=4, group=128)
    # Two groups, four blocks. 0.25 / 7 is 0.03564453125 in bfloat16.
    assert packed.scales.tolist() == [[2.0, 0.03564453125]]
    wanted = [0x88] * 128
    wanted[0] = 0x8A  # 1.5 rounds to 2
    wanted[32 + 31] = 0x18  # column 127 is the last of its block's high half
    wanted[64] = 0x8F
    assert packed.codes[0].tolist() == wanted


def test_codes_follow_from_the_rounded_scale() -> None:
    """1 / 7 is 0.142578125 in bfloat16. 0.499 is 3.4998 of those, 0.4991 is 3.5005; of 1 / 7 both are below 3.5."""
    packed = pack(torch.tensor([[1.0, 0.499, 0.4991, -0.4991]]), bits=4)
    assert packed.scales[0, 0] == 0.142578125
    assert [code & 15 for code in packed.codes[0, :4].tolist()] == [15, 11, 12, 4]
    assert unpack(packed).tolist() == [[7 * 0.142578125, 3 * 0.142578125, 4 * 0.142578125, -4 * 0.142578125]]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_too_small_for_their_scale_are_clamped(bits: int) -> None:
    """bfloat16 ends at 2^-133, where a scale may be rounded from 1.4 steps to 1: codes must not wrap around."""
    step = 2.0**-133
    packed = pack(torch.tensor([[1.4 * LARGEST[bits] * step, -1.4 * LARGEST[bits] * step]]), bits=bits)
    assert packed.scales[0, 0].float() == step
    assert unpack(packed).tolist() == [[LARGEST[bits] * step, -LARGEST[bits] * step]]
    # Below half a step there is no scale at all.
    assert unpack(pack(torch.tensor([[0.4 * LARGEST[bits] * step]]), bits=bits)).tolist() == [[0.0]]


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_zeros(bits: int, group: int) -> None:
    packed = pack(torch.zeros(2, 3, 70), bits, group)
    assert packed.scales.count_nonzero() == 0
    assert packed.codes.unique().tolist() == [0 if bits == 8 else 0x88]
    assert unpack(packed).equal(torch.zeros(2, 3, 70))


@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (0, 4, 5), (2, 0, 5)])
def test_weights_of_nothing(shape: tuple[int, ...]) -> None:
    packed = pack(torch.zeros(shape), 4, 32)
    assert packed.shape == shape
    assert unpack(packed).shape == shape
    assert error(torch.zeros(shape), packed) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The format, any weight.


@dataclasses.dataclass
class Drawn:
    weight: Tensor
    bits: int
    group: int


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    """Weights of any shape, dtype and layout; magnitudes differ from row to row; some groups are zero."""
    bits, group = draw(st.sampled_from(FORMATS))
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    rows, inputs = draw(st.integers(1, 5)), draw(st.integers(1, 300))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    weight = torch.randn(*lead, rows, inputs, generator=random, dtype=F64)
    weight *= 10 ** (6 * torch.rand(*lead, rows, 1, generator=random, dtype=F64) - 4)
    if draw(st.booleans()):
        weight[..., : group // 2 + inputs // 2] = 0
    weight = weight.to(draw(st.sampled_from([torch.float32, BF16, F64, torch.float16])))
    layout = draw(st.sampled_from(["plain", "transposed", "every other", "expanded"]))
    if layout == "transposed":
        weight = weight.mT.contiguous().mT
    elif layout == "every other":
        weight = weight.repeat_interleave(2, -1)[..., ::2]
    elif layout == "expanded":
        weight = weight[..., :1, :].expand(weight.shape)
    return Drawn(weight, bits, group)


@settings(max_examples=150)
@given(drawn())
def test_unpacked_is_within_half_a_step(d: Drawn) -> None:
    packed = pack(d.weight, d.bits, d.group)
    columns = math.ceil(d.weight.shape[-1] / max(d.group, 64)) * max(d.group, 64)
    assert packed.shape == tuple(d.weight.shape)
    assert packed.codes.shape == (*d.weight.shape[:-1], columns * d.bits // 8)
    assert packed.scales.shape == (*d.weight.shape[:-1], columns // d.group)
    got = unpack(packed, F64)
    assert got.shape == d.weight.shape
    scale = packed.scales.to(F64).repeat_interleave(d.group, -1)[..., : d.weight.shape[-1]]
    # A float64 weight is rounded to float32 first: 127 steps have 127 · 2^-24 of a step to lose.
    assert bool(((got - d.weight.to(F64)).abs() <= scale * (0.5 + 1e-5)).all())
    # The scale is that of the largest: within bfloat16's rounding, 2^-8.
    padded = F.pad(d.weight.to(F64), (0, columns - d.weight.shape[-1]))
    largest = padded.unflatten(-1, (-1, d.group)).abs().amax(-1)
    assert torch.allclose(packed.scales.to(F64) * LARGEST[d.bits], largest, rtol=2**-8, atol=0)
    # It is the weight's own norm that the error is relative to.
    assert error(d.weight, packed) == pytest.approx(distance(got, d.weight) if d.weight.any() else 0, rel=1e-6)


@settings(max_examples=60)
@given(drawn())
def test_packing_what_was_unpacked_changes_no_bit(d: Drawn) -> None:
    packed = pack(d.weight, d.bits, d.group)
    assert same(pack(unpack(packed), d.bits, d.group), packed)
    assert same(pack(unpack(packed, F64), d.bits, d.group), packed)


@settings(max_examples=60)
@given(drawn(), st.integers(1, 700))
def test_slices_change_no_bit(d: Drawn, size: int) -> None:
    whole = pack(d.weight, d.bits, d.group)
    unpacked = unpack(whole)
    with patch.object(quantize, "SLICE", size):
        assert same(pack(d.weight, d.bits, d.group), whole)
        assert unpack(whole).equal(unpacked)
        assert error(d.weight, whole) == pytest.approx(distance(unpacked, d.weight), rel=1e-6)


@settings(max_examples=60)
@given(drawn())
def test_padding_stands_for_nothing(d: Drawn) -> None:
    """The codes beyond the inputs are 0, whatever follows the weight in memory."""
    packed = pack(d.weight, d.bits, d.group)
    columns = packed.codes.shape[-1] * 8 // d.bits
    full = unpack(dataclasses.replace(packed, inputs=columns))
    assert full[..., packed.inputs :].count_nonzero() == 0
    assert full[..., : packed.inputs].equal(unpack(packed))
    groups = math.ceil(packed.inputs / d.group)
    assert packed.scales[..., groups:].count_nonzero() == 0


class _Largest(TorchDispatchMode):
    """The most numbers that any new tensor holds, by dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.held[t.dtype] = max(self.held.get(t.dtype, 0), t.numel())
        return out


@pytest.mark.parametrize("transposed", [False, True])
def test_no_copy_of_the_whole_is_made(transposed: bool) -> None:
    weight = torch.randn(6, 50, 128).to(BF16)
    if transposed:
        weight = weight.mT.contiguous().mT
    with patch.object(quantize, "SLICE", 10 * 128), _Largest() as largest:
        packed = pack(weight, 4, 32)
        error(weight, packed)
    assert largest.held[torch.float32] <= 10 * 128
    assert largest.held[torch.int8] <= 10 * 128
    assert largest.held.get(BF16, 0) <= packed.scales.numel()


def test_error_by_hand() -> None:
    weight = torch.tensor([[127.0, 0.5]])
    assert error(weight, pack(weight, 8)) == pytest.approx(0.5 / math.hypot(127, 0.5), rel=1e-9)
    assert error(torch.zeros(2, 2), pack(torch.zeros(2, 2))) == 0
    # 4 bits are coarser by the ratio of the steps: 127 / 7.
    normal = torch.randn(64, 512)
    assert error(normal, pack(normal, 4)) / error(normal, pack(normal, 8)) == pytest.approx(127 / 7, rel=0.05)
    with pytest.raises(ConfigError, match=re.escape("weight has shape (1, 3): packed is of shape (1, 2)")):
        error(torch.zeros(1, 3), pack(weight))


def test_packing_takes_no_part_in_autograd() -> None:
    packed = pack(nn.Parameter(torch.randn(2, 4)))
    assert not packed.scales.requires_grad
    assert not unpack(packed).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes in the format.


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            torch.tensor([[1.0, math.nan]]),
            "w holds values that are not finite: it cannot be quantised (the most is 3.3e+38)",
        ),
        (torch.tensor([[1.0, -math.inf]]), "w holds values that are not finite: it cannot be quantised"),
        (torch.tensor([[[0.0]], [[math.inf]]]), "w holds values that are not finite"),
        (torch.tensor([[-3.36e38]]), "w holds a value of magnitude 3.4e+38: it cannot be quantised (the most is 3.3e"),
        (torch.tensor([[1e200]], dtype=F64), "w holds a value of magnitude 1e+200: it cannot be quantised"),
        (torch.ones(3), "w is float32 (3,): only floating (..., outputs, inputs) can be quantised"),
        (torch.ones(3, 2, dtype=torch.int8), "w is int8 (3, 2): only floating (..., outputs, inputs)"),
        (torch.empty(3, 2, device="meta"), "w has no values (it is on the meta device): it cannot be quantised"),
    ],
)
def test_weights_that_cannot_be_packed_are_named(weight: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        pack(weight, name="w")


def test_the_largest_weights_stay_finite() -> None:
    for bits, group in FORMATS:
        weight = torch.tensor([[3e38, -3e38, 1.0]])
        for dtype in (torch.float32, BF16):
            assert unpack(pack(weight, bits, group), dtype).isfinite().all()


@pytest.mark.parametrize(
    ("bits", "group", "message"),
    [(5, 32, "bits = 5: one of 8, 4"), (4, 64, "group = 64: one of 32, 128"), (8, 0, "group = 0: one of 32, 128")],
)
def test_formats_that_are_not_there(bits: int, group: int, message: str) -> None:
    for call in (lambda: pack(torch.ones(1, 1), bits, group), lambda: quantize_model(nn.Sequential(), bits, group)):
        with pytest.raises(ConfigError, match=f"^{message}$"):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": 65}, "packed codes are uint8 (4, 32): 4 bits and 65 inputs in groups of 32 need contiguous uint8"),
        (
            {"bits": 8},
            "packed codes are uint8 (4, 32): 8 bits and 64 inputs in groups of 32 need contiguous int8 (..., out",
        ),
        ({"group": 128}, "packed codes are uint8 (4, 32): 4 bits and 64 inputs in groups of 128 need"),
        ({"codes": torch.zeros(32, 4, dtype=torch.uint8).T}, "packed codes are uint8 (4, 32): 4 bits and 64 inputs"),
        ({"codes": torch.zeros(32, dtype=torch.uint8)}, "packed codes are uint8 (32,)"),
        ({"scales": torch.zeros(4, 2)}, "packed scales are float32 (4, 2): they must be contiguous bfloat16 (4, 2)"),
        ({"scales": torch.zeros(4, 1, dtype=BF16)}, "packed scales are bfloat16 (4, 1): they must be"),
        ({"scales": torch.zeros(2, 4, dtype=BF16).T}, "packed scales are bfloat16 (4, 2): they must be contiguous"),
        ({"bits": 3}, "bits = 3: one of 8, 4"),
    ],
)
def test_packed_that_does_not_fit_together(changes: dict[str, Any], message: str) -> None:
    packed = pack(torch.randn(4, 64), 4, 32)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        dataclasses.replace(packed, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Experts.


@dataclasses.dataclass
class Case:
    experts: Experts
    x_TD: Tensor
    routing: Routing


def case(
    T: int,
    E: int,
    K: int,
    D: int,
    F: int,
    *,
    activation: Activation = "swiglu",
    bias: bool = False,
    drop: float = 0.0,
    backend: str = "auto",
    seed: int = 0,
) -> Case:
    """Experts in float64, tokens and a routing in which the last expert is idle if there is one to spare."""
    torch.manual_seed(seed)
    experts = Experts(E, D, F, activation=activation, bias=bias, backend=backend).to(F64)
    for held in (experts.gate_up_bias, experts.down_bias):
        if held is not None:
            nn.init.normal_(held)
    taste_TE = torch.rand(T, E)
    if E > K:
        taste_TE[:, -1] = -1
    dropped_TK = torch.rand(T, K) < drop if drop else None
    routing = Routing(taste_TE, taste_TE, taste_TE.topk(K).indices, torch.rand(T, K) + 0.1, dropped_TK)
    return Case(experts, torch.randn(T, D, dtype=F64), routing)


def unpacked(quantized: QuantizedExperts) -> Experts:
    """Ordinary experts in float64 that hold what the codes stand for."""
    gate_up, down = unpack(quantized.gate_up.value, F64), unpack(quantized.down.value, F64)
    bias = quantized.down_bias is not None
    kind: Any = quantized.activation
    experts = Experts(quantized.count, down.shape[1], down.shape[2], activation=kind, bias=bias).to(F64)
    biases = {"gate_up_bias": quantized.gate_up_bias, "down_bias": quantized.down_bias} if bias else {}
    experts.load_state_dict({"gate_up": gate_up, "down": down, **biases})
    return experts


@torch.no_grad()
def compare(c: Case, bits: int, group: int, dtype: torch.dtype, bound: float) -> None:
    quantized = QuantizedExperts.pack(c.experts, bits, group).to(dtype)
    x_TD = c.x_TD.to(dtype)
    y_TD = quantized(x_TD, c.routing)
    assert y_TD.dtype == dtype
    assert distance(y_TD, reference(x_TD.to(F64), c.routing, unpacked(quantized))) <= bound


@st.composite
def cases(
    draw: st.DrawFn,
    backends: Sequence[str] = ("auto",),
    tokens: tuple[int, int] = (0, 12),
    widths: tuple[int, int] = (1, 150),
) -> Case:
    E = draw(st.integers(1, 6))
    return case(
        draw(st.integers(*tokens)),
        E,
        draw(st.integers(1, E)),
        draw(st.integers(*widths)),
        draw(st.integers(*widths)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        bias=draw(st.booleans()),
        drop=draw(st.sampled_from([0.0, 0.3, 1.1])),
        backend=draw(st.sampled_from(backends)),
        seed=draw(st.integers(0, 10**6)),
    )


@settings(max_examples=80)
@given(cases(), st.sampled_from(FORMATS))
def test_experts_are_the_reference_on_the_unpacked_weights(c: Case, form: tuple[int, int]) -> None:
    compare(c, *form, F64, 1e-12)


@settings(max_examples=40)
@given(cases(backends=["grouped", "reference"]), st.sampled_from(FORMATS))
def test_experts_in_float32(c: Case, form: tuple[int, int]) -> None:
    compare(c, *form, torch.float32, 1e-5)


@settings(max_examples=80)
@given(cases(tokens=(0, 40)), st.sampled_from(FORMATS))
def test_experts_in_float32_by_kernels(c: Case, form: tuple[int, int]) -> None:
    """They round tokens to 16-bit whole numbers of their largest: by 1.5e-5 of it, which is up to four times a token's
    ordinary size, and the hidden values again."""
    compare(c, *form, torch.float32, KERNELS)


@settings(max_examples=80)
@given(cases(backends=["auto", "grouped"], tokens=(8, 40), widths=(16, 100)), st.sampled_from(FORMATS))
def test_experts_in_bfloat16(c: Case, form: tuple[int, int]) -> None:
    """Against float64 on the same rounded inputs. The loop rounds the unpacked weights once more, and then as any
    bfloat16 layer: see the bound in test_experts.py."""
    compare(c, *form, BF16, 1.2e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("T", [0, 1, 5])
def test_every_activation(activation: Activation, bias: bool, T: int) -> None:
    c = case(T, 5, 2, 33, 70, activation=activation, bias=bias, drop=0.3)
    assert c.routing.experts_TK.unique().numel() < 5  # one is idle
    for dtype, bound in ((F64, 1e-12), (torch.float32, KERNELS)):
        compare(c, 4, 32, dtype, bound)


def test_dropped_and_idle_experts_are_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the experts with something to do, each matrix once, never all at once."""
    shapes = []

    def spy(packed: Packed, dtype: torch.dtype) -> Tensor:
        shapes.append(packed.shape)
        return unpack(packed, dtype)

    monkeypatch.setattr("handful.experts.quantized.unpack", spy)
    c = case(4, 6, 2, 8, 8)
    dropped_TK = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]]).bool()
    chosen_TK = torch.tensor([[0, 5], [2, 4], [0, 1], [2, 1]])
    routing = dataclasses.replace(c.routing, experts_TK=chosen_TK, dropped_TK=dropped_TK)
    with torch.no_grad():
        QuantizedExperts.pack(c.experts)(c.x_TD, routing)
    assert shapes == [(16, 8), (8, 8)] * 2


def test_which_inputs_the_native_kernels_get(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def spy_experts(x_TD: Tensor, routing: Routing, *rest: Any) -> Tensor:
        gate_up, down, gate_up_bias, down_bias, activation = rest
        assert isinstance(gate_up, Packed)
        assert isinstance(down, Packed)
        assert gate_up.shape == (4, 24, 8)
        assert down.shape == (4, 8, 12)
        assert gate_up_bias.shape == (4, 24)
        assert down_bias.shape == (4, 8)
        assert gate_up_bias.dtype == down_bias.dtype == x_TD.dtype  # they were float64
        assert activation == "geglu"
        calls.append(x_TD.dtype)
        return x_TD

    def spy_linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        assert weight.shape == (3, 8)
        assert bias is not None
        assert bias.dtype == x.dtype
        calls.append(x.dtype)
        return x[..., :3]

    there = True
    monkeypatch.setattr("handful.experts.quantized.available", lambda: there)
    monkeypatch.setattr("handful.experts.quantized.native_error", lambda: "not built")
    monkeypatch.setattr("handful.experts.quantized.quantized_experts", spy_experts)
    monkeypatch.setattr("handful.experts.quantized.linear", spy_linear)

    def ask(backend: str, dtype: torch.dtype) -> list[torch.dtype]:
        c = case(5, 4, 2, 8, 12, activation="geglu", bias=True)
        quantized = QuantizedExperts.pack(c.experts)
        quantized.backend = backend
        layer = QuantizedLinear.pack(nn.Linear(8, 3))
        calls.clear()
        with torch.no_grad():
            quantized(c.x_TD.to(dtype), c.routing)
            assert layer(torch.ones(2, 3, 8, dtype=dtype)).shape == (2, 3, 3)
        return list(calls)

    both = [torch.float32, torch.float32]
    assert ask("auto", torch.float32) == both
    assert ask("auto", BF16) == [BF16, BF16]
    assert ask("auto", F64) == []
    assert ask("grouped", torch.float32) == ask("reference", torch.float32) == both[:1]  # the linear layer's
    assert ask("native", F64) == [F64]  # asked for by name: what it does not take is its own error
    there = False
    assert ask("auto", torch.float32) == []
    with pytest.raises(HandfulError, match=r"^experts backend 'native': not built$"):
        ask("native", torch.float32)


def test_native_asked_for_by_name_says_what_it_does_not_take() -> None:
    c = case(2, 4, 2, 8, 8, backend="native")
    quantized = QuantizedExperts.pack(c.experts)
    wrong = dataclasses.replace(c.routing, experts_TK=torch.tensor([[0, 1], [4, 2]]))
    messages = "x is neither float32 nor bfloat16", r"^routing names expert 4: there are 4, counted from 0$"
    if not available():
        messages = (r"^experts backend 'native': ",) * 2
    with torch.no_grad():
        for x_TD, routing, message in zip((c.x_TD, c.x_TD.float()), (c.routing, wrong), messages, strict=True):
            with pytest.raises(HandfulError, match=message):
                quantized(x_TD, routing)


def test_autocast_computes_in_bfloat16() -> None:
    c = case(6, 4, 2, 32, 32, bias=True)
    layer = nn.Linear(32, 8)
    quantized, quantized_layer = QuantizedExperts.pack(c.experts).float(), QuantizedLinear.pack(layer)
    x_TD = c.x_TD.float()
    with torch.no_grad(), torch.autocast("cpu", BF16):
        y_TD, z_TO = quantized(x_TD, c.routing), quantized_layer(x_TD)
    assert y_TD.dtype == z_TO.dtype == BF16
    assert distance(y_TD, reference(c.x_TD, c.routing, unpacked(quantized.double()))) < 1.2e-2
    assert distance(z_TO, F.linear(x_TD, quantized_layer.weight, layer.bias)) < 1.2e-2


def test_shapes_and_experts_that_do_not_fit() -> None:
    c = case(2, 4, 2, 3, 5)
    quantized = QuantizedExperts.pack(c.experts)
    with pytest.raises(RoutingError, match=r"^experts were given x of shape \(2, 5\): it must be \(tokens, 3\)$"):
        quantized(torch.zeros(2, 5), c.routing)
    with pytest.raises(RoutingError, match=r"^routing is for 2 tokens and 4 experts: there are 3 and 4$"):
        quantized(torch.zeros(3, 3), c.routing)
    for wrong in (-1, 4):
        chosen_TK = torch.tensor([[0, 1], [wrong, 2]])
        with pytest.raises(RoutingError, match=rf"^routing names expert {wrong}: there are 4, counted from 0$"):
            quantized(c.x_TD, dataclasses.replace(c.routing, experts_TK=chosen_TK))
    gate_up, down = quantized.gate_up.value, quantized.down.value
    with pytest.raises(ConfigError, match=re.escape("gate_up is (4, 10, 3) and down (4, 3, 5): they must be")):
        QuantizedExperts(gate_up, down, activation="relu")
    with pytest.raises(ConfigError, match=re.escape("gate_up is (4, 10, 3) and down (3, 5)")):
        QuantizedExperts(gate_up, pack(torch.ones(3, 5)))
    with pytest.raises(ConfigError, match="experts backend 'none': one of auto, "):
        QuantizedExperts(gate_up, down, backend="none")
    with pytest.raises(ConfigError, match=re.escape("linear was given x of shape (2, 4): its last size must be 3")):
        QuantizedLinear.pack(nn.Linear(3, 2))(torch.zeros(2, 4))
    nn.init.constant_(c.experts.down, math.nan)
    with pytest.raises(ConfigError, match=r"^layer\.experts\.down holds values that are not finite"):
        QuantizedExperts.pack(c.experts, name="layer.experts")


def test_a_gradient_is_refused_and_not_lost() -> None:
    c = case(3, 4, 2, 8, 8)
    quantized, layer = QuantizedExperts.pack(c.experts), QuantizedLinear.pack(nn.Linear(8, 2).double())
    x_TD = c.x_TD.clone().requires_grad_()
    learned = dataclasses.replace(c.routing, weights_TK=c.routing.weights_TK.clone().requires_grad_())
    message = r"give no gradient: run the model under torch\.no_grad\(\)"
    calls: list[Callable[[], Tensor]] = [
        lambda: quantized(x_TD, c.routing),
        lambda: quantized(c.x_TD, learned),
        lambda: layer(x_TD),
    ]
    for call in calls:
        with pytest.raises(HandfulError, match=message):
            call()
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                assert not call().requires_grad
    # Nothing asks for a gradient here.
    assert not quantized(c.x_TD, c.routing).requires_grad
    assert not layer(c.x_TD).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Modules.


def packed_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in module.state_dict().items() if name.endswith(("codes", "scales"))}


@pytest.mark.parametrize(
    "turn",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),  # which turns whole numbers too, elsewhere
        lambda m: m.half().float(),
    ],
)
def test_another_dtype_leaves_codes_and_scales_as_they_are(turn: Callable[[nn.Module], nn.Module]) -> None:
    experts = QuantizedExperts.pack(case(1, 4, 2, 40, 24, bias=True).experts.float(), 8)
    layer = QuantizedLinear.pack(nn.Linear(40, 24))
    for module in (experts, layer):
        before = {name: t.clone() for name, t in packed_tensors(module).items()}
        turned = turn(copy.deepcopy(module))
        after = packed_tensors(turned)
        assert before.keys() == after.keys()
        assert len(before) >= 2
        for name, t in before.items():
            assert after[name].dtype == t.dtype
            assert after[name].equal(t)
    # What is not packed follows, and so does the weight as others read it.
    like = turn(nn.Linear(1, 1)).weight
    assert isinstance(like, Tensor)
    quantized = turn(experts)
    assert isinstance(quantized, QuantizedExperts)
    assert quantized.down_bias is not None
    assert quantized.down_bias.dtype == like.dtype
    read = turn(layer).weight
    assert isinstance(read, Tensor)
    assert read.dtype == like.dtype
    assert isinstance(layer.bias, Tensor)
    assert layer.bias.dtype == like.dtype


def test_modules_move() -> None:
    experts = QuantizedExperts.pack(case(1, 4, 2, 40, 24, bias=True).experts)
    for module in (experts, QuantizedLinear.pack(nn.Linear(4, 2))):
        assert {t.device.type for t in module.to("meta").state_dict().values()} == {"meta"}
        assert list(module.parameters()) == []
        for held in module.modules():
            if isinstance(held, PackedWeight):
                assert held.value.codes is held.codes
                assert held.value.scales.device.type == "meta"


def test_state_goes_from_one_to_another() -> None:
    c = case(6, 4, 2, 40, 24, bias=True)
    one = QuantizedExperts.pack(c.experts, 4, 32)
    other = QuantizedExperts.pack(case(1, 4, 2, 40, 24, bias=True, seed=1).experts, 4, 32)
    assert sorted(one.state_dict()) == [
        "down.codes", "down.scales", "down_bias", "gate_up.codes", "gate_up.scales", "gate_up_bias"
    ]  # fmt: skip
    with torch.no_grad():
        want_TD = one(c.x_TD, c.routing)
        assert not other(c.x_TD, c.routing).equal(want_TD)
        for assign in (False, True):
            third = copy.deepcopy(other)
            third.load_state_dict(one.state_dict(), assign=assign)
            assert third(c.x_TD, c.routing).equal(want_TD)
        assert not other(c.x_TD, c.routing).equal(want_TD)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 33), (33,), (0, 33)])
def test_linear_is_the_product_with_the_unpacked_weight(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(33, 20, bias=bias)
    for bits, group in FORMATS:
        quantized = QuantizedLinear.pack(linear, bits, group)
        assert (quantized.in_features, quantized.out_features) == (33, 20)
        assert quantized.weight.equal(unpack(pack(linear.weight, bits, group)))
        x = torch.randn(shape, dtype=F64)
        held = None if linear.bias is None else linear.bias.double()
        with torch.no_grad():
            for dtype, bound in ((F64, 1e-13), (torch.float32, KERNELS), (BF16, 1e-2)):
                x_ = x.to(dtype)
                y = quantized(x_)
                assert y.dtype == dtype
                assert distance(y, F.linear(x_.double(), quantized.weight.double(), held)) <= bound


# ---------------------------------------------------------------------------------------------------------------------
# Models.


def all_of_it(**changes: Any) -> ModelConfig:
    """Every part that a decoder can have: a dense layer, experts with biases, shared ones with a gate, a head."""
    values: dict[str, Any] = {
        "layers": 3, "dense_first": 1, "ffn": 24, "expert_bias": True, "shared_width": 20, "shared_gate": True,
        "qkv_bias": True, "o_bias": True, "tied": False,
    }  # fmt: skip
    return moe({"balance_bias": True, "logits_bias": True, "noisy_top_k": True}, **(values | changes))


@torch.no_grad()
def write_back(model: nn.Module, report: QuantizationReport) -> None:
    """Put into an ordinary model what a quantised one of the same weights stands for."""
    for row in report.tensors:
        if row.reason is None:
            weight = model.get_parameter(row.name)
            weight.copy_(unpack(pack(weight, report.bits, report.group), weight.dtype))


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_computes_with_the_unpacked_weights(bits: int, group: int, tied: bool) -> None:
    model = Decoder(all_of_it(tied=tied)).double().eval()
    nn.init.normal_(model.get_parameter("layers.0.attn.q.bias"))
    for layer in model.moe_layers:
        for bias in (layer.experts.gate_up_bias, layer.experts.down_bias):
            assert bias is not None
            nn.init.normal_(bias)
    twin = copy.deepcopy(model)
    report = quantize_model(model, bits, group)
    write_back(twin, report)
    tokens_BS = torch.randint(300, (2, 9))
    with torch.no_grad():
        got, want = model(tokens_BS), twin(tokens_BS)
    assert distance(got[0], want[0]) < 1e-12
    for a, b in zip(got[1], want[1], strict=True):
        assert a.experts_TK.equal(b.experts_TK)


def test_the_report_has_a_row_for_every_tensor_and_counts_every_byte() -> None:
    model = Decoder(all_of_it())
    before = {name: (tuple(t.shape), t.nbytes) for name, t in model.state_dict().items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = quantize_model(model, bits=4, group=32)
    assert {row.name: (row.shape, row.bytes_before) for row in report.tensors} == before
    assert len(report.tensors) == len(before)
    assert report.bytes_before == sum(size for _, size in before.values())
    after = model.state_dict()
    assert report.bytes_after == sum(t.nbytes for t in after.values())
    quantised = {row.name for row in report.tensors if row.reason is None}
    kinds = ("attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.o.weight", "gate_up", "down", "gate_up.weight",
             "down.weight", "shared_gate.weight", "head.weight")  # fmt: skip
    assert quantised == {name for name in before if name.endswith(kinds)}
    assert report.share == sum(before[name][1] for name in quantised) / report.bytes_before
    for row in report.tensors:
        if row.reason is None:
            packed = pack(weights[row.name], 4, 32)
            assert row.bytes_after == packed.nbytes
            assert row.error == error(weights[row.name], packed)
        else:
            assert row.error is None
            assert row.bytes_after == row.bytes_before
            assert after[row.name].dtype == torch.float32
            if row.name in weights:
                assert after[row.name].equal(weights[row.name])
    reasons = {row.name: row.reason for row in report.tensors}
    assert reasons["layers.1.ffn.router.weight"] == "of Router, which stays as it is"
    assert reasons["norm.weight"] == "of RMSNorm, which stays as it is"
    assert reasons["embed.weight"] == "of Embedding, which stays as it is"
    assert reasons["layers.1.attn.q.bias"] == reasons["layers.1.ffn.experts.down_bias"] == "bias"
    assert reasons["layers.1.ffn.router.balance_bias"] == "bias"
    # Rows are in the model's order.
    assert [row.name for row in report.tensors][:3] == [
        "embed.weight",
        "layers.0.attn_norm.weight",
        "layers.0.attn.q.weight",
    ]


def test_the_report_as_plain_values() -> None:
    report = quantize_model(Decoder(moe()), 8, 128)
    plain = json.loads(json.dumps(report.to_dict()))
    assert (plain["bits"], plain["group"], plain["share"]) == (8, 128, report.share)
    assert plain["bytes_before"] == sum(row["bytes_before"] for row in plain["tensors"])
    assert plain["bytes_after"] == sum(row["bytes_after"] for row in plain["tensors"])
    assert plain["tensors"][0] == {
        "name": "embed.weight", "shape": [300, 16], "bytes_before": 19200, "bytes_after": 19200, "error": None,
        "reason": "of Embedding, which stays as it is; it is the output layer too",
    }  # fmt: skip


def test_bytes_of_a_model_of_useful_width() -> None:
    """4 bits and a 16-bit scale in 32: 4.5 bits of 32 a weight where nothing is padded."""
    report = quantize_model(Decoder(dense(width=64, ffn=128, vocab=64, tied=False)), 4, 32)
    held = [row for row in report.tensors if row.reason is None]
    assert sum(row.bytes_after for row in held) / sum(row.bytes_before for row in held) == 4.5 / 32
    assert 0.9 < report.share < 1


def test_a_tied_output_layer_is_left_to_its_embedding() -> None:
    model = Decoder(moe(tied=True))
    embed = model.embed.weight
    row = quantize_model(model).tensors[0]
    assert row.reason == "of Embedding, which stays as it is; it is the output layer too"
    assert model.embed.weight is embed
    assert model.output_weight is embed
    # In a model of another make the output layer is a Linear that holds the embedding's weight.
    other = nn.ModuleDict({"embed": nn.Embedding(10, 8), "mid": nn.Linear(8, 8), "head": nn.Linear(8, 10)})
    head = other["head"]
    head.weight = other["embed"].weight
    report = quantize_model(other)
    assert other["head"] is head
    assert {row.name: row.reason for row in report.tensors} == {
        "embed.weight": "tied: also head.weight",
        "mid.weight": None,
        "mid.bias": "bias",
        "head.bias": "bias",
    }
    assert report.bytes_before == (80 + 64 + 8 + 10) * 4
    # Two layers that share a weight, too.
    pair = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    pair[1].weight = pair[0].weight
    assert [row.reason for row in quantize_model(pair).tensors] == ["tied: also 1.weight"]
    assert all(type(module) is nn.Linear for module in pair)


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    linear = nn.Linear(8, 8, bias=False)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)})
    report = quantize_model(model)
    assert [(row.name, row.reason) for row in report.tensors] == [("a.weight", None)]
    assert isinstance(model["a"], QuantizedLinear)
    assert model["b"].get_submodule("0") is model["a"]


def test_subclasses_and_what_is_quantised_stay() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mid": nn.Linear(8, 8)})
    want = model["attention"](*[torch.ones(3, 8)] * 3)[0]
    reasons = {row.name: row.reason for row in quantize_model(model, 8).tensors}
    assert reasons["attention.out_proj.weight"] == "of NonDynamicallyQuantizableLinear, which stays as it is"
    assert reasons["attention.in_proj_weight"] == "of MultiheadAttention, which stays as it is"
    assert model["attention"](*[torch.ones(3, 8)] * 3)[0].equal(want)
    codes = model.state_dict()["mid.packed.codes"]
    again = quantize_model(model, 4)
    assert {row.name: row.reason for row in again.tensors}["mid.packed.codes"] == "quantised already"
    assert again.share == 0
    assert again.bytes_before == again.bytes_after
    assert model.state_dict()["mid.packed.codes"] is not None
    assert model.state_dict()["mid.packed.codes"].data_ptr() == codes.data_ptr()


def test_skip() -> None:
    model = Decoder(all_of_it())
    report = quantize_model(model, skip=["head", "layers.1", "*.attn.?.weight", "layers.2.ffn.shared_gate.weight"])
    assert type(model.head) is nn.Linear
    assert not any(isinstance(module, PackedWeight) for module in model.layers[1].modules())
    left = {row.name for row in report.tensors if row.reason == "skipped, as asked"}
    kinds = ("q.weight", "k.weight", "v.weight", "o.weight", "gate_up", "down", "gate_up.weight", "down.weight",
             "shared_gate.weight")  # fmt: skip
    assert left == {"head.weight", "layers.2.ffn.shared_gate.weight"} | {
        row.name
        for row in report.tensors
        if row.name.endswith(kinds) and (row.name.startswith("layers.1.") or ".attn." in row.name)
    }
    assert isinstance(model.get_submodule("layers.2.ffn.experts"), QuantizedExperts)
    assert isinstance(model.get_submodule("layers.0.ffn.down"), QuantizedLinear)


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (["head", "haed"], "skip = 'haed': no module or tensor of the model has that name"),
        (["layers.3"], "skip = 'layers.3': no module"),
        (["layer"], "skip = 'layer': no module"),
        (
            ["layers.2.ffn.experts.down"],
            "layers.2.ffn.experts.gate_up cannot be quantised without layers.2.ffn.experts.down (skipped, as asked)",
        ),
        # A dense layer's gate_up may be skipped alone; that of Experts is half of a whole.
        (["*.gate_up"], "layers.1.ffn.experts.down cannot be quantised without layers.1.ffn.experts.gate_up"),
    ],
)
def test_skips_that_make_no_sense(skip: list[str], message: str) -> None:
    model = Decoder(all_of_it())
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        quantize_model(model, skip=skip)
    assert not any(isinstance(module, PackedWeight) for module in model.modules())


def test_a_weight_that_cannot_be_quantised_is_named_before_anything_is_replaced() -> None:
    model = Decoder(all_of_it())
    assert model.head is not None
    with torch.no_grad():
        model.head.weight[7, 3] = math.inf
    with pytest.raises(ConfigError, match=r"^head\.weight holds values that are not finite"):
        quantize_model(model)
    assert not any(isinstance(module, PackedWeight) for module in model.modules())
    quantize_model(model, skip=["head"])
    with torch.device("meta"):
        empty = Decoder(moe())
    with pytest.raises(ConfigError, match=r"^layers\.0\.attn\.q\.weight has no values"):
        quantize_model(empty)


def test_a_model_that_is_one_layer_cannot_be_replaced_in_place() -> None:
    with pytest.raises(ConfigError, match=r"model is itself of Linear.*QuantizedLinear\.pack"):
        quantize_model(nn.Linear(4, 4))


def test_old_weights_are_let_go_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(moe())
    old = [weakref.ref(layer.experts.gate_up) for layer in model.moe_layers]
    alive = []
    pack_experts = QuantizedExperts.pack

    def spy(*args: Any) -> QuantizedExperts:
        gc.collect()
        alive.append([ref() is not None for ref in old])
        return pack_experts(*args)

    monkeypatch.setattr(QuantizedExperts, "pack", spy)
    quantize_model(model)
    gc.collect()
    assert alive == [[True, True], [False, True]]
    assert [ref() for ref in old] == [None, None]


def test_training_mode_stays() -> None:
    for mode in (True, False):
        model = Decoder(moe()).train(mode)
        quantize_model(model)
        assert {module.training for module in model.modules()} == {mode}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_generation_runs(dtype: torch.dtype, bits: int, tied: bool) -> None:
    model = Decoder(all_of_it(tied=tied)).to(dtype)
    quantize_model(model, bits)
    tokens = list(generate_tokens(model, [1, 2, 3], 12, Sampling(temperature=0)))
    assert len(tokens) == 12
    # With the cache or without, the same likeliest tokens, as far as rounding lets them be.
    if dtype == torch.float32:
        with torch.no_grad():
            logits_BSV, _ = model(torch.tensor([[1, 2, 3, *tokens]]))
        assert logits_BSV[0, 2:-1].argmax(-1).tolist() == tokens


def test_a_quantised_model_turned_to_bfloat16_runs() -> None:
    model = Decoder(all_of_it())
    quantize_model(model, 8)
    model.to(BF16)
    with torch.no_grad():
        logits_BSV, _ = model(torch.tensor([[1, 2, 3]]))
    assert logits_BSV.dtype == BF16
    assert model.output_weight.dtype == BF16


def test_the_loss_of_a_trained_model_hardly_changes_at_eight_bits() -> None:
    model = Decoder(moe(tied=False, width=32, vocab=40))
    tokens_BS = (torch.arange(33) * torch.tensor([[1], [3], [7]])) % 40
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        logits_BSV, _ = model(tokens_BS[:, :-1])
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batches = [(tokens_BS[:, :-1], tokens_BS[:, 1:])]
    before = evaluate(model, batches)
    assert before < 1.0  # of log 40 = 3.7
    changes = {}
    for bits in (8, 4):
        quantised = copy.deepcopy(model)
        report = quantize_model(quantised, bits)
        assert report.share > 0.75
        changes[bits] = abs(evaluate(quantised, batches) - before)
    assert changes[8] < 0.01 * before
    assert changes[4] < 0.5 * before
    assert changes[8] < changes[4]
