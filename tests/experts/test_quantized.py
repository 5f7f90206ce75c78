"""Quantized experts, layers and models are the same maths on the unpacked weights; the report counts every byte.

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

import pytest
import torch
import torch.nn.functional as F
from builders import FORMATS, activations, dense, distance, moe
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from handful.config import Activation, ModelConfig
from handful.errors import ConfigError, HandfulError, RoutingError
from handful.evaluate import evaluate
from handful.experts import Experts
from handful.experts.quantize_model import QuantizationReport, quantize_model
from handful.experts.quantized import PackedWeight, QuantizedExperts, QuantizedLinear
from handful.experts.reference import reference
from handful.experts.weights import ExpertWeights
from handful.generate import generate_tokens
from handful.kernels.extension import available
from handful.model import Decoder
from handful.quantize import Packed, error, pack, unpack
from handful.routing import Routing
from handful.sampling import Sampling

F64, BF16 = torch.float64, torch.bfloat16
ACTIVATIONS: Sequence[Activation] = get_args(Activation)
KERNELS = 2e-4  # what the native kernels may be off by in float32, relative to the size of the values


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
    assert distance(y_TD, reference(x_TD.to(F64), c.routing, unpacked(quantized).weights)) <= bound


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
@given(cases(tokens=(0, 40), widths=(8, 150)), st.sampled_from(FORMATS))
def test_experts_in_float32_by_kernels(c: Case, form: tuple[int, int]) -> None:
    """They round tokens to 16-bit whole numbers of their largest: by 1.5e-5 of it, which is up to four times a token's
    ordinary size, and the hidden values again."""
    compare(c, *form, torch.float32, KERNELS)


@settings(max_examples=80)
@given(cases(backends=["auto", "grouped"], tokens=(8, 40), widths=(16, 100)), st.sampled_from(FORMATS), st.booleans())
def test_experts_in_bfloat16(c: Case, form: tuple[int, int], exact: bool) -> None:
    """Against float64 on the same rounded inputs. The loop rounds the unpacked weights once more, and then as any
    bfloat16 layer: see the bound in test_experts.py. Kernels whose activations have 8 bits may be off by what their
    limits grant: inputs by 0.7 %, through a gate and its product, and hidden values by 1.15 %."""
    with activations(exact=exact):
        compare(c, *form, BF16, 1.2e-2 if exact else 2e-2)


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

    monkeypatch.setattr("handful.experts.weights.unpack", spy)
    c = case(4, 6, 2, 8, 8)
    dropped_TK = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]]).bool()
    chosen_TK = torch.tensor([[0, 5], [2, 4], [0, 1], [2, 1]])
    routing = dataclasses.replace(c.routing, experts_TK=chosen_TK, dropped_TK=dropped_TK)
    with torch.no_grad():
        QuantizedExperts.pack(c.experts)(c.x_TD, routing)
    assert shapes == [(16, 8), (8, 8)] * 2


def test_which_inputs_the_native_kernels_get(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def spy_experts(operation: Any, x_TD: Tensor, *rest: Any) -> Tensor:
        assert operation is torch.ops.handful.experts_quantized
        weights = ExpertWeights(*rest[3:-1])
        assert (weights.experts, weights.width, weights.hidden) == (4, 8, 12)
        assert weights.gate_up.dtype == torch.uint8
        assert weights.gate_up_bias is not None
        assert weights.down_bias is not None
        assert weights.gate_up_bias.shape == (4, 24)
        assert weights.down_bias.shape == (4, 8)
        assert weights.gate_up_bias.dtype == weights.down_bias.dtype == x_TD.dtype  # they were float64
        assert weights.activation == "geglu"
        calls.append(x_TD.dtype)
        return x_TD

    def spy_linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        assert weight.shape == (3, 8)
        assert bias is not None
        assert bias.dtype == x.dtype
        calls.append(x.dtype)
        return x[..., :3]

    there = True
    for module in ("backends", "native", "quantized"):
        monkeypatch.setattr(f"handful.experts.{module}.available", lambda: there)
    monkeypatch.setattr("handful.experts.native.native_error", lambda: "not built")
    monkeypatch.setattr("handful.experts.native._call", spy_experts)
    monkeypatch.setattr("handful.kernels.operations.linear", spy_linear)

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
    with pytest.raises(ConfigError, match="takes float32 and bfloat16"):
        ask("native", F64)
    there = False
    assert ask("auto", torch.float32) == []
    with pytest.raises(HandfulError, match=r"^experts backend 'native': not built$"):
        ask("native", torch.float32)


def test_native_asked_for_by_name_says_what_it_does_not_take() -> None:
    c = case(2, 4, 2, 8, 8, backend="native")
    quantized = QuantizedExperts.pack(c.experts)
    wrong = dataclasses.replace(c.routing, experts_TK=torch.tensor([[0, 1], [4, 2]]))
    messages = "takes float32 and bfloat16 on cpu$", r"^routing names expert 4: there are 4, counted from 0$"
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
    assert distance(y_TD, reference(c.x_TD, c.routing, unpacked(quantized.double()).weights)) < 1.2e-2
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
    """Put into an ordinary model what a quantized one of the same weights stands for."""
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
    quantized = {row.name for row in report.tensors if row.reason is None}
    kinds = ("attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.o.weight", "gate_up", "down", "gate_up.weight",
             "down.weight", "shared_gate.weight", "head.weight")  # fmt: skip
    assert quantized == {name for name in before if name.endswith(kinds)}
    assert report.share == sum(before[name][1] for name in quantized) / report.bytes_before
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


def test_subclasses_and_what_is_quantized_stay() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mid": nn.Linear(8, 8)})
    want = model["attention"](*[torch.ones(3, 8)] * 3)[0]
    reasons = {row.name: row.reason for row in quantize_model(model, 8).tensors}
    assert reasons["attention.out_proj.weight"] == "of NonDynamicallyQuantizableLinear, which stays as it is"
    assert reasons["attention.in_proj_weight"] == "of MultiheadAttention, which stays as it is"
    assert model["attention"](*[torch.ones(3, 8)] * 3)[0].equal(want)
    codes = model.state_dict()["mid.packed.codes"]
    again = quantize_model(model, 4)
    assert {row.name: row.reason for row in again.tensors}["mid.packed.codes"] == "quantized already"
    assert again.share == 0
    assert again.bytes_before == again.bytes_after
    assert model.state_dict()["mid.packed.codes"] is not None
    assert model.state_dict()["mid.packed.codes"].data_ptr() == codes.data_ptr()


def test_skip() -> None:
    model = Decoder(all_of_it())
    report = quantize_model(model, skip=["head", "layers.1", "*.attn.?.weight", "layers.2.ffn.shared_gate.weight"])
    assert isinstance(model.head, nn.Linear)
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
            "layers.2.ffn.experts.gate_up cannot be quantized without layers.2.ffn.experts.down (skipped, as asked)",
        ),
        # A dense layer's gate_up may be skipped alone; that of Experts is half of a whole.
        (["*.gate_up"], "layers.1.ffn.experts.down cannot be quantized without layers.1.ffn.experts.gate_up"),
    ],
)
def test_skips_that_make_no_sense(skip: list[str], message: str) -> None:
    model = Decoder(all_of_it())
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        quantize_model(model, skip=skip)
    assert not any(isinstance(module, PackedWeight) for module in model.modules())


def test_a_weight_that_cannot_be_quantized_is_named_before_anything_is_replaced() -> None:
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


def test_a_format_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^bits = 5: one of 8, 4$"):
        quantize_model(nn.Sequential(), 5)


def test_a_model_that_is_one_layer_cannot_be_replaced_in_place() -> None:
    with pytest.raises(ConfigError, match=r"model is itself of Linear.*QuantizedLinear\.pack"):
        quantize_model(nn.Linear(4, 4))


def test_old_weights_are_let_go_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(moe())
    old = [weakref.ref(layer.experts.gate_up) for layer in model.moe_layers]
    alive = []
    pack = QuantizedExperts.pack

    def spy(*args: Any) -> QuantizedExperts:
        gc.collect()
        alive.append([ref() is not None for ref in old])
        return pack(*args)

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


def test_a_quantized_model_turned_to_bfloat16_runs() -> None:
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
        quantized = copy.deepcopy(model)
        report = quantize_model(quantized, bits)
        assert report.share > 0.75
        changes[bits] = abs(evaluate(quantized, batches) - before)
    assert changes[8] < 0.01 * before
    assert changes[4] < 0.5 * before
    assert changes[8] < changes[4]
