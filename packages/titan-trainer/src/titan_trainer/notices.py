"""Warnings before the first step: settings under which updates would be zero or lost in rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from titan_config import Configurable, diff
from torch import nn

from titan_trainer.schedule import Schedule

MIN_UPDATE_DENOMINATORS = {torch.bfloat16: 256, torch.float16: 2048}
"""{dtype: n}: an update of less than about 1/n of a weight of that dtype is lost in rounding."""


def find_16_bit_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.dtype]:
    """Return {name: dtype} of the trained parameters that are stored in bfloat16 or float16."""
    trained = {name: each.dtype for name, each in parameters.items() if each.requires_grad}
    return {name: dtype for name, dtype in trained.items() if dtype in MIN_UPDATE_DENOMINATORS}


def rounding_warning(dtypes: Mapping[str, torch.dtype]) -> str:
    """Return the warning about 16-bit parameters: {name: dtype}, empty if only other ranks have some."""
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}) or ["16 bits"]
    denominator = MIN_UPDATE_DENOMINATORS[next(iter(dtypes.values()), torch.bfloat16)]
    here = f" ({len(dtypes)} on this rank, first {next(iter(dtypes))})" if dtypes else ""
    return (
        f"Trained parameters are stored in {' and '.join(names)}{here}: updates of less than about 1/{denominator} of "
        "a weight, weight decay included, are lost in rounding. At a learning rate of 1e-4, norm weights stay at "
        "exactly 1.0. Store parameters in float32 (--training.dtype float32); forward and backward still run in "
        "bfloat16 (--training.mixed_precision_param)."
    )


def zero_lr_warning(schedule: Schedule, step: int, steps: int) -> str:
    """Return the warning about steps after `step`, up to `steps`, with a learning rate of 0; "" if there are none."""
    num_idle = schedule.steps_at_zero(step, steps)
    if not num_idle:
        return ""
    return f"The learning rate is 0 in steps {steps - num_idle + 1} to {steps}. {schedule.zero_rate_fix(steps)}"


def describe_changes(config_file: Path, config: Configurable.Config, schedule: Schedule) -> str:
    """Return one line for each setting of `config` that differs from the config file of the resumed run.

    A change of training.steps adds a line where it changes the schedule.
    """
    changes = diff(config_file, config)
    lines = [f"changed: {change}" for change in changes]
    steps = next((change for change in changes if change.path == "training.steps"), None)
    if steps is not None and (note := schedule.change_note(steps.old, steps.new)):
        lines.append(note)
    return "".join(f"{line}\n" for line in lines)
