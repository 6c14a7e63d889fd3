"""A model wholly in fp64: what foreign code computes in float32, such as norms and rotary angles, is lifted too."""

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
    """Make new tensors in `dtype`; for float64 every request for float32 means it, also in recomputation."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if dtype is torch.float64:
            mode = _Float32IsFloat64()
            with mode, around_backward(mode):
                yield
        else:
            yield
    finally:
        torch.set_default_dtype(default)


class _Float32IsFloat64(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        lifted = (torch.float64 if argument is torch.float32 else argument for argument in args)
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*lifted, **named)
