"""Learning rate schedules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

from titan_config import ConfigError, Configurable


class Schedule(Configurable, ABC):
    """A factor of the learning rate for each step. A custom schedule is a subclass with a `factor`.

    It is built with `training_steps`, the number of steps of the run.
    """

    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config, *, training_steps: int) -> None:
        self.config = config
        self.training_steps = training_steps

    @abstractmethod
    def factor(self, step: int) -> float:
        """Return the factor of the learning rate for step number `step`, counted from 0."""

    def steps_at_zero(self, first: int, end: int) -> int:
        """Return how many steps at the end of `range(first, end)` (counted from 0) have a factor of 0."""
        step = end
        while step > first and self.factor(step - 1) == 0:
            step -= 1
        return end - step

    def zero_rate_fix(self, steps: int) -> str:
        """Return how to avoid steps with a factor of 0 in a run of `steps`: a sentence for a warning."""
        return "Train for fewer --training.steps, or change --lr_scheduler."

    def change_note(self, old_steps: int, new_steps: int) -> str:
        """Return what a change of training.steps means for the schedule of a resumed run; "" if nothing."""
        return ""


class WarmupStableDecay(Schedule):
    """A factor of the learning rate for each step: linear warm-up, a plateau at 1, then decay to `min_lr_factor`.

    The decay covers the last `decay_ratio * total_steps` steps; if `decay_ratio` is None, all steps after the warm-up.
    """

    class Config(Schedule.Config):
        warmup_steps: int = 200
        """Steps of linear warm-up. The factor is 1 / warmup_steps in the first of them and 1 in the last."""
        total_steps: int | None = None
        """Number of steps after which the decay is complete. None: training.steps."""
        decay_ratio: float | None = None
        """Fraction of total_steps that the decay takes. None: all steps after the warm-up."""
        decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
        """Shape of the decay; sqrt is 1 - sqrt(progress)."""
        min_lr_factor: float = 0.0
        """Factor after the decay, from step total_steps + 1 on."""

        def validate(self) -> None:
            if self.warmup_steps < 0:
                raise ConfigError(f"lr_scheduler.warmup_steps must be at least 0, got {self.warmup_steps}.")
            if self.total_steps is not None and self.total_steps < 1:
                raise ConfigError(f"lr_scheduler.total_steps must be at least 1, or None, got {self.total_steps}.")
            for name in ("decay_ratio", "min_lr_factor"):
                value = getattr(self, name)
                if value is not None and not 0 <= value <= 1:
                    raise ConfigError(f"lr_scheduler.{name} must be between 0 and 1, got {value}.")

    config: Config

    def __init__(self, config: Config, *, training_steps: int) -> None:
        super().__init__(config, training_steps=training_steps)
        self.total_steps = config.total_steps or training_steps
        self.warmup_steps = config.warmup_steps
        after_warmup = max(self.total_steps - self.warmup_steps, 0)
        if config.decay_ratio is None:
            self.decay_steps = after_warmup
        else:
            self.decay_steps = min(round(config.decay_ratio * self.total_steps), after_warmup)

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate for step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_start = self.total_steps - self.decay_steps
        if step < decay_start or self.decay_steps == 0:
            return 1.0
        progress = min((step - decay_start) / self.decay_steps, 1.0)
        remaining = {
            "linear": 1 - progress,
            "sqrt": 1 - math.sqrt(progress),
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }[self.config.decay_type]
        return self.config.min_lr_factor + (1 - self.config.min_lr_factor) * remaining

    def zero_rate_fix(self, steps: int) -> str:
        """Return how to avoid steps with a factor of 0 in a run of `steps`."""
        return (
            f"lr_scheduler.total_steps is {self.config.total_steps}, training.steps is {steps}. Set "
            f"--lr_scheduler.total_steps to None or {steps}, --lr_scheduler.min_lr_factor above 0, or fewer "
            "--training.steps."
        )

    def change_note(self, old_steps: int, new_steps: int) -> str:
        """Return that the decay ends at another step; "" if total_steps is set."""
        if self.config.total_steps is not None:
            return ""
        return (
            f"the learning rate now decays until step {new_steps}; "
            f"set --lr_scheduler.total_steps {old_steps} to keep the previous schedule"
        )
