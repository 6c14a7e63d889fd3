"""What the ranks of a run tell each other about a checkpoint, over a group of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from titan_ckpt.errors import CheckpointError

T = TypeVar("T")


class CollectiveGuard:
    """The ranks that save and load together; a process without `torch.distributed` is one rank.

    The group is a gloo group made here, so that saving in a thread never mixes its messages with those of training (on
    a shared gloo group both would hang). Making it is a collective: every rank makes its `CollectiveGuard` at the same point.
    With `alone` this rank is the only one, whatever the others do.
    """

    def __init__(self, alone: bool = False) -> None:
        distributed = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self._group = dist.new_group(backend="gloo") if distributed else None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which decides and publishes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order of rank, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather_first(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, and an empty list elsewhere."""
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def share(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def first(self, action: Callable[[], T]) -> T:
        """Do `action` on rank 0 and return its result on every rank. Raises what `together` does."""
        return self.share(self.together(lambda: action() if self.is_first else None))  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Return on every rank whether `flag` is true on any; it costs less than a `gather`."""
        if self._group is None:
            return flag
        highest = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group)
        return bool(highest)

    def together(self, action: Callable[[], T]) -> T:
        """Do `action` on every rank and return this rank's result.

        Raises:
            Exception: what `action` raised on this rank.
            CheckpointError: when `action` raised on other ranks only; so no rank goes on to wait for one that failed.
        """
        result: list[T] = []
        failure: Exception | None = None
        try:
            result.append(action())
        except Exception as error:  # raised again below, after the other ranks were told
            failure = error
        if self.any(failure is not None):
            reports = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
            if failure is not None:
                raise failure
            failed = {rank: report for rank, report in enumerate(reports) if report is not None}
            raise CheckpointError("\n".join(f"Rank {rank} failed: {report}" for rank, report in failed.items()))
        return result[0]
