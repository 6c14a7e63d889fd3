"""Sections of a run's config that are plain settings and build nothing."""

from __future__ import annotations

from typing import Literal

from titan_config import ConfigError, Configurable
from titan_parallel import MixedPrecision


class Training(Configurable.Config):
    """`--training.*`: how long, on how much, in which precision."""

    global_batch_size: int
    """Rows (sequences) of one optimizer step over all ranks. Gradient accumulation follows from it."""
    local_batch_size: int = 8
    """Rows of one micro-batch on one data rank."""
    seq_len: int = 2048
    """Tokens of a row."""
    steps: int = 10000
    """Optimizer steps of the run; may grow when a run goes on. Where the decay ends, lr_scheduler.total_steps says."""
    max_norm: float | None = 1.0
    """Gradients are clipped to this norm. None: measured only."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of stored parameters and optimizer state. In bfloat16 updates below 1/256 of a weight are lost in rounding."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Of parameters while they compute."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Of gradients while they are summed."""
    gc_freq: int = 50
    """Steps from one garbage collection to the next; between them there is none, so that ranks pause together."""

    def validate(self) -> None:
        for name in ("global_batch_size", "local_batch_size", "seq_len", "steps", "gc_freq"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(
                    f"Got training.{name} {value}. It must be 1 or more. Set --training.{name} to a positive number."
                )
        if self.max_norm is not None and not self.max_norm > 0:  # nan is neither
            raise ConfigError(
                f"Got training.max_norm {self.max_norm}. A norm to clip to is positive. "
                "Set --training.max_norm above 0, or to None for no clipping."
            )
        if self.global_batch_size % self.local_batch_size:
            raise ConfigError(
                f"Got a global batch of {self.global_batch_size} rows in micro-batches of {self.local_batch_size}. "
                "The local batch size must divide the global one. "
                "Change --training.local_batch_size or --training.global_batch_size."
            )

    def mixed_precision(self) -> MixedPrecision.Config:
        """What `parallelize` takes."""
        return MixedPrecision.Config(param=self.mixed_precision_param, reduce=self.mixed_precision_reduce)

    def num_batches(self, dp_size: int) -> int:
        """Micro-batches of a step on each data rank. Raises ConfigError where ranks cannot take as many whole ones."""
        rows_at_once = dp_size * self.local_batch_size
        if self.global_batch_size % rows_at_once:
            raise ConfigError(
                f"Got a global batch of {self.global_batch_size} rows for {dp_size} data ranks with "
                f"micro-batches of {self.local_batch_size}. Each rank takes as many whole ones. "
                f"Set --training.global_batch_size to a multiple of {rows_at_once}{self._or_fewer(dp_size)}."
            )
        return self.global_batch_size // rows_at_once

    def _or_fewer(self, dp_size: int) -> str:
        rows, rest = divmod(self.global_batch_size, dp_size)
        if rest:
            return ""
        fitting = max(size for size in range(1, self.local_batch_size + 1) if rows % size == 0)
        return f", or --training.local_batch_size to {fitting}"


class Comm(Configurable.Config):
    """`--comm.*`: how long a collective may take before the run is ended."""

    init_timeout_seconds: int = 300
    """Until the end of the first step: compiling and connecting take time."""
    train_timeout_seconds: int = 100
    """From the second step on, but for validations: they may compile, and open their data."""

    def validate(self) -> None:
        for name in ("init_timeout_seconds", "train_timeout_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"Got comm.{name} {getattr(self, name)}. A timeout is 1 second or more. Set --comm.{name}."
                )


class Debug(Configurable.Config):
    """`--debug.*`: what makes a run repeatable."""

    seed: int = 0
    """Of the initial weights, the order of the data and every random number."""
    deterministic: bool = False
    """Only kernels that give the same bits each time (needed on GPUs for bitwise equal resumes)."""
    deterministic_warn_only: bool = False
    """Warn of a kernel that has no deterministic form instead of stopping."""

    def validate(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ConfigError(
                f"debug.seed must be from 0 to 2**64 - 1, got {repr(self.seed)[:40]}. Set --debug.seed.", "seed"
            )
