"""Rank consistency check: an error on one rank, or a difference between ranks, is raised on every rank.

A rank that raises alone leaves the others waiting in their next collective, and ranks that take different branches
run collectives that do not match. So ranks compare beforehand, with one all-reduce of three integers. They exchange
details only if that sum shows an error or a difference.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from titan_config import ConfigError
from torch import Tensor


@dataclass(frozen=True)
class Item:
    """A text of one or more lines that must be equal on `ranks`."""

    name: str
    text: str
    ranks: Sequence[int]

    @property
    def digest(self) -> int:
        """A 64-bit hash of the name, the first rank and the text."""
        words = f"{self.name}\n{self.ranks[0]}\n{self.text}".encode()
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest())


class RankConsistencyCheck:
    """A context manager for code that may fail on one rank only.

    Use it as `with RankConsistencyCheck("parallelize", "cpu") as consistency:`. Inside, `consistency.on(name, text)`
    registers a text that must be equal on all ranks. On exit, each rank that failed raises its own error, and all
    others raise a ConfigError with the failed ranks and their message. If texts differ, every rank raises a ConfigError
    with the name, and the first different line of two ranks. The body must not run collectives. With a single rank it
    does nothing.

    After `consistency.ask(True)` on any rank, `asked` is true on every rank after the block.
    """

    asked = False

    def __init__(self, doing: str, device_type: str) -> None:
        """`doing` is a verb for error messages ("Rank 1 could not {doing}"). `device_type` is that of the collectives
        on the default group.
        """
        self._doing = doing
        self._device_type = device_type
        self._num_ranks = _num_ranks()
        self._items: list[Item] = []
        self.on("calls", doing)

    def on(self, name: str, text: str, ranks: Sequence[int] | None = None) -> None:
        """Register a text that must be equal on `ranks` (None: all), which must include this rank.

        All ranks must register the same names, in the same order.
        """
        self._items.append(Item(name, text, range(self._num_ranks) if ranks is None else ranks))

    def ask(self, needs: bool) -> None:
        """Make `asked` true on every rank after the block, if `needs` is true on any rank."""
        self.asked = needs

    def __enter__(self) -> RankConsistencyCheck:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        interrupted = error is not None and not isinstance(error, Exception)
        if self._num_ranks == 1 or interrupted or not self._any_error_or_difference(error):
            return
        reports = self._gather_reports(error)
        if error is None:
            _raise_error_of_another_rank(reports, self._doing)
        if all(report["error"] is None for report in reports):
            self._raise_difference([report["digests"] for report in reports])

    def _any_error_or_difference(self, error: BaseException | None) -> bool:
        """Return whether any rank failed or any text differs, and set `asked`.

        This is the only collective of ranks without errors. The first of the n ranks that share an item contributes its
        digest times 1 - n, each other its digest: the sum, modulo 2^64, is zero if all digests are equal.
        """
        rank = dist.get_rank()
        total = sum(item.digest * (1 - len(item.ranks) if rank == item.ranks[0] else 1) for item in self._items)
        signed = (total + 2**63) % 2**64 - 2**63
        sums = torch.tensor([error is not None, signed, self.asked], dtype=torch.int64, device=self._device_type)
        dist.all_reduce(sums)
        if dist.get_backend() == "fake":  # a dry run has no other ranks
            return False
        num_errors, digest_sum, num_asking = sums.tolist()
        self.asked = num_asking > 0
        return (num_errors, digest_sum) != (0, 0)

    def _gather_reports(self, error: BaseException | None) -> list[dict[str, Any]]:
        """Return the error of each rank, and for each of its items the first rank that shares it and the digest."""
        digests = [(item.ranks[0], item.digest) for item in self._items]
        text = json.dumps({"error": _error_text(error), "digests": digests})
        return [json.loads(report) for report in _gather_texts(text, self._device_type)]

    def _raise_difference(self, digests: list[list[list[int]]]) -> None:
        """Raise ConfigError for the first item that differs.

        All ranks call this with the same `digests`. Only the texts of two ranks are sent.
        """
        for item, of_ranks in zip(self._items, zip(*digests, strict=True), strict=True):
            for first in sorted({shared_from for shared_from, _ in of_ranks}):
                groups: dict[int, list[int]] = {}
                for rank, (shared_from, digest) in enumerate(of_ranks):
                    if shared_from == first:
                        groups.setdefault(digest, []).append(rank)
                if len(groups) > 1:
                    pair = list(groups.values())[:2]
                    texts = [_broadcast_text(item.text, ranks[0], self._device_type) for ranks in pair]
                    raise ConfigError(_difference(item.name, pair, texts))


def ranks_text(ranks: Sequence[int]) -> str:
    """Return the ranks as text: "rank 3", "ranks 0, 1, 2", "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 56 more"."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _raise_error_of_another_rank(reports: list[dict[str, Any]], doing: str) -> None:
    failed = [rank for rank, report in enumerate(reports) if report["error"] is not None]
    if failed:
        message = reports[failed[0]]["error"]
        ranks = ranks_text([rank for rank in failed if reports[rank]["error"] == message])
        raise ConfigError(f"{ranks.capitalize()} could not {doing}: {message}")


def _difference(name: str, groups: list[list[int]], texts: list[str]) -> str:
    """Return the error message with the first line that differs between the texts of two groups of ranks."""
    lines = itertools.zip_longest(*(text.splitlines() for text in texts), fillvalue="nothing")
    one, other = next(pair for pair in lines if pair[0] != pair[1])
    return (
        f"Ranks must have the same {name}, got {other} on {ranks_text(groups[1])} and {one} on {ranks_text(groups[0])}."
    )


def _error_text(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def host_device_type(device_type: str) -> str:
    """Return "cpu" if the default group has a backend for it, else `device_type`.

    A collective on CPU needs no current CUDA device.
    """
    has_cpu = dist.is_initialized() and "cpu:" in dist.get_backend_config()
    return "cpu" if has_cpu else device_type


# Texts as tensors of bytes: torch's object collectives need numpy, which is not a dependency of torch.


def _gather_texts(text: str, device_type: str) -> list[str]:
    """Return the texts of all ranks."""
    mine = _bytes_of(text, device_type)
    sizes = [int(size) for size in _gather(_size_of(mine))]
    padded = mine.new_zeros(max(sizes))
    padded[: len(mine)] = mine
    return [_text_of(received[:size]) for received, size in zip(_gather(padded), sizes, strict=True)]


def _broadcast_text(text: str, source: int, device_type: str) -> str:
    """Return the text of rank `source`."""
    mine = _bytes_of(text, device_type)
    size = _size_of(mine)
    dist.broadcast(size, src=source)
    received = mine if dist.get_rank() == source else mine.new_zeros(int(size))
    dist.broadcast(received, src=source)
    return _text_of(received)


def _gather(tensor: Tensor) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


def _size_of(tensor: Tensor) -> Tensor:
    return torch.tensor([len(tensor)], dtype=torch.int64, device=tensor.device)


def _bytes_of(text: str, device_type: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device=device_type)


def _text_of(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode()
