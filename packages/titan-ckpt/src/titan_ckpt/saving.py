"""One save, from the copies in CPU memory to a published checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_ckpt.errors import CheckpointError
from titan_ckpt.files import FileRecord, publish, write_blocks, write_json
from titan_ckpt.index import INDEX
from titan_ckpt.manifest import Manifest, installed_versions, write_manifest
from titan_ckpt.plan import Plan
from titan_ckpt.ranks import Ranks
from titan_ckpt.shelf import Shelf
from titan_ckpt.state import merge

STATE = "state.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Snapshot:
    """What a rank brings to a save: its plan, what writes the plan's chunks as a file, and the values of its parts."""

    step: int
    plan: Plan
    write_chunks: Callable[[Path], FileRecord]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class _Written:
    values: Mapping[str, Any]
    files: dict[str, FileRecord]


def save(snapshot: Snapshot, shelf: Shelf, ranks: Ranks, run_config: Any) -> None:
    """Write a snapshot and publish it: a collective of all ranks.

    Raises:
        CheckpointError: on every rank, when any rank failed; nothing is published then.
    """
    try:
        folder = ranks.share(ranks.together(lambda: shelf.begin(snapshot.step) if ranks.is_first else shelf.folder))
        everything = ranks.gather_first(ranks.together(lambda: _write(folder, snapshot)))
        ranks.together(lambda: _publish(folder, snapshot, everything, shelf, run_config) if ranks.is_first else None)
    except OSError as error:
        raise CheckpointError(
            f"Got {error} while saving step {snapshot.step} to {shelf.folder}. A save needs a disk that takes all of "
            f"it. Free or mend it; the checkpoints published before are whole."
        ) from error


def _write(folder: Path, snapshot: Snapshot) -> _Written:
    plan = snapshot.plan
    return _Written(snapshot.values, {plan.file: snapshot.write_chunks(folder / plan.file)} if plan.mine else {})


def _publish(folder: Path, snapshot: Snapshot, everything: Sequence[_Written], shelf: Shelf, run_config: Any) -> None:
    files = {name: record for written in everything for name, record in written.files.items()}
    files[INDEX] = write_blocks(folder / INDEX, [snapshot.plan.index])
    files[STATE] = write_json(folder / STATE, merge(written.values for written in everything))
    files[CONFIG] = write_json(folder / CONFIG, run_config)
    write_manifest(folder, Manifest(snapshot.step, len(everything), installed_versions(), files))
    publish(folder, shelf.path(snapshot.step))
