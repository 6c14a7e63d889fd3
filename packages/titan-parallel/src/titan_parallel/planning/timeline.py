"""The memory of a rank over a step: the lifetime and the category of each allocation."""

from __future__ import annotations

import bisect
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CATEGORIES = (
    "parameters",
    "optimizer",
    "gradients",
    "activations",
    "gathered_weights",
    "gradient_buckets",
    "logits",
    "working",
)
"""Categories of memory. Activations live from a forward into a backward; "working" is everything else."""

Site = tuple[str, ...]
"""An allocation site in a step: (phase, operator, dtype, shape without the first dim)."""


@dataclass
class Allocation:
    """A storage during the time that it has one size: from event `born` until event `died`."""

    size: int
    born: int
    site: Site
    in_backward: bool
    died: float = float("inf")
    category: str = ""


@dataclass
class Timeline:
    """Every allocation of a step, in the order of events; an event allocates or frees memory."""

    phase: str = "forward"
    allocations: list[Allocation] = field(default_factory=list)
    _events: list[tuple[int, int]] = field(default_factory=list)  # (allocation, +1 or -1)
    _borders: list[int] = field(default_factory=list)  # the events at which a backward began, ended, began, ...
    _live: dict[int, tuple[Any, int]] = field(default_factory=dict)  # storage -> (weak reference, allocation)

    def operator_ran(self, operator: str, outputs: list[Tensor], in_backward: bool) -> None:
        """Record the storages of `outputs` that are new."""
        if in_backward != bool(len(self._borders) % 2):
            self._borders.append(len(self._events))
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live and storage.nbytes() and tensor.device.type != "meta":
                phase = "backward" if in_backward else self.phase
                site = (phase, operator, str(tensor.dtype), "x".join(map(str, tensor.shape[1:])))
                self._begin(storage, site, in_backward)

    def label(self, tensors: list[Tensor], category: str) -> None:
        """Set the category of the storages of `tensors`, including storages that are not recorded yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live:
                self._begin(storage, ("before", category), in_backward=False)
            self.allocations[self._live[storage._cdata][1]].category = category

    def label_unlabeled(self, tensors: list[Tensor], category: str) -> None:
        """Set the category of the storages of `tensors` that are recorded and have none."""
        for tensor in tensors:
            known = self._live.get(tensor.untyped_storage()._cdata)
            if known is not None and not self.allocations[known[1]].category:
                self.allocations[known[1]].category = category

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Record the new size of a storage: FSDP2 gathers and frees weights by a resize."""
        site: Site = ("gathered",)
        if storage._cdata in self._live:
            index = self._live[storage._cdata][1]
            allocation = self.allocations[index]
            allocation.category, site = "gathered_weights", allocation.site
            self._end(storage._cdata)
        if storage.nbytes():
            self._begin(storage, site, in_backward=False)
            self.allocations[-1].category = "gathered_weights"

    def peaks(self) -> dict[Site, dict[str, int]]:
        """Return, for each site, the bytes by category at the highest total after an allocation there."""
        self._categorize()
        totals = dict.fromkeys(CATEGORIES, 0)
        total = 0
        best: dict[Site, tuple[int, tuple[int, ...]]] = {}
        for index, sign in self._events:
            allocation = self.allocations[index]
            totals[allocation.category] += sign * allocation.size
            total += sign * allocation.size
            if sign > 0 and total >= best.get(allocation.site, (0,))[0]:
                best[allocation.site] = total, tuple(totals.values())
        return {site: dict(zip(CATEGORIES, values, strict=True)) for site, (_, values) in best.items()}

    def peak_of(self, category: str) -> int:
        """Return the peak of one category, in bytes."""
        self._categorize()
        now = most = 0
        for index, sign in self._events:
            if self.allocations[index].category == category:
                now += sign * self.allocations[index].size
                most = max(most, now)
        return most

    def _categorize(self) -> None:
        for allocation in self.allocations:
            if allocation.category in ("", "logits", "gradient_buckets"):
                allocation.category = self._category_of(allocation)

    def _category_of(self, allocation: Allocation) -> str:
        """Return the category by lifetime.

        What outlives the forward in which it was allocated is an activation; what outlives a backward is a gradient
        bucket.
        """
        border = bisect.bisect_right(self._borders, allocation.born)
        outlives = border < len(self._borders) and allocation.died >= self._borders[border]
        if allocation.in_backward:
            return "gradient_buckets" if outlives else allocation.category or "working"
        if outlives and allocation.site[0] == "forward":
            return "activations"
        return "logits" if allocation.category == "logits" else "working"

    def _begin(self, storage: torch.UntypedStorage, site: Site, in_backward: bool) -> None:
        key = storage._cdata
        reference = weakref.ref(storage, lambda _: self._end(key))
        self._live[key] = reference, len(self.allocations)
        self._events.append((len(self.allocations), 1))
        self.allocations.append(Allocation(storage.nbytes(), len(self._events) - 1, site, in_backward))

    def _end(self, key: int) -> None:
        if key in self._live:
            _, index = self._live.pop(key)
            self.allocations[index].died = len(self._events)
            self._events.append((index, -1))
