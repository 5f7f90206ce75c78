"""Models without memory, on torch's meta device: of which only the shapes are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["meta_device"]


class _Unmade(TorchFunctionMode):
    """First weights are not drawn: on that device torch would follow the draws in Python, and import its compiler."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, Tensor.normal_, Tensor.mul):
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            func = torch.empty
        return func(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Modules that are made here have parameters without memory or values, on torch's "meta" device."""
    with torch.device("meta"), _Unmade():
        yield
