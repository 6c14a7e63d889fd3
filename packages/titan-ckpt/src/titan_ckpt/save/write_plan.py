"""The write plan: which rank writes which chunks. Agreed once, and again if the tensors of a rank change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.format.chunks import Chunk
from titan_ckpt.format.index import Index, encode_index, index_of, join_indices


@dataclass(frozen=True)
class WritePlan:
    """Names of the chunks that this rank writes, its file, and (on rank 0) the index of the chunks of all ranks."""

    mine: frozenset[str]
    file: str
    index: bytes


class Planner:
    """Caches the write plan of a run; `plan` is a collective of all ranks."""

    def __init__(self, guard: CollectiveGuard) -> None:
        self._guard = guard
        self._signature: object = None
        self._plan = WritePlan(frozenset(), "", b"")

    def plan(self, chunks: Sequence[Chunk], replicated: frozenset[str]) -> WritePlan:
        """Return the cached plan if names, shapes and dtypes of the chunks are unchanged on all ranks, or a new one.

        Raises:
            CheckpointError: on every rank, if ranks disagree on a tensor or their chunks do not cover it.
        """
        signature = (
            replicated,
            [(chunk.name, chunk.shape, chunk.offsets, chunk.data.shape, chunk.data.dtype) for chunk in chunks],
        )
        if self._guard.any(signature != self._signature):
            self._signature = None
            self._plan = make_plan(chunks, replicated, self._guard)
            self._signature = signature
        return self._plan


def make_plan(chunks: Sequence[Chunk], replicated: frozenset[str], guard: CollectiveGuard) -> WritePlan:
    """Decide which rank writes which chunks; a collective of all ranks.

    `replicated` names the chunks of plain tensors: one of the ranks that hold such a chunk writes it. The same applies
    to a box of a DTensor that ranks of different meshes hold, such as a tied weight in two pipeline stages.

    Raises:
        CheckpointError: on every rank, if ranks disagree on a tensor or their chunks do not cover it.
    """
    file = f"rank-{guard.rank:05}.safetensors"
    mine = _my_chunks(chunks, replicated, guard)
    indices = guard.gather_to_first(index_of(mine, file))
    duplicates = guard.broadcast(_find_duplicates(indices))
    mine = [chunk for chunk in mine if chunk.name not in duplicates.get(guard.rank, ())]
    unique = [
        {name: tensor for name, tensor in index.items() if name not in duplicates.get(rank, ())}
        for rank, index in enumerate(indices)
    ]
    index = guard.run_on_all(lambda: encode_index(join_indices(unique)) if guard.is_first else b"")
    return WritePlan(frozenset(chunk.name for chunk in mine), file, index)


def _my_chunks(chunks: Sequence[Chunk], replicated: frozenset[str], guard: CollectiveGuard) -> list[Chunk]:
    """Return the chunks that this rank writes; the ranks that hold a replicated chunk take turns, in order of names."""
    holders: dict[str, list[int]] = {}
    for rank, names in enumerate(guard.all_gather(sorted(replicated))):
        for name in names:
            holders.setdefault(name, []).append(rank)
    writer = {name: who[place % len(who)] for place, (name, who) in enumerate(sorted(holders.items()))}
    return [chunk for chunk in chunks if writer.get(chunk.name, guard.rank) == guard.rank]


def _find_duplicates(indices: Sequence[Index]) -> dict[int, set[str]]:
    """Return, by rank, the names of chunks that an earlier rank holds too; few, and none on most ranks."""
    seen: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    duplicates: dict[int, set[str]] = {}
    for rank, index in enumerate(indices):
        for name, tensor in index.items():
            boxes = {(name, chunk.offsets, chunk.sizes) for chunk in tensor.chunks}
            if boxes <= seen:
                duplicates.setdefault(rank, set()).add(name)
            seen |= boxes
    return duplicates
