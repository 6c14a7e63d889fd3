"""The manifest of a checkpoint: written last, it makes the folder valid and records size and checksum of each file."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import xxhash

from titan_ckpt.errors import BrokenCheckpoint, UnknownFormat
from titan_ckpt.format.durable_files import CONFIG, INDEX, STATE, FileRecord, write_json
from titan_ckpt.format.regular_file import FileMissing, read_json
from titan_ckpt.format.schema import to_file_name, to_integer, to_list, to_object, to_text

MANIFEST = "manifest.json"
FORMAT = 1
STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_MAX_MANIFEST_BYTES = 1 << 26  # the record of a file takes about 100 bytes
_TITAN = ("titan-ckpt", "titan-config", "titan-data", "titan-ft", "titan-models", "titan-parallel", "titan-trainer")


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint, and the installed versions of torch and the titan packages.

    `load_step` is the config field of that name of the run that saved it (None: not set). `counters` names the parts
    whose value `step` was equal to the step of the checkpoint.
    """

    step: int
    world_size: int
    versions: dict[str, str]
    files: dict[str, FileRecord]
    load_step: int | None = None
    counters: list[str] = field(default_factory=list)
    format: int = FORMAT


@cache
def installed_versions() -> dict[str, str]:
    """Return the installed versions of torch and of the titan packages."""
    versions = {"torch": str(torch.__version__)}
    for name in _TITAN:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with a checksum of its own content, as a new file of `folder`."""
    content = asdict(manifest)
    write_json(folder / MANIFEST, {"xxh3": _content_hash(content), "content": content})


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        BrokenCheckpoint: if it is missing or changed, or its step is not that of the folder name.
        UnknownFormat: if this version cannot read its format.
        CheckpointError: if the disk fails.
    """
    try:
        stored = to_object(read_json(folder / MANIFEST, _MAX_MANIFEST_BYTES), MANIFEST)
    except FileMissing as error:
        if not os.path.lexists(folder):
            raise
        raise BrokenCheckpoint(f"it has no {MANIFEST}") from error
    content = to_object(stored.get("content", stored), MANIFEST)
    found = content.get("format")
    if type(found) is int and found > 0 and found != FORMAT:
        raise UnknownFormat(f"its format must be {FORMAT} for this version of titan-ckpt, got {found}")
    to_object(stored, MANIFEST, ("xxh3", "content"))
    if stored["xxh3"] != _content_hash(content):
        raise BrokenCheckpoint(f"{MANIFEST} does not match its own checksum")
    return _checked(content, folder)


def _checked(content: dict[str, Any], folder: Path) -> Manifest:
    to_object(content, MANIFEST, [entry.name for entry in fields(Manifest)])
    step = to_integer(content["step"], "step")
    name = STEP_NAME.fullmatch(folder.name)
    if name and int(name[1]) != step:
        raise BrokenCheckpoint(f"{MANIFEST} is of step {step}, not of the step in the folder name")
    records = to_object(content["files"], "files")
    for required in (INDEX, STATE, CONFIG):
        if required not in records:
            raise BrokenCheckpoint(f"{MANIFEST} does not list {required}")
    versions = to_object(content["versions"], "versions")
    load_step = content["load_step"]
    return Manifest(
        step=step,
        world_size=to_integer(content["world_size"], "world_size", 1),
        versions={name: to_text(version, "a version") for name, version in versions.items()},
        files={to_file_name(name, "a name in files"): _record(record, name) for name, record in records.items()},
        load_step=None if load_step is None else to_integer(load_step, "load_step"),
        counters=[to_text(name, "a name in counters") for name in to_list(content["counters"], "counters")],
        format=to_integer(content["format"], "format", 1),
    )


def _record(record: Any, name: str) -> FileRecord:
    to_object(record, f"the record of {name}", ("size", "xxh3"))
    size = to_integer(record["size"], f"the size of {name}")
    return FileRecord(size, to_text(record["xxh3"], f"the xxh3 of {name}", "[0-9a-f]{16}"))


def _content_hash(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
