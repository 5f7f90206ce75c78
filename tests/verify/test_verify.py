"""`verify` passes what is right, and catches each kind of mistake that a backend can make.

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · I inputs · O outputs
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from handful import cli
from handful.errors import ConfigError, RoutingError
from handful.experts import BACKENDS
from handful.experts.reference import reference
from handful.experts.weights import ExpertWeights
from handful.machine import native_error
from handful.quantize import Packed, unpack
from handful.routing import Routing
from handful.verify.cases import ACTIVATIONS, FORMATS, LOADS, MEMORY, SIZES, Case, draw, draw_cases, place
from handful.verify.checks import checks_of
from handful.verify.examine import Row, Tally, examine
from handful.verify.run import LEVELS, Verification, verify

# The module, and not the function of its name.
verify_module: Any = importlib.import_module("handful.verify.run")

# Whether the kernels are on this computer, whatever HANDFUL_ISA says of this process.
THERE = native_error() is None or os.environ.get("HANDFUL_ISA") == "none"

F64 = torch.float64
Backend = Callable[[Tensor, Routing, ExpertWeights], Tensor]
grouped = BACKENDS["grouped"]


def examined(backend: str, name: str = "float32", cases: int = 12) -> Row:
    return examine((backend, name), "torch", 0, cases, lambda _: None)


# ---------------------------------------------------------------------------------------------------------------------
# Cases.


@pytest.mark.parametrize("seed", range(4))
def test_the_default_cases_cover_what_there_is(seed: int) -> None:
    cases = list(draw_cases(seed, verify_module.CASES))
    assert len(cases) == verify_module.CASES
    assert [(c.tokens, c.experts, c.top_k, c.width, c.hidden) for c in cases[: len(SIZES)]] == SIZES
    assert {(c.activation, c.bias, c.memory) for c in cases} == {
        (kind, bias, memory) for kind in ACTIVATIONS for bias in (False, True) for memory in MEMORY
    }
    assert {c.load for c in cases} == set(LOADS)
    assert {c.drop for c in cases} == {0.0, 0.3, 1.0}


def test_the_corners() -> None:
    assert {T for T, *_ in SIZES} >= {0, 1, 2, 3, 4, 5, 6, 7, 8, 40, 300}
    assert any(E == 1 for _, E, *_ in SIZES)
    assert any(K == 1 < E for _, E, K, *_ in SIZES)
    assert any(K == E > 1 for _, E, K, *_ in SIZES)
    widths, hiddens = ({size[i] for size in SIZES} for i in (3, 4))
    assert widths >= {1, 3, 17, 33, 100, 16, 64, 128}
    assert hiddens >= {1, 3, 17, 33, 16, 32, 64, 128}


def test_a_seed_draws_the_same_cases_again_and_another_seed_others() -> None:
    assert list(draw_cases(3, 9)) == list(draw_cases(3, 9))
    assert list(draw_cases(3, 9)) != list(draw_cases(4, 9))
    case = Case(5, 3, 2, 4, 4, seed=9)
    first, second, other = (draw(c, "float32").values["x"] for c in (case, case, replace(case, seed=8)))
    assert first.equal(second)
    assert not first.equal(other)


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_ones_that_the_backend_can_be_given(name: str) -> None:
    for case in draw_cases(1, 12):
        drawn = draw(case, name)
        for key, value in drawn.values.items():
            assert value.dtype == F64
            if key in drawn.packed:
                assert value.equal(unpack(drawn.packed[key], F64))
            elif key != "up":
                assert value.to(drawn.dtype_of(key)).to(F64).equal(value) or case.drop, key


@pytest.mark.parametrize("activation", ["relu", "swiglu_clamped"])
@pytest.mark.parametrize("tokens", [3, 200])
def test_no_rounding_decides_a_slope(activation: Any, tokens: int) -> None:
    """Hidden values are exact in bfloat16, so no precision puts one on the other side of a kink; kinks are met."""
    drawn = draw(Case(tokens, 4, 2, 100, 32, activation=activation, bias=True, seed=5), "bfloat16")
    x, w, b = (drawn.values[key] for key in ("x", "gate_up", "gate_up_bias"))
    hidden = torch.einsum("td,egd->etg", x, w) + b.unsqueeze(1)
    assert not (hidden == 0).any()
    assert not (hidden.abs() == 7).any()
    if tokens == 200:
        assert hidden.to(torch.bfloat16).to(F64).equal(hidden)
        assert (hidden < 0).any()
        assert (hidden > 7).any()
        assert (hidden < -7).any()


def test_few_numbers_cannot_cancel() -> None:
    for activation in ACTIVATIONS:
        drawn = draw(Case(2, 4, 2, 3, 3, activation=activation, bias=True, seed=1), "bfloat16")
        assert all((value > 0).all() for value in drawn.values.values())


def test_what_is_dropped_weighs_nan() -> None:
    drawn = draw(Case(50, 4, 2, 3, 3, drop=0.5, seed=1), "float32")
    assert drawn.dropped_TK is not None
    assert 0 < drawn.dropped_TK.sum() < 100
    assert drawn.values["weights"].isnan().equal(drawn.dropped_TK)


def test_loads() -> None:
    chosen = {load: draw(Case(300, 8, 2, 2, 2, load=load, seed=1), "float32").experts_TK for load in LOADS}
    counts = {load: experts_TK.flatten().bincount(minlength=8) for load, experts_TK in chosen.items()}
    assert counts["even"].min() > 50
    assert counts["skewed"][0] > 2 * counts["skewed"][7]
    assert counts["one"][6:].sum() > 550
    assert counts["idle"][::2].sum() == 0
    assert (counts["idle"][1::2] > 0).all()


def test_memory() -> None:
    value = torch.randn(3, 4, 5)
    laid = {memory: place(value, memory) for memory in MEMORY}
    assert all(there.equal(value) for there in laid.values())
    assert laid["plain"].is_contiguous()
    assert laid["shifted"].is_contiguous()
    assert laid["shifted"].storage_offset() == 1
    assert laid["transposed"].stride() == (20, 1, 4)
    assert laid["gaps"].stride()[1] > 5
    for memory, there in laid.items():  # a shape without numbers has a place too
        assert place(value[:0], memory).shape == (0, 4, 5), there.shape


# ---------------------------------------------------------------------------------------------------------------------
# What is right passes, and nothing else.


@pytest.mark.parametrize("name", FORMATS)
def test_grouped_is_right(name: str) -> None:
    state = torch.random.get_rng_state()
    row = examined("grouped", name)
    assert row.failures == ()
    assert row.ok
    assert row.output_error is not None
    assert 0 < row.output_error <= row.output_bound
    if FORMATS[name].bits:
        assert (row.gradient_error, row.gradient_of, row.gradient_bound) == (None, None, None)
    else:
        assert row.gradient_error is not None
        assert row.gradient_bound is not None
        assert 0 < row.gradient_error <= row.gradient_bound
        assert row.gradient_of in ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
    assert torch.random.get_rng_state().equal(state)  # the caller's draws are left alone


def scaled(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    return grouped(x_TD, routing, experts) * 1.001


def one_element(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    """Off by 4e-3 of the largest, 5e-6 of the norm."""
    y_TD = grouped(x_TD, routing, experts)
    off_TD = torch.zeros_like(y_TD)
    if y_TD.numel() > 10_000:
        off_TD[0, 0] = 4e-3 * float(y_TD.detach().abs().max())
        off_TD *= min(1.0, float(5e-6 * y_TD.detach().norm() / off_TD.norm()))
    return y_TD + off_TD


def without_autograd(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    y_TD = grouped(x_TD, routing, experts)
    return y_TD if torch.is_grad_enabled() else y_TD * 1.001


def no_weight_gradient(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    return grouped(x_TD, replace(routing, weights_TK=routing.weights_TK.detach()), experts)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.0001


def x_gradient(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    return grouped(_Scale.apply(x_TD), routing, experts)  # type: ignore[no-untyped-call]


def wrong_dtype(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    return grouped(x_TD, routing, experts).double()


def swallows_nan(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    return grouped(x_TD, routing, experts).nan_to_num(0.0)


def leaks_nan(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    y_TD = grouped(x_TD, routing, experts)
    return y_TD + 0 * y_TD.sum()


def leaks_dropped(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    return grouped(x_TD, routing, experts) + 0 * routing.weights_TK.sum(1, keepdim=True).to(x_TD.dtype)


def computes_dropped(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    weights_TK = routing.weights_TK.nan_to_num(0.5)
    return grouped(x_TD, replace(routing, weights_TK=weights_TK, dropped_TK=None), experts)


def crashes(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    raise RuntimeError("no kernel\nfor this")


def ignores_strides(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    T, D = x_TD.shape
    return grouped(x_TD.as_strided((T, D), (D, 1)), routing, experts)


def assumes_alignment(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    assert x_TD.data_ptr() % 8 == 0, "misaligned"
    return grouped(x_TD, routing, experts)


def accepts_any_expert(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    return grouped(x_TD, replace(routing, experts_TK=routing.experts_TK.clamp(0, experts.experts - 1)), experts)


def other_error(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    try:
        return grouped(x_TD, routing, experts)
    except RoutingError as error:
        raise IndexError(str(error)) from None


def random_bits(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    y_TD = grouped(x_TD, routing, experts)
    return y_TD * (1 + 1e-6 * torch.rand_like(y_TD))


def needs_every_gradient(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    assert x_TD.requires_grad or not torch.is_grad_enabled(), "x wants no gradient"
    return grouped(x_TD, routing, experts)


def gradient_expects_memory(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    y_TD = grouped(x_TD, routing, experts)
    if y_TD.requires_grad:

        def look(grad_TD: Tensor) -> None:
            assert not grad_TD.numel() or 0 not in grad_TD.stride(), "expanded gradient"

        y_TD.register_hook(look)
    return y_TD


def relu_slope(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    """relu whose slope at 0 is 1."""
    if experts.activation != "relu":
        return grouped(x_TD, routing, experts)

    class At0(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            ctx.save_for_backward(h)
            return h.relu()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (h,) = ctx.saved_tensors
            slope: Tensor = h >= 0
            return grad * slope

    module: types.ModuleType = importlib.import_module("handful.experts.reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "activate", lambda h, kind: At0.apply(h))  # type: ignore[no-untyped-call]
        y_TD: Tensor = module.reference(x_TD, routing, experts)
        return y_TD


class _Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.detach()


def no_second_derivative(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    return reference(_Detached.apply(x_TD), routing, experts)  # type: ignore[no-untyped-call]


class _First(torch.autograd.Function):
    """The gradient is right, and half as much again is added to the gradient's own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 0.5 * (grad - grad.detach())


def second_derivative(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    return reference(_First.apply(x_TD), routing, experts)  # type: ignore[no-untyped-call]


def names_its_code(x_TD: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    try:
        return grouped(x_TD, routing, experts)
    except RoutingError as error:
        raise RoutingError(f"make_plan, expert_sort.cpp:25, {error}") from None


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (scaled, r"^T=40 .*: output is off by 0\.001, bound 1e-05"),
        (one_element, r"^T=257 .*: output has an element off by 0\.0001 of the largest, bound 8e-05"),
        (without_autograd, r"^T=40 [^;]*: output alone is off by 0\.001, bound 1e-05$"),
        (no_weight_gradient, r"^T=40 [^;]*: gradient of weights is missing$"),
        (x_gradient, r"^T=40 [^;]*: gradient of x is off by 0\.0001, bound 1e-05$"),
        (wrong_dtype, r"output is \(\(40, 64\), 'torch\.float64'\): it must be \(\(40, 64\), 'torch\.float32'\)"),
        (swallows_nan, r"^NaN in an expert, relu: .*: of \d+ values to be NaN \d+ are not, and 0 others are$"),
        (swallows_nan, r"^NaN in a token: .*: of 40 values to be NaN 40 are not, and 0 others are$"),
        (leaks_nan, r"^NaN in a token: T=5 output alone: of 40 values to be NaN 0 are not, and 160 others are$"),
        (leaks_dropped, r"dropped .*: output is off by inf, bound 1e-05"),
        (computes_dropped, r"dropped .*: output is off by "),
        (crashes, r"^T=40 .*: RuntimeError: no kernel$"),
        (ignores_strides, r"transposed memory .*: output is off by "),
        (assumes_alignment, r"shifted memory .*: AssertionError: misaligned$"),
        (accepts_any_expert, r"^mistakes are errors: T=1 expert -1 of 6: is accepted$"),
        (other_error, r"^mistakes are errors: T=1 expert -1 of 6: IndexError, not an error of ours$"),
        (
            names_its_code,
            r"^mistakes are errors: T=1 expert -1 of 6: make_plan, expert_sort\.cpp:25, .* names a line of code$",
        ),
        (no_second_derivative, r"^second derivatives: they are left out in silence$"),
        (second_derivative, r"^second derivatives: they are off by 0\.\d+, bound 8e-05$"),
        (random_bits, r"^same bits again: T=1: output alone with 1 threads has other bits than with 1$"),
        (needs_every_gradient, r"^frozen inputs: AssertionError: x wants no gradient$"),
        (gradient_expects_memory, r"gaps memory .*: AssertionError: expanded gradient$"),
        (relu_slope, r"T=\d+ .* relu .*: gradient of \w+ is off by "),
    ],
)
def test_a_wrong_backend_is_caught(backend: Backend, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "wrong", backend)
    row = examined("wrong", cases=30 if backend is relu_slope else 20)  # whose case comes late
    assert not row.ok
    assert any(re.search(message, failure) for failure in row.failures), "\n".join(row.failures)
    # All that is not its mistake goes through.
    if backend not in (scaled, crashes, wrong_dtype, x_gradient, no_weight_gradient, without_autograd):
        assert len(row.failures) < 18


def test_an_error_that_is_not_finite_is_none_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "wrong", lambda *given: grouped(*given) * math.nan)
    row = examined("wrong", cases=1)
    assert (row.output_error, row.gradient_error) == (math.inf, math.inf)
    found = Verification(seed=0, cases=1, seconds=1.0, native_error=None, rows=(row,))
    document = found.to_dict()
    assert document["rows"][0]["output_error"] is None
    assert document["rows"][0]["gradient_error"] is None
    json.dumps(document, allow_nan=False)


# ---------------------------------------------------------------------------------------------------------------------
# The native paths, played by torch: what is asked of them is asked on every machine.


def played_linear(x_TI: Tensor, weight: Tensor | Packed, bias_O: Tensor | None) -> Tensor:
    matrix_OI = unpack(weight, x_TI.dtype) if isinstance(weight, Packed) else weight
    if x_TI.dim() != 2 or x_TI.shape[1] != matrix_OI.shape[1]:
        raise RoutingError("x does not fit")
    # In float64, where what threads change is far below the bits that are kept.
    bias = None if bias_O is None else bias_O.to(F64)
    return torch.nn.functional.linear(x_TI.to(F64), matrix_OI.to(F64), bias).to(x_TI.dtype)


def no_bias(x_TI: Tensor, weight: Tensor | Packed, bias_O: Tensor | None) -> Tensor:
    return played_linear(x_TI, weight, None)


def one_scale(x_TI: Tensor, weight: Tensor | Packed, bias_O: Tensor | None) -> Tensor:
    """Every group with the scale of the first."""
    if isinstance(weight, Packed):
        weight = replace(weight, scales=weight.scales[:, :1].expand_as(weight.scales).contiguous())
    return played_linear(x_TI, weight, bias_O)


def any_shape(x_TI: Tensor, weight: Tensor | Packed, bias_O: Tensor | None) -> Tensor:
    inputs = weight.inputs if isinstance(weight, Packed) else weight.shape[1]
    return played_linear(x_TI.reshape(len(x_TI), -1)[:, :inputs], weight, bias_O)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    def put(linear: Any) -> None:
        module: Any = types.ModuleType("handful.kernels.operations")
        module.linear = linear
        monkeypatch.setitem(sys.modules, "handful.kernels.operations", module)

    return put


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8/32", "int4/128"])
def test_a_right_linear_map_passes(name: str, play: Callable[[Any], None]) -> None:
    play(played_linear)
    row = examined("linear", name)
    assert row.failures == ()
    assert row.output_error is not None
    assert row.gradient_bound is None
    assert row.checks == 4


@pytest.mark.parametrize(
    ("linear", "name", "message"),
    [
        (no_bias, "float32", "bias .*: output alone is off by"),
        (one_scale, "int4/32", ": output alone is off by"),
        (any_shape, "int8/128", "mistakes are errors: T=1 x of another width: is accepted"),
    ],
)
def test_a_wrong_linear_map_is_caught(linear: Any, name: str, message: str, play: Callable[[Any], None]) -> None:
    play(linear)
    row = examined("linear", name, cases=30)
    assert any(re.search(message, failure) for failure in row.failures), "\n".join(row.failures)


def test_threads_must_not_change_a_bit(play: Callable[[Any], None]) -> None:
    def by_threads(x_TI: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
        return played_linear(x_TI, weight, bias_O) * (1 + 1e-6 * torch.get_num_threads())

    play(by_threads)
    before = torch.get_num_threads()
    row = examined("linear", cases=1)
    assert torch.get_num_threads() == before
    assert row.failures == ("same bits with any threads: T=1: output alone with 2 threads has other bits than with 1",)


def test_what_is_checked() -> None:
    """Every format is asked about NaN, mistakes and bits; gradients only of what can be trained."""
    for name, kind in FORMATS.items():
        checks = checks_of("native", name)
        assert "same bits with any threads" in checks
        assert sum(what.startswith("NaN in an expert") for what in checks) == len(ACTIVATIONS)
        assert ("frozen inputs" in checks) is (not kind.bits)


# ---------------------------------------------------------------------------------------------------------------------
# verify: what is examined, levels, children.


def test_verify_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one: grouped in this process and, where the native kernels are, their lowest level in another."""
    levels = ["avx2"] if THERE else []
    steps: list[tuple[int, int, str]] = []
    found = verify(seed=5, cases=2, levels=levels, progress=lambda *step: steps.append(step))
    assert found.ok, "\n".join(f"{row.backend} {row.level} {row.format}: {row.failures}" for row in found.rows)
    assert (found.seed, found.cases) == (5, 2)
    assert (found.native_error is None) == THERE
    of = {(row.backend, row.level, row.format) for row in found.rows}
    trained, packed = ("float32", "bfloat16", "autocast"), ("int8/32", "int8/128", "int4/32", "int4/128")
    expected = {("grouped", "torch", name) for name in ("float64", *trained, *packed)}
    for level in levels:
        expected |= {("native", level, name) for name in (*trained, *packed)}
        expected |= {("linear", level, name) for name in ("float32", "bfloat16", *packed)}
    assert of == expected
    assert len(found.rows) == len(of)
    total = sum(row.cases + row.checks for row in found.rows)
    assert [step[:2] for step in steps] == [(i + 1, total) for i in range(total)]
    assert steps[0][2] == "grouped torch float64"


def test_another_backend_is_examined_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "mine", scaled)
    monkeypatch.delitem(BACKENDS, "grouped")
    found = verify(cases=1, levels=[])
    assert not found.ok
    wrong = {(row.backend, row.format) for row in found.rows if not row.ok}
    assert ("mine", "float32") in wrong
    assert {row.backend for row in found.rows} == {"mine"}


def test_mistakes_in_the_call() -> None:
    with pytest.raises(ConfigError, match=r"^cases = 0: at least 1$"):
        verify(cases=0)
    with pytest.raises(ConfigError, match=r"^level 'sse': this computer has "):
        verify(levels=["sse"])


def test_levels_are_the_machines_whatever_handful_isa_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "native", reference)
    plain = verify_module._native_levels()
    if native_error() is None:
        isa = torch.ops.handful.isa().split()
        assert plain[0] == [level for level, features in LEVELS.items() if features & set(isa)]
    assert bool(plain[0]) == THERE
    assert (plain[1] is None) == THERE
    monkeypatch.setenv("HANDFUL_ISA", "none")
    assert verify_module._native_levels() == plain


ROW = asdict(Tally(("native", "float32")).row("", 3, 0))
# A child that says one case and one row for each subject, after `behave`, which knows the subject's `name`.
CHILD = f"""
import json, os, signal, sys, time
print("a library's greeting")
for name in sys.argv[1:]:
    backend, _, form = name.partition(":")
    say = lambda said: print(json.dumps(said), flush=True)
    {{behave}}
    say({{{{"row": {{{{**json.loads({json.dumps(ROW)!r}), "backend": backend, "format": form}}}}}}}})
"""
SUBJECTS = [("native", "float32"), ("native", "bfloat16"), ("linear", "float32")]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Row]]:
    def run(behave: str) -> list[Row]:
        code = CHILD.replace("{{", "{").replace("}}", "}").replace("{behave}", behave)

        def command(subjects: Any, seed: int, cases: int) -> list[str]:
            return [sys.executable, "-c", code, *(f"{backend}:{name}" for backend, name in subjects)]

        monkeypatch.setattr(verify_module, "_command", command)
        rows: list[Row] = verify_module._in_children(SUBJECTS, "avx2", 0, 3, lambda *_: None)
        assert [(row.backend, row.format) for row in rows] == SUBJECTS
        assert {row.level for row in rows} == {"avx2"}
        return rows

    return run


def test_a_child_is_told_its_level(children: Callable[[str], list[Row]]) -> None:
    rows = children('assert os.environ["HANDFUL_ISA"] == "avx2"')
    assert all(row.ok and row.cases == 3 for row in rows), rows


def test_a_child_that_dies_is_a_failure_and_the_rest_goes_on(children: Callable[[str], list[Row]]) -> None:
    rows = children('say({"at": f"case of {form}"}); form == "bfloat16" and os.kill(os.getpid(), signal.SIGILL)')
    assert [row.failures for row in rows] == [(), ("case of bfloat16: the process died of SIGILL",), ()]


def test_a_child_that_dies_between_cases_is_a_failure_too(children: Callable[[str], list[Row]]) -> None:
    rows = children('form == "bfloat16" and os.kill(os.getpid(), signal.SIGSEGV)')
    assert [row.failures for row in rows] == [(), ("the process died of SIGSEGV",), ()]


def test_a_child_that_cannot_begin_has_failed_everything(children: Callable[[str], list[Row]]) -> None:
    rows = children("sys.exit('no such thing')")
    assert {row.failures for row in rows} == {("the process ended with status 1: no such thing",)}


def test_a_child_that_hangs_is_stopped(children: Callable[[str], list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "CHILD_SECONDS", 2)
    rows = children('say({"at": "a lock"}); form == "bfloat16" and time.sleep(60)')
    assert [row.failures for row in rows] == [(), ("a lock: the process was stopped after 2 s",), ()]


def test_what_a_child_says(capsys: pytest.CaptureFixture[str]) -> None:
    verify_module.serve(["7", "2", "grouped:int8/32", "grouped:float32"])
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [line["row"] for line in said if "row" in line]
    assert [row["format"] for row in rows] == ["int8/32", "float32"]
    want = examine(("grouped", "float32"), "", 7, 2, lambda _: None)
    assert Row(**{**rows[1], "failures": tuple(rows[1]["failures"])}) == want
    assert [line["at"] for line in said if "at" in line][:2] == [str(case) for case in draw_cases(7, 2)]


def test_a_child_is_this_package_wherever_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the same name where the command is given must not be examined in its place."""
    (tmp_path / "handful").mkdir()
    (tmp_path / "handful/__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    rows = verify_module._in_children([("grouped", "float64")], "avx2", 0, 1, lambda *_: None)
    if native_error() is None:
        assert [row.failures for row in rows] == [()]
    assert "the wrong one" not in str(rows)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


class Called:
    """`handful verify …`, with few cases, in two formats and without children."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        few = [subject for subject in verify_module._torch_subjects() if subject[1] in ("bfloat16", "int8/32")]
        monkeypatch.setattr(verify_module, "_torch_subjects", lambda: few)
        monkeypatch.setattr(verify_module, "verify", partial(verify, cases=2, levels=[]))
        monkeypatch.setenv("COLUMNS", "200")

    def __call__(self, *arguments: str) -> tuple[int, str, list[str]]:
        self.monkeypatch.setattr(sys, "argv", ["handful", "verify", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = self.capsys.readouterr()
        return int(end.value.code or 0), out, err.splitlines()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Called:
    return Called(monkeypatch, capsys)


def test_the_table(called: Called) -> None:
    code, out, err = called("--seed", "3")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert out.startswith("Worst errors against the plain loop in float64, seed 3")
    assert lines[1] == ["backend", "level", "format", "cases", "output", "bound", "worst", "gradient", "bound"]
    assert [line[2] for line in lines[2:]] == ["bfloat16", "int8/32"]
    assert all(line[:2] == ["grouped", "torch"] and line[-1] == "ok" for line in lines[2:])
    assert re.fullmatch(
        r"Proved on this computer: all 2 rows, \d+ cases, compute what the plain loop does in float64; it took \d+ s\.",
        err[-1],
    )
    # Where there is no terminal, a line at the start of each row.
    assert err[0].endswith(": grouped torch bfloat16")
    assert err[1].endswith(": grouped torch int8/32")
    assert len(err) == 3 + (not THERE)


def test_without_native_kernels_a_line_says_why(called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_native_levels", lambda: ([], "this CPU has no AVX2"))
    monkeypatch.setattr(verify_module, "verify", partial(verify, cases=1))
    code, out, err = called()
    assert (code, len(out.splitlines())) == (0, 4)
    assert err[-2] == "the native kernels were not examined: this CPU has no AVX2"


def test_the_table_fits_into_80_columns(called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = called()
    assert "…" not in out
    assert Console().width == 80


def test_a_wrong_row_is_exit_status_1(called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "grouped", lambda x, r, w: (reference if w.bits else crashes)(x, r, w))
    code, out, err = called()
    assert code == 1
    assert [line.split()[-1] for line in out.splitlines()[2:]] == ["no", "ok"]
    assert re.fullmatch(r"Not proved on this computer: 1 of 2 rows is wrong; it took \d+ s\.", err[-1])
    told = [line for line in err if line.startswith("grouped torch bfloat16: ")]
    assert len(told) == 4
    assert re.fullmatch(r"grouped torch bfloat16: T=40 .*: RuntimeError: no kernel", told[0])
    assert re.fullmatch(r"grouped torch bfloat16: and \d+ more failures; --json tells all", told[3])


@pytest.mark.parametrize("backend", [grouped, crashes])
def test_json(backend: Backend, called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "grouped", backend)
    code, out, _ = called("--json", "--seed", "9")
    document = json.loads(out)
    assert code == (0 if document["ok"] else 1)
    assert document["ok"] is (backend is grouped)
    assert list(document) == ["seed", "cases", "seconds", "native_error", "rows", "ok"]
    assert (document["seed"], document["cases"]) == (9, 2)
    row = document["rows"][0]
    assert list(row) == [
        "backend", "level", "format", "cases", "checks", "output_error", "output_bound", "gradient_error",
        "gradient_of", "gradient_bound", "failures", "ok",
    ]  # fmt: skip
    assert (row["backend"], row["level"], row["format"]) == ("grouped", "torch", "bfloat16")
    assert row["ok"] is document["ok"]
    if backend is crashes:
        assert row["output_error"] is None
        assert row["failures"][0].endswith(": RuntimeError: no kernel")
    else:
        assert isinstance(row["output_error"], float)
        assert row["failures"] == []
