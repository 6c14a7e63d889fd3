"""Track the furthest step of the group.

A replica that was told of a later step never trains below it.
"""

from __future__ import annotations

from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from titan_ft.network import replica_rank


class RecordingClient:
    """torchft's client of a manager, with the last quorum kept in `last`: the manager itself keeps too little of it.

    Replaces `Manager._client` and its `_quorum` (torchft 0.2.0, private); without them, building a group fails.
    """

    def __init__(self, client: Any) -> None:
        self._client, self._ask, self.last = client, client._quorum, None

    def _quorum(self, **arguments: Any) -> Any:
        self.last = self._ask(**arguments)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class Progress:
    """The furthest step that this replica was told of, and consistency of its ranks on whether they are behind it."""

    def __init__(self, store: TCPStore) -> None:
        self._store, self._num_votes, self._behind, self._quorum_id = store, 0, False, None
        self.furthest = 0

    def is_behind(self, quorum: Any, step: int) -> bool:
        """Return whether any rank of this replica is behind.

        Ranks ask each other in each new quorum, and while one is behind. (Which of them heals from another replica is
        torchft's choice and differs between them.)
        """
        self.furthest = max(self.furthest, quorum.max_step)
        if quorum.quorum_id != self._quorum_id or self._behind:
            self._quorum_id = quorum.quorum_id
            self._behind = self._any_rank(step < self.furthest)
        return self._behind

    def _any_rank(self, mine: bool) -> bool:
        rank, num_ranks = replica_rank()
        self._num_votes += 1
        self._store.set(f"behind/{self._num_votes}/{rank}", str(int(mine)))
        return any(self._store.get(f"behind/{self._num_votes}/{each}") == b"1" for each in range(num_ranks))
