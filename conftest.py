"""Shared by all tests of the repository: `run_ranks` forks ranks of a gloo group and returns what each computed."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forking is only safe while OpenMP has no pool of threads


def _rank_main(
    rank: int, world_size: int, rendezvous: Path, function: Callable[..., Any], args: tuple, pipe: Any
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(rendezvous), world_size), rank=rank, world_size=world_size
        )
        dist.barrier()  # nobody is done before all are connected
        pipe.send_bytes(pickle.dumps((True, function(*args))))  # copies: shared tensors would end with the process
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
        os._exit(0)  # no exit handlers of the parent's libraries


def _run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 300) -> list[Any]:
    """Call `function(*args)` on `world_size` forked ranks; return their results in order of rank.

    Closures are fine, results must pickle. Forking costs a second: let one call run many cases. Raises RuntimeError
    with the traceback of the first rank that failed; the others are ended.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            target_args = (rank, world_size, Path(folder, "store"), function, args, sender)
            process = context.Process(target=_rank_main, args=target_args, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        results: dict[int, Any] = {}
        try:
            while len(results) < world_size:
                waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
                ready = multiprocessing.connection.wait(waiting, timeout_s)
                if not ready:
                    raise RuntimeError(
                        f"Got no answer from ranks {sorted(set(range(world_size)) - set(results))} in {timeout_s} s."
                    )
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        succeeded, value = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        processes[rank].join()
                        succeeded, value = False, f"The process ended with code {processes[rank].exitcode}."
                    if not succeeded:
                        raise RuntimeError(f"Rank {rank} of {world_size} failed:\n{value}")
                    results[rank] = value
        finally:
            for process in processes:
                if len(results) < world_size:
                    process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(world_size, function, *args)`: see `_run_ranks`."""
    return _run_ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden texts of the recipes anew")
