"""Ranks as forked processes: closures work, models need not pickle, and no rank outlives the call."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_parallel._torch.distributed import FileStore

_GRACE_S = 1.0
"""How long to wait, once a rank has failed, for others that fail by themselves: what follows from it comes later."""


@dataclass(frozen=True)
class Failed:
    """What was raised in a task, and on which ranks. (The others were ended.)"""

    ranks: tuple[int, ...]
    kind: str
    """The name of the exception; "" where a process ended or did not answer."""
    message: str
    trace: str


_Raised = tuple[str, str, str]
"""The name of an exception, its message, the traceback."""

Work = Callable[[str], Any]
"""What each rank does for one task of a name; the result must pickle."""


def require_fork() -> None:
    """Raise RuntimeError where processes cannot be forked from this one."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise RuntimeError(
            f"Got the platform {sys.platform}. Ranks are forked, so that any model can be checked from any script. Run "
            "the check on Linux."
        )
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "Got a process that has used CUDA. Ranks are forked, and what CUDA holds does not survive a fork. Run the "
            "check before anything touches a GPU, or on its own: python -m titan_parallel check module:build."
        )
    if dist.is_initialized():
        raise RuntimeError(
            "Got a process that is a rank already. The check starts ranks of its own, and these belong to no other "
            "group. Run it without torchrun, before init_distributed()."
        )


def run_alone(work: Work, name: str, timeout_s: float) -> Any | Failed:
    """`work(name)` in one process that belongs to no group."""
    (result,) = _Ranks(1, work, [name], timeout_s, grouped=False).outcomes().values()
    return result if isinstance(result, Failed) else result[0]


def run_on_ranks(num_ranks: int, work: Work, names: Sequence[str], timeout_s: float) -> dict[str, list[Any] | Failed]:
    """`work(name)` on each rank of a gloo group for one name after another: the results in order of rank, or Failed.

    A rank that raises, dies, or takes longer than `timeout_s` ends the others; the names that are left get new ranks.
    """
    outcomes: dict[str, list[Any] | Failed] = {}
    while left := [name for name in names if name not in outcomes]:
        outcomes |= _Ranks(num_ranks, work, left, timeout_s, grouped=True).outcomes()
    return outcomes


class _Ranks:
    """One set of processes, from start to end."""

    def __init__(self, num_ranks: int, work: Work, names: Sequence[str], timeout_s: float, *, grouped: bool) -> None:
        self._names = names
        self._timeout_s = timeout_s
        self._answers: dict[str, dict[int, Any]] = {name: {} for name in names}
        self._num_ranks = num_ranks
        self._work = work
        self._grouped = grouped
        self._pipes: dict[int, connection.Connection] = {}
        self._processes: list[ForkProcess] = []

    def outcomes(self) -> dict[str, list[Any] | Failed]:
        """What came of the names, up to the first that failed."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._start(Path(folder, "store"))
                done: dict[str, list[Any] | Failed] = {}
                for name in self._names:
                    failures = self._collect(name)
                    if failures:
                        return done | {name: _first(failures)}
                    done[name] = [self._answers[name][rank] for rank in range(self._num_ranks)]
                return done
            finally:
                for process in self._processes:
                    process.kill()
                    process.join()

    def _start(self, store: Path) -> None:
        importlib.import_module("torch.distributed.fsdp")  # takes a second: once here, and not in every rank

        sys.stdout.flush()
        sys.stderr.flush()
        context = multiprocessing.get_context("fork")
        for rank in range(self._num_ranks):
            receiver, sender = context.Pipe(duplex=False)
            group = (rank, self._num_ranks, store, self._timeout_s) if self._grouped else None
            process = context.Process(target=_rank_main, args=(group, self._work, self._names, sender), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads; see _rank_main
                process.start()
            sender.close()
            self._pipes[rank] = receiver
            self._processes.append(process)

    def _collect(self, name: str) -> dict[int, _Raised]:
        """Wait for what all ranks say of `name`; what those that failed raised."""
        failures: dict[int, _Raised] = {}
        deadline = time.monotonic() + self._timeout_s
        while waiting := [rank for rank in self._pipes if rank not in self._answers[name] and rank not in failures]:
            ready = connection.wait([self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                return failures or dict.fromkeys(waiting, ("", f"no answer in {self._timeout_s:g} s", ""))
            for rank in waiting:
                if self._pipes[rank] in ready:
                    self._receive(rank, name, failures)
            if failures:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        return failures

    def _receive(self, rank: int, name: str, failures: dict[int, _Raised]) -> None:
        try:
            task, succeeded, value = pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join()
            failures[rank] = ("", f"the process ended with code {self._processes[rank].exitcode}", "")
            return
        if succeeded:
            self._answers[task][rank] = value
        else:
            failures[rank] = value


def _first(failures: dict[int, _Raised]) -> Failed:
    """The failure of the lowest rank, and all ranks that say the same."""
    kind, message, trace = failures[min(failures)]
    ranks = tuple(rank for rank, other in sorted(failures.items()) if other[:2] == (kind, message))
    return Failed(ranks, kind, message, trace)


def _rank_main(
    group: tuple[int, int, Path, float] | None, work: Work, names: Sequence[str], pipe: connection.Connection
) -> None:
    parent = os.getppid()
    os.dup2(2, 1)  # what ranks print is no part of the caller's output
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # that gathering is slow
    torch.set_num_threads(1)  # a pool of threads does not survive a fork; without one none is needed
    name = names[0]
    try:
        if group is not None:
            _join(*group)
        for name in names:
            pipe.send_bytes(pickle.dumps((name, True, work(name))))
    except BaseException as error:
        message = " ".join([str(error), *getattr(error, "__notes__", [])])
        pipe.send_bytes(pickle.dumps((name, False, (type(error).__name__, message, traceback.format_exc()))))
    sys.stdout.flush()
    sys.stderr.flush()
    while os.getppid() == parent:  # connections stay open, so that no other rank fails before it is ended
        time.sleep(0.05)
    os._exit(0)  # no exit handlers of the caller's libraries


def _join(rank: int, num_ranks: int, store: Path, timeout_s: float) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    timeout = timedelta(seconds=timeout_s)
    rendezvous = FileStore(str(store), num_ranks)
    dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=num_ranks, timeout=timeout)
    dist.barrier()
