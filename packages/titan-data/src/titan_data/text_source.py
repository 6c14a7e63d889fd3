"""Source of local plain text files."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

from titan_data.compression import read_all
from titan_data.encoding import decoded
from titan_data.files import find_files
from titan_data.source import MapSource, Source


class TextSource(MapSource):
    """Source of UTF-8 text files, kept in memory; each file is one document, or is split at `separator`.

    Files may be compressed with gzip, zstd, xz or bzip2. An empty file has no document; a byte order mark is skipped.
    Raises FileNotFoundError, and ValueError for invalid UTF-8 or if there is no text.
    """

    class Config(Source.Config):
        path: str | Path
        """A file, or a glob pattern such as `books/*.txt`."""
        separator: str | None = None
        """The text between two documents of a file, such as an empty line (two line feeds); None: a file is one
        document. A line feed also matches the line ends of Windows."""

        def validate(self) -> None:
            if self.separator == "":
                raise ValueError(
                    'separator must have at least one character, got "". Use None to make each file one document.'
                )

    def __init__(self, config: Config) -> None:
        self._texts: list[str] = []
        self._places: list[str] = []
        self._checksum = 0
        for path in find_files(config.path):
            content = read_all(path)
            self._checksum = zlib.crc32(content, self._checksum)
            texts = _split(decoded(content, path), config.separator) if content else []
            self._texts += texts
            self._places += [f"{path}, document {number}" for number in range(1, len(texts) + 1)]
        self._require_text()

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, index: int) -> str:
        return self._texts[index]

    def place(self, index: int) -> str:
        return self._places[index]

    def identity(self) -> dict[str, Any]:
        return {"kind": "TextSource", "documents": len(self), "checksum": f"{self._checksum:08x}"}


def _split(text: str, separator: str | None) -> list[str]:
    if separator is None:
        return [text]
    if "\n" not in separator or "\r" in separator or "\r\n" not in text:
        return text.split(separator)
    return re.split("\r?\n".join(re.escape(part) for part in separator.split("\n")), text)
