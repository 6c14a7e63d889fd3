"""Compare the settings of replicas before a step.

Replicas that differ would diverge silently, or end each other in the first sum.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from titan_ft.network import replica_rank
from titan_ft.snapshot import State, shapes_of


class Told(NamedTuple):
    """Digest, state and name that a replica sends to the others of a quorum."""

    replica_id: int
    digest: str
    established: bool
    """It has made a step with others."""


def digest_of(identity: Any, state: State, store: TCPStore) -> str:
    """Return a digest of all that replicas have to share, the same on each rank of this replica.

    `identity`: JSON values, such as settings. Of `state`, the shapes, dtypes and meshes of its part `model` count: an
    optimizer's state may be there on one replica and not yet on another. `store` is the replica's own.
    """
    rank, num_ranks = replica_rank()
    shared = json.dumps([identity, shapes_of(state.get("model", {})), num_ranks], sort_keys=True)
    store.set(f"digest/{rank}", hashlib.sha256(shared.encode()).hexdigest())
    return hashlib.sha256(b"".join(store.get(f"digest/{each}") for each in range(num_ranks))).hexdigest()


def exchange(quorum: Any, told: Told, timeout: timedelta) -> list[Told]:
    """Tell the other replicas of a torchft quorum; return what each of them told, in order of their indices.

    It goes through the store in which they set up their process group: a replica that is gone costs the timeout, and
    no sum is begun that others do not take part in. Raises RuntimeError.
    """
    from torchft.process_group import create_store_client

    address = f"{quorum.store_address}/titan/{quorum.quorum_id}/{replica_rank()[0]}"
    store = create_store_client(address, timeout)
    store.set(str(quorum.replica_rank), json.dumps(told))
    return [Told(*json.loads(store.get(str(index)))) for index in range(quorum.replica_world_size)]


def differing(replicas: list[Told]) -> list[int]:
    """Return the indices of replicas that differ from the first that is established, or from the first if none is."""
    reference = next((told for told in replicas if told.established), replicas[0])
    return [index for index, told in enumerate(replicas) if told.digest != reference.digest]
