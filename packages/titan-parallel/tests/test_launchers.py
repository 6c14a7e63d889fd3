"""srun and mpirun set no RANK: their tasks join as one run, and a single process in an allocation runs alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from titan_parallel.mesh.launchers import first_host, ranks_of_launcher

SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_JOB_NODELIST": "node[01-04]",
}
OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


def ranks(**environment: str) -> tuple[str, ...]:
    found = ranks_of_launcher(environment)
    return tuple(found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def test_srun_tasks_become_ranks():
    assert ranks(**SRUN) == ("5", "8", "1", "node03")
    assert ranks(**SRUN | {"SLURM_STEP_NUM_NODES": "1"}) == ("5", "8", "1", "127.0.0.1")
    ports = {ranks_of_launcher(SRUN | {"SLURM_JOB_ID": job})["MASTER_PORT"] for job in ("77", "77", "78", "79")}
    assert len(ports) == 3  # a port for each job, the same for all its tasks
    few = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
    assert ranks(**few, SLURM_NNODES="1") == ("1", "2", "1", "127.0.0.1")
    assert ranks(**few, SLURM_NODELIST="n[1-2]") == ("1", "2", "1", "n1")


def test_mpirun_tasks_become_ranks_also_inside_srun():
    for below in ({}, SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}):
        assert ranks(**OMPI, OMPI_COMM_WORLD_LOCAL_SIZE="4", **below) == ("1", "4", "1", "127.0.0.1")
        assert ranks(**PMI, **below) == ("3", "4", "1", "127.0.0.1")
    of_mvapich = {name.replace("OMPI", "MV2"): value for name, value in OMPI.items()}
    assert ranks(**of_mvapich, MV2_COMM_WORLD_LOCAL_SIZE="4") == ("1", "4", "1", "127.0.0.1")


JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[01-03]", "SLURM_NODELIST": "node[01-03]"}
HEAD = JOB | {"SLURM_NTASKS": "6", "SLURM_NNODES": "3"}
"""A task that mpirun forks on its own node."""
FAR = JOB | {"SLURM_NODELIST": "node[02-03]", "SLURM_STEP_NODELIST": "node[02-03]", "SLURM_STEP_ID": "0"}
FAR |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_NODES": "2"}
"""A task of a daemon that mpirun starts with srun, on one of the other two nodes."""


@pytest.mark.parametrize(
    ("launcher", "size"),
    [("OMPI_COMM_WORLD", 6), ("OMPI_COMM_WORLD", 2), ("MV2_COMM_WORLD", 6), ("PMI", 6)],  # PMI, 2: as srun --mpi=pmi2
)
def test_mpirun_tasks_of_all_nodes_agree_on_the_address(launcher, size):
    named = {f"{launcher}_SIZE": str(size), f"{launcher}_LOCAL_SIZE": "1", f"{launcher}_LOCAL_RANK": "0"}
    for variables in (HEAD, HEAD | {"SLURM_STEP_ID": "4294967291"}, FAR):
        found = ranks_of_launcher(named | variables | {f"{launcher}_RANK": "1"})
        assert found == ranks_of_launcher(named | HEAD | {f"{launcher}_RANK": "1"})
        assert found["MASTER_ADDR"] == "node01"


def test_srun_tasks_with_pmi_use_the_nodes_of_their_step():
    step = SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}
    assert ranks(**step) == ranks(**SRUN) == ("5", "8", "1", "node03")
    assert ranks(**step | {"SLURM_STEP_NUM_NODES": "1"})[3] == "127.0.0.1"
    assert ranks_of_launcher(step)["MASTER_PORT"] == ranks_of_launcher(SRUN)["MASTER_PORT"]


def test_one_of_several_tasks_never_runs_alone():
    flux = {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_TASK_LOCAL_ID": "1", "MASTER_ADDR": "n1"}
    found = ranks_of_launcher(flux)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "1")
    for environment, sentence in (
        ({"WORLD_SIZE": "2"}, "RANK must be set if WORLD_SIZE is 2"),
        ({"PMIX_RANK": "1"}, "PMIX_SIZE, the number of tasks, must be set if PMIX_RANK is"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ranks_of_launcher(environment)
    assert ranks_of_launcher({"WORLD_SIZE": "1"}) == {}


def test_unknown_nodes_require_master_addr(tmp_path):
    several = OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ValueError, match=r"MASTER_ADDR must be set if OMPI_COMM_WORLD_SIZE is 4"):
        ranks_of_launcher(several)
    of_pals = {"PMI_RANK": "3", "PMI_SIZE": "4", "PALS_LOCAL_RANKID": "1"}
    # 127.0.0.1 would be another host on each node
    for unknown in (of_pals, OMPI, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}):
        with pytest.raises(ValueError, match=r"MASTER_ADDR must be set if \w+ is \d and no variable names"):
            ranks_of_launcher(unknown)
    assert "MASTER_ADDR" not in ranks_of_launcher(several | {"MASTER_ADDR": "head", "MASTER_PORT": "1"})
    (tmp_path / "nodes").write_text("alpha\nbeta\n")
    assert ranks(**several, PBS_NODEFILE=str(tmp_path / "nodes"))[3] == "alpha"


def test_a_task_with_one_visible_gpu_uses_it():
    assert ranks(**SRUN, CUDA_VISIBLE_DEVICES="3")[2] == "0"
    assert ranks(**SRUN, CUDA_VISIBLE_DEVICES="2,3")[2] == "1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "2", **SRUN},
        {"RANK": "0", "WORLD_SIZE": "1", **OMPI},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # a notebook in an allocation
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_SUBMIT_DIR": "/home"},
        SRUN | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "8"},  # the shell of salloc
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=range(9),
)
def test_nothing_is_set_for_torchrun_or_a_single_process(environment):
    assert ranks_of_launcher(environment) == {}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PMI_RANK": "0"}, "PMI_SIZE, the number of tasks, must be set if PMI_RANK is"),
        (OMPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK must be from 0 to 3, got 4"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID must be a number, got 'x'"),
        (SRUN | {"SLURM_STEP_NODELIST": "["}, "The Slurm node list must look like"),
    ],
)
def test_invalid_launcher_variables_raise(environment, message):
    with pytest.raises(ValueError, match=message):
        ranks_of_launcher(environment)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node[01-03,7]", "node01"),
        ("node[7,01-03],login", "node7"),
        ("login,node[01-03]", "login"),
        ("a", "a"),
        ("gpu-a100-[003-004].cluster", "gpu-a100-003.cluster"),
        ("rack[1-2]n[05,09]", "rack1n05"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(node_list, host):
    assert first_host(node_list) == host


JOIN = """
import torch, torch.distributed as dist
from titan_parallel import init_distributed
init_distributed("cpu", timeout_s={timeout_s})
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
print(dist.get_world_size(), int(total), flush=True)
"""


def start(timeout_s: float = 300, **variables: str) -> subprocess.Popen:
    others = ("SLURM_", "OMPI_", "MV2_", "PMI_", "RANK", "WORLD_SIZE", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    command = [sys.executable, "-c", JOIN.format(timeout_s=timeout_s)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment | variables, stdout=pipe, stderr=pipe, text=True)


def test_srun_tasks_join_and_a_shell_of_the_job_runs_alone(tmp_path):
    task = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    tasks = [start(**task, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")]
    shell = start(SLURM_NTASKS="2", SLURM_JOB_ID="1")
    assert [process.communicate()[0] for process in [*tasks, shell]] == ["2 3\n", "2 3\n", "1 1\n"]


def test_missing_ranks_raise_a_timeout_error():
    environment = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
    environment |= {"MASTER_PORT": str(10_000 + os.getpid() % 20_000)}
    said = start(timeout_s=1, **environment).communicate()[1]
    assert "All 2 ranks must join at 127.0.0.1" in said
    assert "within 1 s, but rank 0 could not" in said


def test_a_single_process_in_a_job_of_several_tasks_warns_once():
    environment = {"SLURM_NTASKS": "7", "SLURM_SUBMIT_DIR": "/", "SLURM_PROCID": "0"}
    code = "from titan_parallel import adopt_launcher; adopt_launcher(); adopt_launcher()"
    environment = {"PATH": os.environ["PATH"]} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.count("The Slurm job has 7 tasks") == 1, done.stderr
