"""The default replica group: a single replica, without fault tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from titan_config import Configurable
from torch import Tensor

from titan_trainer.protocols import State


class SingleReplica(Configurable):
    """A `ReplicaGroup` of one replica: none joins, none leaves, and every step commits."""

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
        """Do nothing: there is no other replica to heal."""

    def begin_step(self) -> tuple[int, int]:
        """Return (0, 1): the first replica of one."""
        return 0, 1

    def reduce_(self, tensor: Tensor) -> None:
        """Leave `tensor` unchanged: it is the sum over one replica."""

    def commit(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Do nothing."""
