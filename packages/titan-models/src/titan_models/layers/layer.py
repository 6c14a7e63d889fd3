"""What a module with weights or matrix products says about itself, so that nobody has to guess."""

from __future__ import annotations

import abc

import torch
from titan_config import Configurable
from torch import nn

from titan_models.initialization.initializers import Initializer
from titan_models.layers.flops import Flops


class Layer(Configurable, nn.Module, abc.ABC):
    """A module that owns parameters or does matrix products of its own."""

    def initializers(self) -> dict[str, Initializer]:
        """`{name: initializer}` of the parameters and buffers this very module owns, not its children."""
        return {}

    @abc.abstractmethod
    def own_flops(self, seq_len: int) -> Flops:
        """The matrix products of this very module, forward and backward, for one token of a sequence of `seq_len`."""

    def own_idle_parameters(self) -> int:
        """How many of this very module's parameters a token does not meet: those of the experts it does not go to."""
        return 0


def new_parameter(*shape: int) -> nn.Parameter:
    """A parameter of NaNs: a weight that was never initialized nor loaded shows at the first loss."""
    return nn.Parameter(torch.full(shape, torch.nan))
