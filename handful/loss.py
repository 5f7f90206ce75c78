"""The next-token loss without the (tokens × vocabulary) logits: chunk by chunk, its gradients made on the way.

In a small model the logits are most of what memory moves: computed, normalised, read back and differentiated whole,
they take a third of a training step. A chunk stays in cache. The gradient of a mean needs nothing from above but a
factor, so it can be made at once, while the chunk's probabilities are at hand.

Legend: T tokens · D model width · V vocabulary · c tokens of a chunk
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from handful import kernels
from handful.kernels import with_kernel

__all__ = ["linear_cross_entropy"]

CHUNK = 1 << 20  # logits in a chunk


@with_kernel(kernels.softmax_loss)
def softmax_loss(logits_cV: Tensor, targets_c: Tensor, gradient: bool) -> Tensor | float:
    """The sum over tokens of -log softmax(logits)[target], in nats. With a gradient the logits become that by them:
    probabilities - one-hot(target)."""
    logp_cV = logits_cV.log_softmax(-1)
    target_c1 = targets_c.unsqueeze(1)
    loss = -logp_cV.gather(1, target_c1).sum()
    if gradient:
        torch.exp(logp_cV, out=logits_cV)
        logits_cV.scatter_add_(1, target_c1, logits_cV.new_full(target_c1.shape, -1.0))
    return loss


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
        T, V = len(x_TD), len(w_VD)
        grads = any(ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device)
        grad_x_TD = torch.empty_like(x_TD) if grads else None
        grad_w_VD = torch.zeros(w_VD.shape, dtype=total.dtype, device=w_VD.device) if grads else None
        step = max(1, CHUNK // V)
        for first in range(0, T, step):
            x_cD, targets_c = x_TD[first : first + step], targets_T[first : first + step]
            diff_cV = (x_cD @ w_VD.mT).to(total.dtype)
            total += softmax_loss(diff_cV, targets_c, grads)
            if grad_x_TD is not None and grad_w_VD is not None:
                # The division by T waits for the end.
                diff_cV = diff_cV.to(x_TD.dtype)
                torch.mm(diff_cV, w_VD, out=grad_x_TD[first : first + step])
                if diff_cV.dtype == grad_w_VD.dtype:
                    grad_w_VD.addmm_(diff_cV.mT, x_cD)
                else:
                    grad_w_VD += diff_cV.mT @ x_cD
        ctx.save_for_backward(grad_x_TD, grad_w_VD)
        ctx.w_dtype = w_VD.dtype
        ctx.tokens = max(1, T)
        return total / max(1, T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x_TD, grad_w_VD = ctx.saved_tensors
        factor = grad / ctx.tokens  # a scalar in float32 at least: it scales bfloat16 without being rounded to it
        return grad_x_TD * factor, (grad_w_VD * factor).to(ctx.w_dtype), None


def linear_cross_entropy(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> Tensor:
    """cross_entropy(x @ wᵀ, targets), the mean over tokens: a float32 scalar (float64 for float64), 0 of none.

    Products run in x's dtype, or autocast's; softmax, and sums over tokens, in float32 at least. The gradient is
    available once (no double backward).
    """
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TD, w_VD = x_TD.to(dtype), w_VD.to(dtype)
    if not torch.is_grad_enabled():  # a Function is told of inputs that require gradients even so
        x_TD, w_VD = x_TD.detach(), w_VD.detach()
    with torch.autocast(device, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(x_TD, w_VD, targets_T)  # type: ignore[no-untyped-call]
    return loss
