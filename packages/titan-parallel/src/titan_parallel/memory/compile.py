"""Compilation of blocks with torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from titan_config import Configurable

from titan_parallel.sharding_plan.roles import RoleSpec
from titan_parallel.sharding_plan.units import check_has_units, units_of
from titan_parallel.transforms import ParallelBuild


class Compile(Configurable):
    """Compile each block or unit of a model; equal blocks share the code that is compiled for the first."""

    class Config(Configurable.Config):
        backend: str = "inductor"
        """Any backend that torch.compile knows by name."""

    roles: Mapping[str, RoleSpec] = {
        "block": RoleSpec(options={"streams"}),
        "unit": RoleSpec(options={"streams"}),
    }

    def __init__(self, config: Config) -> None:
        self._config = config

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return `forward` of a block, compiled at its first call."""
        return torch.compile(forward, backend=self._config.backend)

    def validate(self, build: ParallelBuild) -> None:
        """Raise ConfigError for a model without blocks or units."""
        check_has_units(build.roles, "compile")

    def apply(self, build: ParallelBuild) -> None:
        """Replace the forward of each block and unit. Local parameters are swapped in outside of compiled code."""
        for unit in units_of(build.model, build.roles).values():
            unit.forward = self.wrap(unit.forward)
            if unit in build.parameter_views:
                unit.forward = build.parameter_views[unit](unit.forward)
