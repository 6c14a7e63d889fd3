"""Track the highest step of the group.

A replica that was told of a later step never trains from an earlier one.
"""

from __future__ import annotations

from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from titan_ft.network import replica_rank


class RecordingClient:
    """The client of a torchft manager, with the last quorum kept in `last_quorum`: the manager itself drops most of it.

    Replaces `Manager._client` and its `_quorum` (private, torchft 0.2.0); if they are gone, building a group fails.
    """

    def __init__(self, client: Any) -> None:
        self._client, self._request_quorum, self.last_quorum = client, client._quorum, None

    def _quorum(self, **arguments: Any) -> Any:
        self.last_quorum = self._request_quorum(**arguments)
        return self.last_quorum

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class Progress:
    """The highest step that this replica was told of, and agreement of its ranks on whether they are behind it."""

    def __init__(self, store: TCPStore) -> None:
        self._store, self._num_votes, self._behind, self._quorum_id = store, 0, False, None
        self.max_step = 0

    def is_behind(self, quorum: Any, step: int) -> bool:
        """Return whether any rank of this replica is behind.

        The ranks exchange their answers in each new quorum, and while one of them is behind. (torchft chooses for each
        rank separately whether it heals from another replica.)
        """
        self.max_step = max(self.max_step, quorum.max_step)
        if quorum.quorum_id != self._quorum_id or self._behind:
            self._quorum_id = quorum.quorum_id
            self._behind = self._any_rank(step < self.max_step)
        return self._behind

    def _any_rank(self, flag: bool) -> bool:
        rank, num_ranks = replica_rank()
        self._num_votes += 1
        self._store.set(f"behind/{self._num_votes}/{rank}", str(int(flag)))
        return any(self._store.get(f"behind/{self._num_votes}/{each}") == b"1" for each in range(num_ranks))
