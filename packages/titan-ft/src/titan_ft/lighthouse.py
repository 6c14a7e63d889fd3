"""A torchft lighthouse inside this process, for tests and for runs on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from titan_ft.logs import silence_torchft_logging


@contextmanager
def local_lighthouse(
    *, min_replicas: int = 1, heartbeat_timeout_ms: int = 5_000, join_timeout_ms: int = 60_000
) -> Iterator[str]:
    """Run a torchft lighthouse on a free port of 127.0.0.1; yield its address, and stop it when the context ends.

    A replica without a heartbeat for `heartbeat_timeout_ms` counts as dead. A step starts with at least `min_replicas`
    replicas, and waits up to `join_timeout_ms` for replicas that are alive but not ready. For several machines, run the
    program `torchft_lighthouse` instead, in a place where it outlives every replica.
    """
    silence_torchft_logging()
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
