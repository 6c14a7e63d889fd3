"""Selection of the weight files in a Hugging Face folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from titan_ckpt.errors import CheckpointError, join_names
from titan_ckpt.format.strict_json import read_json, regular_file_exists

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
_OTHER_LAYOUT = re.compile(r"consolidated.*\.safetensors|model(-\d+-of-\d+)?\..+\.safetensors")
"""Original layouts of a vendor (Mistral, Llama), and variants selected by name (`model.fp32.safetensors`)."""


def folder_of(path: Path) -> Path:
    """Return the folder of weights given as a folder or as one of its files."""
    return path.parent if path.is_file() else path


def weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the weight files, and the file of each tensor according to the index (empty if there is no index).

    `path` is a folder, or a file that selects one set of weights: an index, or a safetensors file. Weights under names
    that transformers does not load by default are ignored.

    Raises:
        CheckpointError: if a folder has no weights or two sets of them, or an index has invalid file names.
    """
    if path.is_file() and path.suffix != ".json":
        return [path], {}
    if path.is_file():
        return _files_of(path, _read_index(path))
    names = [name for name in _safetensors_in(path) if not _OTHER_LAYOUT.fullmatch(name)]
    known = _read_index(path / INDEX) if regular_file_exists(path / INDEX) else None
    sets = _sets(names, known)
    if len(sets) > 1:
        choices = [str(path / name) for name in (INDEX, SINGLE) if name in sets]
        raise CheckpointError(
            f"{path} must contain one set of weights, got {' and '.join(sets)}. Move the others away"
            f"{', or pass ' + ' or '.join(choices) + ' instead of the folder' if choices else ''}."
        )
    if known is not None:
        if unused := sorted({name for name in names if _SHARD.fullmatch(name)} - set(known.values())):
            logger.warning("Ignoring %s, which %s does not contain.", join_names(unused), path / INDEX)
        return _files_of(path / INDEX, known)
    if not names:
        raise CheckpointError(f"{path} must contain {SINGLE}, or several safetensors files and {INDEX}, got none.")
    return [path / name for name in names], {}


def _files_of(index: Path, known: dict[str, str]) -> tuple[list[Path], dict[str, str]]:
    return sorted({index.parent / name for name in known.values()}), known


def _safetensors_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def _sets(names: list[str], known: dict[str, str] | None) -> dict[str, set[str]]:
    """Return the sets of weights among `names`, by display name. Beside an index, shards are a set only if complete.

    Raises:
        CheckpointError: if there is no index, and shards are missing.
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
                f"A folder without {INDEX} must contain all files model-*-of-{count}.safetensors, got "
                f"{join_names(sorted(files))}. Download the other files and the index, or move these files away."
            )
    return sets


def _read_index(path: Path) -> dict[str, str]:
    known = read_json(path, "weight_map")
    if not known:
        raise CheckpointError(
            f"The weight_map of {path} must contain file names, got none. Use the folder that contains the weights."
        )
    if other := [name for name in known.values() if not isinstance(name, str)]:
        raise CheckpointError(
            f"The weight_map of {path} must contain only file names, got {other[0]!r:.200}. Download it again."
        )
    if invalid := [name for name in known.values() if Path(name).name != name or set(name) & {"\\", "\0"}]:
        raise CheckpointError(f"{path} must contain plain file names of its own folder, got {invalid[0]!r:.200}.")
    return known
