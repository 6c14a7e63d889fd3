"""Local JSONL files, read in any order through an index of their lines."""

from __future__ import annotations

import bisect
import json
import mmap
import zlib
from array import array
from pathlib import Path
from typing import Any

from titan_data.files import find_files
from titan_data.source import MapSource, Source

_decode = json.JSONDecoder().decode  # what json.loads comes to


class JsonlSource(MapSource):
    """A JSON object a line, one document each; empty lines are passed over.

    Opening reads every file once (1 GB takes about a second, two with `check`) and keeps 16 bytes a document. Raises
    FileNotFoundError, and ValueError that names file and line for a line that is no JSON object or has no text.
    """

    class Config(Source.Config):
        path: str | Path
        """A file, or a pattern such as `data/*.jsonl`."""
        text_field: str = "text"
        """The field that holds the text."""
        check: bool = True
        """Parse every line on opening, not only when its turn comes."""

    def __init__(self, config: Config) -> None:
        self._field = config.text_field
        self._files = [_IndexedFile(path) for path in find_files(config.path)]
        self._firsts = [0]
        for file in self._files:
            self._firsts.append(self._firsts[-1] + len(file.starts))
        if not len(self):
            raise ValueError(
                f"Got {config.path}, which holds no line. At least one JSON object is needed. Check the path."
            )
        if config.check:
            for index in range(len(self)):
                self.text(index)
        self._require_text()

    def __len__(self) -> int:
        return self._firsts[-1]

    def text(self, index: int) -> str:
        file, number = self._locate(index)
        try:
            text = _decode(file.line(number).decode())[self._field]
        except (ValueError, TypeError, KeyError) as error:
            raise self._bad_line(file, number) from error
        if not isinstance(text, str):
            raise self._bad_line(file, number)
        return text

    def place(self, index: int) -> str:
        file, number = self._locate(index)
        return f"{file.path}, line {file.line_number(number)}"

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "JsonlSource",
            "text_field": self._field,
            "documents": len(self),
            "bytes": sum(file.size for file in self._files),
            "checksum": " ".join(f"{file.checksum:08x}" for file in self._files),
        }

    def _locate(self, index: int) -> tuple[_IndexedFile, int]:
        position = bisect.bisect_right(self._firsts, index) - 1
        return self._files[position], index - self._firsts[position]

    def _bad_line(self, file: _IndexedFile, number: int) -> ValueError:
        where = f"{file.path}, line {file.line_number(number)}"
        try:
            record = json.loads(file.line(number).decode())
        except ValueError as error:
            return ValueError(
                f"Got a line that is not JSON in {where}: {error}. Each line must be one JSON object. "
                f"Correct or remove the line."
            )
        if not isinstance(record, dict):
            return ValueError(
                f"Got a {type(record).__name__} in {where}. Each line must be a JSON object with the field "
                f"{self._field!r}. Correct or remove the line."
            )
        if self._field not in record:
            return ValueError(
                f"Got a record without the field {self._field!r} in {where}; it has {', '.join(record) or 'none'}. "
                f"Each record needs its text there. Set text_field, or correct the line."
            )
        return ValueError(
            f"Got {self._field!r} of type {type(record[self._field]).__name__} in {where}. The text must be a string. "
            f"Set text_field, or correct the line."
        )


class _IndexedFile:
    """A file and where its lines are that are not empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts, self.ends, self.checksum, self.size = array("q"), array("q"), 0, 0
        with path.open("rb") as file:
            for line in file:
                if not line.isspace():
                    self.starts.append(self.size)
                    self.ends.append(self.size + len(line))
                self.size += len(line)
                self.checksum = zlib.crc32(line, self.checksum)
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def line(self, number: int) -> bytes:
        return self._bytes[self.starts[number] : self.ends[number]]

    def line_number(self, number: int) -> int:
        """Return the line's number in the file, from 1, empty lines counted."""
        return self._bytes[: self.starts[number]].count(b"\n") + 1
