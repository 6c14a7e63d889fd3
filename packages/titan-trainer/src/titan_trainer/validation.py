"""The loss on text that training does not see."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch.distributed as dist
from titan_config import ConfigError, Configurable
from titan_parallel import ParallelModel

from titan_trainer.protocols import Loader, Loss

log = logging.getLogger(__name__)

MANY_BATCHES = 10_000
"""Global batches after which a validation says that it is still going on."""


class Validator(Configurable):
    """Evaluates the mean loss over the same rows each time: the first of its loader, until they hold enough targets."""

    class Config(Configurable.Config):
        dataloader: Configurable.Config
        """Of the validation text; one that ends after an epoch where `tokens` is None."""
        interval: int = 100
        """Training steps from one validation to the next; there is one after step training.steps, too."""
        tokens: int | None = None
        """Valid targets to evaluate, in whole global batches. None: until the loader ends, so it must not be
        `infinite`."""

        def validate(self) -> None:
            for name in ("interval", "tokens"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ConfigError(
                        f"Got validator.{name} {value}. It must be 1 or more. Set --validator.{name} above 0."
                    )
            if self.tokens is None and getattr(self.dataloader, "infinite", False) is True:
                raise ConfigError(
                    "validator.tokens must be a number where validator.dataloader.infinite is True, got None. Set "
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
        """Build the loop. `is_stopped` is asked before each batch, with the same answer on every rank."""
        self.config, self.loader, self.parallel, self.loss = config, loader, parallel, loss
        self.is_stopped = is_stopped
        self.start = loader.state_dict()

    def is_due(self, step: int, last: bool) -> bool:
        """Return whether to validate after step number `step`."""
        return last or step % self.config.interval == 0

    def validate(self) -> float | None:
        """Return the mean loss over all valid targets, the same on every rank; None where it was stopped.

        Raises ValueError if the loader gives no valid target.
        """
        dims = self.parallel.dims
        self.loader.load_state_dict(self.start)
        loss_sum, count, num_batches = 0.0, 0, 0
        while self.config.tokens is None or count < self.config.tokens:
            if self.is_stopped():
                return None
            if num_batches == MANY_BATCHES:
                if count == 0:
                    break
                log.warning("Validated on %d batches, and is not done: see --validator.tokens.", num_batches)
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
                f"Got no valid target in {num_batches} batches of validation. The text must fill at least one batch. "
                "Give it more text, or take a smaller global batch."
            )
        return loss_sum / count
