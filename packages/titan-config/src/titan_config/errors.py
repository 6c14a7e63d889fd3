"""What a config raises: errors of three sentences (got, need, do) that know where in the tree they happened."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """A config is wrong.

    `message` says what was got, what is needed, what to do; `path` where in the tree ("model.norm.eps", "" for the root
    and where it is not known); `file` which file, with the line where that helps ("run.json:12").
    """

    def __init__(self, message: str, path: str = "", file: str = "") -> None:
        super().__init__(message, path, file)
        self.message = message
        self.path = path
        self.file = file

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.path, self.message) if part)

    def add_parent(self, path: str) -> None:
        """Make `path` the place of the config that the error has been about so far."""
        self.path = join(path, self.path)


class UnknownName(ConfigError, AttributeError):
    """A config was asked for, or given, a name that is none of its fields."""


class NotAllowed(ConfigError):
    """An `import_path` that the allow-list does not hold."""

    import_path = ""


def label(cls: type) -> str:
    """Return the qualified name of a class, without the functions that it is defined in."""
    return cls.__qualname__.rpartition("<locals>.")[2]


def join(path: str, name: object) -> str:
    """Return the path of the part `name` of what lies at `path` ("" is the root)."""
    return f"{path}.{name}" if path and str(name) else f"{path}{name}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the advice for a wrong `name`: the closest of `names`, or those there are when none is close."""
    import difflib

    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]}?"
    if not known:
        return "Remove it."
    return f"Use one of: {', '.join(known[:12])}{', ...' if len(known) > 12 else '.'}"
