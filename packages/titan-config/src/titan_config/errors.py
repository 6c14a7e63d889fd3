"""What a config raises: errors of three sentences (got, need, do) that know where in the tree they happened."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """A config is wrong: `path` says where in the tree ("model.layers.norm.eps"), `message` what was got, needed, to do."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message, path)
        self.message = message
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message

    def under(self, path: str) -> ConfigError:
        """Return the same error seen from a config that holds this one at `path`."""
        return type(self)(self.message, join(path, self.path))


class UnknownName(ConfigError, AttributeError):
    """A config was asked for, or given, a name that is none of its fields."""


def join(path: str, name: object) -> str:
    """Return the path of the part `name` of what lies at `path` ("" is the root)."""
    return f"{path}.{name}" if path and str(name) else f"{path}{name}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "Did you mean ...?" for the name closest to `name`, or the names there are when none is close."""
    import difflib

    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]}?"
    if not names:
        return "Remove it."
    shown = ", ".join(sorted(names)[:12])
    return f"Use one of: {shown}, ..." if len(names) > 12 else f"Use one of: {shown}."
