"""Collectives that keep the ranks of a save or load together, over a dedicated gloo group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from titan_ckpt.errors import CheckpointError

T = TypeVar("T")


class CollectiveGuard:
    """Runs actions on all ranks or on rank 0, and raises an error of one rank on all of them.

    The gloo group is created here, so that messages of a background save never mix with those of training (on one
    shared gloo group both would hang). The constructor is a collective: every rank must call it at the same point.
    Without `torch.distributed`, or with `alone=True`, this process is the only rank.
    """

    def __init__(self, alone: bool = False) -> None:
        distributed = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self._group = dist.new_group(backend="gloo") if distributed else None

    @property
    def is_first(self) -> bool:
        """True on rank 0, which decides and publishes."""
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order of rank, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather_to_first(self, value: T) -> list[T]:
        """Return the values of all ranks, in order of rank, on rank 0, and an empty list on the other ranks."""
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0 on every rank."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def run_on_first(self, action: Callable[[], T]) -> T:
        """Call `action` on rank 0 and return its result on every rank. Raises the errors of `run_on_all`."""
        return self.broadcast(self.run_on_all(lambda: action() if self.is_first else None))  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Return, on every rank, whether `flag` is true on at least one rank; cheaper than `all_gather`."""
        if self._group is None:
            return flag
        highest = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group)
        return bool(highest)

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Call `action` on every rank and return the result of this rank.

        Raises:
            Exception: the error that `action` raised on this rank.
            CheckpointError: if `action` raised on other ranks only, so that no rank waits for a failed one.
        """
        result: list[T] = []
        failure: Exception | None = None
        try:
            result.append(action())
        except Exception as error:  # re-raised below, after the other ranks were notified
            failure = error
        if self.any(failure is not None):
            reports = self.all_gather(None if failure is None else f"{type(failure).__name__}: {failure}")
            if failure is not None:
                raise failure
            failed = {rank: report for rank, report in enumerate(reports) if report is not None}
            raise CheckpointError("\n".join(f"Rank {rank} failed: {report}" for rank, report in failed.items()))
        return result[0]
