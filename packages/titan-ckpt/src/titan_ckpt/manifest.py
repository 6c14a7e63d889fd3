"""The manifest: written last, it makes a folder a checkpoint and says what each of its files must be."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import xxhash

from titan_ckpt.errors import BrokenCheckpoint
from titan_ckpt.files import FileRecord, record_of, write_json

MANIFEST = "manifest.json"
FORMAT = 1
_TITAN = ("titan-ckpt", "titan-config", "titan-data", "titan-ft", "titan-models", "titan-parallel", "titan-trainer")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of; `versions` are of torch and of the titan packages that were installed."""

    step: int
    world_size: int
    versions: dict[str, str]
    files: dict[str, FileRecord]
    format: int = FORMAT


@cache
def installed_versions() -> dict[str, str]:
    """Return the versions of torch and of the titan packages that are installed."""
    versions = {"torch": str(torch.__version__)}
    for name in _TITAN:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with a checksum of itself, as a new file of `folder`."""
    content = asdict(manifest)
    write_json(folder / MANIFEST, {"xxh3": _content_hash(content), "content": content})


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        BrokenCheckpoint: when there is none, or it is not as it was written, or of a format this version does not know.
    """
    path = folder / MANIFEST
    try:
        stored = json.loads(path.read_bytes())
        content = stored["content"]
        if stored["xxh3"] != _content_hash(content):
            raise BrokenCheckpoint(f"{MANIFEST} does not match its own checksum")
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"it has no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(f"{MANIFEST} cannot be read: {error}") from error
    if content["format"] != FORMAT:
        raise BrokenCheckpoint(f"its format is {content['format']}, and this titan-ckpt reads format {FORMAT}")
    return Manifest(**{**content, "files": {name: FileRecord(**record) for name, record in content["files"].items()}})


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return what is wrong with the files `names` of a checkpoint, one sentence each; empty when they are whole."""
    damage = []
    for name in names:
        expected = manifest.files[name]
        try:
            found = record_of(folder / name)
        except FileNotFoundError:
            damage.append(f"{name} is missing")
            continue
        except OSError as error:
            damage.append(f"{name} cannot be read ({error})")
            continue
        if found.size != expected.size:
            damage.append(f"{name} has {found.size} bytes and should have {expected.size}")
        elif found.xxh3 != expected.xxh3:
            damage.append(f"{name} has the right size but other content (xxh3 {found.xxh3}, should be {expected.xxh3})")
    return damage


def check_whole(folder: Path) -> Manifest:
    """Check every file of a checkpoint and return its manifest.

    Raises:
        BrokenCheckpoint: naming every file that is missing, truncated or changed.
    """
    manifest = read_manifest(folder)
    damage = find_damage(folder, manifest, manifest.files)
    if damage:
        raise BrokenCheckpoint("; ".join(damage))
    return manifest


def _content_hash(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
