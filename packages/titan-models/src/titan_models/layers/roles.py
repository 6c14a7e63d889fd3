"""Roles of modules, from which titan-parallel (or another engine) derives how to shard a model."""

from __future__ import annotations

from typing import Any

Roles = dict[str, str | tuple[str, dict[str, Any]]]
"""`{pattern: role}` or `{pattern: (role, options)}` over module names.

`*` matches one dot-separated component of a name; `""` is the module itself.
"""


def under(prefix: str, roles: Roles) -> Roles:
    """Return the roles of a child module with `prefix` before each pattern."""
    return {f"{prefix}.{pattern}" if pattern else prefix: role for pattern, role in roles.items()}
