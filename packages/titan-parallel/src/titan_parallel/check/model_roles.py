"""The roles of a model that was given without a table."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from titan_config import ConfigError
from torch import nn

from titan_parallel import hugging_face
from titan_parallel.sharding_plan.roles import RoleTable


@runtime_checkable
class StatesRoles(Protocol):
    """A model that says what its parts are."""

    def roles(self) -> RoleTable:
        """The table."""


@runtime_checkable
class DeclaresPlan(Protocol):
    """A model of `transformers`: what it declares, and where its ends are."""

    _tp_plan: dict[str, str]

    def get_output_embeddings(self) -> nn.Module | None:
        """The head."""


def declared_roles(model: nn.Module) -> RoleTable:
    """`model.roles()`, or those of a Hugging Face model. Raises ConfigError for a model that has none."""
    if isinstance(model, StatesRoles):
        return model.roles()
    if isinstance(model, DeclaresPlan):
        return hugging_face.roles_of(model)
    raise ConfigError(
        f"Got a {type(model).__name__} without roles. They say what the parts of a model are. Give roles, or let the "
        "model have a method roles()."
    )
