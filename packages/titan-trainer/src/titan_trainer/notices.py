"""Warnings before the first step: settings by which nothing, or less than it seems, would be learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from titan_config import Configurable, diff
from torch import nn

from titan_trainer.schedule import WarmupStableDecay

SHARE_LOST = {torch.bfloat16: 256, torch.float16: 2048}
"""An update of less than about 1/n of a weight leaves it as it is."""


def rounded_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.dtype]:
    """Return {name: dtype} of the trained parameters that are stored in 16 bits."""
    return {name: each.dtype for name, each in parameters.items() if each.requires_grad and each.dtype in SHARE_LOST}


def warning_of_rounding(rounded: Mapping[str, torch.dtype]) -> str:
    """Return the warning of parameters in 16 bits; `rounded` is empty where only other ranks have some."""
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in rounded.values()}) or ["16 bits"]
    lost = SHARE_LOST[next(iter(rounded.values()), torch.bfloat16)]
    first = f" ({len(rounded)} here, {next(iter(rounded))} first)" if rounded else ""
    return (
        f"Trained parameters are stored in {' and '.join(dtypes)}{first}: an update of less than about 1/{lost} of a "
        "weight is lost in rounding, and weight decay with it. At a learning rate of 1e-4 the gain of a norm stays "
        "1.0. Store them in float32 (--training.dtype float32): they compute in bfloat16 all the same "
        "(--training.mixed_precision_param)."
    )


def steps_without_rate(schedule: WarmupStableDecay, step: int, steps: int) -> str:
    """Return the warning of steps after `step`, up to `steps`, whose learning rate is 0; "" without any."""
    idle = schedule.steps_at_zero(step, steps)
    if not idle:
        return ""
    return (
        f"The learning rate is 0 in steps {steps - idle + 1} to {steps}: lr_scheduler.total_steps is "
        f"{schedule.config.total_steps}, training.steps is {steps}. Set --lr_scheduler.total_steps to None or "
        f"{steps}, --lr_scheduler.min_lr_factor above 0, or fewer --training.steps."
    )


def changes_since(config_file: Path, config: Configurable.Config, total_steps: int | None) -> str:
    """Return a line for each setting that differs from the config of the run so far.

    `total_steps` is that of the schedule: None for one that ends with the run.
    """
    changes = diff(config_file, config)
    lines = [f"changed: {change}" for change in changes]
    steps = next((change for change in changes if change.path == "training.steps"), None)
    if steps is not None and total_steps is None:
        lines.append(
            f"the learning rate now decays until step {steps.new}; "
            f"--lr_scheduler.total_steps {steps.old} keeps the schedule that the run had"
        )
    return "".join(f"{line}\n" for line in lines)
