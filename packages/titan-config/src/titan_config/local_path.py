"""Paths are local: one with a scheme, such as s3://bucket/run, would become a folder called "s3:"."""

from __future__ import annotations

import os
import re

from titan_config.errors import ConfigError

# Path("s3://b") is "s3:/b", so that one slash is enough; a scheme of one letter is a drive of Windows; fsspec chains
# schemes ("simplecache::s3://b").
_SCHEME = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*::)*([A-Za-z][A-Za-z0-9+.-]+):[/\\]")


def scheme_of(path: str | os.PathLike[str]) -> str:
    """Return the scheme of a path in small letters ("s3"), "" for a local path."""
    found = _SCHEME.match(os.fspath(path))
    return found[1].lower() if found else ""


def plain(path: str | os.PathLike[str]) -> str:
    """Return a path with a scheme as it was written: `Path` made one slash of two or, after `file:`, of three."""
    text = os.fspath(path)
    slashes = ":///" if scheme_of(path) == "file" else "://"
    return text if isinstance(path, str) else re.sub(r":/(?!/)", slashes, text, count=1)


def remote_advice(scheme: str) -> str:
    """Return what to do instead of giving a path with this scheme."""
    if scheme == "file":
        return "Leave file:// out."
    return "Remote storage is not supported yet: write to a local folder and copy it, or mount the storage."


def require_local(path: str | os.PathLike[str], name: str) -> None:
    """Raise ConfigError for a path with a scheme; `name` is what the error calls it."""
    scheme = scheme_of(path)
    if scheme:
        raise ConfigError(f"{name} must be a local path, got {plain(path)}. {remote_advice(scheme)}")
