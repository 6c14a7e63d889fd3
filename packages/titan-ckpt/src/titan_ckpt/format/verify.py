"""Verification of a checkpoint: sizes and checksums of its files, and consistency of index, values and tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from titan_ckpt.errors import BrokenCheckpoint, CheckpointError, join_names
from titan_ckpt.format.durable_files import CONFIG, INDEX, STATE, FileRecord
from titan_ckpt.format.index import Index, read_index
from titan_ckpt.format.manifest import Manifest, read_manifest
from titan_ckpt.format.readers import read_config, read_values
from titan_ckpt.format.regular_file import record_of, size_of
from titan_ckpt.format.safetensors_reader import open_mapped
from titan_ckpt.format.safetensors_writer import DTYPE_NAMES
from titan_ckpt.paths import local_path

JSON_FILES = (INDEX, STATE, CONFIG)


def tensor_files(manifest: Manifest) -> list[str]:
    """Return the names of the tensor files."""
    return sorted(manifest.files.keys() - set(JSON_FILES))


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return the damage of the files `names` of a checkpoint, one sentence each; empty if they are intact.

    Raises:
        CheckpointError: if the disk fails.
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
            damage.append(f"{name} must have {expected.size} bytes, got {found.size}")
        elif found.xxh3 != expected.xxh3:
            damage.append(
                f"{name} has the right size but changed content: its xxh3 must be {expected.xxh3}, got {found.xxh3}"
            )
    return damage


def check_whole(folder: Path) -> Manifest:
    """Verify every file of a checkpoint and return its manifest.

    Raises:
        BrokenCheckpoint: if files are missing, truncated or changed (the message names all of them), or inconsistent.
        CheckpointError: if the disk fails.
    """
    folder = local_path(folder, "checkpoint")
    manifest = read_manifest(folder)
    damage = find_damage(folder, manifest, manifest.files) or find_inconsistencies(folder, manifest)
    if not damage:
        damage = find_tensor_mismatches(folder, read_index(folder), tensor_files(manifest))
    if damage:
        raise BrokenCheckpoint("; ".join(damage))
    return manifest


def find_inconsistencies(folder: Path, manifest: Manifest) -> list[str]:
    """Return the inconsistencies between the JSON files of a checkpoint, one phrase each; empty if there are none."""
    try:
        index, values = read_index(folder), read_values(folder)
        read_config(folder)
    except BrokenCheckpoint as error:
        return [str(error)]
    used = {chunk.file for tensor in index.values() for chunk in tensor.chunks}
    files = set(tensor_files(manifest))
    problems = [f"{name} is in {INDEX} but not in the manifest" for name in sorted(used - files)[:4]]
    problems += [f"{name} contains no tensor of {INDEX}" for name in sorted(files - used)[:4]]
    for name in manifest.counters:
        found = values[name].get("step") if name in values else None
        if type(found) is not int or found != manifest.step:
            problems.append(f"the part {name} must be at step {manifest.step}, got step {found!r:.40}")
    return problems


def find_tensor_mismatches(folder: Path, index: Index, files: Iterable[str]) -> list[str]:
    """Return which of the intact `files` contain other tensors than the index states; empty if none do.

    Raises:
        CheckpointError: if the disk fails.
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
                found = {key: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in file.meta_tensors().items()}
        except CheckpointError as error:
            if not isinstance(error, BrokenCheckpoint):
                raise
            problems.append(str(error))
            continue
        other = sorted(key for key in there.keys() | found.keys() if there.get(key) != found.get(key))
        if other:
            problems.append(f"{name} and {INDEX} differ in {join_names(other)}")
    return problems
