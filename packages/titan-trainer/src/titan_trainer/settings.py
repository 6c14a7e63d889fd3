"""Config sections that hold plain settings and build no object."""

from __future__ import annotations

from typing import Literal

from titan_config import ConfigError, Configurable
from titan_parallel import MixedPrecision


class Training(Configurable.Config):
    """Batch size, sequence length, number of steps and precision (`--training.*`)."""

    global_batch_size: int
    """Sequences per optimizer step over all ranks. It determines the number of gradient accumulation steps."""
    local_batch_size: int = 8
    """Sequences per micro-batch on each data-parallel rank."""
    seq_len: int = 2048
    """Tokens per sequence."""
    steps: int = 10000
    """Optimizer steps of the run; may be raised on resume. The decay ends at lr_scheduler.total_steps."""
    max_norm: float | None = 1.0
    """Maximum gradient norm: gradients are clipped to it. None: no clipping, the norm is only reported."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Dtype of stored parameters and optimizer state. bfloat16 loses updates below 1/256 of a weight in rounding."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of parameters in forward and backward."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Dtype of gradient reduction."""
    gc_freq: int = 50
    """Steps between garbage collections. There is no automatic collection, so that all ranks pause together."""

    def validate(self) -> None:
        for name in ("global_batch_size", "local_batch_size", "seq_len", "steps", "gc_freq"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"training.{name} must be at least 1, got {value}.")
        if self.max_norm is not None and not self.max_norm > 0:  # rejects nan, too
            raise ConfigError(f"training.max_norm must be > 0, or None for no clipping, got {self.max_norm}.")
        if self.global_batch_size % self.local_batch_size:
            raise ConfigError(
                f"training.global_batch_size must be a multiple of training.local_batch_size "
                f"({self.local_batch_size}), got {self.global_batch_size}."
            )

    def mixed_precision(self) -> MixedPrecision.Config:
        """Return the mixed-precision config for `parallelize`."""
        return MixedPrecision.Config(param=self.mixed_precision_param, reduce=self.mixed_precision_reduce)

    def num_batches(self, dp_size: int) -> int:
        """Return the number of micro-batches per step on each of `dp_size` data-parallel ranks.

        Raises ConfigError if the global batch does not divide into micro-batches, equally many per rank.
        """
        multiple = dp_size * self.local_batch_size
        if self.global_batch_size % multiple:
            raise ConfigError(
                f"training.global_batch_size must be a multiple of {multiple} ({dp_size} data-parallel ranks with "
                f"local_batch_size {self.local_batch_size}), got {self.global_batch_size}."
                f"{self._local_batch_size_advice(dp_size)}"
            )
        return self.global_batch_size // multiple

    def _local_batch_size_advice(self, dp_size: int) -> str:
        sequences_per_rank, remainder = divmod(self.global_batch_size, dp_size)
        if remainder:
            return ""
        largest = max(size for size in range(1, self.local_batch_size + 1) if sequences_per_rank % size == 0)
        return f" Change the global batch size, or set --training.local_batch_size to {largest}."


class Comm(Configurable.Config):
    """Timeouts after which a hanging collective ends the run (`--comm.*`)."""

    init_timeout_seconds: int = 300
    """Timeout until the end of the first step, and in validations: both may compile, connect, or open data."""
    train_timeout_seconds: int = 100
    """Timeout from the second step on, except in validations."""

    def validate(self) -> None:
        for name in ("init_timeout_seconds", "train_timeout_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"comm.{name} must be at least 1, got {getattr(self, name)}.")


class Debug(Configurable.Config):
    """Random seed and deterministic kernels (`--debug.*`)."""

    seed: int = 0
    """Seed of the initial weights, the order of the data and all random number generators."""
    deterministic: bool = False
    """Use only kernels that give the same bits each time (needed on GPUs for bitwise equal resumes)."""
    deterministic_warn_only: bool = False
    """Warn about an operation without a deterministic kernel instead of raising an error."""

    def validate(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"debug.seed must be from 0 to 2**64 - 1, got {repr(self.seed)[:40]}.", "seed")
