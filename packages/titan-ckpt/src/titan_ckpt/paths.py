"""Paths of this machine's file systems: an address of a remote store is refused, never made a local folder."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from titan_config import ConfigError, require_local

from titan_ckpt.errors import CheckpointError


def local_path(path: str | PathLike[str], name: str) -> Path:
    """Return `path`, which the message calls `name`, as a `Path`.

    Raises:
        CheckpointError: when it begins with a scheme, such as `s3://` or `file://`.
    """
    try:
        require_local(path, name)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return Path(path)
