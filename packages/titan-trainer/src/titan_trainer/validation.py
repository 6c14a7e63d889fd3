"""Validation: the mean loss on held-out data."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch.distributed as dist
from titan_config import ConfigError, Configurable
from titan_parallel import ParallelModel

from titan_trainer.protocols import Loader, Loss

log = logging.getLogger(__name__)

WARN_AFTER_BATCHES = 10_000
"""Number of global batches after which a validation warns that it has not finished."""


class Validator(Configurable):
    """The mean loss over the same sequences in each validation: the first of its loader, up to `tokens` targets."""

    class Config(Configurable.Config):
        dataloader: Configurable.Config
        """Loader of the validation data. If `tokens` is None, it must end after an epoch."""
        interval: int = 100
        """Training steps from one validation to the next; step training.steps is followed by one, too."""
        tokens: int | None = None
        """Valid targets to evaluate, in whole global batches. None: all data of the loader, which must be finite."""

        def validate(self) -> None:
            for name in ("interval", "tokens"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ConfigError(f"validator.{name} must be at least 1, got {value}.")
            if self.tokens is None and getattr(self.dataloader, "infinite", False) is True:
                raise ConfigError(
                    "validator.tokens must be a number if validator.dataloader.infinite is True, got None. Set "
                    "--validator.tokens, or --validator.dataloader.infinite False.",
                    "tokens",
                )

    def __init__(
        self,
        config: Config,
        *,
        loader: Loader,
        parallel: ParallelModel,
        loss: Loss,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Build the validator. `is_stopped` is called before each batch and must return the same on every rank."""
        self.config, self.loader, self.parallel, self.loss = config, loader, parallel, loss
        self.is_stopped = is_stopped
        self.start = loader.state_dict()

    def is_due(self, step: int, last: bool) -> bool:
        """Return whether to validate after step number `step`; `last` if it is the last of the run."""
        return last or step % self.config.interval == 0

    def validate(self) -> float | None:
        """Return the mean loss over all valid targets, the same on every rank; None if `is_stopped` returned True.

        Raises ValueError if the data has no valid target.
        """
        dims = self.parallel.dims
        self.loader.load_state_dict(self.start)
        loss_sum, count, num_batches = 0.0, 0, 0
        while self.config.tokens is None or count < self.config.tokens:
            if self.is_stopped():
                return None
            if num_batches == WARN_AFTER_BATCHES:
                if count == 0:
                    break
                log.warning("Validation has not finished after %d batches. Limit it: --validator.tokens.", num_batches)
            batches = self.loader.next_batches(dims.dp_rank, dims.dp_size)
            if not batches:
                break
            batch_sum, batch_count = self.parallel.evaluate(batches, self.loss)
            loss_sum += float(batch_sum)
            count += int(batch_count)
            num_batches += 1
            cursor_delta = self.loader.cursor_delta()
            if dims.dp_size > 1:
                dist.all_reduce(cursor_delta, group=dims.data_group)
            self.loader.commit(cursor_delta)
        if count == 0:
            raise ValueError(
                f"Validation data must fill at least one global batch, got no valid target in {num_batches} batches. "
                "Use more text, or a smaller --training.global_batch_size."
            )
        return loss_sum / count
