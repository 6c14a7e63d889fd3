"""A lighthouse inside this process: enough for one machine, for tests and for trying things out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from titan_ft.logs import calm_torchft


@contextmanager
def local_lighthouse(
    *, min_replicas: int = 1, heartbeat_timeout_ms: int = 5_000, join_timeout_ms: int = 60_000
) -> Iterator[str]:
    """Run a torchft lighthouse on a free port of 127.0.0.1 and give its address, until the context ends.

    A replica that was not heard of for `heartbeat_timeout_ms` counts as dead. A step starts with `min_replicas` or
    more, and waits up to `join_timeout_ms` for those that are alive and not ready. Across machines, run the program
    `torchft_lighthouse` instead, where it outlives every replica.
    """
    calm_torchft()
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=min_replicas,
        heartbeat_timeout_ms=heartbeat_timeout_ms,
        join_timeout_ms=join_timeout_ms,
    )
    try:
        yield f"http://127.0.0.1:{urlsplit(server.address()).port}"
    finally:
        server.shutdown()
