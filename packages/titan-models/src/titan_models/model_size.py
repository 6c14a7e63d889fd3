"""Parameter and FLOP counts of a model."""

from __future__ import annotations

from torch import nn

from titan_models.layers.flops import Flops
from titan_models.layers.layer import Layer


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_active_parameters(model: nn.Module) -> int:
    """Return the number of parameters that one token uses; tied parameters count once."""
    idle = sum(module.own_idle_parameters() for module in model.modules() if isinstance(module, Layer))
    return count_parameters(model) - idle


def count_flops_per_token(model: nn.Module, seq_len: int) -> Flops:
    """Return the FLOPs of the matrix products of one token in a sequence of `seq_len`, forward and backward.

    Each `Layer` states its own. Raises ValueError, with the name of the module, for a module that has parameters and
    is no `Layer`.
    """
    total = Flops(full=0, causal=0)
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            total += module.own_flops(seq_len)
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                "Each module with parameters must be a titan_models.Layer, so that its own_flops() can be counted, got "
                f"{f'{name}, ' if name else ''}a {type(module).__qualname__}."
            )
    return total
