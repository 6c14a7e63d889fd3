"""One save: write the snapshots of all ranks, then publish the checkpoint."""

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
    """The state that a rank saves: its write plan, a function that writes the planned chunks, and JSON values."""

    step: int
    plan: WritePlan
    write_chunks: Callable[[Path], FileRecord]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class _RankOutput:
    values: Mapping[str, Any]
    files: dict[str, FileRecord]


def save(
    snapshot: Snapshot,
    checkpoint_folder: CheckpointFolder,
    guard: CollectiveGuard,
    run_config: Any,
    load_step: int | None = None,
) -> None:
    """Write a snapshot and publish it as a checkpoint; a collective of all ranks.

    Raises:
        SaveFailed: on every rank, if the disk failed on any rank. Nothing is published, and the files of this attempt
            are deleted. If only the flush of the new name failed, the checkpoint is published, and the next attempt
            flushes the name.
        CheckpointError: on every rank, for any other failure.
    """
    temporary: Path | None = None
    try:
        if guard.run_on_first(lambda: checkpoint_folder.flush_published(snapshot.step)):
            return
        temporary = folder = guard.run_on_first(lambda: checkpoint_folder.begin_save(snapshot.step))
        outputs = guard.gather_to_first(guard.run_on_all(lambda: _write(folder, snapshot)))
        guard.run_on_first(lambda: _publish(folder, snapshot, outputs, checkpoint_folder, run_config, load_step))
    except Exception as error:  # of any kind, so that all ranks reach the collective on the next line
        if guard.any(isinstance(error, OSError)):
            raise SaveFailed(
                f"Saving step {snapshot.step} to {checkpoint_folder.path} failed: {error}. Earlier checkpoints are "
                "intact. Free disk space or fix the disk."
            ) from error
        raise
    finally:
        if guard.is_first and temporary is not None:
            checkpoint_folder.end_save(temporary)


def _write(folder: Path, snapshot: Snapshot) -> _RankOutput:
    plan = snapshot.plan
    return _RankOutput(snapshot.values, {plan.file: snapshot.write_chunks(folder / plan.file)} if plan.mine else {})


def _publish(
    folder: Path,
    snapshot: Snapshot,
    outputs: Sequence[_RankOutput],
    checkpoint_folder: CheckpointFolder,
    run_config: Any,
    load_step: int | None,
) -> None:
    """Write the files shared by all ranks, the manifest last, and rename the folder to `step-N`."""
    step = snapshot.step
    files = {name: record for output in outputs for name, record in output.files.items()}
    values = merge(output.values for output in outputs)
    files[INDEX] = write_blocks(folder / INDEX, [snapshot.plan.index])
    files[STATE] = write_json(folder / STATE, values)
    files[CONFIG] = write_json(folder / CONFIG, run_config)
    counters = [name for name, state in values.items() if type(state.get("step")) is int and state["step"] == step]
    write_manifest(folder, Manifest(step, len(outputs), installed_versions(), files, load_step, counters))
    checkpoint_folder.publish(folder, step)
