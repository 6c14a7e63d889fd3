"""The learning rate's course: warm-up, stable, decay."""

from __future__ import annotations

import math
from typing import Literal

from titan_config import ConfigError, Configurable


class WarmupStableDecay(Configurable):
    """A factor for the learning rate at each step: linear warm-up, a plateau at 1, then decay to `min_lr_factor`.

    Without `decay_ratio` the decay takes all steps after the warm-up; with it, the last `decay_ratio * total_steps`.
    """

    class Config(Configurable.Config):
        warmup_steps: int = 200
        """Steps of linear warm-up: the first has a factor of 1 / warmup_steps, the last a factor of 1."""
        total_steps: int | None = None
        """Steps at which the decay ends. None: training.steps."""
        decay_ratio: float | None = None
        """The share of total_steps that decays. None: all after the warm-up."""
        decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
        """The shape of the decay; sqrt is 1 - sqrt(progress)."""
        min_lr_factor: float = 0.0
        """The factor that the step after the last of the decay would have."""

        def validate(self) -> None:
            if self.warmup_steps < 0:
                raise ConfigError(
                    f"Got {self.warmup_steps} warm-up steps. There are 0 or more. Set lr_scheduler.warmup_steps."
                )
            if self.total_steps is not None and self.total_steps < 1:
                raise ConfigError(
                    f"Got {self.total_steps} total steps. A schedule has at least one. Set lr_scheduler.total_steps."
                )
            for name in ("decay_ratio", "min_lr_factor"):
                value = getattr(self, name)
                if value is not None and not 0 <= value <= 1:
                    raise ConfigError(
                        f"Got {name} {value}. It is a share between 0 and 1. Set lr_scheduler.{name} in that range."
                    )

    def __init__(self, config: Config, *, training_steps: int) -> None:
        self.config = config
        self.total_steps = config.total_steps or training_steps
        self.warmup_steps = config.warmup_steps
        after_warmup = max(self.total_steps - self.warmup_steps, 0)
        if config.decay_ratio is None:
            self.decay_steps = after_warmup
        else:
            self.decay_steps = min(round(config.decay_ratio * self.total_steps), after_warmup)

    def steps_at_zero(self, first: int, end: int) -> int:
        """Count the last of the updates `first` to `end - 1` (from 0) whose factor is 0: those after the decay."""
        step = end
        while step > first and self.factor(step - 1) == 0:
            step -= 1
        return end - step

    def factor(self, step: int) -> float:
        """The factor for the learning rate of the update number `step`, counted from 0."""
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
