"""The packed bytes are what the format says, by hand and for any weight; MXFP4's are those that others read.

Legend: E experts · D model width · I inputs · O outputs
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from builders import FORMATS, distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from handful import quantize
from handful.errors import CheckpointError, ConfigError
from handful.quantize import Mxfp4, Packed, error, pack, pack_mxfp4, pack_stack, unpack, unpack_mxfp4

F64, BF16 = torch.float64, torch.bfloat16
LARGEST = {8: 127, 4: 7}


def same(a: Packed, b: Packed) -> bool:
    forms = [(packed.bits, packed.group, packed.inputs) for packed in (a, b)]
    return a.codes.equal(b.codes) and a.scales.equal(b.scales) and forms[0] == forms[1]


# ---------------------------------------------------------------------------------------------------------------------
# The format, by hand.


def test_eight_bits_by_hand() -> None:
    """A scale of 1, ties to the even number, and 59 columns of padding whose second group is no group at all."""
    packed = pack(torch.tensor([[127.0, -64.0, 0.5, 1.5, 2.5]]), bits=8, group=32)
    assert packed.codes.dtype == torch.int8
    # Two pieces: the first words of both, then the second ones.
    assert packed.codes.tolist() == [[127, -64, 0, 2] + [0] * 4 + [2] + [0] * 55]
    assert packed.scales.dtype == BF16
    assert packed.scales.tolist() == [[1.0, 0.0]]
    assert (packed.bits, packed.group, packed.inputs, packed.shape) == (8, 32, 5, (1, 5))
    assert packed.nbytes == 64 + 2 * 2


def test_four_bits_by_hand() -> None:
    """Two pieces in four rounds of words: columns from 0 of the first, from 0 of the second; then from 4 on; ...

    Columns 16 to 31 of a piece are in the high halves. 8 is added to each.
    """
    first = torch.arange(32) % 15 - 7  # -7 … 7, -7 … 7, -7, -6
    second = 7 - torch.arange(32) % 15
    packed = pack(torch.cat([first * 1.0, second * 0.5]).unsqueeze(0), bits=4, group=32)
    assert packed.codes.dtype == torch.uint8
    assert packed.codes.shape == (1, 32)
    bytes_ = packed.codes[0].tolist()
    # -7 … -4 with -6 … -3, then 7 … 4 with 6 … 3.
    assert bytes_[:8] == [0x21, 0x32, 0x43, 0x54, 0xEF, 0xDE, 0xCD, 0xBC]
    # -3 … 0 with -2 … 1, then 3 … 0 with 2 … -1.
    assert bytes_[8:16] == [0x65, 0x76, 0x87, 0x98, 0xAB, 0x9A, 0x89, 0x78]
    assert packed.scales.tolist() == [[1.0, 0.5]]
    packed = pack(torch.tensor([[7.0, -1.0]]), bits=4, group=32)
    assert packed.codes.tolist() == [[0x8F, 0x87] + [0x88] * 30]
    assert packed.scales.tolist() == [[1.0, 0.0]]


def test_a_group_of_128_by_hand() -> None:
    weight = torch.zeros(1, 130)
    weight[0, 127], weight[0, 128], weight[0, 0] = -14.0, 0.25, 3.0
    packed = pack(weight, bits=4, group=128)
    # Two groups, eight pieces. 0.25 / 7 is 0.03564453125 in bfloat16.
    assert packed.scales.tolist() == [[2.0, 0.03564453125]]
    wanted = [0x88] * 128
    wanted[0] = 0x8A  # 1.5 rounds to 2
    wanted[3 * 32 + 3 * 4 + 3] = 0x18  # column 127 is the last of the last word of piece 3
    wanted[4 * 4] = 0x8F
    assert packed.codes[0].tolist() == wanted


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [64, 512, 513, 640, 1088])
def test_where_a_column_lies(bits: int, inputs: int) -> None:
    """By the words of `Packed`, for every column of one."""
    found = pack(torch.zeros(1, inputs), bits).codes[0]
    columns = found.numel() * 8 // bits
    for column in range(0, inputs, 37):
        one = torch.zeros(1, inputs)
        one[0, column] = 1.0
        changed = (pack(one, bits).codes[0] != found).nonzero().flatten().tolist()
        block, piece, within = column // 512, column % 512 // 32, column % 32
        pieces = min(512, columns - 512 * block) // 32
        word, high = within // 4, False
        if bits == 4:
            word, high = word % 4, within >= 16
        place = 512 * block * bits // 8 + 4 * (word * pieces + piece) + within % 4
        assert changed == [place]
        code = pack(one, bits).codes[0, place].item()
        assert code == {(8, False): 127, (4, False): 0x8F, (4, True): 0xF8}[bits, high]


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
            "w holds values that are not finite: it cannot be quantized (the most is 3.3e+38)",
        ),
        (torch.tensor([[1.0, -math.inf]]), "w holds values that are not finite: it cannot be quantized"),
        (torch.tensor([[[0.0]], [[math.inf]]]), "w holds values that are not finite"),
        (torch.tensor([[-3.36e38]]), "w holds a value of magnitude 3.4e+38: it cannot be quantized (the most is 3.3e"),
        (torch.tensor([[1e200]], dtype=F64), "w holds a value of magnitude 1e+200: it cannot be quantized"),
        (torch.ones(3), "w is float32 (3,): only floating (..., outputs, inputs) can be quantized"),
        (torch.ones(3, 2, dtype=torch.int8), "w is int8 (3, 2): only floating (..., outputs, inputs)"),
        (torch.empty(3, 2, device="meta"), "w has no values (it is on the meta device): it cannot be quantized"),
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
    with pytest.raises(ConfigError, match=f"^{message}$"):
        pack(torch.ones(1, 1), bits, group)


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
# A stack that is never held.


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_a_stack_is_packed_as_if_it_were_there(bits: int, group: int) -> None:
    weight = torch.randn(5, 7, 70).to(BF16)
    assert same(pack_stack(iter(weight), 5, bits, group), pack(weight, bits, group))
    weight[3, 2, 1] = math.inf
    with pytest.raises(ConfigError, match=r"^experts\[3\] holds values that are not finite"):
        pack_stack(iter(weight), 5, bits, group, "experts")


# ---------------------------------------------------------------------------------------------------------------------
# MXFP4.


def test_mxfp4_by_hand() -> None:
    """Code 2j is the low half of byte j; the scale is 2^(s - 127)."""
    blocks = torch.zeros(1, 2, 16, dtype=torch.uint8)
    blocks[0, 0, :4] = torch.tensor([0x10, 0x32, 0x54, 0x76])  # 0 … 7: every magnitude
    blocks[0, 0, 4:8] = torch.tensor([0x98, 0xBA, 0xDC, 0xFE])  # with the sign
    blocks[0, 1, 15] = 0xF1
    got = unpack_mxfp4(blocks, torch.tensor([[127, 130]], dtype=torch.uint8))
    assert got.dtype == BF16
    assert got.shape == (1, 64)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert got[0, :16].tolist() == [*magnitudes, *(-m for m in magnitudes)]
    assert got[0, 8].signbit()  # minus zero
    assert got[0, 62:].tolist() == [0.5 * 8, -6 * 8]
    packed = pack_mxfp4(torch.tensor([[0.0] * 30 + [4.0, -48.0]]))
    assert packed.scales.tolist() == [[130]]  # 48 is 1.5 · 2^5: 2^5 over 4 is 2^3
    assert packed.blocks[0, 0, 15] == 0xF1
    assert (packed.shape, packed.nbytes) == ((1, 32), 17)


def test_mxfp4_rounds_to_the_nearest_and_ties_to_even() -> None:
    """The largest, 4, makes the scale 1."""
    given = [0.25, 0.26, 0.75, 0.74, 1.25, 1.26, 1.75, 1.74, 2.5, 2.51, 3.5, 3.49, 5.0, 5.01, 7.9, -0.25, -0.75, -7.9]
    right = [0.0, 0.5, 1.0, 0.5, 1.0, 1.5, 2.0, 1.5, 2.0, 3.0, 4.0, 3.0, 4.0, 6.0, 6.0, 0.0, -1.0, -6.0]
    packed = pack_mxfp4(torch.tensor([given + [4.0] * 14]))
    assert packed.scales.tolist() == [[127]]
    assert unpack_mxfp4(packed.blocks, packed.scales)[0, :18].tolist() == right


def test_mxfp4_at_the_ends_of_the_scale() -> None:
    for value in (2.0**-128, 6 * 2.0**-127, 2.0**-133, 3.0e38, 0.0):
        packed = pack_mxfp4(torch.full((1, 32), value))
        got = float(unpack_mxfp4(packed.blocks, packed.scales)[0, 0])
        assert abs(got - value) <= max(value / 3, 2.0**-129)
    assert pack_mxfp4(torch.zeros(1, 32)).scales.tolist() == [[0]]
    assert error(torch.zeros(1, 32), pack_mxfp4(torch.zeros(1, 32))) == 0


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_mxfp4_is_read_as_transformers_reads_it(seed: int, E: int, rows: int, groups: int) -> None:
    """Every byte and every scale with which all numbers are bfloat16's. Theirs gives the transpose."""
    theirs = importlib.import_module("transformers.integrations.mxfp4").convert_moe_packed_tensors
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (E, rows, groups, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(253, (E, rows, groups), dtype=torch.uint8, generator=random)
    got = unpack_mxfp4(blocks, scales)
    assert got.equal(theirs(blocks, scales).mT)
    with patch.object(quantize, "SLICE", 96):
        assert unpack_mxfp4(blocks, scales).equal(got)
    # And written: packing what was read stands for the same.
    packed = pack_mxfp4(got)
    assert unpack_mxfp4(packed.blocks, packed.scales).equal(got)
    assert error(got, packed) == 0


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, BF16, F64]))
def test_mxfp4_is_the_nearest_there_is(seed: int, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
    packed = pack_mxfp4(weight)
    got = unpack_mxfp4(packed.blocks, packed.scales).double().unflatten(-1, (-1, 32))
    scale = 2.0 ** (packed.scales.double().unsqueeze(-1) - 127)
    group = weight.double().unflatten(-1, (-1, 32))
    largest = group.abs().amax(-1, keepdim=True) / scale
    assert bool(((largest >= 4) & (largest < 8)).all())
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=F64)
    best = (group.abs() / scale).unsqueeze(-1).sub(codes).abs().amin(-1)
    assert torch.allclose((got - group).abs() / scale, best, rtol=0, atol=1e-6)
    assert error(weight, packed) == pytest.approx(distance(got, group), rel=1e-6)
    assert 0.05 < error(weight, packed) < 0.2


@pytest.mark.parametrize(
    ("scale", "message"),
    [(255, "holds scale 255, which stands for no number"), (254, "holds scale 254, with which a weight is beyond")],
)
def test_mxfp4_scales_that_are_no_numbers(scale: int, message: str) -> None:
    scales = torch.tensor([[127, scale]], dtype=torch.uint8)
    blocks = torch.full((1, 2, 16), 0x77, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=f"^experts.down_proj_scales {message}"):
        unpack_mxfp4(blocks, scales, "experts.down_proj_scales")
    if scale == 254:  # 1.5 · 2^127 is a number
        assert unpack_mxfp4(blocks & 0x33, scales)[0, 32] == 1.5 * 2.0**127


def test_mxfp4_of_what_cannot_be_packed() -> None:
    with pytest.raises(ConfigError, match=r"^w has 40 inputs: MXFP4 needs a multiple of 32$"):
        pack_mxfp4(torch.ones(1, 40), "w")
    with pytest.raises(ConfigError, match=r"^w holds values that are not finite"):
        pack_mxfp4(torch.full((1, 32), math.nan), "w")
    assert Mxfp4(*(t.zero_() for t in vars(pack_mxfp4(torch.ones(2, 3, 64))).values())).shape == (2, 3, 64)
