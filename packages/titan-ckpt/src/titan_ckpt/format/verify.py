"""Verify a checkpoint: sizes and checksums of its files, and that index, values and tensors agree."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from titan_ckpt.errors import BrokenCheckpoint, CheckpointError, listed
from titan_ckpt.format.durable_files import CONFIG, INDEX, STATE, FileRecord
from titan_ckpt.format.index import Index, read_index
from titan_ckpt.format.manifest import Manifest, read_manifest
from titan_ckpt.format.readers import read_config, read_values
from titan_ckpt.format.regular_file import record_of, size_of
from titan_ckpt.format.safetensors_reader import open_mapped
from titan_ckpt.format.safetensors_writer import DTYPE_NAMES
from titan_ckpt.paths import local_path

NOT_TENSORS = (INDEX, STATE, CONFIG)


def files_of_tensors(manifest: Manifest) -> list[str]:
    """Return the names of the files that hold tensors."""
    return sorted(manifest.files.keys() - set(NOT_TENSORS))


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return what is wrong with the files `names` of a checkpoint, one sentence each; empty when they are whole.

    Raises:
        CheckpointError: when the disk fails.
    """
    damage = []
    for name in names:
        expected = manifest.files[name]
        try:
            size = size_of(folder / name)
            found = record_of(folder / name) if size == expected.size else FileRecord(size, "")
        except BrokenCheckpoint as error:
            damage.append(str(error))
            continue
        if found.size != expected.size:
            damage.append(f"{name} has {found.size} bytes and should have {expected.size}")
        elif found.xxh3 != expected.xxh3:
            damage.append(f"{name} has the right size but other content (xxh3 {found.xxh3}, should be {expected.xxh3})")
    return damage


def check_whole(folder: Path) -> Manifest:
    """Check every file of a checkpoint and return its manifest.

    Raises:
        BrokenCheckpoint: naming every file that is missing, truncated or changed, or what does not fit together.
        CheckpointError: when the disk fails.
    """
    folder = local_path(folder, "checkpoint")
    manifest = read_manifest(folder)
    damage = find_damage(folder, manifest, manifest.files) or find_contradictions(folder, manifest)
    if not damage:
        damage = find_other_tensors(folder, read_index(folder), files_of_tensors(manifest))
    if damage:
        raise BrokenCheckpoint("; ".join(damage))
    return manifest


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
