"""Finding the files a config names, with errors that name the nearest one there is."""

from __future__ import annotations

import difflib
import glob
import os
from pathlib import Path


def find_file(path: str | Path) -> Path:
    """Return `path` as a file that is there. Raises FileNotFoundError with the nearest name, IsADirectoryError."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise IsADirectoryError(
            f"Got {file}, a folder. A file is needed here. Name one of those in it{_examples(file)}."
        )
    if not file.exists():
        raise FileNotFoundError(f"Got {file}, which is not there. A file that exists is needed. {_advice(file)}")
    return file


def find_files(pattern: str | Path) -> list[Path]:
    """Return the files a path or a pattern such as `data/*.jsonl` names, in order of name. Raises as `find_file`."""
    if not glob.has_magic(os.fspath(pattern)) or Path(pattern).exists():
        return [find_file(pattern)]
    names = glob.glob(os.path.expanduser(os.fspath(pattern)), recursive=True)
    files = sorted(Path(name) for name in names if os.path.isfile(name))
    if not files:
        raise FileNotFoundError(
            f"Got {pattern}, which matches no file. At least one is needed. {_advice(Path(pattern))}"
        )
    return files


def _advice(file: Path) -> str:
    folder = file.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if folder != file.parent:
        return f"There is no folder {file.parent}; the nearest that exists is {folder.absolute()}."
    near = difflib.get_close_matches(file.name, os.listdir(folder), n=1, cutoff=0.5)
    if near:
        return f"The nearest name is {folder / near[0]}."
    return f"No file in {folder.absolute()} has a name like it{_examples(folder)}."


def _examples(folder: Path) -> str:
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))[:3]
    return f" (such as {', '.join(names)})" if names else " (it is empty)"
