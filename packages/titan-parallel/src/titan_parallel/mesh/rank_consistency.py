"""RankConsistencyCheck of ranks: what one rank cannot do, or would do otherwise than the others, is an error on every rank.

A rank that raises alone leaves the others waiting in their next collective, and ranks that go different ways meet in
collectives that do not belong together. So ranks agree beforehand. That is one sum of three integers over all ranks;
only where it says that something is wrong do they tell each other what.
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
    """What must be alike on `ranks`: a few words of text, or many lines of it."""

    name: str
    text: str
    ranks: Sequence[int]

    @property
    def digest(self) -> int:
        """64 bits of all that it says."""
        words = f"{self.name}\n{self.ranks[0]}\n{self.text}".encode()
        return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest())


class RankConsistencyCheck:
    """`with RankConsistencyCheck("parallelize", "cpu") as consistency:` around what can fail on one rank alone.

    Inside, `consistency.on(name, text)` says what must be alike. On leaving, each rank that failed raises its own error,
    and all others a ConfigError that says which rank said what; where texts differ, every rank raises a ConfigError
    naming the item, and who has which. Inside, no rank may wait for another. Does nothing where a rank is alone.

    `consistency.ask(True)` asks all ranks to do something that they do together: `asked` says on leaving if any did.
    """

    asked = False

    def __init__(self, doing: str, device_type: str) -> None:
        """`doing` is a verb, for errors; the sum runs on a device of this type, which the default group knows."""
        self._doing = doing
        self._device_type = device_type
        self._num_ranks = _num_ranks()
        self._items: list[Item] = []
        self.on("calls", doing)

    def on(self, name: str, text: str, ranks: Sequence[int] | None = None) -> None:
        """`text` must be the same on these ranks (None: all), which this rank is one of. All give the same names."""
        self._items.append(Item(name, text, range(self._num_ranks) if ranks is None else ranks))

    def ask(self, needs: bool) -> None:
        """Let `asked` be true on every rank, after the block, if `needs` is on any."""
        self.asked = needs

    def __enter__(self) -> RankConsistencyCheck:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        interrupted = error is not None and not isinstance(error, Exception)
        if self._num_ranks == 1 or interrupted or not self._something_is_wrong(error):
            return
        said = self._tell_what(error)
        if error is None:
            _raise_failure_of_another(said, self._doing)
        if all(of_rank["error"] is None for of_rank in said):
            self._raise_difference([of_rank["digests"] for of_rank in said])

    def _something_is_wrong(self, error: BaseException | None) -> bool:
        """Return whether any rank failed, or any item differs, and set `asked`: the one collective of ranks that agree.

        The first of the n ranks that share an item gives its digest times 1 - n, each other gives its digest: the sum
        is zero, modulo 2^64, if all digests are the same.
        """
        rank = dist.get_rank()
        total = sum(item.digest * (1 - len(item.ranks) if rank == item.ranks[0] else 1) for item in self._items)
        signed = (total + 2**63) % 2**64 - 2**63
        sums = torch.tensor([error is not None, signed, self.asked], dtype=torch.int64, device=self._device_type)
        dist.all_reduce(sums)
        if dist.get_backend() == "fake":  # in a plan nobody else is there
            return False
        *wrong, num_asking = sums.tolist()
        self.asked = num_asking > 0
        return wrong != [0, 0]

    def _tell_what(self, error: BaseException | None) -> list[dict[str, Any]]:
        """What went wrong on each rank, and the digests of its items: who shares it, and what it says."""
        digests = [(item.ranks[0], item.digest) for item in self._items]
        text = json.dumps({"error": _said(error), "digests": digests})
        return [json.loads(told) for told in _gather_texts(text, self._device_type)]

    def _raise_difference(self, digests: list[list[list[int]]]) -> None:
        """All ranks come here together, with the same `digests`; only now long texts are sent, and only two of them."""
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
    """As a person says it: "rank 3", "ranks 0, 1, 2", "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 56 more"."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _raise_failure_of_another(said: list[dict[str, Any]], doing: str) -> None:
    failed = [rank for rank, of_rank in enumerate(said) if of_rank["error"] is not None]
    if failed:
        message = said[failed[0]]["error"]
        who = ranks_text([rank for rank in failed if said[rank]["error"] == message])
        raise ConfigError(f"{who.capitalize()} could not {doing}: {message}")


def _difference(name: str, groups: list[list[int]], texts: list[str]) -> str:
    """The first line that differs, of what two groups of ranks have."""
    lines = itertools.zip_longest(*(text.splitlines() for text in texts), fillvalue="nothing")
    one, other = next(pair for pair in lines if pair[0] != pair[1])
    return (
        f"Got other {name} on {ranks_text(groups[1])} ({other}) than on {ranks_text(groups[0])} ({one}). What these "
        f"ranks do together needs the same on each. Give them the same {name}."
    )


def _said(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def host_device_type(device_type: str) -> str:
    """ "cpu" where the default group has a backend for it, so that a device need not be set yet; else `device_type`."""
    has_cpu = dist.is_initialized() and "cpu:" in dist.get_backend_config()
    return "cpu" if has_cpu else device_type


# Texts as tensors of bytes: torch's own collectives for objects need numpy, which torch does not bring.


def _gather_texts(text: str, device_type: str) -> list[str]:
    """The texts of all ranks."""
    mine = _bytes_of(text, device_type)
    sizes = [int(size) for size in _gather(_size_of(mine))]
    padded = mine.new_zeros(max(sizes))
    padded[: len(mine)] = mine
    return [_text_of(received[:size]) for received, size in zip(_gather(padded), sizes, strict=True)]


def _broadcast_text(text: str, source: int, device_type: str) -> str:
    """The text of one rank."""
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
