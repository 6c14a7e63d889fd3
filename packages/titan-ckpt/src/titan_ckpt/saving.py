"""One save, from the copies in CPU memory to a published checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_ckpt.chunks import Chunk
from titan_ckpt.errors import CheckpointError
from titan_ckpt.files import FileRecord, publish, write_json, write_tensors
from titan_ckpt.index import INDEX, Index, index_of, join_indices, write_index
from titan_ckpt.manifest import Manifest, installed_versions, write_manifest
from titan_ckpt.ranks import Ranks
from titan_ckpt.shelf import Shelf
from titan_ckpt.state import merge

STATE = "state.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Snapshot:
    """What a rank brings to a save: its chunks, the JSON values of its parts, and which chunks other ranks hold too.

    `replicated` names the chunks that come from plain tensors; of the ranks that bring such a chunk one writes it.
    """

    step: int
    chunks: Sequence[Chunk]
    replicated: frozenset[str]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class _Written:
    index: Index
    values: Mapping[str, Any]
    files: dict[str, FileRecord]


def save(snapshot: Snapshot, shelf: Shelf, ranks: Ranks, run_config: Any) -> None:
    """Write a snapshot and publish it: a collective of all ranks.

    Raises:
        CheckpointError: on every rank, when any rank failed; nothing is published then.
    """
    try:
        folder = ranks.share(ranks.together(lambda: shelf.begin(snapshot.step) if ranks.is_first else shelf.folder))
        mine = _my_chunks(snapshot, ranks)
        everything = ranks.gather_first(ranks.together(lambda: _write(folder, mine, snapshot.values, ranks.rank)))
        ranks.together(
            lambda: _publish(folder, snapshot.step, everything, shelf, run_config) if ranks.is_first else None
        )
    except OSError as error:
        raise CheckpointError(
            f"Got {error} while saving step {snapshot.step} to {shelf.folder}. A save needs a disk that takes all of "
            f"it. Free or mend it; the checkpoints published before are whole."
        ) from error


def _my_chunks(snapshot: Snapshot, ranks: Ranks) -> list[Chunk]:
    """The chunks this rank writes: of what several ranks hold, each takes its turn."""
    holders: dict[str, list[int]] = {}
    for rank, names in enumerate(ranks.gather(sorted(snapshot.replicated))):
        for name in names:
            holders.setdefault(name, []).append(rank)
    writer = {name: who[place % len(who)] for place, (name, who) in enumerate(sorted(holders.items()))}
    return [chunk for chunk in snapshot.chunks if writer.get(chunk.name, ranks.rank) == ranks.rank]


def _write(folder: Path, chunks: Sequence[Chunk], values: Mapping[str, Any], rank: int) -> _Written:
    if not chunks:
        return _Written({}, values, {})
    file = f"rank-{rank:05}.safetensors"
    tensors: dict[str, Tensor] = {chunk.key: chunk.data for chunk in chunks}
    return _Written(index_of(chunks, file), values, {file: write_tensors(folder / file, tensors)})


def _publish(folder: Path, step: int, everything: Sequence[_Written], shelf: Shelf, run_config: Any) -> None:
    files = {name: record for written in everything for name, record in written.files.items()}
    files[INDEX] = write_index(folder, join_indices(written.index for written in everything))
    files[STATE] = write_json(folder / STATE, merge(written.values for written in everything))
    files[CONFIG] = write_json(folder / CONFIG, run_config)
    write_manifest(folder, Manifest(step, len(everything), installed_versions(), files))
    publish(folder, shelf.path(step))
