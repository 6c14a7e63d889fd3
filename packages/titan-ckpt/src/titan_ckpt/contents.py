"""Cross-check index, values and tensor files of a checkpoint: checksums alone do not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from titan_ckpt.errors import BrokenCheckpoint, CheckpointError, listed
from titan_ckpt.files import CONFIG, INDEX, STATE
from titan_ckpt.index import Index, read_index
from titan_ckpt.mapped_file import open_mapped
from titan_ckpt.reading import read_config, read_values
from titan_ckpt.tensor_file import DTYPE_NAMES

if TYPE_CHECKING:  # the manifest's check of a whole checkpoint comes here
    from titan_ckpt.manifest import Manifest

NOT_TENSORS = (INDEX, STATE, CONFIG)


def files_of_tensors(manifest: Manifest) -> list[str]:
    """Return the names of the files that hold tensors."""
    return sorted(manifest.files.keys() - set(NOT_TENSORS))


def find_contradictions(folder: Path, manifest: Manifest) -> list[str]:
    """Return what is wrong with what the whole JSON files of a checkpoint say; empty when they fit together."""
    try:
        index, values = read_index(folder), read_values(folder)
        read_config(folder)
    except BrokenCheckpoint as error:
        return [str(error)]
    used = {chunk.file for tensor in index.values() for chunk in tensor.chunks}
    files = set(files_of_tensors(manifest))
    problems = [f"{name} is not listed" for name in sorted(used - files)[:4]]
    problems += [f"{name} holds no tensor of {INDEX}" for name in sorted(files - used)[:4]]
    for name in manifest.counters:
        found = values[name].get("step") if name in values else None
        if type(found) is not int or found != manifest.step:
            problems.append(f"{name} is at step {found!r:.40}")
    return problems


def find_other_tensors(folder: Path, index: Index, files: Iterable[str]) -> list[str]:
    """Return in which of the whole `files` there are other tensors than the index says; empty when they are those.

    Raises:
        CheckpointError: when the disk fails.
    """
    expected: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {name: {} for name in files}
    for tensor_name, tensor in index.items():
        for chunk in tensor.chunks:
            if chunk.file in expected:
                expected[chunk.file][chunk.key(tensor_name)] = (tensor.dtype, chunk.sizes)
    problems = []
    for name, there in expected.items():
        try:
            with open_mapped(folder / name) as file:
                found = {key: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in file.stand_ins().items()}
        except CheckpointError as error:
            if not isinstance(error, BrokenCheckpoint):
                raise
            problems.append(str(error))
            continue
        other = sorted(key for key in there.keys() | found.keys() if there.get(key) != found.get(key))
        if other:
            problems.append(f"{name} and {INDEX} differ in {listed(other)}")
    return problems
