"""Fixtures: replicas as forked processes that a test may kill, and a lighthouse for them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 900
"""Reached only if something hangs."""
os.environ.setdefault("RUST_LOG", "warn")
fork = multiprocessing.get_context("fork")


def _lighthouse_main(options: dict[str, int], pipe: Any) -> None:
    from titan_ft import local_lighthouse

    with local_lighthouse(**options) as address:
        pipe.send(address)
        pipe.recv()


def _rank_main(rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], args: tuple, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    def send(kind: str, value: Any) -> None:
        pipe.send_bytes(pickle.dumps((kind, value)))  # pipe.send shares memory, but this process may exit first

    logging.getLogger().handlers.clear()  # pytest's would keep errors, and thus sockets of failed reductions
    torch.set_num_threads(1)
    try:
        if num_ranks > 1:
            store = dist.FileStore(str(folder / "store"), num_ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        send("result", function(*args, report=lambda event: send("event", event)))
    except BaseException:
        send("error", traceback.format_exc())
    os._exit(0)


class Replica:
    """`num_ranks` forked processes that each call `function(*args, report=...)`."""

    def __init__(self, function: Callable[..., Any], *args: Any, num_ranks: int = 1) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(num_ranks):
            receiver, sender = fork.Pipe(duplex=False)
            target_args = (rank, num_ranks, Path(self.folder.name), function, args, sender)
            process = fork.Process(target=_rank_main, args=target_args, daemon=True)
            process.start()
            sender.close()
            self.pipes.append(receiver)
            self.processes.append(process)

    def next_message(self, rank: int) -> tuple[str, Any]:
        assert self.pipes[rank].poll(TIMEOUT_S), f"rank {rank} said nothing for {TIMEOUT_S} s"
        kind, value = pickle.loads(self.pipes[rank].recv_bytes())
        assert kind != "error", f"rank {rank} failed:\n{value}"
        return kind, value

    def wait_for(self, condition: Callable[[Any], bool]) -> None:
        """Wait until rank 0 reports an event for which `condition` holds."""
        kind, event = self.next_message(0)
        while not condition(event):
            assert kind == "event", f"the replica ended without the event: {event}"
            kind, event = self.next_message(0)

    def results(self) -> list[Any]:
        """Return the result of the function on each rank."""
        results = []
        for rank in range(len(self.pipes)):
            kind, value = self.next_message(rank)
            while kind != "result":
                kind, value = self.next_message(rank)
            results.append(value)
        return results

    def exit_codes(self) -> list[int | None]:
        for process in self.processes:
            process.join(TIMEOUT_S)
        return [process.exitcode for process in self.processes]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


@pytest.fixture
def start_replica() -> Iterator[Callable[..., Replica]]:
    """`start_replica(function, *args, num_ranks=1) -> Replica`; all replicas are killed at the end of the test."""
    replicas: list[Replica] = []

    def start(*args: Any, **options: Any) -> Replica:
        replicas.append(Replica(*args, **options))
        return replicas[-1]

    yield start
    for replica in replicas:
        replica.end()


@pytest.fixture
def lighthouse() -> Iterator[Callable[..., str]]:
    """`lighthouse(min_replicas=1) -> address`, in a separate process, so that the test process can fork."""
    started: list[tuple[Any, Any]] = []

    def start(min_replicas: int = 1) -> str:
        here, there = fork.Pipe()
        options = {"min_replicas": min_replicas, "heartbeat_timeout_ms": 5_000}  # for a busy machine
        process = fork.Process(target=_lighthouse_main, args=(options, there), daemon=True)
        process.start()
        started.append((process, here))
        assert here.poll(TIMEOUT_S), "the lighthouse did not start"
        return here.recv()

    yield start
    for process, pipe in started:
        pipe.send("end")
        process.join(60)
        process.kill()
        process.join()
