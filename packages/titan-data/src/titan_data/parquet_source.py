"""Source of local Parquet files."""

from __future__ import annotations

import bisect
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from titan_data.arrow_texts import missing_field, missing_text, require_strings
from titan_data.cache import END_BYTES, cached
from titan_data.files import find_files
from titan_data.source import MapSource, Source


class ParquetSource(MapSource):
    """Source of Parquet files; each table row is one document.

    The text column is unpacked once to a cache, which all ranks of a machine share. Supports strings, large strings,
    string views (Polars) and dictionary-encoded strings. A file without rows has no documents, whatever its columns.
    Raises FileNotFoundError, and ValueError for a file that is not Parquet or has no text in the column.
    """

    class Config(Source.Config):
        path: str | Path
        """A file, or a glob pattern such as `data/*.parquet`."""
        text_field: str = "text"
        """The column with the text."""
        cache_dir: str | Path | None = None
        """The folder for the unpacked column; None: `titan-data` in the user's cache folder."""

    def __init__(self, config: Config) -> None:
        self._field = config.text_field
        self._files: list[Path] = []
        self._columns: list[Any] = []
        self._firsts, self._checksum = [0], 0
        for path in find_files(config.path):
            column, end = _open(path, config.text_field, config.cache_dir)
            self._checksum = zlib.crc32(end, self._checksum)
            self._files.append(path)
            self._columns.append(column)
            self._firsts.append(self._firsts[-1] + len(column))
        if not len(self):
            raise ValueError(f"{config.path} must have at least one row, got none.")
        self._require_text()

    def __len__(self) -> int:
        return self._firsts[-1]

    def text(self, index: int) -> str:
        file, row = self._locate(index)
        return self._columns[file][row].as_py()

    def place(self, index: int) -> str:
        file, row = self._locate(index)
        return _place(self._files[file], row)

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "ParquetSource",
            "text_field": self._field,
            "checksum": f"{self._checksum:08x}",
            "documents": len(self),
        }

    def _locate(self, index: int) -> tuple[int, int]:
        file = bisect.bisect_right(self._firsts, index) - 1
        return file, index - self._firsts[file]


def _open(path: Path, text_field: str, cache_dir: str | Path | None) -> tuple[Any, bytes]:
    """Return the text column and the last bytes of the file, which hold Parquet's schema, offsets and statistics."""
    import pyarrow
    import pyarrow.parquet

    def make(target: BinaryIO) -> None:
        _unpack(parquet, text_field, path, target)

    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            if parquet.metadata.num_rows == 0:
                column = pyarrow.array([], pyarrow.large_string())
            else:
                _check_schema(parquet.schema_arrow, text_field, path)
                unpacked = cached(path, f"arrow {text_field}", cache_dir, make)
                with pyarrow.memory_map(str(unpacked)) as file:
                    column = pyarrow.ipc.open_file(file).read_all().column(0)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{path} must be a complete Parquet file, got a read error: {error}. Download it again, or use JsonlSource "
            "for JSONL and TextSource for plain text."
        ) from error
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - END_BYTES))
        return column, stream.read()


def _check_schema(schema: Any, text_field: str, path: Path) -> None:
    count = schema.names.count(text_field)
    if count > 1:
        raise ValueError(f"{path} must have one column {text_field!r}, got {count} of that name. Rename the others.")
    if not count:
        raise missing_field(text_field, schema.names, str(path))
    require_strings(schema.field(text_field).type, text_field, str(path))


def _unpack(parquet: Any, text_field: str, path: Path, target: BinaryIO) -> None:
    """Write the text column to `target` as an Arrow file, batch by batch. Raises ValueError for a null text."""
    import pyarrow

    kind, row = pyarrow.large_string(), 0
    with pyarrow.ipc.new_file(target, pyarrow.schema([("text", kind)])) as writer:
        for batch in parquet.iter_batches(columns=[text_field]):
            texts = batch.column(0).cast(kind)
            if texts.null_count:
                first = texts.is_null().index(True).as_py()
                raise missing_text(text_field, texts.null_count, _place(path, row + first))
            writer.write_batch(pyarrow.record_batch([texts], names=["text"]))
            row += len(texts)


def _place(path: Path, row: int) -> str:
    return f"{path}, row {row + 1}"
