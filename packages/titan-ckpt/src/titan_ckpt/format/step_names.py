"""Valid step numbers: integers that fit into the name of a checkpoint folder."""

from __future__ import annotations

import operator
from typing import Any

import torch

from titan_ckpt.errors import CheckpointError

MAX_STEP = 10**18 - 1
"""The largest N for which a folder `step-N` is recognized."""


def to_step(step: Any) -> int | None:
    """Return a step, which may be an integer of NumPy or torch, as an int, or None if it is not a valid step."""
    if isinstance(step, bool) or getattr(step, "dtype", None) is torch.bool:
        return None
    try:
        number = operator.index(step)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if 0 <= number <= MAX_STEP else None


def require_step(step: Any) -> int:
    """Return a step as an int.

    Raises:
        CheckpointError: if it is not an integer, is a bool, is negative, or exceeds `MAX_STEP`.
    """
    number = to_step(step)
    if number is None:
        long = isinstance(step, int) and step.bit_length() > 256
        got = f"an integer of {step.bit_length()} bits" if long else f"{step!r:.80}"
        raise CheckpointError(f"step must be an integer from 0 to {MAX_STEP}, got {got}.")
    return number
