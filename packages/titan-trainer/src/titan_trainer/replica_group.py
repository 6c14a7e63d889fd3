"""The default replica group: one replica, always whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from titan_config import Configurable
from torch import Tensor

from titan_trainer.protocols import State


class SingleReplica(Configurable):
    """A `ReplicaGroup` of one: nobody joins, nobody leaves, and every step commits."""

    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config) -> None:
        pass

    def register_state(
        self,
        state_dict: Callable[[], State],
        load_state_dict: Callable[[State], None],
        step: int = 0,
        identity: Any = None,
    ) -> None:
        """Nobody needs healing."""

    def begin_step(self) -> tuple[int, int]:
        """This replica, of one."""
        return 0, 1

    def reduce_(self, tensor: Tensor) -> None:
        """A sum over one replica is the tensor itself."""

    def commit(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Nothing to leave."""
