"""Local Parquet files."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from titan_data.arrow_texts import ArrowTexts, missing_field
from titan_data.files import find_files
from titan_data.hugging_face_source import load_dataset
from titan_data.source import MapSource, Source

FOOTER_BYTES = 65536


class ParquetSource(MapSource):
    """A row, a document. `datasets` unpacks the text column to its cache once; ranks of a machine share it.

    Raises FileNotFoundError, and ValueError for a file that is no Parquet or has no text in that column.
    """

    class Config(Source.Config):
        path: str | Path
        """A file, or a pattern such as `data/*.parquet`."""
        text_field: str = "text"
        """The column that holds the text."""
        cache_dir: str | Path | None = None
        """Where the unpacked column is kept; None: where `datasets` keeps its files."""

    def __init__(self, config: Config) -> None:
        files = find_files(config.path)
        checksum = 0
        for file in files:
            checksum = zlib.crc32(_checked_footer(file, config.text_field), checksum)
        identity = {"kind": "ParquetSource", "text_field": config.text_field, "checksum": f"{checksum:08x}"}
        names = [str(file.absolute()) for file in files]
        dataset = load_dataset(
            "parquet", split="train", data_files=names, columns=[config.text_field], cache_dir=config.cache_dir
        )
        self._texts = ArrowTexts(dataset, config.text_field, str(config.path), identity)

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, index: int) -> str:
        return self._texts.text(index)

    def place(self, index: int) -> str:
        return self._texts.place(index)

    def identity(self) -> dict[str, Any]:
        return self._texts.identity()


def _checked_footer(file: Path, text_field: str) -> bytes:
    """Return the file's end, where Parquet keeps its schema, offsets and statistics, once the schema has the field."""
    import pyarrow
    import pyarrow.parquet

    try:
        fields = pyarrow.parquet.read_schema(file).names
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"Got {file}, which cannot be read as Parquet ({error}). A whole Parquet file is needed. "
            f"Fetch it again; JSONL is for JsonlSource, plain text for TextSource."
        ) from error
    if text_field not in fields:
        raise missing_field(text_field, fields, str(file))
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - FOOTER_BYTES))
        return stream.read()
