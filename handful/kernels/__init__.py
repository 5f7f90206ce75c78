"""What the C++ extension (csrc/) offers, and how a forward pass comes to it.

extension     whether it is there, what it takes, its errors
operations    its operations, typed; autograd: their gradients, and their shapes for torch.compile
dispatch      `with_kernel`, and who may be passed by
forwards      the kernels that forwards are decorated with
"""

from __future__ import annotations

from handful.kernels.dispatch import with_kernel
from handful.kernels.extension import exact_activations, few_tokens, set_exact_activations, steady_tokens
from handful.kernels.forwards import (
    decode_attention,
    largest,
    linear,
    prefill_attention,
    rms_norm,
    route,
    softmax_loss,
)

__all__ = [
    "decode_attention", "exact_activations", "few_tokens", "largest", "linear", "prefill_attention", "rms_norm",
    "route", "set_exact_activations", "softmax_loss", "steady_tokens", "with_kernel",
]  # fmt: skip
