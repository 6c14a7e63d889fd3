"""How the ranks of a replica, and of other replicas, find this process."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]


def address_towards(url: str) -> str:
    """Return the IP address of this machine as the host of `url` (`http://host:port`) would see it.

    A process that reaches its lighthouse at 127.0.0.1 is 127.0.0.1; one that reaches it over the cluster's network has
    its address there. Nothing is sent. Raises ValueError where `url` names no host and port, or an unknown host.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None or parts.port is None:
        raise ValueError(
            f"Got the lighthouse address {url!r}. It is a URL with host and port. Write http://host:29510."
        )
    try:
        family, _, _, _, remote = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(remote)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ValueError(
            f"Got the lighthouse address {url!r}, and no way to {parts.hostname!r} ({error}). Every rank must reach "
            "the lighthouse. Give its IP address, or a name that this machine can look up."
        ) from error


def in_url(host: str) -> str:
    """Return `host` as a URL writes it: an IPv6 address stands in brackets."""
    return f"[{host}]" if ":" in host else host


def replica_rank() -> tuple[int, int]:
    """Which of its replica's ranks this process is: (rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def open_store(host: str) -> TCPStore:
    """Open the store in which this replica's ranks find each other, and are found by those of other replicas.

    Rank 0 keeps it, at `host`. It is the replica's own: the one that torchrun keeps over restarts remembers the dead.
    """
    rank, num_ranks = replica_rank()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    address = [(store.host, store.port) if store is not None else ("", 0)]
    if num_ranks > 1:
        dist.broadcast_object_list(address, src=0)
    return store or TCPStore(*address[0], is_master=False, wait_for_workers=False)
