"""How other machines reach this process: found by asking which way the lighthouse lies."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def address_towards(url: str) -> str:
    """Return the IP address of this machine as the host of `url` (`http://host:port`) would see it.

    A process that reaches its lighthouse at 127.0.0.1 is 127.0.0.1; one that reaches it over the cluster's network has its
    address there. Nothing is sent. Raises ValueError where `url` names no host and port, or a host that is not known.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None or parts.port is None:
        raise ValueError(
            f"Got the lighthouse address {url!r}. It must be a URL with host and port. Write http://host:29510."
        )
    try:
        family, _, _, _, remote = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(remote)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ValueError(
            f"Got the lighthouse address {url!r}, and found no way to {parts.hostname!r} ({error}). Every rank must reach the "
            "lighthouse. Give its IP address, or a name that this machine can look up."
        ) from error


def in_url(host: str) -> str:
    """Return `host` as a URL writes it: an IPv6 address stands in brackets."""
    return f"[{host}]" if ":" in host else host
