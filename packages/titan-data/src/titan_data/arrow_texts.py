"""A column of an Arrow table as documents."""

from __future__ import annotations

from typing import Any

from titan_data.source import MapSource


class ArrowTexts(MapSource):
    """The texts of one column of a `datasets.Dataset`, which lies on disk and is mapped into memory, not read.

    Raises ValueError where the column is missing, holds no text, or lacks it in some row.
    """

    def __init__(self, dataset: Any, text_field: str, name: str, identity: dict[str, Any]) -> None:
        import pyarrow.types as kinds

        if text_field not in dataset.column_names:
            raise missing_field(text_field, dataset.column_names, name)
        self._column = dataset.data.column(text_field)
        self._name, self._identity = name, identity
        kind = self._column.type
        if not (kinds.is_string(kind) or kinds.is_large_string(kind)):
            raise ValueError(
                f"Got the field {text_field!r} of type {kind} in {name}. The text must be strings. Set text_field."
            )
        if self._column.null_count:
            row = next(row for row in range(len(self)) if not self._column[row].is_valid)
            raise ValueError(
                f"Got {self._column.null_count} records without text in {name}, the first at {self.place(row)}. "
                f"Each record needs a string in {text_field!r}. Remove them, or set text_field."
            )
        self._require_text()

    def __len__(self) -> int:
        return len(self._column)

    def text(self, index: int) -> str:
        return self._column[index].as_py()

    def place(self, index: int) -> str:
        return f"{self._name}, row {index + 1}"

    def identity(self) -> dict[str, Any]:
        return {**self._identity, "documents": len(self)}


def missing_field(field: str, fields: list[str], place: str) -> ValueError:
    """The error for a record of `fields` that lacks `field`."""
    return ValueError(
        f"Got a record without the field {field!r} in {place}; it has {', '.join(fields) or 'none'}. "
        f"Each record needs its text there. Set text_field, or correct the data."
    )
