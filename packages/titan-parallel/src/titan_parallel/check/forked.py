"""Run ranks as forked processes: closures work, models need not pickle, and no rank outlives the call."""

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
"""Time to wait, once a rank has failed, for independent failures of others; failures that it causes come later."""


@dataclass(frozen=True)
class Failed:
    """An error in a task, and the ranks that raised it. The other ranks were ended."""

    ranks: tuple[int, ...]
    kind: str
    """The name of the exception; "" for a process that ended or timed out."""
    message: str
    trace: str


_Raised = tuple[str, str, str]
"""(name of an exception, message, traceback)"""

Work = Callable[[str], Any]
"""The work of each rank for a task, given by its name; the result must pickle."""


def require_fork() -> None:
    """Raise RuntimeError if ranks cannot be forked from this process."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise RuntimeError(
            f"check_parallel must run on Linux, got the platform {sys.platform}, which cannot fork processes."
        )
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "check_parallel must be called before CUDA is initialized in this process, because forked ranks cannot use "
            "it. Call it earlier, or run it in its own process: python -m titan_parallel check MODULE:FUNCTION."
        )
    if dist.is_initialized():
        raise RuntimeError(
            "check_parallel must be called outside a process group, got an initialized one. Run it without torchrun "
            "and before init_distributed()."
        )


def run_alone(work: Work, name: str, timeout_s: float) -> Any | Failed:
    """Return the result of `work(name)` in one process without a process group."""
    (result,) = _Ranks(1, work, [name], timeout_s, grouped=False).outcomes().values()
    return result if isinstance(result, Failed) else result[0]


def run_on_ranks(num_ranks: int, work: Work, names: Sequence[str], timeout_s: float) -> dict[str, list[Any] | Failed]:
    """Run `work(name)` on each rank of a gloo group, one name after the other.

    Returns {name: results in order of rank, or Failed}. If a rank raises, dies, or takes longer than `timeout_s`, all
    ranks are ended, and new ranks run the remaining names.
    """
    outcomes: dict[str, list[Any] | Failed] = {}
    while left := [name for name in names if name not in outcomes]:
        outcomes |= _Ranks(num_ranks, work, left, timeout_s, grouped=True).outcomes()
    return outcomes


class _Ranks:
    """One set of rank processes."""

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
        """Return the results of the names in order, up to and including the first that fails."""
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
        importlib.import_module("torch.distributed.fsdp")  # takes a second: once here instead of in every rank

        sys.stdout.flush()
        sys.stderr.flush()
        context = multiprocessing.get_context("fork")
        for rank in range(self._num_ranks):
            receiver, sender = context.Pipe(duplex=False)
            group = (rank, self._num_ranks, store, self._timeout_s) if self._grouped else None
            process = context.Process(target=_rank_main, args=(group, self._work, self._names, sender), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads; see _rank_main
                process.start()
            sender.close()
            self._pipes[rank] = receiver
            self._processes.append(process)

    def _collect(self, name: str) -> dict[int, _Raised]:
        """Wait for the results of all ranks for `name`; return {rank: error} of those that fail."""
        failures: dict[int, _Raised] = {}
        deadline = time.monotonic() + self._timeout_s
        while waiting := [rank for rank in self._pipes if rank not in self._answers[name] and rank not in failures]:
            ready = connection.wait([self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                return failures or dict.fromkeys(
                    waiting, ("", f"no result within {self._timeout_s:g} s (timeout_s)", "")
                )
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
    """Return the failure of the lowest rank, with all ranks that raised the same error."""
    kind, message, trace = failures[min(failures)]
    ranks = tuple(rank for rank, other in sorted(failures.items()) if other[:2] == (kind, message))
    return Failed(ranks, kind, message, trace)


def _rank_main(
    group: tuple[int, int, Path, float] | None, work: Work, names: Sequence[str], pipe: connection.Connection
) -> None:
    parent = os.getppid()
    os.dup2(2, 1)  # keep prints of the ranks out of the caller's stdout
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # hides a performance warning
    torch.set_num_threads(1)  # a thread pool does not survive a fork; with one thread none is needed
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
    while os.getppid() == parent:  # keep connections open, so that other ranks do not fail first
        time.sleep(0.05)
    os._exit(0)  # skip the exit handlers of the caller's libraries


def _join(rank: int, num_ranks: int, store: Path, timeout_s: float) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    timeout = timedelta(seconds=timeout_s)
    rendezvous = FileStore(str(store), num_ranks)
    dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=num_ranks, timeout=timeout)
    dist.barrier()
