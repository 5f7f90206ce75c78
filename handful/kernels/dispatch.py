"""Who computes a forward pass: its own body, or a kernel that gives the same.

    @with_kernel(kernels.rms_norm)
    def forward(self, x): ...

The rules by which a kernel may pass modules by are here too: what a user does to a module is honoured.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from handful.kernels.extension import inference_only

__all__ = ["as_written", "is_unmodified", "unobserved", "unwatched", "with_kernel"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
M = TypeVar("M", bound=nn.Module)

Method = Callable[Concatenate[S, P], R]


def with_kernel(kernel: Callable[..., Any]) -> Callable[[Method[S, P, R]], Method[S, P, R]]:
    """Ask `kernel` first, with the same arguments; the decorated body runs whenever it says NotImplemented."""

    def decorate(body: Method[S, P, R]) -> Method[S, P, R]:
        @functools.wraps(body)
        def forward(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            result = kernel(self, *args, **kwargs)
            return body(self, *args, **kwargs) if result is NotImplemented else result

        return forward

    return decorate


_WITH_KERNEL = with_kernel(len)(len).__code__  # of every decorated function

_call = nn.Module.__call__


def unobserved(x: Tensor, kinds: Iterable[type]) -> bool:
    """Whether x may pass modules of these classes by in inference: `unwatched`."""
    return inference_only(x) and unwatched(kinds)


def unwatched(kinds: Iterable[type]) -> bool:
    """Whether nothing is traced, no hook is on all modules, and no other forward is in the place of one of these
    classes' own."""
    if torch.compiler.is_compiling() or _has_any_global_hook() or nn.Module.__call__ is not _call:
        return False
    return all(map(as_written, kinds))


def is_unmodified(module: object, kind: type[M]) -> TypeGuard[M]:
    """Whether calling a module does what its class says and no more: no subclass of `kind`, no hook, no forward of its
    own. Whether its class says what it was written to say, `unobserved` knows."""
    if type(module) is not kind:
        return False
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


_written: dict[tuple[type, str], Callable[..., Any]] = {}  # classes' methods as they were written


def as_written(kind: type, method: str = "forward") -> bool:
    """Whether a class's method was compiled from the class's own text: names can be copied, code cannot."""
    function = getattr(kind, method)
    if _written.get((kind, method)) is function:
        return True
    body = function.__wrapped__ if getattr(function, "__code__", None) is _WITH_KERNEL else function
    code = getattr(body, "__code__", None)
    where = getattr(code, "co_qualname", None), getattr(code, "co_filename", None)
    if where != (f"{kind.__qualname__}.{method}", sys.modules[kind.__module__].__file__):
        return False
    _written[kind, method] = function
    return True
