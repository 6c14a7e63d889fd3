"""torchft's HTTP transport of states between replicas, at an address that the others can reach.

All that Titan touches of torchft's insides is in this file.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from urllib.parse import urlsplit

from torchft.checkpointing import HTTPTransport

from titan_ft.network import in_url
from titan_ft.snapshot import Snapshot


class SnapshotTransport(HTTPTransport[dict[str, Snapshot]]):
    """Serves this rank's snapshot to newcomers while they need it, and holds on to none afterwards."""

    def __init__(self, host: str, timeout: timedelta) -> None:
        self._host = host
        super().__init__(timeout=timeout, num_chunks=0)

    def address(self) -> str:
        """Where snapshots are served (torchft would name the machine, which others may not be able to look up)."""
        return f"http://{in_url(self._host)}:{urlsplit(super().address()).port}/checkpoint/"

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Snapshot]:
        """Fetch the snapshot of a live replica's rank. Its tensors are read-only, which torch would warn of."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return super().recv_checkpoint(src_rank, metadata, step, timeout)

    def disallow_checkpoint(self) -> None:
        """Wait for newcomers that are still reading, then let the snapshot go (torchft would keep it)."""
        super().disallow_checkpoint()
        self._state_dict = None
