"""Steps as they are saved: integers that the name of a folder can hold."""

from __future__ import annotations

import operator
from typing import Any

import torch

from titan_ckpt.errors import CheckpointError

LARGEST_STEP = 10**18 - 1
"""The largest N whose folder `step-N` is found again."""


def to_step(step: Any) -> int | None:
    """Return a step, which may be an integer of numpy or torch, as an int; None for what is no step."""
    if isinstance(step, bool) or getattr(step, "dtype", None) is torch.bool:
        return None
    try:
        number = operator.index(step)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if 0 <= number <= LARGEST_STEP else None


def require_step(step: Any) -> int:
    """Return a step as an int.

    Raises:
        CheckpointError: when it is no integer, a bool, negative, or larger than `LARGEST_STEP`.
    """
    number = to_step(step)
    if number is None:
        long = isinstance(step, int) and step.bit_length() > 256
        got = f"one of {step.bit_length()} bits" if long else f"{step!r:.80}"
        raise CheckpointError(f"step must be an integer from 0 to {LARGEST_STEP}, got {got}.")
    return number
