"""Router state that stays in fp32, since its changes per step are too small for bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from titan_models.layers.flops import Flops
from titan_models.layers.layer import Layer


class Fp32State(Layer):
    """A module without parameters whose buffers stay in fp32 when the model is cast to another dtype."""

    def own_flops(self, seq_len: int) -> Flops:
        return Flops(full=0, causal=0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype is not torch.float32:  # None: on another rank
                self._buffers[name] = before[name].to(buffer.device)  # type: ignore[union-attr]
        return self
