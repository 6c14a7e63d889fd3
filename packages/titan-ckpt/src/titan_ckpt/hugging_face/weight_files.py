"""Select the weight files of a Hugging Face folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from titan_ckpt.errors import CheckpointError, listed
from titan_ckpt.format.strict_json import is_there, read_json

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
_OTHER_LAYOUT = re.compile(r"consolidated.*\.safetensors|model(-\d+-of-\d+)?\..+\.safetensors")
"""The makers' own layout (Mistral, Llama), and variants that are asked for by name (`model.fp32.safetensors`)."""


def folder_of(path: Path) -> Path:
    """Return the folder of weights that are given as a folder, or as one of its files."""
    return path.parent if path.is_file() else path


def weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the files that hold the weights, and which file has which tensor by the index (empty: there is none).

    `path` is a folder, or the file that says which set of weights to take: an index, or a safetensors file. Weights
    under other names than transformers takes by default are passed over.

    Raises:
        CheckpointError: when a folder has no weights or two sets of them, or an index names other than its files.
    """
    if path.is_file() and path.suffix != ".json":
        return [path], {}
    if path.is_file():
        return _files_of(path, _read_index(path))
    names = [name for name in _safetensors_in(path) if not _OTHER_LAYOUT.fullmatch(name)]
    known = _read_index(path / INDEX) if is_there(path / INDEX) else None
    sets = _sets(names, known)
    if len(sets) > 1:
        told = [str(path / name) for name in (INDEX, SINGLE) if name in sets]
        raise CheckpointError(
            f"{path} must hold one set of weights, got {' and '.join(sets)}. Move the others away"
            f"{', or give ' + ' or '.join(told) + ' instead of the folder' if told else ''}."
        )
    if known is not None:
        if unused := sorted({name for name in names if _SHARD.fullmatch(name)} - set(known.values())):
            logger.warning("%s does not name %s, which are passed over.", path / INDEX, listed(unused))
        return _files_of(path / INDEX, known)
    if not names:
        raise CheckpointError(
            f"{path} must hold {SINGLE}, or several safetensors files and {INDEX}, got none. Give the folder that has "
            f"them."
        )
    return [path / name for name in names], {}


def _files_of(index: Path, known: dict[str, str]) -> tuple[list[Path], dict[str, str]]:
    return sorted({index.parent / name for name in known.values()}), known


def _safetensors_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def _sets(names: list[str], known: dict[str, str] | None) -> dict[str, set[str]]:
    """The sets of weights among files, by what an error calls them. Beside an index, shards are one when all are there.

    Raises:
        CheckpointError: when there is no index, and not all shards.
    """
    sets = {} if known is None else {INDEX: set(known.values())}
    indexed = sets.get(INDEX, set())
    sets |= {name: {name} for name in (SINGLE, _ADAPTER) if name in names and name not in indexed}
    shards: dict[str, set[str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault(match[1], set()).add(name)
    for count, files in shards.items():
        if len(files) == int(count) and not files & indexed:
            sets[f"model-*-of-{count}.safetensors"] = files
        elif known is None:
            raise CheckpointError(
                f"A folder without {INDEX} must hold all files model-*-of-{count}.safetensors, got "
                f"{listed(sorted(files))}. Download the others and the index, or move these away."
            )
    return sets


def _read_index(path: Path) -> dict[str, str]:
    known = read_json(path, "weight_map")
    if not known:
        raise CheckpointError(
            f"The weight_map of {path} must name safetensors files, got none. Give the folder that holds them."
        )
    if other := [name for name in known.values() if not isinstance(name, str)]:
        raise CheckpointError(
            f"The weight_map of {path} must hold names of files alone, got {other[0]!r:.200}. Download it again."
        )
    if odd := [name for name in known.values() if Path(name).name != name or set(name) & {"\\", "\0"}]:
        raise CheckpointError(f"{path} must name files of its own folder, got {odd[0]!r:.200}.")
    return known
