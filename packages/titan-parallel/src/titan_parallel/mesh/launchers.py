"""Ranks from the environment variables of srun, mpirun and other launchers that do not set RANK.

torch reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. If RANK is set, as by torchrun, nothing changes.
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

log = logging.getLogger(__name__)

_SPECIAL_STEPS = 0xFFFFFFF0
"""Slurm step ids from here on are not steps of srun: 0xfffffffa is the shell of salloc, 0xfffffffb that of sbatch."""
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000


@dataclass(frozen=True)
class _Names:
    """The environment variables of a launcher; in a tuple, the first one that is set is read."""

    rank: str
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


_SLURM = _Names("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), ("SLURM_LOCALID",), ())
_PMI = _Names(
    "PMI_RANK",
    ("PMI_SIZE",),
    ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"),
    ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
)
# mpirun may start its daemons with srun; its tasks then have the variables of Slurm too. So mpirun is tried first.
_LAUNCHERS = (
    _Names(
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Names(
        "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_LOCAL_SIZE",)
    ),
    _PMI,
    _SLURM,
    _Names("FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",), ()),
    _Names("PMIX_RANK", ("PMIX_SIZE",), ("PMIX_LOCAL_RANK",), ("PMIX_LOCAL_SIZE",)),  # set by other launchers too
)


def adopt_launcher() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the variables of srun or mpirun.

    Changes nothing if RANK is set or this process is the only task. Raises ValueError if the variables are incomplete
    or invalid.
    """
    os.environ.update(ranks_of_launcher(os.environ))


def ranks_of_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables to set for torch; none for a single process, or if RANK is set."""
    if "RANK" in environment:
        return {}
    for names in _LAUNCHERS:
        if names.rank in environment and not (names is _SLURM and _is_shell_of_slurm(environment)):
            return _ranks(environment, names)
    if environment.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"RANK must be set if WORLD_SIZE is {environment['WORLD_SIZE']}. Start with torchrun, or set RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
        )
    return {}


def _ranks(environment: Mapping[str, str], names: _Names) -> dict[str, str]:
    size = _number(environment, names.size)
    if size is None:
        raise ValueError(
            f"{names.size[0]}, the number of tasks, must be set if {names.rank} is. Start with torchrun, or set RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
        )
    if size == 1:
        return {}
    rank = _number(environment, (names.rank,))
    if rank is None or not 0 <= rank < size:
        raise ValueError(f"{names.rank} must be from 0 to {size - 1}, got {environment[names.rank]}.")
    local_rank = _number(environment, names.local_rank)
    is_one_step = _is_one_step_of_slurm(environment, names, size)
    ranks = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(_device_index(environment, rank if local_rank is None else local_rank)),
    }
    if "MASTER_ADDR" not in environment:
        ranks["MASTER_ADDR"] = _address(environment, names, size, is_one_step)
    if "MASTER_PORT" not in environment:
        ranks["MASTER_PORT"] = str(_port(environment, is_one_step))
    return ranks


def _is_shell_of_slurm(environment: Mapping[str, str]) -> bool:
    """Return whether this process runs alone in a shell (or notebook) of an allocation, and is not a task of srun."""
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID"))
    if step is not None:
        return step.isdecimal() and int(step) >= _SPECIAL_STEPS
    is_batch = environment.get("ENVIRONMENT") == "BATCH" or "SLURM_SUBMIT_DIR" in environment
    if is_batch and environment.get("SLURM_NTASKS", "1") != "1":
        _warn_alone(environment["SLURM_NTASKS"])
    return is_batch


@cache
def _warn_alone(num_tasks: str) -> None:
    """Warn once per process: recipes and the library both call `adopt_launcher`."""
    log.warning(
        "The Slurm job has %s tasks, but this process was not started by srun and runs alone. To run on all tasks, "
        "start the command with srun.",
        num_tasks,
    )


def _is_one_step_of_slurm(environment: Mapping[str, str], names: _Names, size: int) -> bool:
    """Return whether one srun started all tasks, so that they agree on the SLURM_STEP_* variables.

    mpirun forks the tasks of its own node, and starts daemons on the other nodes with srun: their tasks have another
    step, and those of its own node may have none.
    """
    if names is _PMI:  # set by srun --mpi=pmi2, or by an mpiexec whose daemons srun started
        return _number(environment, ("SLURM_STEP_NUM_TASKS",)) == size
    return names is _SLURM


def _number(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    """Return the number in the first of these variables that is set, or None."""
    name = next((name for name in names if name in environment), None)
    if name is None:
        return None
    if not environment[name].isdecimal():
        raise ValueError(f"{name} must be a number, got {environment[name]!r}.")
    return int(environment[name])


def _device_index(environment: Mapping[str, str], local_rank: int) -> int:
    """Return the index of this task's device among its visible ones: 0 if only one is visible."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return 0 if visible and "," not in visible else local_rank


def _address(environment: Mapping[str, str], names: _Names, size: int, is_one_step: bool) -> str:
    """Return the host of the first task. Raises ValueError if there may be several nodes and no variable names them."""
    num_nodes = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES"))
    local_size = _number(environment, names.local_size)
    if local_size == size or (is_one_step and num_nodes == "1"):
        return "127.0.0.1"
    of_step = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    for name in of_step if is_one_step else ("SLURM_JOB_NODELIST",):
        if environment.get(name):
            return first_host(environment[name])
    nodes = _lines_of(environment.get("PBS_NODEFILE", ""))
    if nodes:
        return nodes[0]
    raise ValueError(
        f"MASTER_ADDR must be set if {names.size[0]} is {size} and no variable names the nodes. Set it to the host of "
        "the first task, or to 127.0.0.1 if all tasks are on this node."
    )


def _lines_of(file: str) -> list[str]:
    if not os.path.isfile(file):
        return []
    with open(file, encoding="utf-8") as lines:
        return [line.strip() for line in lines if line.strip()]


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list: "node01" for "node[01-03,7],login"."""
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", node_list.strip())
    if first is None:
        raise ValueError(f"The Slurm node list must look like node[01-03,7], got {node_list!r}. Set MASTER_ADDR.")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _port(environment: Mapping[str, str], is_one_step: bool) -> int:
    """Return a port that is the same for all tasks of a run, and likely different from that of other jobs."""
    job = environment.get("SLURM_JOB_ID", environment.get("SLURM_JOBID", environment.get("PBS_JOBID")))
    job = job or environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid"))
    if job is None:
        return 29_500
    step = environment.get("SLURM_STEP_ID", "") if is_one_step else ""
    return _FIRST_PORT + zlib.crc32(f"{job}.{step}".encode()) % _NUM_PORTS
