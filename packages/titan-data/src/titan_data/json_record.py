"""Strict parser of one JSON object per line: input that parsers may interpret differently is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from titan_data.encoding import not_utf8


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {_shown(twice)} twice in one object")
    return record


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not a JSON number")


_decode = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number).decode


def text_of(line: bytes, field: str) -> str:
    """Return the string in `field` of a JSON object.

    Raises ValueError, TypeError, KeyError or RecursionError; `bad_line` turns them into a readable error.
    """
    text = _decode(line.decode())[field]
    if not isinstance(text, str):
        raise TypeError(field)
    return text


def bad_line(line: bytes, field: str, path: Path, number: int) -> ValueError:
    """Return the error for a line for which `text_of` raised, with file and line."""
    where = f"{path}, line {number}"
    try:
        record = _decode(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return not_utf8(line, error.start, where, path)
    except RecursionError:
        return ValueError(f"{where} must be a JSON object, got one that is nested too deeply.")
    except ValueError as error:
        return ValueError(f"{where} must be a JSON object, got {_problem(error)}.")
    if not isinstance(record, dict):
        return ValueError(f"{where} must be a JSON object with the field {field!r}, got a {type(record).__name__}.")
    if field not in record:
        names = ", ".join(_shown(name, quoted=False) for name in list(record)[:10]) or "none"
        return ValueError(f"{where} must have the field {field!r}, got the fields: {names}. Set text_field.")
    kind = type(record[field]).__name__
    return ValueError(
        f"{where}: the field {field!r} must be a string, got {kind}. Set text_field, or correct the line."
    )


def _problem(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error.msg}, column {error.colno})"
    if "integer string conversion" in str(error):
        return "an integer of more than 4,300 digits"
    return str(error)


def _shown(name: str, quoted: bool = True) -> str:
    short = name if len(name) <= 60 else name[:60] + "..."
    return repr(short) if quoted else short
