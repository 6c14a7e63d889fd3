"""Rejection of remote paths: a path with a scheme, such as s3://bucket/run, would become a local folder "s3:"."""

from __future__ import annotations

import os
import re

from titan_config.errors import ConfigError

# One slash is enough because Path("s3://b") is "s3:/b". A single letter is a Windows drive, not a scheme. fsspec chains
# schemes: "simplecache::s3://b".
_SCHEME = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*::)*([A-Za-z][A-Za-z0-9+.-]+):[/\\]")


def scheme_of(path: str | os.PathLike[str]) -> str:
    """Return the scheme of a path in lower case ("s3"), "" for a local path."""
    found = _SCHEME.match(os.fspath(path))
    return found[1].lower() if found else ""


def as_written(path: str | os.PathLike[str]) -> str:
    """Return a path with a scheme as the user wrote it: `Path` collapses "://" and "file:///" to one slash."""
    text = os.fspath(path)
    slashes = ":///" if scheme_of(path) == "file" else "://"
    return text if isinstance(path, str) else re.sub(r":/(?!/)", slashes, text, count=1)


def remote_advice(scheme: str) -> str:
    """Return the advice for an error about a path with this scheme."""
    if scheme == "file":
        return "Remove file://."
    return "Remote storage is not supported yet: write to a local folder and copy it, or mount the storage."


def require_local(path: str | os.PathLike[str], name: str) -> None:
    """Raise ConfigError for a path with a scheme; `name` is the subject of the message."""
    scheme = scheme_of(path)
    if scheme:
        raise ConfigError(f"{name} must be a local path, got {as_written(path)}. {remote_advice(scheme)}")
