"""Compilation of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from titan_config import Configurable


class Compile(Configurable):
    """Compiles each block; identical blocks share what was compiled for the first."""

    class Config(Configurable.Config):
        backend: str = "inductor"
        """Any backend that torch.compile knows by name."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a block, compiled at its first call."""
        return torch.compile(forward, backend=self._config.backend)
