"""What must hold besides the values: NaN stays where it is, mistakes are errors, the same call gives the same bits.

Legend: T tokens · D model width · E experts · O outputs of a linear map
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from handful.config import Activation
from handful.errors import HandfulError
from handful.verify.cases import ACTIVATIONS, F64, FORMATS, Case, Drawn, draw
from handful.verify.subjects import ELEMENT, Subject, WrongError, bounds, distance, forward, inputs, run

__all__ = ["checks_of"]

PARAMETERS = ("gate_up", "down", "gate_up_bias", "down_bias")
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
    error, _ = distance(got[~where], clean[~where].to(F64))
    if error > bound:
        raise WrongError(f"{what}: values beside NaN change by {error:.2g}, bound {bound:.2g}")


def _nan_in_token(subject: Subject, seed: int) -> None:
    """Its own output is NaN, and no other token's output or gradient, nor that of an expert it does not use."""
    bound = bounds(*subject)[0]
    for tokens in (5, 70):
        drawn = draw(_check_case(seed, tokens), subject[1])
        clean, got = run(drawn, subject), run(_with(drawn, "x", (3, 7)), subject)
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
    bound = bounds(*subject)[0]
    for tokens in (5, 70):
        drawn = draw(_check_case(seed, tokens, activation), subject[1])
        clean = run(drawn, subject)
        expert = int(drawn.experts_TK[1, 0])
        users_T = (drawn.experts_TK == expert).any(1)
        rows = len(drawn.values["gate_up"][0])
        for name, index in (("gate_up", (expert, 0, 0)), ("gate_up", (expert, rows - 1, 0)), ("down", (expert, 9, 0))):
            got = run(_with(drawn, name, index), subject)
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
        clean, got = run(drawn, subject), run(_with(drawn, "gate_up", (0, 11, 0)), subject)
        column_TO = (torch.arange(96) == 11).expand(tokens, 96)
        _only_nan(got["output alone"], clean["output alone"], column_TO, bounds(*subject)[0], f"T={tokens}")


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
            attempts: list[Callable[[], object]] = [lambda case=case: run(case, subject)]  # type: ignore[misc]
            if FORMATS[subject[1]].gradient is not None and subject[0] != "linear":
                attempts.append(lambda case=case: forward(case, subject[0], inputs(case)))  # type: ignore[misc]
            for attempt in attempts:
                try:
                    attempt()
                except HandfulError as error:
                    if ".cpp" in str(error) or "\n" in str(error):
                        raise WrongError(f"T={tokens} {what}: {error!s} names a line of code") from None
                    continue
                except Exception as error:
                    raise WrongError(f"T={tokens} {what}: {type(error).__name__}, not an error of ours") from None
                raise WrongError(f"T={tokens} {what}: is accepted")


def _frozen(subject: Subject, seed: int) -> None:
    """A gradient does not depend on which others are asked for."""
    drawn = draw(_check_case(seed, 70), subject[1])
    every = run(drawn, subject)
    leaves = ("x", "weights", *PARAMETERS)
    bound = FORMATS[subject[1]].gradient or 0.0
    for name in leaves:
        alone = run(drawn, subject, frozen=[other for other in leaves if other != name])
        if sorted(alone) != sorted(["output", "output alone", name]):
            raise WrongError(f"asked for the gradient of {name} alone, gives {', '.join(sorted(alone))}")
        error, _ = distance(alone[name], every[name].to(F64))
        if error > bound:
            raise WrongError(f"the gradient of {name} alone is off by {error:.2g}, bound {bound:.2g}")


def _second_derivatives(subject: Subject, seed: int) -> None:
    """They are right or refused by torch, but never left out in silence."""
    backend, name = subject
    drawn = draw(_check_case(seed, 70), name)

    def second(backend: str, given: dict[str, Tensor]) -> Tensor:
        x_TD = given["x"].requires_grad_()
        y_TD = forward(drawn, backend, given)
        (first_TD,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
        if first_TD.requires_grad:
            first_TD.to(F64).square().sum().backward()
            if x_TD.grad is not None:
                return x_TD.grad
        raise WrongError("they are left out in silence")

    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=FORMATS[name].autocast):
        warnings.simplefilter("ignore")  # torch tells of an operation without them, and goes on
        try:
            got = second(backend, inputs(drawn))
        except (HandfulError, RuntimeError):
            return
    error, _ = distance(got, second("reference", {key: value.clone() for key, value in drawn.values.items()}))
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
            first = run(drawn, subject)
            for count in threads:
                torch.set_num_threads(count)
                for key, value in run(drawn, subject).items():
                    if not value.equal(first[key]):
                        raise WrongError(
                            f"T={tokens}: {key} with {count} threads has other bits than with {threads[0]}"
                        )
    finally:
        torch.set_num_threads(before)
