"""Routings on their way to and from clients: base64 of a .npy file.

An expert is a number from 0. Of an assignment that was not computed, as the expert was full or did not choose the
token, E is added to it.

Legend: T tokens · L MoE layers · E experts · K experts per token
"""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
import torch
from numpy.typing import NDArray

from handful.config import RouterConfig
from handful.observe import Recording
from handful.server.errors import invalid

__all__ = ["experts_npy", "replayed", "routed_bytes", "weights_npy"]


def experts_npy(routed: Recording, router: RouterConfig) -> str:
    """The chosen experts, (T, L, K), of the smallest unsigned type that fits."""
    kind = _kind(router)
    layers = []
    for experts_TK, dropped_TK in zip(routed.experts_TK, routed.dropped_TK, strict=True):
        experts = experts_TK.numpy().astype(kind)
        layers.append(experts if dropped_TK is None else experts + dropped_TK.numpy() * kind(router.experts))
    return _npy(np.stack(layers, axis=1))


def weights_npy(routed: Recording) -> str:
    """What their outputs were multiplied by, (T, L, K) float16."""
    return _npy(np.stack([weights_TK.numpy() for weights_TK in routed.weights_TK], axis=1))


def routed_bytes(tokens: int, layers: int, router: RouterConfig, weights: bool) -> int:
    """Bytes of them for so many tokens, before they are base64."""
    each = router.experts if router.choice == "expert" else router.top_k
    return tokens * layers * each * (np.dtype(_kind(router)).itemsize + 2 * weights)


def replayed(text: str, router: RouterConfig) -> Recording:
    """What `experts_npy` told. ApiError for what it would not have told."""
    name = "replay_routed_experts"
    try:
        file = io.BytesIO(base64.b64decode(text, validate=True))
        found = np.lib.format.read_array(file, allow_pickle=False)
    except (binascii.Error, ValueError, EOFError, OSError, MemoryError, SyntaxError, OverflowError, TypeError):
        raise invalid(name, "is not base64 of a .npy file") from None
    if found.ndim != 3 or found.dtype not in (np.uint8, np.uint16, np.uint32) or 0 in found.shape[1:]:
        what = f"{found.dtype} of shape {found.shape}"[:80]
        raise invalid(name, f"{what}: unsigned integers of shape (tokens, MoE layers, experts a token)")
    if found.size and int(found.max()) > _largest(router):
        raise invalid(name, f"names expert {int(found.max())}; there are {router.experts}, counted from 0")
    experts_LTK = torch.from_numpy(found.astype(np.int32)).transpose(0, 1)
    dropped_LTK = experts_LTK >= router.experts
    return Recording(
        list(experts_LTK - dropped_LTK.int() * router.experts),
        [torch.zeros(chosen_TK.shape, dtype=torch.float16) for chosen_TK in experts_LTK],
        [dropped_TK if bool(dropped_TK.any()) else None for dropped_TK in dropped_LTK],
    )


def _largest(router: RouterConfig) -> int:
    """That there can be. Where each token is routed for itself, all is computed."""
    return router.experts * (1 if router.independent else 2) - 1


def _kind(router: RouterConfig) -> type[np.unsignedinteger]:
    return np.uint8 if _largest(router) < 1 << 8 else np.uint16 if _largest(router) < 1 << 16 else np.uint32


def _npy(values: NDArray[np.generic]) -> str:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(values), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()
