"""One load: the newest whole checkpoint is found, compared, and only then read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_ckpt.chunks import Chunk, local_chunks
from titan_ckpt.comparing import check_parts, describe_config, describe_misfit, raise_misfit
from titan_ckpt.errors import BrokenCheckpoint, CheckpointError
from titan_ckpt.manifest import find_damage, read_manifest
from titan_ckpt.ranks import Ranks
from titan_ckpt.reading import TensorReader, read_config, read_values
from titan_ckpt.shelf import Shelf
from titan_ckpt.state import Part, join, split_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that was not loaded, and why."""

    folder: Path
    reason: str


def find_newest_whole(shelf: Shelf, ranks: Ranks) -> tuple[int | None, list[PassedOver]]:
    """Return the step of the newest checkpoint whose every file is whole, and the broken ones that are newer.

    Raises:
        CheckpointError: when there are checkpoints, and all are broken: to begin anew is for a person to decide.
    """
    passed_over: list[PassedOver] = []
    for step in reversed(ranks.share(shelf.steps())):
        damage = damage_of(shelf.path(step), ranks)
        if not damage:
            return step, passed_over
        passed_over.append(PassedOver(shelf.path(step), damage))
        logger.warning("Passing over %s: %s.", shelf.path(step), damage)
    if passed_over:
        reasons = "\n".join(f"  {broken.folder.name}: {broken.reason}" for broken in passed_over)
        raise CheckpointError(
            f"Got {len(passed_over)} checkpoints in {shelf.folder}, all of them broken:\n{reasons}\nA run goes on "
            f"from a whole one. Restore one, or move them away to begin anew."
        )
    return None, []


def damage_of(folder: Path, ranks: Ranks) -> str:
    """Return what is wrong with a checkpoint (empty: it is whole), on all ranks; they share the checking."""
    reason, manifest = "", None
    if ranks.is_first:
        try:
            manifest = read_manifest(folder)
        except BrokenCheckpoint as error:
            reason = str(error)
    reason, manifest = ranks.share((reason, manifest))
    if manifest is None:
        return reason
    mine = sorted(manifest.files)[ranks.rank :: ranks.world_size]
    return "; ".join(damage for found in ranks.gather(find_damage(folder, manifest, mine)) for damage in found)


def load_parts(folder: Path, parts: Mapping[str, Part], ranks: Ranks, run_config: Any, exactly: bool = True) -> None:
    """Load a checkpoint that was found whole into the parts: all is compared first, then all is loaded.

    Parts without tensors get their state first, so that one which refuses it does so before a weight is touched. With
    `exactly=False` the checkpoint may have more parts than are asked for.

    Raises:
        CheckpointError: on every rank, when anything is missing, unexpected, or of another shape or type on any.
    """
    tensors, _, states = ranks.together(lambda: split_parts(parts))
    chunks = local_chunks(tensors)
    with TensorReader(folder) as reader:
        values = read_values(folder)
        ranks.together(
            lambda: check_parts(values if exactly else {k: v for k, v in values.items() if k in parts}, parts)
        )
        _check_fit(folder, reader, chunks, tensors, parts, ranks, run_config)
        with_tensors = [name for name in parts if _has_tensors(name, tensors)]
        without = [name for name in parts if name not in with_tensors]
        _hand_over(without, parts, states, values, ranks)
        ranks.together(lambda: reader.fill(chunks.values()))
        _hand_over(with_tensors, parts, states, values, ranks)


def _check_fit(
    folder: Path,
    reader: TensorReader,
    chunks: Mapping[str, Chunk],
    tensors: Mapping[str, Tensor],
    parts: Iterable[str],
    ranks: Ranks,
    run_config: Any,
) -> None:
    names = set().union(*ranks.gather(set(tensors)))
    index = {name: stored for name, stored in reader.index.items() if name.partition(".")[0] in set(parts)}
    problems = describe_misfit(index, chunks, names)
    found = list(dict.fromkeys(problem for mine in ranks.gather(problems) for problem in mine))
    if found:
        raise_misfit(folder, found, describe_config(read_config(folder), run_config))


def _has_tensors(part: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(f"{part}.") for name in tensors)


def _hand_over(
    names: Iterable[str],
    parts: Mapping[str, Part],
    states: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Any],
    ranks: Ranks,
) -> None:
    def load_all() -> None:
        for name in names:
            parts[name].load_state_dict(join(states[name], values[name]))

    ranks.together(load_all)
