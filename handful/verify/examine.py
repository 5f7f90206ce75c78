"""One backend in one precision, held against the plain loop in float64: its output, every gradient, and what else must
hold (`checks.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from handful.verify.cases import FORMATS, Drawn, draw, draw_cases
from handful.verify.checks import checks_of
from handful.verify.subjects import ELEMENT, Subject, WrongError, bounds, distance, expected, run

__all__ = ["Row", "examine", "lost"]


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
        want = expected(drawn, backend)
        got = run(drawn, self.subject)
        output_bound, gradient_bound = bounds(backend, name)
        y_dtype = torch.bfloat16 if FORMATS[name].autocast else drawn.x_dtype
        wrong = []
        for key in [*want, "output alone"] if gradient_bound is not None else ["output alone"]:
            right = want["output" if key == "output alone" else key]
            if key not in got:
                wrong.append(f"gradient of {key} is missing")
                continue
            is_output = key.startswith("output")
            what, bound = (key, output_bound) if is_output else (f"gradient of {key}", gradient_bound or 0.0)
            dtype = y_dtype if is_output else drawn.dtype_of(key)
            if got[key].shape != right.shape or got[key].dtype != dtype:
                found, wanted = (
                    (tuple(shape), str(d)) for shape, d in ((got[key].shape, got[key].dtype), (right.shape, dtype))
                )
                wrong.append(f"{what} is {found}: it must be {wanted}")
                continue
            norm, element = distance(got[key], right)
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

    def attempt(self, what: str, attempted: Callable[[], None]) -> None:
        """Run a case or check; whatever it raises is a failure of the backend."""
        try:
            attempted()
        except WrongError as error:
            self.failures.append(f"{what}: {error}")
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            self.failures.append(f"{what}: {type(error).__name__}: {first}")

    def row(self, level: str, cases: int, checks: int) -> Row:
        output_bound, gradient_bound = bounds(*self.subject)
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
