"""State of a router that moves too little a step for bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from titan_models.layers.flops import Flops
from titan_models.layers.layer import Layer


class Fp32State(Layer):
    """A part without parameters whose buffers stay in fp32, with all their bits, whatever the model is cast to."""

    def own_flops(self, seq_len: int) -> Flops:
        return Flops(full=0, causal=0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype is not torch.float32:  # None: another rank's
                self._buffers[name] = before[name].to(buffer.device)  # type: ignore[union-attr]
        return self
