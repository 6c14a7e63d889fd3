"""Addresses and the store through which the ranks of a replica, and other replicas, reach this process."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]


def local_address(url: str) -> str:
    """Return the IP address of this machine as seen by the host of `url` (`http://host:port`).

    It is 127.0.0.1 for a lighthouse at 127.0.0.1, and the address in the cluster's network for one reached over that
    network. Nothing is sent. Raises ValueError if `url` has no host and port, or the host is unknown.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None or parts.port is None:
        raise ValueError(f"The lighthouse address must be http://host:port, got {url!r}.")
    try:
        family, _, _, _, remote = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(remote)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ValueError(
            f"The lighthouse at {url!r} must be reachable from every rank, got {error} for {parts.hostname!r}. Use "
            "its IP address, or a name that this machine can resolve."
        ) from error


def url_host(host: str) -> str:
    """Return `host` as it is written in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def replica_rank() -> tuple[int, int]:
    """Return (rank, number of ranks) of this process in its replica."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def open_store(host: str) -> TCPStore:
    """Open the store of this replica, in which its ranks find each other and ranks of other replicas find them.

    Rank 0 hosts it, at `host`. The store of torchrun cannot serve, since it outlives restarts and keeps entries of dead
    ranks.
    """
    rank, num_ranks = replica_rank()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    address = [(store.host, store.port) if store is not None else ("", 0)]
    if num_ranks > 1:
        dist.broadcast_object_list(address, src=0)
    return store or TCPStore(*address[0], is_master=False, wait_for_workers=False)
