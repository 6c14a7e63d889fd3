"""Which rank writes what: agreed once, and again when the tensors of a rank change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titan_ckpt.chunks import Chunk
from titan_ckpt.index import encode_index, index_of, join_indices
from titan_ckpt.ranks import Ranks


@dataclass(frozen=True)
class Plan:
    """The chunks that this rank writes, by name, their file, and (on rank 0) the index of what all ranks write."""

    mine: frozenset[str]
    file: str
    index: bytes


class Planner:
    """Keeps the plan of a run; `plan` is a collective of all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._held: object = None
        self._plan = Plan(frozenset(), "", b"")

    def plan(self, chunks: Sequence[Chunk], replicated: frozenset[str]) -> Plan:
        """Return the last plan where all ranks hold chunks of the same names, shapes and types as then, or a new one.

        Raises:
            CheckpointError: on every rank, when ranks disagree on a tensor or do not fill it.
        """
        held = (
            replicated,
            [(chunk.name, chunk.shape, chunk.offsets, chunk.data.shape, chunk.data.dtype) for chunk in chunks],
        )
        if self._ranks.any(held != self._held):
            self._held = None
            self._plan = make_plan(chunks, replicated, self._ranks)
            self._held = held
        return self._plan


def make_plan(chunks: Sequence[Chunk], replicated: frozenset[str], ranks: Ranks) -> Plan:
    """Agree on who writes what.

    `replicated` names the chunks that come from plain tensors; of the ranks that bring such a chunk one writes it.

    Raises:
        CheckpointError: on every rank, when ranks disagree on a tensor or do not fill it.
    """
    file = f"rank-{ranks.rank:05}.safetensors"
    mine = _my_chunks(chunks, replicated, ranks)
    indices = ranks.gather_first(index_of(mine, file))
    index = ranks.together(lambda: encode_index(join_indices(indices)) if ranks.is_first else b"")
    return Plan(frozenset(chunk.name for chunk in mine), file, index)


def _my_chunks(chunks: Sequence[Chunk], replicated: frozenset[str], ranks: Ranks) -> list[Chunk]:
    """The chunks this rank writes: of what several ranks hold, each takes its turn."""
    holders: dict[str, list[int]] = {}
    for rank, names in enumerate(ranks.gather(sorted(replicated))):
        for name in names:
            holders.setdefault(name, []).append(rank)
    writer = {name: who[place % len(who)] for place, (name, who) in enumerate(sorted(holders.items()))}
    return [chunk for chunk in chunks if writer.get(chunk.name, ranks.rank) == ranks.rank]
