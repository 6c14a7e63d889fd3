"""Consistency check of the settings of replicas before a step.

Replicas with different settings would diverge silently, or fail in the first reduction.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from titan_ft.network import replica_rank
from titan_ft.snapshot import State, tensor_specs


class ReplicaInfo(NamedTuple):
    """Digest, state and id that a replica sends to the others of a quorum."""

    replica_id: int
    digest: str
    established: bool
    """True once the replica has committed a step with other replicas."""


def compute_digest(identity: Any, state: State, store: TCPStore) -> str:
    """Return a digest of all that replicas must have in common, equal on all ranks of this replica.

    `identity`: JSON values, such as settings. Of `state`, only the shapes, dtypes and meshes of `state["model"]` count,
    since optimizer state may exist on one replica and not yet on another. `store` is the store of this replica.
    """
    rank, num_ranks = replica_rank()
    shared = json.dumps([identity, tensor_specs(state.get("model", {})), num_ranks], sort_keys=True)
    store.set(f"digest/{rank}", hashlib.sha256(shared.encode()).hexdigest())
    return hashlib.sha256(b"".join(store.get(f"digest/{each}") for each in range(num_ranks))).hexdigest()


def exchange_info(quorum: Any, info: ReplicaInfo, timeout: timedelta) -> list[ReplicaInfo]:
    """Send `info` to the other replicas of a torchft quorum; return the infos of all replicas, by replica rank.

    The exchange uses the store in which the replicas set up their process group. A dead replica therefore costs only
    `timeout`, and no reduction starts without it. Raises RuntimeError.
    """
    from torchft.process_group import create_store_client

    address = f"{quorum.store_address}/titan/{quorum.quorum_id}/{replica_rank()[0]}"
    store = create_store_client(address, timeout)
    store.set(str(quorum.replica_rank), json.dumps(info))
    return [ReplicaInfo(*json.loads(store.get(str(index)))) for index in range(quorum.replica_world_size)]


def mismatched_replicas(replicas: list[ReplicaInfo]) -> list[int]:
    """Return the indices of replicas that differ from the first established one (or the first, if none is)."""
    reference = next((info for info in replicas if info.established), replicas[0])
    return [index for index, info in enumerate(replicas) if info.digest != reference.digest]
