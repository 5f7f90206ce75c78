"""The C++ extension: whether it is there, what it takes, and its errors.

csrc/README.md is its map. The kernels choose among AVX2, AVX-512 and AMX at run time, and use torch's threads. Products
are in float32, or in bfloat16 with float32 sums; the same bits come out for any number of threads.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from handful.errors import ConfigError, HandfulError, RoutingError
from handful.kernels.autograd import register
from handful.machine import native_error

__all__ = [
    "DTYPES",
    "ROUTER_KERNEL_MAX_TOKENS",
    "Level",
    "available",
    "exact_activations",
    "few_tokens",
    "gemv_max_tokens",
    "inference_only",
    "infers_on_cpu",
    "levels",
    "native_max_tokens",
    "prefers_native",
    "set_exact_activations",
    "steady_tokens",
    "translate_error",
]

DTYPES = (torch.float32, torch.bfloat16)

ROUTER_KERNEL_MAX_TOKENS = 32  # beyond them torch's product is the quicker
# Tokens up to which our kernels are quicker than torch for one matrix of floats: where AMX or pairs multiply bfloat16,
# and of float32. Where nothing multiplies bfloat16, torch takes three to four times as long as we do for any number.
NATIVE_MAX_TOKENS_AMX, NATIVE_MAX_TOKENS_PAIRS, NATIVE_MAX_TOKENS = 16, 128, 4

_available: bool | None = None  # None: nobody has asked yet
_max_tokens_bfloat16: int | None = None
_gemv_max_tokens = _gemv_max_tokens_floats = _gemv_max_call = 0


def available() -> bool:
    """Whether the kernels are there: `handful.machine.native_error()` says why not. Loads them at the first call.

    It is a fact about this process: modules ask when they compute, and keep no answer that another computer's
    process would read. Raises ConfigError if HANDFUL_ISA names a level that this computer does not have.
    """
    return _load() if _available is None else _available


def _load() -> bool:
    global _available, _gemv_max_tokens, _gemv_max_tokens_floats, _gemv_max_call, _max_tokens_bfloat16
    found = native_error() is None
    if found:
        limits = dict(line.split(": ") for line in torch.ops.handful.limits().splitlines())
        _gemv_max_tokens = int(limits["gemv_max_tokens_packed"])
        _gemv_max_tokens_floats = int(limits["gemv_max_tokens"])
        _gemv_max_call = int(limits["gemv_max_call"])
        register(panel=int(limits["panel"]))
        isa = set(torch.ops.handful.isa().split())
        if isa >= {"avx512_vnni", "avx512_bf16"}:
            _max_tokens_bfloat16 = NATIVE_MAX_TOKENS_AMX if "amx_bf16" in isa else NATIVE_MAX_TOKENS_PAIRS
    _available = found
    return found


class Level(NamedTuple):
    """A level of instructions that kernels are compiled for: its name, and the features that it needs of a CPU."""

    name: str
    needs: frozenset[str]


def levels(features: Iterable[str]) -> dict[str, Level]:
    """Which level a CPU of these features (as in `Machine.isa`) multiplies with: many tokens in "float32", "bfloat16"
    by "codes" of 8 or 4 bits and by "exact codes", and "few tokens". HandfulError where there is none."""
    try:
        lines = torch.ops.handful.levels(" ".join(features)).splitlines()
    except RuntimeError as error:
        raise translate_error(error) from None
    rows = (line.split(": ") for line in lines)
    return {use: Level(name, frozenset(needs.split())) for use, name, needs in rows}


def exact_activations() -> bool:
    """Whether activations in bfloat16 that quantized weights multiply keep more than 8 bits: as it was set, or as
    HANDFUL_EXACT_ACTIVATIONS says. Without the kernels they always do. ConfigError where it says neither 0 nor 1."""
    if not available():
        return True
    try:
        return bool(torch.ops.handful.exact_activations())
    except RuntimeError as error:
        raise ConfigError(str(translate_error(error))) from None


def set_exact_activations(on: bool) -> None:
    """For all models of this process, from the next call on."""
    if available():
        torch.ops.handful.set_exact_activations(on)


def gemv_max_tokens() -> int:
    """Tokens that meet quantized weights as they are read from memory (GEMV); more are multiplied in tiles (GEMM). 0
    where the kernels are not there."""
    return _gemv_max_tokens if available() else 0


def native_max_tokens(dtype: torch.dtype) -> int | None:
    """Tokens up to which our kernels multiply a matrix of floats more quickly than torch; None: any number."""
    return _max_tokens_bfloat16 if dtype == torch.bfloat16 else NATIVE_MAX_TOKENS


def steady_tokens(dtype: torch.dtype, experts: int = 0, top_k: int = 1) -> int | None:
    """Tokens of a forward pass from which the bits of each depend on itself and those before it alone, and not on how
    many others pass with it: fewer may be multiplied by other kernels, which add in another order. None where no number
    is large enough: without our kernels, and in other dtypes.

    experts, top_k   of the model's MoE layers; 0: it has none.
    """
    if not available() or dtype not in DTYPES:
        return None
    few_of_experts = min(_gemv_max_tokens * experts // top_k, _gemv_max_call)
    return max(ROUTER_KERNEL_MAX_TOKENS, native_max_tokens(dtype) or 0, _gemv_max_tokens, few_of_experts) + 1


def few_tokens(dtype: torch.dtype, experts: int = 0, top_k: int = 1) -> int | None:
    """Tokens of a forward pass up to which each has the bits that it has alone: all are multiplied by the same kernels,
    which take each for itself. None where there is no such number: without our kernels, and in other dtypes.

    experts, top_k   of the model's MoE layers; 0: it has none.
    """
    if not available() or dtype not in DTYPES:
        return None
    few_of_experts = [min(_gemv_max_tokens_floats * experts // top_k, _gemv_max_call)] if experts else []
    of_floats = native_max_tokens(dtype) or _gemv_max_tokens_floats
    return min(ROUTER_KERNEL_MAX_TOKENS, of_floats, _gemv_max_tokens, *few_of_experts)


def prefers_native(weight: Tensor, tokens: int, dtype: torch.dtype) -> bool:
    """Whether our kernels are to multiply so many tokens by a float weight in inference: few of them, which read a
    weight as fast as memory gives it. With more, torch's products are as good, where the CPU has some for the dtype."""
    most = native_max_tokens(dtype)
    return available() and weight.dtype == dtype and (most is None or tokens <= most)


def infers_on_cpu(x: Tensor) -> bool:
    """Whether x is on the CPU, and nothing is computed with autograd or autocast."""
    return not torch.is_grad_enabled() and x.is_cpu and not torch.is_autocast_enabled("cpu")


def inference_only(x: Tensor, *weights: Tensor) -> bool:
    """Whether x and weights can go to the kernels that have no gradients."""
    if not infers_on_cpu(x) or x.dtype not in DTYPES:
        return False
    return not weights or all(weight.dtype in DTYPES for weight in weights)


def translate_error(error: RuntimeError) -> Exception:
    """The kernels' own complaint, in one line and without its place in the source, as an error of ours."""
    line = re.sub(r"^\w+, [\w./]+:\d+, ", "", str(error).splitlines()[0])
    return RoutingError(line) if line.startswith(("routing names", "choice names")) else HandfulError(line)


# Known before anything is traced, by a module that comes out of a pickle too. A wrong HANDFUL_ISA is told to who asks
# next.
with contextlib.suppress(ConfigError):
    available()
