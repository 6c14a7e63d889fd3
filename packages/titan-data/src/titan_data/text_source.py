"""Local plain text files."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from titan_data.files import find_files
from titan_data.source import MapSource, Source


class TextSource(MapSource):
    """Plain text in UTF-8, held in memory: a file is one document, or is cut into several at each `separator`.

    Raises FileNotFoundError, and ValueError for bytes that are not UTF-8 or when no text is left.
    """

    class Config(Source.Config):
        path: str | Path
        """A file, or a pattern such as `books/*.txt`."""
        separator: str | None = None
        """What stands between two documents of a file (such as an empty line: two line feeds); None: nothing does."""

        def validate(self) -> None:
            if self.separator == "":
                raise ValueError(
                    'Got separator "". What stands between two documents has at least one character. '
                    "Set it to None for one document a file."
                )

    def __init__(self, config: Config) -> None:
        self._texts: list[str] = []
        self._places: list[str] = []
        self._checksum = 0
        for path in find_files(config.path):
            content = path.read_bytes()
            self._checksum = zlib.crc32(content, self._checksum)
            text = _decoded(content, path)
            texts = [text] if config.separator is None else text.split(config.separator)
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


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Got bytes that are not UTF-8 in {path}, line {content.count(10, 0, error.start) + 1}. Text in UTF-8 is "
            f"needed. Convert the file, with iconv say."
        ) from error
