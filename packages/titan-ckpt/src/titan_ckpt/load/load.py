"""One load: the newest whole checkpoint is found, compared, and only then read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_ckpt.checkpoint_folder import CheckpointFolder
from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.errors import BrokenCheckpoint, CheckpointError, UnknownFormat, listed
from titan_ckpt.format.chunks import Chunk, local_chunks
from titan_ckpt.format.finite import not_finite
from titan_ckpt.format.index import Index, read_index
from titan_ckpt.format.manifest import Manifest, read_manifest
from titan_ckpt.format.readers import TensorReader, read_config, read_values
from titan_ckpt.format.state_tree import Part, join, split_parts
from titan_ckpt.format.verify import files_of_tensors, find_contradictions, find_damage, find_other_tensors
from titan_ckpt.load.compatibility import check_parts, describe_config, describe_misfit, raise_misfit
from titan_ckpt.torch_parts import OptimizerPart, to_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was not loaded, and why."""

    folder: Path
    reason: str


def find_newest_whole(
    checkpoint_folder: CheckpointFolder, ranks: CollectiveGuard, least: int = 0
) -> tuple[int | None, list[Skipped]]:
    """Return the step of the newest whole checkpoint from step `least` on, and the broken ones that are newer.

    Raises:
        UnknownFormat: at the first whose format this version does not read: it is no damage.
        CheckpointError: when there are checkpoints, and all are broken: to begin anew is for a person to decide. When
            the disk fails.
    """
    skipped: list[Skipped] = []
    for step in reversed(ranks.first(checkpoint_folder.steps)):
        if step < least:
            break
        damage = damage_of(checkpoint_folder.path(step), ranks)
        if not damage:
            return step, skipped
        skipped.append(Skipped(checkpoint_folder.path(step), damage))
        if ranks.is_first:
            logger.warning("Passing over %s: %s.", checkpoint_folder.path(step), damage)
    if skipped:
        reasons = "\n".join(f"  {broken.folder.name}: {broken.reason}" for broken in skipped)
        raise CheckpointError(
            f"Got {len(skipped)} checkpoints in {checkpoint_folder.folder}, all of them broken:\n{reasons}\nA run goes on "
            f"from a whole one. Restore one, or move them away to begin anew."
        )
    return None, []


def find_asked(
    checkpoint_folder: CheckpointFolder, ranks: CollectiveGuard, load_step: int
) -> tuple[int, list[Skipped]]:
    """Return `load_step`, whose files are whole.

    Raises:
        BrokenCheckpoint: when it is not whole, or not there.
        CheckpointError: when the disk fails.
    """
    damage = damage_of(checkpoint_folder.path(load_step), ranks)
    if damage:
        raise BrokenCheckpoint(
            f"load_step must name a whole checkpoint, got {load_step}: {damage}. Choose one of "
            f"{ranks.first(checkpoint_folder.steps)}, or leave load_step out."
        )
    return load_step, []


def was_followed(checkpoint_folder: CheckpointFolder, load_step: int) -> bool:
    """Return whether the newest checkpoint after `load_step` was saved by a run with this same setting.

    Such a run has gone back already; when it is started again by the same command, it goes on.

    Raises:
        UnknownFormat: when that checkpoint is of a format that this version does not read.
        CheckpointError: when the disk fails.
    """
    for step in reversed(checkpoint_folder.steps()):
        if step <= load_step:
            return False
        try:
            return _manifest_of(checkpoint_folder.path(step)).load_step == load_step
        except UnknownFormat:  # what saved it may have gone back, so this run must not
            raise
        except BrokenCheckpoint:
            continue
    return False


def damage_of(folder: Path, ranks: CollectiveGuard) -> str:
    """Return what is wrong with a checkpoint (empty: it is whole), on all ranks; they share the checking.

    Raises:
        UnknownFormat: when it is of a format that this version does not read.
        CheckpointError: when the disk fails.
    """
    reason, manifest = ranks.first(lambda: _look(folder))
    if manifest is None:
        return reason
    if reason:
        return reason
    mine = files_of_tensors(manifest)[ranks.rank :: ranks.world_size]

    def find_mine() -> list[str]:
        return find_damage(folder, manifest, mine) or find_other_tensors(folder, read_index(folder), mine)

    return "; ".join(damage for found in ranks.gather(ranks.together(find_mine)) for damage in found)


def _look(folder: Path) -> tuple[str, Manifest | None]:
    """What is wrong with all but the tensors, and the manifest where it can be read."""
    try:
        manifest = _manifest_of(folder)
    except UnknownFormat:
        raise
    except BrokenCheckpoint as error:
        return str(error), None
    others = sorted(manifest.files.keys() - set(files_of_tensors(manifest)))
    return "; ".join(find_damage(folder, manifest, others) or find_contradictions(folder, manifest)), manifest


def _manifest_of(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint. Raises what `read_manifest` does, UnknownFormat with the way out."""
    try:
        return read_manifest(folder)
    except UnknownFormat as error:
        raise UnknownFormat(
            f"{folder} must be of a format that is known here: {error}. Update titan-ckpt, or move the folder away to "
            f"go on from an older checkpoint."
        ) from error


def load_parts(
    folder: Path, parts: Mapping[str, Part], ranks: CollectiveGuard, run_config: Any, exactly: bool = True
) -> None:
    """Load a checkpoint that was found whole into the parts: all is compared first, then all is loaded.

    Parts without tensors get their state first, so that one which refuses it does so before a weight is touched. With
    `exactly=False` the checkpoint may have more parts than are asked for.

    Raises:
        CheckpointError: on every rank, when anything is missing, unexpected, or of another shape or type on any.
    """
    parts = to_parts(parts)
    with ranks.together(lambda: TensorReader(folder)) as reader:
        values = ranks.together(lambda: read_values(folder))
        ranks.together(
            lambda: check_parts(values if exactly else {k: v for k, v in values.items() if k in parts}, parts)
        )
        ranks.together(lambda: _tell_stored(parts, reader.index, values))
        tensors, _, states = ranks.together(lambda: split_parts(parts))
        chunks = local_chunks(tensors)
        _check_fit(folder, reader, chunks, tensors, parts, ranks, run_config)
        with_tensors = [name for name in parts if _has_tensors(name, tensors)]
        without = [name for name in parts if name not in with_tensors]
        _hand_over(without, parts, states, values, tensors, ranks)
        ranks.together(lambda: reader.fill(chunks.values()))
        _report_not_finite(folder, chunks, ranks)
        _hand_over(with_tensors, parts, states, values, tensors, ranks)


def _check_fit(
    folder: Path,
    reader: TensorReader,
    chunks: Mapping[str, Chunk],
    tensors: Mapping[str, Tensor],
    parts: Iterable[str],
    ranks: CollectiveGuard,
    run_config: Any,
) -> None:
    names = set().union(*ranks.gather(set(tensors)))
    index = {name: stored for name, stored in reader.index.items() if name.partition(".")[0] in set(parts)}
    problems = describe_misfit(index, chunks, names)
    found = list(dict.fromkeys(problem for mine in ranks.gather(problems) for problem in mine))
    if found:
        raise_misfit(folder, found, describe_config(read_config(folder), run_config))


def _report_not_finite(folder: Path, chunks: Mapping[str, Chunk], ranks: CollectiveGuard) -> None:
    weights = {name: chunk.data for name, chunk in chunks.items() if name.startswith("model.")}
    found = sorted(set().union(*ranks.gather(ranks.together(lambda: not_finite(weights)))))
    if found and ranks.is_first:
        logger.warning("%s has values that are not finite in %d tensors: %s.", folder, len(found), listed(found))


def _tell_stored(parts: Mapping[str, Part], index: Index, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell optimizers, which may not have made their state yet, what there is of it. Raises CheckpointError."""
    for name, part in parts.items():
        if isinstance(part, OptimizerPart):
            prefix = f"{name}."
            tensors = {key.removeprefix(prefix): stored for key, stored in index.items() if key.startswith(prefix)}
            part.expect(tensors, values[name])


def _has_tensors(part: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(f"{part}.") for name in tensors)


def _hand_over(
    names: Iterable[str],
    parts: Mapping[str, Part],
    states: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    ranks: CollectiveGuard,
) -> None:
    def load_all() -> None:
        for name in names:
            try:
                parts[name].load_state_dict(join(states[name], values[name], tensors))
            except ValueError:  # of which the part is the author, and a CheckpointError is one
                raise
            except Exception as error:
                raise CheckpointError(
                    f"The part {name!r} must take the state that was saved of it, got {type(error).__name__}: {error}. "
                    f"Load it into the part that it was saved from."
                ) from error

    ranks.together(load_all)
