"""The base class of modules with parameters: initializers and FLOP counts."""

from __future__ import annotations

import abc

import torch
from titan_config import Configurable
from torch import nn

from titan_models.initialization.initializers import Initializer
from titan_models.layers.flops import Flops


class Layer(Configurable, nn.Module, abc.ABC):
    """A module that owns parameters or computes matrix products. All methods exclude child modules."""

    def initializers(self) -> dict[str, Initializer]:
        """Return `{name: initializer}` for the parameters and persistent buffers of this module."""
        return {}

    @abc.abstractmethod
    def own_flops(self, seq_len: int) -> Flops:
        """Return the FLOPs of this module for one token in a sequence of `seq_len`, forward and backward."""

    def own_idle_parameters(self) -> int:
        """Return the number of parameters of this module that a token does not use: experts it is not routed to."""
        return 0


def new_parameter(*shape: int) -> nn.Parameter:
    """Return a parameter filled with NaN, so that a weight neither initialized nor loaded makes the first loss NaN."""
    return nn.Parameter(torch.full(shape, torch.nan))
