"""Exceptions of configs, with the path in the tree and the file in which they occurred."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """An error in a config.

    `message` states the constraint, the invalid value and the fix ("X must be Y, got Z."); `path` is the place in the
    tree ("model.norm.eps", "" for the root or if unknown); `file` is the file, with the line if known ("run.json:12").
    """

    def __init__(self, message: str, path: str = "", file: str = "") -> None:
        super().__init__(message, path, file)
        self.message = message
        self.path = path
        self.file = file

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.path, self.message) if part)

    def add_parent(self, path: str) -> None:
        """Prepend the path of a parent config to the path of the error."""
        self.path = join(path, self.path)


class UnknownName(ConfigError, AttributeError):
    """Access to, or assignment of, a field that the config does not have."""


class NotAllowed(ConfigError):
    """An `import_path` that is not on the allow-list."""

    import_path = ""


def label(cls: type) -> str:
    """Return the qualified name of a class, without the functions in which it is defined."""
    return cls.__qualname__.rpartition("<locals>.")[2]


def join(path: str, name: object) -> str:
    """Return the path of the child `name` of the node at `path` ("" is the root)."""
    return f"{path}.{name}" if path and str(name) else f"{path}{name}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the advice for an unknown `name`: the closest of `names`, or the first 12 of them if none is close."""
    import difflib

    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]}?"
    if not known:
        return "Remove it."
    return f"Use one of: {', '.join(known[:12])}{', ...' if len(known) > 12 else '.'}"
