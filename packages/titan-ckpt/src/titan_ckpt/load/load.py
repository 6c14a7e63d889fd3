"""Find the newest valid checkpoint, check compatibility, read it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_ckpt.checkpoint_folder import CheckpointFolder
from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.errors import BrokenCheckpoint, CheckpointError, UnknownFormat, join_names
from titan_ckpt.format.chunks import Chunk, local_chunks
from titan_ckpt.format.finite import find_nonfinite
from titan_ckpt.format.index import Index, read_index
from titan_ckpt.format.manifest import Manifest, read_manifest
from titan_ckpt.format.readers import TensorReader, read_config, read_values
from titan_ckpt.format.state_tree import Part, join, split_parts
from titan_ckpt.format.verify import find_damage, find_inconsistencies, find_tensor_mismatches, tensor_files
from titan_ckpt.load.compatibility import check_parts, describe_config, describe_mismatch, raise_mismatch
from titan_ckpt.torch_parts import OptimizerPart, to_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """A broken checkpoint that was not loaded, and the reason."""

    folder: Path
    reason: str


def find_newest_valid(
    checkpoint_folder: CheckpointFolder, guard: CollectiveGuard, min_step: int = 0
) -> tuple[int | None, list[Skipped]]:
    """Return the step of the newest valid checkpoint at or after `min_step`, and the broken checkpoints newer than it.

    The step is None if there are no checkpoints.

    Raises:
        UnknownFormat: if a newer checkpoint has a format that this version cannot read, which is not damage.
        CheckpointError: if there are checkpoints and all are broken, since only the user can decide to start over; if
            the disk fails.
    """
    skipped: list[Skipped] = []
    for step in reversed(guard.run_on_first(checkpoint_folder.steps)):
        if step < min_step:
            break
        damage = describe_damage(checkpoint_folder.step_path(step), guard)
        if not damage:
            return step, skipped
        skipped.append(Skipped(checkpoint_folder.step_path(step), damage))
        if guard.is_first:
            logger.warning("Skipping %s: %s.", checkpoint_folder.step_path(step), damage)
    if skipped:
        reasons = "\n".join(f"  {broken.folder.name}: {broken.reason}" for broken in skipped)
        raise CheckpointError(
            f"At least one checkpoint in {checkpoint_folder.path} must be valid, got {len(skipped)}, all broken:\n"
            f"{reasons}\nRestore one of them, or move all of them away to start over."
        )
    return None, []


def find_requested(
    checkpoint_folder: CheckpointFolder, guard: CollectiveGuard, load_step: int
) -> tuple[int, list[Skipped]]:
    """Return `load_step`, after verifying the files of its checkpoint, and an empty list of skipped checkpoints.

    Raises:
        BrokenCheckpoint: if the checkpoint is broken or absent.
        CheckpointError: if the disk fails.
    """
    damage = describe_damage(checkpoint_folder.step_path(load_step), guard)
    if damage:
        raise BrokenCheckpoint(
            f"load_step must be the step of a valid checkpoint, got {load_step}: {damage}. Choose one of "
            f"{guard.run_on_first(checkpoint_folder.steps)}, or do not set load_step."
        )
    return load_step, []


def load_step_was_applied(checkpoint_folder: CheckpointFolder, load_step: int) -> bool:
    """Return whether the newest checkpoint after `load_step` was saved by a run with the same `load_step`.

    Such a run has already gone back; if it is restarted with the same command, it resumes.

    Raises:
        UnknownFormat: if that checkpoint has a format that this version cannot read.
        CheckpointError: if the disk fails.
    """
    for step in reversed(checkpoint_folder.steps()):
        if step <= load_step:
            return False
        try:
            return _read_manifest(checkpoint_folder.step_path(step)).load_step == load_step
        except UnknownFormat:  # the run that saved it may have gone back already
            raise
        except BrokenCheckpoint:
            continue
    return False


def describe_damage(folder: Path, guard: CollectiveGuard) -> str:
    """Return the damage of a checkpoint, or an empty string if it is valid, on all ranks; the ranks share the work.

    Raises:
        UnknownFormat: if its format cannot be read by this version.
        CheckpointError: if the disk fails.
    """
    reason, manifest = guard.run_on_first(lambda: _check_metadata(folder))
    if manifest is None:
        return reason
    if reason:
        return reason
    mine = tensor_files(manifest)[guard.rank :: guard.world_size]

    def find_mine() -> list[str]:
        return find_damage(folder, manifest, mine) or find_tensor_mismatches(folder, read_index(folder), mine)

    return "; ".join(damage for found in guard.all_gather(guard.run_on_all(find_mine)) for damage in found)


def _check_metadata(folder: Path) -> tuple[str, Manifest | None]:
    """Return the damage of all files but the tensor files, and the manifest if it can be read."""
    try:
        manifest = _read_manifest(folder)
    except UnknownFormat:
        raise
    except BrokenCheckpoint as error:
        return str(error), None
    others = sorted(manifest.files.keys() - set(tensor_files(manifest)))
    return "; ".join(find_damage(folder, manifest, others) or find_inconsistencies(folder, manifest)), manifest


def _read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint. Raises the errors of `read_manifest`; UnknownFormat states the fix."""
    try:
        return read_manifest(folder)
    except UnknownFormat as error:
        raise UnknownFormat(
            f"{folder} cannot be read: {error}. Update titan-ckpt, or move the folder away to resume from an older "
            "checkpoint."
        ) from error


def load_parts(
    folder: Path, parts: Mapping[str, Part], guard: CollectiveGuard, run_config: Any, exactly: bool = True
) -> None:
    """Load a verified checkpoint into the parts, after checking that all of it fits.

    Parts without tensors are loaded first, so that a part that rejects its state does so before any weight changes.
    With `exactly=False` the checkpoint may have more parts than requested.

    Raises:
        CheckpointError: on every rank, if a tensor on any rank is missing, unexpected, or of another shape or dtype.
    """
    parts = to_parts(parts)
    with guard.run_on_all(lambda: TensorReader(folder)) as reader:
        values = guard.run_on_all(lambda: read_values(folder))
        guard.run_on_all(
            lambda: check_parts(values if exactly else {k: v for k, v in values.items() if k in parts}, parts)
        )
        guard.run_on_all(lambda: _set_expected_state(parts, reader.index, values))
        tensors, _, states = guard.run_on_all(lambda: split_parts(parts))
        chunks = local_chunks(tensors)
        _check_compatibility(folder, reader, chunks, tensors, parts, guard, run_config)
        with_tensors = [name for name in parts if _has_tensors(name, tensors)]
        without = [name for name in parts if name not in with_tensors]
        _load_states(without, parts, states, values, tensors, guard)
        guard.run_on_all(lambda: reader.fill(chunks.values()))
        _warn_nonfinite(folder, chunks, guard)
        _load_states(with_tensors, parts, states, values, tensors, guard)


def _check_compatibility(
    folder: Path,
    reader: TensorReader,
    chunks: Mapping[str, Chunk],
    tensors: Mapping[str, Tensor],
    parts: Iterable[str],
    guard: CollectiveGuard,
    run_config: Any,
) -> None:
    names = set().union(*guard.all_gather(set(tensors)))
    index = {name: stored for name, stored in reader.index.items() if name.partition(".")[0] in set(parts)}
    problems = describe_mismatch(index, chunks, names)
    found = list(dict.fromkeys(problem for mine in guard.all_gather(problems) for problem in mine))
    if found:
        raise_mismatch(folder, found, describe_config(read_config(folder), run_config))


def _warn_nonfinite(folder: Path, chunks: Mapping[str, Chunk], guard: CollectiveGuard) -> None:
    weights = {name: chunk.data for name, chunk in chunks.items() if name.startswith("model.")}
    found = sorted(set().union(*guard.all_gather(guard.run_on_all(lambda: find_nonfinite(weights)))))
    if found and guard.is_first:
        logger.warning("%s has NaN or infinite values in %d tensors: %s.", folder, len(found), join_names(found))


def _set_expected_state(parts: Mapping[str, Part], index: Index, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Pass the stored index to optimizers, whose state may not exist before the first step. Raises CheckpointError."""
    for name, part in parts.items():
        if isinstance(part, OptimizerPart):
            prefix = f"{name}."
            tensors = {key.removeprefix(prefix): stored for key, stored in index.items() if key.startswith(prefix)}
            part.expect(tensors, values[name])


def _has_tensors(part: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(f"{part}.") for name in tensors)


def _load_states(
    names: Iterable[str],
    parts: Mapping[str, Part],
    states: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    guard: CollectiveGuard,
) -> None:
    def load_all() -> None:
        for name in names:
            try:
                parts[name].load_state_dict(join(states[name], values[name], tensors))
            except ValueError:  # raised by the part itself; includes CheckpointError
                raise
            except Exception as error:
                raise CheckpointError(
                    f"The part {name!r} must accept its saved state, got {type(error).__name__}: {error}. Load it "
                    "into the part that it was saved from."
                ) from error

    guard.run_on_all(load_all)
