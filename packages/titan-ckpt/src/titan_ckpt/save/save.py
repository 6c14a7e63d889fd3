"""One save, from the copies in CPU memory to a published checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_ckpt.checkpoint_folder import CheckpointFolder
from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.errors import SaveFailed
from titan_ckpt.format.durable_files import CONFIG, INDEX, STATE, FileRecord, write_blocks, write_json
from titan_ckpt.format.manifest import Manifest, installed_versions, write_manifest
from titan_ckpt.format.state_tree import merge
from titan_ckpt.save.write_plan import WritePlan


@dataclass(frozen=True)
class Snapshot:
    """What a rank brings to a save: its plan, what writes the plan's chunks as a file, and the values of its parts."""

    step: int
    plan: WritePlan
    write_chunks: Callable[[Path], FileRecord]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class _Written:
    values: Mapping[str, Any]
    files: dict[str, FileRecord]


def save(
    snapshot: Snapshot,
    checkpoint_folder: CheckpointFolder,
    ranks: CollectiveGuard,
    run_config: Any,
    load_step: int | None = None,
) -> None:
    """Write a snapshot and publish it: a collective of all ranks.

    Raises:
        SaveFailed: on every rank, when the disk failed on any. Nothing is published then, and its bytes are freed; if
            only the flush of the new name failed, the checkpoint is there, and the next try flushes the name.
        CheckpointError: on every rank, when there is another reason.
    """
    temporary: Path | None = None
    try:
        if ranks.first(lambda: checkpoint_folder.flush_published(snapshot.step)):
            return
        temporary = folder = ranks.first(lambda: checkpoint_folder.begin(snapshot.step))
        everything = ranks.gather_first(ranks.together(lambda: _write(folder, snapshot)))
        ranks.first(lambda: _publish(folder, snapshot, everything, checkpoint_folder, run_config, load_step))
    except Exception as error:  # of any kind, so that all ranks come to the next line
        if ranks.any(isinstance(error, OSError)):
            raise SaveFailed(
                f"The disk must take all of a save, got {error} at step {snapshot.step} in {checkpoint_folder.folder}. Free "
                f"space; earlier checkpoints are whole."
            ) from error
        raise
    finally:
        if ranks.is_first and temporary is not None:
            checkpoint_folder.end(temporary)


def _write(folder: Path, snapshot: Snapshot) -> _Written:
    plan = snapshot.plan
    return _Written(snapshot.values, {plan.file: snapshot.write_chunks(folder / plan.file)} if plan.mine else {})


def _publish(
    folder: Path,
    snapshot: Snapshot,
    everything: Sequence[_Written],
    checkpoint_folder: CheckpointFolder,
    run_config: Any,
    load_step: int | None,
) -> None:
    """Write the files that are for all ranks, the manifest last, and give the folder its name."""
    step = snapshot.step
    files = {name: record for written in everything for name, record in written.files.items()}
    values = merge(written.values for written in everything)
    files[INDEX] = write_blocks(folder / INDEX, [snapshot.plan.index])
    files[STATE] = write_json(folder / STATE, values)
    files[CONFIG] = write_json(folder / CONFIG, run_config)
    counters = [name for name, state in values.items() if type(state.get("step")) is int and state["step"] == step]
    write_manifest(folder, Manifest(step, len(everything), installed_versions(), files, load_step, counters))
    checkpoint_folder.publish(folder, step)
