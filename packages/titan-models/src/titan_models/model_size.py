"""Parameters and floating point operations of a model, counted by walking its modules."""

from __future__ import annotations

from torch import nn

from titan_models.layers.flops import Flops
from titan_models.layers.layer import Layer


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_active_parameters(model: nn.Module) -> int:
    """Number of parameters that a token meets, tied ones once."""
    idle = sum(module.own_idle_parameters() for module in model.modules() if isinstance(module, Layer))
    return count_parameters(model) - idle


def count_flops_per_token(model: nn.Module, seq_len: int) -> Flops:
    """Matrix products of one token of a sequence of `seq_len`, forward and backward.

    Each `Layer` states its own. Raises ValueError, naming it, for a module with parameters that states nothing.
    """
    total = Flops(full=0, causal=0)
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            total += module.own_flops(seq_len)
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"Got {name or 'a model'}, a {type(module).__qualname__} with parameters. What it computes is unknown, "
                "so a count would be wrong. Make it a titan_models.Layer that states its own_flops()."
            )
    return total
