"""Lookup of local files, with errors that suggest the nearest existing name."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
from pathlib import Path

from titan_config import require_local

TOKENIZER_FILES = ("tokenizer.json", "*.tiktoken", "*.model")


def find_file(path: str | Path) -> Path:
    """Return `path` of a data file, checked to be an existing regular file. Raises as `find_tokenizer` does."""
    file = Path(path).expanduser()
    if file.is_dir():
        require_local(path, "path")
        raise IsADirectoryError(
            f"path must be a file, got the folder {file}. Use a file in this folder or a pattern such as {file / '*'}. "
            f"{_contents(file, ('*',))}"
        )
    return _existing(path, ("*",))


def find_tokenizer(path: str | Path) -> Path:
    """Return `path` of a tokenizer file, checked to be an existing regular file.

    Raises ValueError for a URL, a pipe or a device, FileNotFoundError with the nearest name, and IsADirectoryError with
    the tokenizer files in the folder.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        require_local(path, "path")
        raise IsADirectoryError(
            f"path must be a tokenizer file, got the folder {file}. {_contents(file, TOKENIZER_FILES)}"
        )
    return _existing(path, TOKENIZER_FILES)


def _existing(path: str | Path, kinds: tuple[str, ...]) -> Path:
    require_local(path, "path")
    file = Path(path).expanduser()
    if file.is_symlink() and not file.exists():
        raise FileNotFoundError(f"path must exist, got {file}, a link to {os.readlink(file)}, which does not exist.")
    if not file.exists():
        raise FileNotFoundError(f"path must exist, got {file}. {_advice(file, kinds)}")
    if not file.is_file():
        raise ValueError(f"path must be a regular file, got {file}, which is a pipe, socket or device.")
    return file


def find_files(pattern: str | Path) -> list[Path]:
    """Return the files that match a path or a glob pattern such as `data/*.jsonl`, sorted by name.

    Names that begin with `_` or `.` do not match, unless the file name in the pattern begins with that character: Spark
    and Hadoop use them for metadata (`_SUCCESS`, `.part-0.crc`). Raises as `find_file` does.
    """
    require_local(pattern, "path")
    if not glob.has_magic(os.fspath(pattern)) or Path(pattern).exists():
        return [find_file(pattern)]
    names = glob.glob(os.path.expanduser(os.fspath(pattern)), recursive=True)
    if not os.path.basename(os.fspath(pattern)).startswith(("_", ".")):
        names = [name for name in names if not os.path.basename(name).startswith(("_", "."))]
    files = sorted(Path(name) for name in names if os.path.isfile(name))
    if not files:
        raise FileNotFoundError(f"path must match at least one file, got {pattern}. {_advice(Path(pattern), ('*',))}")
    return files


def _advice(file: Path, kinds: tuple[str, ...]) -> str:
    folder = file.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if folder != file.parent:
        return f"The folder {file.parent} does not exist; the nearest existing folder is {folder.absolute()}."
    near = difflib.get_close_matches(file.name, _names(folder, kinds), n=1, cutoff=0.5)
    return f"The nearest name is {folder / near[0]}." if near else _contents(folder.absolute(), kinds)


def _contents(folder: Path, kinds: tuple[str, ...]) -> str:
    names, whole = _names(folder, kinds), kinds == ("*",)
    if not names:
        return f"The folder {folder} is empty." if whole else f"{folder} has no tokenizer file ({', '.join(kinds)})."
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    return f"Files in {folder}: {shown}." if whole else f"Tokenizer files in {folder}: {shown}."


def _names(folder: Path, kinds: tuple[str, ...]) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return [name for name in names if any(fnmatch.fnmatch(name, kind) for kind in kinds)]
