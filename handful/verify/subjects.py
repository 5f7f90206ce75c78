"""What is examined: a backend in one format, run on a case that was drawn; and the reference, with how far off it is
and how far it may be.

Legend: T tokens · D model width · K experts per token · O outputs of a linear map
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from handful.experts import Experts
from handful.experts.quantized import QuantizedExperts
from handful.meta_device import meta_device
from handful.quantize import Packed
from handful.routing import Routing
from handful.verify.cases import F64, FORMATS, Drawn, place, roundings

__all__ = ["ELEMENT", "Subject", "WrongError", "bounds", "distance", "expected", "forward", "inputs", "run"]

# A largest single error of this many bounds, in units of the largest value: one wrong element hardly moves a norm.
ELEMENT = 8
LINEAR = 1e-2  # of a linear map by codes: its x made bytes, and the output rounded

# A backend (or "linear", the native linear map) and the name of a format.
Subject = tuple[str, str]


class WrongError(Exception):
    """A case or check that did not come out right, told in a line."""


def distance(got: Tensor, want: Tensor) -> tuple[float, float]:
    """‖got − want‖ / ‖want‖, and the largest element's error / the largest of want.

    Where nothing is wanted, nothing may come; inf where something is not finite.
    """
    if not want.numel():
        return 0.0, 0.0
    off = got.to(F64) - want
    errors = []
    for order in (2.0, math.inf):
        size = float(torch.linalg.vector_norm(want, order))
        error = float(torch.linalg.vector_norm(off, order))
        errors.append(error / size if size else math.inf if error else 0.0)
    return (errors[0], errors[1]) if all(map(math.isfinite, errors)) else (math.inf, math.inf)


def bounds(backend: str, name: str) -> tuple[float, float | None]:
    """How far off the output and the gradients may be; None: forward only."""
    kind = FORMATS[name]
    if backend == "linear":
        if kind.bits:
            return LINEAR, None
        return (roundings(2) if name == "bfloat16" else kind.output), None
    if kind.bits and backend != "native":
        return roundings(9), None  # x may be in bfloat16, and then so is every step
    return kind.output, kind.gradient


def _routing(drawn: Drawn, weights_TK: Tensor, memory: str = "plain") -> Routing:
    even_TE = torch.full((len(drawn.experts_TK), drawn.case.experts), 1 / drawn.case.experts)
    dropped_TK = None if drawn.dropped_TK is None else place(drawn.dropped_TK, memory)
    return Routing(even_TE, even_TE, place(drawn.experts_TK, memory), weights_TK, dropped_TK)


def _experts(drawn: Drawn, backend: str, given: dict[str, Tensor]) -> Experts:
    """A layer that holds these parameters as they lie in memory."""
    case = drawn.case
    with meta_device():
        experts = Experts(
            case.experts, case.width, case.hidden, activation=case.activation, bias=case.bias, backend=backend
        )
    for name, _ in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(given[name]))
    return experts


def _gradients(experts: Experts, x_TD: Tensor, routing: Routing, up_TD: Tensor) -> dict[str, Tensor]:
    """The output, and every gradient that autograd gave."""
    y_TD = experts(x_TD, routing)
    y_TD.backward(up_TD)
    leaves = {"x": x_TD, "weights": routing.weights_TK, **dict(experts.named_parameters())}
    return {"output": y_TD.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def _reference(drawn: Drawn) -> dict[str, Tensor]:
    """What is right: the plain loop in float64."""
    leaves = {name: value.clone() for name, value in drawn.values.items()}
    x_TD, weights_TK = leaves["x"].requires_grad_(), leaves["weights"].requires_grad_()
    experts = _experts(drawn, "reference", leaves)
    return _gradients(experts, x_TD, _routing(drawn, weights_TK), leaves["up"])


def inputs(drawn: Drawn) -> dict[str, Tensor]:
    """What a backend is given, as its case wants it in memory."""
    return {
        name: place(value.to(drawn.dtype_of(name)), drawn.case.memory)
        for name, value in drawn.values.items()
        if name not in ("up", *drawn.packed)
    }


def _output(drawn: Drawn, backend: str) -> Tensor:
    """The output alone, as for generating text."""
    given, case = inputs(drawn), drawn.case
    routing = _routing(drawn, given["weights"], case.memory)
    with torch.inference_mode():
        if not drawn.packed:
            y_TD: Tensor = _experts(drawn, backend, given)(given["x"], routing)
            return y_TD
        experts = QuantizedExperts(
            drawn.packed["gate_up"],
            drawn.packed["down"],
            activation=case.activation,
            gate_up_bias=given.get("gate_up_bias"),
            down_bias=given.get("down_bias"),
            backend=backend,
        )
        y_TD = experts(given["x"], routing)
        return y_TD


def _results(drawn: Drawn, backend: str, frozen: Sequence[str] = ()) -> dict[str, Tensor]:
    """What a backend gives, both with and without autograd. `frozen` get no gradient."""
    out = {"output alone": _output(drawn, backend)}
    if drawn.packed:
        return out
    given = inputs(drawn)
    experts = _experts(drawn, backend, given)
    for name, leaf in (("x", given["x"]), ("weights", given["weights"]), *experts.named_parameters()):
        leaf.requires_grad_(name not in frozen)
    up_TD = place(drawn.values["up"].to(out["output alone"].dtype), drawn.case.memory)
    if drawn.case.memory == "gaps" and len(up_TD):
        up_TD = up_TD[:1, :1].expand_as(up_TD)
    return out | _gradients(experts, given["x"], _routing(drawn, given["weights"], drawn.case.memory), up_TD)


def _linear(drawn: Drawn) -> dict[str, Tensor]:
    """The native linear map, on one expert's first matrix."""
    given = inputs(drawn)
    bias_O = given["gate_up_bias"][0].contiguous() if drawn.case.bias else None
    if drawn.packed:
        first = drawn.packed["gate_up"]
        weight: Tensor | Packed = replace(first, codes=first.codes[0], scales=first.scales[0])
    else:
        weight = given["gate_up"][0]
    operations = importlib.import_module("handful.kernels.operations")
    with torch.inference_mode():
        return {"output alone": operations.linear(given["x"], weight, bias_O)}


def _linear_reference(drawn: Drawn) -> dict[str, Tensor]:
    values = drawn.values
    bias_O = values["gate_up_bias"][0] if drawn.case.bias else None
    return {"output": nn.functional.linear(values["x"], values["gate_up"][0], bias_O)}


def expected(drawn: Drawn, backend: str) -> dict[str, Tensor]:
    """What a backend is to give: the output, and of experts every gradient."""
    return _linear_reference(drawn) if backend == "linear" else _reference(drawn)


def forward(drawn: Drawn, backend: str, given: dict[str, Tensor]) -> Tensor:
    """The output of a layer that holds these parameters, as autograd is to see it."""
    y_TD: Tensor = _experts(drawn, backend, given)(given["x"], _routing(drawn, given["weights"]))
    return y_TD


def run(drawn: Drawn, subject: Subject, frozen: Sequence[str] = ()) -> dict[str, Tensor]:
    """What a subject gives of a case: "output alone", and with autograd "output" and every gradient."""
    backend, name = subject
    if backend == "linear":
        return _linear(drawn)
    with torch.autocast("cpu", torch.bfloat16, enabled=FORMATS[name].autocast):
        return _results(drawn, backend, frozen)
