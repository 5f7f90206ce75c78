"""One backend in one precision, held against the plain loop in float64: its output, every gradient, and what else must
hold (NaN stays where it is, mistakes are errors, the same call gives the same bits).

Legend: T tokens · D model width · E experts · K experts per token · F an expert's hidden width · I inputs and O outputs
of a linear map
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from handful.config import Activation
from handful.errors import HandfulError
from handful.experts import Experts
from handful.experts.quantized import QuantizedExperts
from handful.meta_device import meta_device
from handful.quantize import Packed
from handful.routing import Routing
from handful.verify.cases import ACTIVATIONS, FORMATS, Case, Drawn, draw, draw_cases, place, roundings

__all__ = ["Row", "Subject", "checks_of", "examine", "lost"]

F64 = torch.float64
PARAMETERS = ("gate_up", "down", "gate_up_bias", "down_bias")

# A largest single error of this many bounds, in units of the largest value: one wrong element hardly moves a norm.
ELEMENT = 8

# A backend (or "linear", the native linear map) and the name of a format.
Subject = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One backend at one level and in one format.

    level             native kernels: avx2, avx512 or amx. Otherwise torch.
    cases, checks     random cases compared with the reference; properties checked (NaN, mistakes, same bits).
    output_error      the worst ‖out − ref‖ / ‖ref‖; None: no case came to an end. inf: something is not finite.
    gradient_error    the same over every gradient, and `gradient_of` is whose; None: forward only.
    failures          what went wrong, a line each, with the case that shows it.
    """

    backend: str
    level: str
    format: str
    cases: int
    checks: int
    output_error: float | None
    output_bound: float
    gradient_error: float | None
    gradient_of: str | None
    gradient_bound: float | None
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failures


def _bounds(backend: str, name: str) -> tuple[float, float | None]:
    kind = FORMATS[name]
    if backend == "linear":
        return (roundings(2) if name == "bfloat16" else kind.output), None
    if kind.bits and backend != "native":
        return roundings(9), None  # x may be in bfloat16, and then so is every step
    return kind.output, kind.gradient


# ---------------------------------------------------------------------------------------------------------------------
# Running them.


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


def _given(drawn: Drawn) -> dict[str, Tensor]:
    """What a backend is given, as its case wants it in memory."""
    return {
        name: place(value.to(drawn.dtype_of(name)), drawn.case.memory)
        for name, value in drawn.values.items()
        if name not in ("up", *drawn.packed)
    }


def _output(drawn: Drawn, backend: str) -> Tensor:
    """The output alone, as for generating text."""
    given, case = _given(drawn), drawn.case
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
    given = _given(drawn)
    experts = _experts(drawn, backend, given)
    for name, leaf in (("x", given["x"]), ("weights", given["weights"]), *experts.named_parameters()):
        leaf.requires_grad_(name not in frozen)
    up_TD = place(drawn.values["up"].to(out["output alone"].dtype), drawn.case.memory)
    if drawn.case.memory == "gaps" and len(up_TD):
        up_TD = up_TD[:1, :1].expand_as(up_TD)
    return out | _gradients(experts, given["x"], _routing(drawn, given["weights"], drawn.case.memory), up_TD)


def _linear(drawn: Drawn) -> dict[str, Tensor]:
    """The native linear map, on one expert's first matrix."""
    given = _given(drawn)
    bias_O = given["gate_up_bias"][0].contiguous() if drawn.case.bias else None
    if drawn.packed:
        first = drawn.packed["gate_up"]
        weight: Tensor | Packed = replace(first, codes=first.codes[0], scales=first.scales[0])
    else:
        weight = given["gate_up"][0]
    native = importlib.import_module("handful.experts.native")
    with torch.inference_mode():
        return {"output alone": native.linear(given["x"], weight, bias_O)}


def _linear_reference(drawn: Drawn) -> dict[str, Tensor]:
    values = drawn.values
    bias_O = values["gate_up_bias"][0] if drawn.case.bias else None
    return {"output": nn.functional.linear(values["x"], values["gate_up"][0], bias_O)}


def _run(drawn: Drawn, subject: Subject, frozen: Sequence[str] = ()) -> dict[str, Tensor]:
    backend, name = subject
    if backend == "linear":
        return _linear(drawn)
    with torch.autocast("cpu", torch.bfloat16, enabled=FORMATS[name].autocast):
        return _results(drawn, backend, frozen)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing.


class WrongError(Exception):
    """A case or check that did not come out right, told in a line."""


def _distance(got: Tensor, want: Tensor) -> tuple[float, float]:
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


@dataclass
class Tally:
    """The worst of one row, as it is found."""

    subject: Subject
    output: float | None = None
    gradient: float | None = None
    gradient_of: str | None = None
    failures: list[str] = field(default_factory=list)

    def compare(self, drawn: Drawn) -> None:
        """Run a case and hold it against the reference. Raises WrongError with what is out of bounds."""
        backend, name = self.subject
        want = _linear_reference(drawn) if backend == "linear" else _reference(drawn)
        got = _run(drawn, self.subject)
        bounds = _bounds(backend, name)
        y_dtype = torch.bfloat16 if FORMATS[name].autocast else drawn.x_dtype
        wrong = []
        for key in [*want, "output alone"] if bounds[1] is not None else ["output alone"]:
            right = want["output" if key == "output alone" else key]
            if key not in got:
                wrong.append(f"gradient of {key} is missing")
                continue
            is_output = key.startswith("output")
            what, bound = (key, bounds[0]) if is_output else (f"gradient of {key}", bounds[1] or 0.0)
            dtype = y_dtype if is_output else drawn.dtype_of(key)
            if got[key].shape != right.shape or got[key].dtype != dtype:
                found, wanted = (
                    (tuple(shape), str(d)) for shape, d in ((got[key].shape, got[key].dtype), (right.shape, dtype))
                )
                wrong.append(f"{what} is {found}: it must be {wanted}")
                continue
            norm, element = _distance(got[key], right)
            if norm > bound:
                wrong.append(f"{what} is off by {norm:.2g}, bound {bound:.2g}")
            elif element > ELEMENT * bound:
                wrong.append(f"{what} has an element off by {element:.2g} of the largest, bound {ELEMENT * bound:.2g}")
            if is_output:
                self.output = max(norm, self.output or 0.0)
            elif self.gradient is None or norm > self.gradient:
                self.gradient, self.gradient_of = norm, key
        if wrong:
            raise WrongError("; ".join(wrong))

    def attempt(self, what: str, run: Callable[[], None]) -> None:
        """Run a case or check; whatever it raises is a failure of the backend."""
        try:
            run()
        except WrongError as error:
            self.failures.append(f"{what}: {error}")
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            self.failures.append(f"{what}: {type(error).__name__}: {first}")

    def row(self, level: str, cases: int, checks: int) -> Row:
        output_bound, gradient_bound = _bounds(*self.subject)
        return Row(
            backend=self.subject[0],
            level=level,
            format=self.subject[1],
            cases=cases,
            checks=checks,
            output_error=self.output,
            output_bound=output_bound,
            gradient_error=self.gradient,
            gradient_of=self.gradient_of,
            gradient_bound=gradient_bound,
            failures=tuple(self.failures),
        )


def examine(subject: Subject, level: str, seed: int, cases: int, on_case: Callable[[str], None]) -> Row:
    """Run every case and check of one subject, in this process."""
    backend, name = subject
    tally = Tally(subject)
    for case in draw_cases(seed, cases):
        on_case(str(case))
        tally.attempt(str(case), lambda case=case: tally.compare(draw(case, name)))  # type: ignore[misc]
    checks = checks_of(backend, name)
    for what, check in checks.items():
        on_case(what)
        tally.attempt(what, partial(check, subject, seed))
    return tally.row(level, cases, len(checks))


def lost(subject: Subject, level: str, failure: str) -> Row:
    """The row of a subject whose process died."""
    return Tally(subject, failures=[failure]).row(level, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Checks: what must hold besides the values.

Check = Callable[[Subject, int], None]


def checks_of(backend: str, name: str) -> dict[str, Check]:
    checks: dict[str, Check] = {"NaN in a token": _nan_in_token, "mistakes are errors": _mistakes}
    if backend == "linear":
        checks["NaN in a weight"] = _nan_in_linear
    else:
        checks |= {f"NaN in an expert, {kind}": partial(_nan_in_expert, kind) for kind in ACTIVATIONS}
        if not FORMATS[name].bits:
            checks |= {"frozen inputs": _frozen, "second derivatives": _second_derivatives}
    native = backend in ("native", "linear")
    checks["same bits with any threads" if native else "same bits again"] = partial(
        _same_bits, (1, 2, 3) if native else (1,)
    )
    return checks


def _check_case(seed: int, tokens: int, activation: Activation = "swiglu", load: str = "even") -> Case:
    """Ordinary sizes for a check; every seed draws its own values."""
    return Case(tokens, 6, 2, 40, 48, activation=activation, bias=True, load=load, seed=seed % (1 << 31))


def _with(drawn: Drawn, name: str, index: Any) -> Drawn:
    """The same with a NaN (in a packed weight: in its scales)."""
    if name in drawn.packed:
        scales = drawn.packed[name].scales.clone()
        scales[index] = math.nan
        return replace(drawn, packed=drawn.packed | {name: replace(drawn.packed[name], scales=scales)})
    value = drawn.values[name].clone()
    value[index] = math.nan
    return replace(drawn, values=drawn.values | {name: value})


def _only_nan(got: Tensor, clean: Tensor, where: Tensor, bound: float, what: str) -> None:
    """NaN exactly at `where`, and elsewhere what comes without it."""
    found = got.isnan()
    if not found.equal(where):
        missing, leaked = int((where & ~found).sum()), int((found & ~where).sum())
        raise WrongError(f"{what}: of {int(where.sum())} values to be NaN {missing} are not, and {leaked} others are")
    error, _ = _distance(got[~where], clean[~where].to(F64))
    if error > bound:
        raise WrongError(f"{what}: values beside NaN change by {error:.2g}, bound {bound:.2g}")


def _nan_in_token(subject: Subject, seed: int) -> None:
    """Its own output is NaN, and no other token's output or gradient, nor that of an expert it does not use."""
    bound = _bounds(*subject)[0]
    for tokens in (5, 70):
        drawn = draw(_check_case(seed, tokens), subject[1])
        clean, got = _run(drawn, subject), _run(_with(drawn, "x", (3, 7)), subject)
        rows = torch.zeros(tokens, dtype=torch.bool)
        rows[3] = True
        for key in ("output alone", "output", "x"):
            if key in got:
                _only_nan(got[key], clean[key], rows.unsqueeze(1).expand_as(got[key]), bound, f"T={tokens} {key}")
        idle_E = ~torch.isin(torch.arange(drawn.case.experts), drawn.experts_TK[3])
        for key in PARAMETERS:
            if key in got:
                part = got[key][idle_E]
                _only_nan(
                    part, clean[key][idle_E], torch.zeros_like(part, dtype=torch.bool), bound, f"T={tokens} {key}"
                )


def _nan_in_expert(activation: Activation, subject: Subject, seed: int) -> None:
    """NaN in one of its weights: its tokens are NaN, no other token's output or gradient and no other expert's."""
    bound = _bounds(*subject)[0]
    for tokens in (5, 70):
        drawn = draw(_check_case(seed, tokens, activation), subject[1])
        clean = _run(drawn, subject)
        expert = int(drawn.experts_TK[1, 0])
        users_T = (drawn.experts_TK == expert).any(1)
        rows = len(drawn.values["gate_up"][0])
        for name, index in (("gate_up", (expert, 0, 0)), ("gate_up", (expert, rows - 1, 0)), ("down", (expert, 9, 0))):
            got = _run(_with(drawn, name, index), subject)
            what = f"T={tokens} {name}[{expert}, {index[1]}]"
            where_TD = users_T.unsqueeze(1).expand(tokens, 40)
            if name == "down":
                where_TD = where_TD & (torch.arange(40) == 9)
            for key in ("output alone", "output"):
                if key in got:
                    _only_nan(got[key], clean[key], where_TD, bound, f"{what} {key}")
            for key in ("x", "weights", *PARAMETERS):
                if key in got:
                    others = ~users_T if key in ("x", "weights") else torch.arange(6) != expert
                    part = got[key][others]
                    _only_nan(
                        part, clean[key][others], torch.zeros_like(part, dtype=torch.bool), bound, f"{what} {key}"
                    )


def _nan_in_linear(subject: Subject, seed: int) -> None:
    """NaN in a row of the weight: that output is NaN for every token, and no other."""
    for tokens in (5, 70):
        drawn = draw(_check_case(seed, tokens), subject[1])
        clean, got = _run(drawn, subject), _run(_with(drawn, "gate_up", (0, 11, 0)), subject)
        column_TO = (torch.arange(96) == 11).expand(tokens, 96)
        _only_nan(got["output alone"], clean["output alone"], column_TO, _bounds(*subject)[0], f"T={tokens}")


def _mistakes(subject: Subject, seed: int) -> None:
    """Experts that do not exist and shapes that do not fit are one-line errors of ours, never a crash or a result."""
    for tokens in (1, 70):
        drawn = draw(_check_case(seed, tokens), subject[1])
        wider = {**drawn.values, "x": torch.zeros(tokens, 41, dtype=F64)}
        deeper = {**drawn.values, "x": torch.zeros(tokens, 1, 40, dtype=F64)}
        wrong = {"x of another width": replace(drawn, values=wider)}
        if subject[0] != "linear":
            wrong["x of 3 dimensions"] = replace(drawn, values=deeper)
            for expert in (-1, 6, 1 << 40):
                chosen_TK = drawn.experts_TK.clone()
                chosen_TK[-1, -1] = expert
                wrong[f"expert {expert} of 6"] = replace(drawn, experts_TK=chosen_TK)
            longer = {**drawn.values, "x": torch.zeros(tokens + 1, 40, dtype=F64)}
            wrong["a routing of fewer tokens"] = replace(drawn, values=longer)
        for what, case in wrong.items():
            runs: list[Callable[[], object]] = [lambda case=case: _run(case, subject)]  # type: ignore[misc]
            if FORMATS[subject[1]].gradient is not None and subject[0] != "linear":
                runs.append(lambda case=case: _with_autograd(case, subject[0]))  # type: ignore[misc]
            for run in runs:
                try:
                    run()
                except HandfulError as error:
                    if ".cpp" in str(error) or "\n" in str(error):
                        raise WrongError(f"T={tokens} {what}: {error!s} names a line of code") from None
                    continue
                except Exception as error:
                    raise WrongError(f"T={tokens} {what}: {type(error).__name__}, not an error of ours") from None
                raise WrongError(f"T={tokens} {what}: is accepted")


def _with_autograd(drawn: Drawn, backend: str) -> object:
    given = _given(drawn)
    return _experts(drawn, backend, given)(given["x"], _routing(drawn, given["weights"]))


def _frozen(subject: Subject, seed: int) -> None:
    """A gradient does not depend on which others are asked for."""
    drawn = draw(_check_case(seed, 70), subject[1])
    every = _run(drawn, subject)
    leaves = ("x", "weights", *PARAMETERS)
    bound = FORMATS[subject[1]].gradient or 0.0
    for name in leaves:
        alone = _run(drawn, subject, frozen=[other for other in leaves if other != name])
        if sorted(alone) != sorted(["output", "output alone", name]):
            raise WrongError(f"asked for the gradient of {name} alone, gives {', '.join(sorted(alone))}")
        error, _ = _distance(alone[name], every[name].to(F64))
        if error > bound:
            raise WrongError(f"the gradient of {name} alone is off by {error:.2g}, bound {bound:.2g}")


def _second_derivatives(subject: Subject, seed: int) -> None:
    """They are right or refused by torch, but never left out in silence."""
    backend, name = subject
    drawn = draw(_check_case(seed, 70), name)

    def second(backend: str, given: dict[str, Tensor]) -> Tensor:
        x_TD = given["x"].requires_grad_()
        y_TD = _experts(drawn, backend, given)(x_TD, _routing(drawn, given["weights"]))
        (first_TD,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
        if first_TD.requires_grad:
            first_TD.to(F64).square().sum().backward()
            if x_TD.grad is not None:
                return x_TD.grad
        raise WrongError("they are left out in silence")

    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=FORMATS[name].autocast):
        warnings.simplefilter("ignore")  # torch tells of an operation without them, and goes on
        try:
            got = second(backend, _given(drawn))
        except (HandfulError, RuntimeError):
            return
    error, _ = _distance(got, second("reference", {key: value.clone() for key, value in drawn.values.items()}))
    bound = ELEMENT * (FORMATS[name].gradient or 0.0)
    if error > bound:
        raise WrongError(f"they are off by {error:.2g}, bound {bound:.2g}")


def _same_bits(threads: Sequence[int], subject: Subject, seed: int) -> None:
    """The same call gives the same bits, with any of these numbers of threads."""
    before = torch.get_num_threads()
    try:
        for tokens, load in ((1, "even"), (6, "even"), (70, "even"), (300, "one")):
            drawn = draw(_check_case(seed, tokens, "geglu", load), subject[1])
            torch.set_num_threads(threads[0])
            first = _run(drawn, subject)
            for count in threads:
                torch.set_num_threads(count)
                for key, value in _run(drawn, subject).items():
                    if not value.equal(first[key]):
                        raise WrongError(
                            f"T={tokens}: {key} with {count} threads has other bits than with {threads[0]}"
                        )
    finally:
        torch.set_num_threads(before)
