"""The roles of a model for which the caller gives no table."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from titan_config import ConfigError
from torch import nn

from titan_parallel import hugging_face
from titan_parallel.sharding_plan.roles import RoleTable


@runtime_checkable
class HasRoles(Protocol):
    """A model with a method `roles()`."""

    def roles(self) -> RoleTable:
        """Return the table of roles."""


@runtime_checkable
class HasTensorParallelPlan(Protocol):
    """A model of `transformers`, with its tensor parallel plan and its head."""

    _tp_plan: dict[str, str]

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head."""


def declared_roles(model: nn.Module) -> RoleTable:
    """Return `model.roles()`, or the roles of a Hugging Face model. Raises ConfigError for other models."""
    if isinstance(model, HasRoles):
        return model.roles()
    if isinstance(model, HasTensorParallelPlan):
        return hugging_face.roles_of(model)
    raise ConfigError(
        f"roles must be given for a model without a method roles(), got {type(model).__name__}. Pass roles, or add the "
        "method."
    )
