"""Cache of files derived from other files (such as decompressed ones), shared by the ranks of a machine and by runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock
from titan_config import require_local

END_BYTES = 65_536
"""Bytes at each end of a file in its cache key; Parquet has its schema, offsets and statistics at the end."""


def cached(source: Path, kind: str, cache_dir: str | Path | None, make: Callable[[BinaryIO], None]) -> Path:
    """Return the cached file that `make` writes for `source`; `make` is called again only after `source` changes.

    kind: a key for the kind of content; its first word is the file extension. cache_dir: None means `titan-data` in
    the user's cache folder. The file is written under a temporary name and then renamed, so that it is never partial.
    """
    folder = _folder(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_key(source, kind)}.{kind.split()[0]}"
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = target.with_name(f"{target.name}.{os.getpid()}")
            try:
                with partial.open("wb") as file:
                    make(file)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    return target


def _folder(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        require_local(cache_dir, "cache_dir")
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titan-data"


def _key(source: Path, kind: str) -> str:
    status = source.stat()
    attributes = [str(source.resolve()), kind, status.st_size, status.st_mtime_ns, status.st_ino]
    digest = hashlib.sha256(repr(attributes).encode())
    with source.open("rb") as file:
        digest.update(file.read(END_BYTES))
        file.seek(max(0, status.st_size - END_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:32]
