"""A column of an Arrow table as documents."""

from __future__ import annotations

from typing import Any

from titan_data.source import MapSource


class ArrowTexts(MapSource):
    """The texts of one column of a `datasets.Dataset`, which lies on disk and is mapped into memory, not read.

    Raises ValueError where the column is missing, holds no text, or lacks it in some row.
    """

    def __init__(self, dataset: Any, text_field: str, name: str, identity: dict[str, Any]) -> None:
        if text_field not in dataset.column_names:
            raise missing_field(text_field, dataset.column_names, name)
        self._column = dataset.data.column(text_field)
        self._name, self._identity = name, identity
        require_strings(self._column.type, text_field, name)
        if self._column.null_count:
            row = next(row for row in range(len(self)) if not self._column[row].is_valid)
            raise missing_text(text_field, self._column.null_count, self.place(row))
        self._require_text()

    def __len__(self) -> int:
        return len(self._column)

    def text(self, index: int) -> str:
        return self._column[index].as_py()

    def place(self, index: int) -> str:
        return f"{self._name}, row {index + 1}"

    def identity(self) -> dict[str, Any]:
        return {**self._identity, "documents": len(self)}


def require_strings(kind: Any, text_field: str, place: str) -> None:
    """Raise ValueError unless an Arrow type is one of strings: plain, large, a view (Polars), or a dictionary's."""
    import pyarrow.types as kinds

    inner = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(inner) or kinds.is_large_string(inner) or kinds.is_string_view(inner)):
        raise ValueError(f"{place}: the field {text_field!r} must hold strings, got {kind}. Set text_field.")


def missing_field(field: str, fields: list[str], place: str) -> ValueError:
    """Return the error for a record of `fields` that lacks `field`."""
    return ValueError(
        f"{place} must have the field {field!r}, got the fields: {', '.join(fields) or 'none'}. Set text_field."
    )


def missing_text(field: str, count: int, first: str) -> ValueError:
    """Return the error for records of which `field` is null."""
    return ValueError(
        f"{first}: the field {field!r} must be a string, got null (as in {count:,} records). Remove them, or set "
        f"text_field."
    )
