"""Settings for the probe's run on a long sequence.

That run finds tokens that are mixed at a distance, and limits (such as an expert's capacity) that a few tokens do not
reach.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from titan_parallel.probe.cheap_copy import LARGE
from titan_parallel.probe.model_inputs import vocabulary
from titan_parallel.sharding_plan.roles import Roles

LENGTHS = (1024, 512, 256, 128, 64)
ALWAYS_RUN = 2
"""Number of leading blocks that run even if they are equivalent; a run on a short sequence has more."""
_BUDGET = 2**33
"""Multiplications of a run, which take one or two seconds. An elementwise operation counts as 32 for each feature."""


def affordable_lengths(copied: nn.Module, representatives: Mapping[nn.Module, nn.Module]) -> list[int]:
    """Return the lengths, longest first, on which a run of the copy takes a few seconds at most."""
    skipped = {id(p) for block, first in representatives.items() if first is not block for p in block.parameters()}
    skipped |= {id(m.weight) for m in copied.modules() if isinstance(m, nn.Embedding)}
    linears = {id(m.weight) for m in copied.modules() if isinstance(m, nn.Linear)}
    cost = sum(_multiplications(p, id(p) in linears) for p in copied.parameters() if id(p) not in skipped)
    positions = getattr(getattr(copied, "config", None), "max_position_embeddings", None)
    longest = positions if isinstance(positions, int) else LENGTHS[0]
    return [length for length in LENGTHS if length * cost <= _BUDGET and length <= longest]


def skipped_heads(copied: nn.Module, roles: Roles) -> dict[nn.Module, Callable[..., Any]]:
    """Return {large projection to the vocabulary: a forward that returns its input}, as logits need much memory."""
    size = vocabulary(copied, roles)
    return {
        module: lambda x: x
        for module in copied.modules()
        if isinstance(module, nn.Linear) and module.weight.numel() > LARGE and len(module.weight) == size
    }


def _multiplications(parameter: Tensor, is_linear: bool) -> int:
    """Estimate the multiplications for each token.

    A large matrix of a linear module is replaced in the copy; a token is routed to a few experts.
    """
    if parameter.numel() <= LARGE or (parameter.dim() == 2 and not is_linear):
        return parameter.numel()
    return 32 * sum(parameter.shape) if parameter.dim() == 2 else 8 * parameter.numel() // len(parameter)
