"""Local paths: the URL of a remote store is rejected, instead of becoming a local folder of that name."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from titan_config import ConfigError, require_local

from titan_ckpt.errors import CheckpointError


def local_path(path: str | PathLike[str], name: str) -> Path:
    """Return `path` as a `Path`; error messages call it `name`.

    Raises:
        CheckpointError: if it begins with a URL scheme, such as `s3://` or `file://`.
    """
    try:
        require_local(path, name)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return Path(path)
