"""The table of roles: what each part of a model is, so that an engine can work out what follows from it on a mesh."""

from __future__ import annotations

from typing import Any

Roles = dict[str, str | tuple[str, dict[str, Any]]]
"""`{pattern: role}` or `{pattern: (role, options)}` over module names; `*` is one part of a name, `""` the module."""


def under(prefix: str, roles: Roles) -> Roles:
    """The roles of a child, as its parent names them."""
    return {f"{prefix}.{pattern}" if pattern else prefix: role for pattern, role in roles.items()}
