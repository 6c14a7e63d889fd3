"""Source of documents from a column of an Arrow table."""

from __future__ import annotations

from typing import Any

from titan_data.source import MapSource


class ArrowTexts(MapSource):
    """Source of the texts in one column of a `datasets.Dataset`, memory-mapped from disk.

    Raises ValueError if the column is missing, is not of strings, or has a null.
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
    """Raise ValueError unless an Arrow type is a string, large string, string view (Polars) or dictionary of these."""
    import pyarrow.types as kinds

    inner = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(inner) or kinds.is_large_string(inner) or kinds.is_string_view(inner)):
        raise ValueError(f"{place}: the field {text_field!r} must be of strings, got {kind}. Set text_field.")


def missing_field(field: str, fields: list[str], place: str) -> ValueError:
    """Return the error for a record with `fields` that has no `field`."""
    return ValueError(
        f"{place} must have the field {field!r}, got the fields: {', '.join(fields) or 'none'}. Set text_field."
    )


def missing_text(field: str, count: int, first: str) -> ValueError:
    """Return the error for `count` records in which `field` is null; `first` is the place of the first of them."""
    return ValueError(
        f"{first}: the field {field!r} must be a string, got null (in {count:,} records). Remove these records, or set "
        "text_field."
    )
