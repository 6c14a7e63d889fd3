"""Run a model entirely in fp64, including what third-party code computes in float32 (norms, rotary angles)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from titan_parallel._torch.distributed import around_backward


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` the default dtype; for float64 also turn each request for float32 into one for float64.

    Recomputation in the backward pass is covered too.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if dtype is torch.float64:
            mode = _Float32ToFloat64()
            with mode, around_backward(mode):
                yield
        else:
            yield
    finally:
        torch.set_default_dtype(default)


class _Float32ToFloat64(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        new_args = (torch.float64 if value is torch.float32 else value for value in args)
        new_kwargs = {
            name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()
        }
        return func(*new_args, **new_kwargs)
