"""The precisions of a run: weights are stored in one dtype, computed in another, and gradients summed in a third."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from titan_config import Configurable
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


class MixedPrecision(Configurable):
    """Weights keep the dtype they are stored in; units compute in `param`, gradients are summed in `reduce`."""

    class Config(Configurable.Config):
        param: Literal["bfloat16", "float32"] = "bfloat16"
        """What weights and inputs of blocks are cast to for computing."""
        reduce: Literal["bfloat16", "float32"] = "float32"
        """What gradients are cast to before they are accumulated and summed."""

    def __init__(self, config: Config) -> None:
        self.param_dtype: torch.dtype = getattr(torch, config.param)
        self._reduce_dtype: torch.dtype = getattr(torch, config.reduce)

    def changes(self, model: nn.Module) -> bool:
        """Whether any weight is stored in another dtype than it is computed in."""
        return any(p.is_floating_point() and p.dtype != self.param_dtype for p in model.parameters())

    def policy(self) -> MixedPrecisionPolicy:
        """What `fully_shard` takes."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return MixedPrecisionPolicy(param_dtype=self.param_dtype, reduce_dtype=self._reduce_dtype)
