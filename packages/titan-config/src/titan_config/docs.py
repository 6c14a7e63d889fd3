"""Attribute docstrings: the string literal below a field is its help text on the command line."""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
from functools import lru_cache
from typing import Any

from titan_config.configurable import Config


def field_doc(cls: type[Config], name: str) -> str:
    """Return the docstring of a field from the most derived class that has one; "" if there is none."""
    for base in cls.__mro__:
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        if file and issubclass(base, Config):
            doc = _docs_in(file).get((base.__qualname__, name))
            if doc:
                return doc
    return ""


def class_doc(cls: type[Any]) -> str:
    """Return the first sentence of the docstring of `cls` itself (not inherited); "" if there is none."""
    text = " ".join((cls.__dict__.get("__doc__") or "").split())
    return text.split(". ")[0].removesuffix(".") + "." if text else ""


@lru_cache
def _docs_in(file: str) -> dict[tuple[str, str], str]:
    docs: dict[tuple[str, str], str] = {}
    _collect(ast.parse("".join(linecache.getlines(file))), "", docs)
    return docs


def _collect(node: ast.AST, qualname: str, docs: dict[tuple[str, str], str]) -> None:
    body = getattr(node, "body", [])
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.ClassDef):
            _collect(statement, f"{qualname}.{statement.name}".lstrip("."), docs)
        elif isinstance(statement, ast.FunctionDef):
            _collect(statement, f"{qualname}.{statement.name}.<locals>".lstrip("."), docs)
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs[qualname, statement.target.id] = inspect.cleandoc(value.value)
