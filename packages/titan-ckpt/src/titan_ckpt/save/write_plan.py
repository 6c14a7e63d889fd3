"""Which rank writes what: agreed once, and again when the tensors of a rank change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.format.chunks import Chunk
from titan_ckpt.format.index import Index, encode_index, index_of, join_indices


@dataclass(frozen=True)
class WritePlan:
    """The chunks that this rank writes, by name, their file, and (on rank 0) the index of what all ranks write."""

    mine: frozenset[str]
    file: str
    index: bytes


class Planner:
    """Keeps the plan of a run; `plan` is a collective of all ranks."""

    def __init__(self, ranks: CollectiveGuard) -> None:
        self._ranks = ranks
        self._held: object = None
        self._plan = WritePlan(frozenset(), "", b"")

    def plan(self, chunks: Sequence[Chunk], replicated: frozenset[str]) -> WritePlan:
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


def make_plan(chunks: Sequence[Chunk], replicated: frozenset[str], ranks: CollectiveGuard) -> WritePlan:
    """Agree on who writes what.

    `replicated` names the chunks that come from plain tensors; of the ranks that bring such a chunk one writes it. The
    same holds for a box of a DTensor that ranks of different meshes bring, as stages do with a tied weight.

    Raises:
        CheckpointError: on every rank, when ranks disagree on a tensor or do not fill it.
    """
    file = f"rank-{ranks.rank:05}.safetensors"
    mine = _my_chunks(chunks, replicated, ranks)
    indices = ranks.gather_first(index_of(mine, file))
    repeats = ranks.share(_find_repeats(indices))
    mine = [chunk for chunk in mine if chunk.name not in repeats.get(ranks.rank, ())]
    once = [
        {name: tensor for name, tensor in index.items() if name not in repeats.get(rank, ())}
        for rank, index in enumerate(indices)
    ]
    index = ranks.together(lambda: encode_index(join_indices(once)) if ranks.is_first else b"")
    return WritePlan(frozenset(chunk.name for chunk in mine), file, index)


def _my_chunks(chunks: Sequence[Chunk], replicated: frozenset[str], ranks: CollectiveGuard) -> list[Chunk]:
    """The chunks this rank writes: of what several ranks hold, each takes its turn."""
    holders: dict[str, list[int]] = {}
    for rank, names in enumerate(ranks.gather(sorted(replicated))):
        for name in names:
            holders.setdefault(name, []).append(rank)
    writer = {name: who[place % len(who)] for place, (name, who) in enumerate(sorted(holders.items()))}
    return [chunk for chunk in chunks if writer.get(chunk.name, ranks.rank) == ranks.rank]


def _find_repeats(indices: Sequence[Index]) -> dict[int, set[str]]:
    """By rank, the names of chunks that an earlier rank brings too; few, and on most ranks none."""
    seen: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    repeats: dict[int, set[str]] = {}
    for rank, index in enumerate(indices):
        for name, tensor in index.items():
            boxes = {(name, chunk.offsets, chunk.sizes) for chunk in tensor.chunks}
            if boxes <= seen:
                repeats.setdefault(rank, set()).add(name)
            seen |= boxes
    return repeats
