"""Parallel degrees, and the device mesh that follows from them."""

from __future__ import annotations

import copy
import functools
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from titan_config import ConfigError, Configurable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_parallel._torch.distributed import backend_of_axes, concatenate, default_group, flatten
from titan_parallel.mesh.rank_consistency import RankConsistencyCheck, host_device_type

# The order of the axes, slowest first: neighboring ranks exchange most. (Expert parallelism will be a second view of
# the same ranks.)
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DEGREES = (
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "context_parallel_degree",
    "data_parallel_replicate_degree",
)
"""The degrees that the user sets; `data_parallel_shard_degree` defaults to the remaining ranks."""


class ParallelDims(Configurable):
    """The degree of each kind of parallelism, and the device mesh with these axes."""

    class Config(Configurable.Config):
        data_parallel_replicate_degree: int = 1
        """Number of replicas of each weight shard (DDP; HSDP with shards). Replicas process different samples."""
        data_parallel_shard_degree: int | None = None
        """Number of ranks to shard weights, gradients and optimizer state over (FSDP). None: all remaining ranks."""
        tensor_parallel_degree: int = 1
        """Number of ranks that each matrix product is split over."""
        pipeline_parallel_degree: int = 1
        """Number of ranks that the stack of blocks is split over, in pipeline stages."""
        pipeline_parallel_schedule: Literal[
            "GPipe",
            "1F1B",
            "Interleaved1F1B",
            "LoopedBFS",
            "InterleavedZeroBubble",
            "ZBVZeroBubble",
            "DualPipeV",
        ] = "1F1B"
        """Order in which the stages run the forwards and backwards of micro-batches."""
        pipeline_parallel_schedule_csv: Path | None = None
        """CSV file of a custom schedule in torch's format; replaces `pipeline_parallel_schedule`."""
        pipeline_parallel_stages_per_rank: int | None = None
        """Number of stages per rank. None: the default of the schedule (2 for interleaved and V schedules, else 1)."""
        pipeline_parallel_splits: list[str] = []
        """Names of the blocks at which the second, third, ... stage begins. Empty: balance the cost of the stages."""
        context_parallel_degree: int = 1
        """Number of ranks that the tokens of each sequence are split over."""
        context_parallel_method: Literal["gather", "ulysses", "ring"] = "gather"
        """Attention over all ranks: all-gather keys and values, all-to-all tokens to heads (Ulysses), or ring."""
        context_parallel_load_balance: bool = True
        """Give each context-parallel rank an early and a late part of a sequence: equal work under causal masks."""
        sequence_parallel: bool | None = None
        """With tensor parallelism, shard the residual stream along the sequence between regions. None: if possible."""
        loss_parallel: bool = True
        """With tensor parallelism, compute the loss on logits that stay sharded over the vocabulary."""
        fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
        """Free gathered weights between forward and backward. "default": all except those of the head."""
        fsdp_reduce_gradients: Literal["always", "once"] = "always"
        """Reduce after each micro-batch (a rank keeps only its shard), or once per step, as pipelines always do."""

    @staticmethod
    def count_data_ranks(config: Config, world_size: int) -> int:
        """Return `dp_size` on `world_size` ranks, without a process group. Raises ConfigError as `build` does."""
        return config.data_parallel_replicate_degree * shard_degree(config, world_size)

    def __init__(self, config: Config, *, world_size: int, device_type: str) -> None:
        self.config = config
        self.world_size = world_size
        self.device_type = device_type
        with RankConsistencyCheck("build a mesh", host_device_type(device_type)) as consistency:
            consistency.on("degrees", f"{config!r} on {world_size} ranks of {device_type}")
            self.dp_shard_size = shard_degree(config, world_size)
            _require_group(world_size)
        self.pp_size = config.pipeline_parallel_degree
        self.dp_replicate_size = config.data_parallel_replicate_degree
        self.cp_size = config.context_parallel_degree
        self.tp_size = config.tensor_parallel_degree
        self.sequence_parallel = config.sequence_parallel is not False and self.tp_size > 1
        """Sequence parallelism is on. With None in the config this is preliminary: `parallelize` decides."""
        self.loss_parallel = config.loss_parallel and self.tp_size > 1
        self.mesh: DeviceMesh = _mesh(
            default_group(),
            device_type,
            (self.pp_size, self.dp_replicate_size, self.dp_shard_size, self.cp_size, self.tp_size),
        )
        self.data_group: dist.ProcessGroup = _along(self.mesh, "dp_replicate", "dp_shard").get_group()
        """The data-parallel group of this rank: ranks that differ only in `dp_rank`. A single rank has a group too."""

    def without_sequence_parallel(self) -> ParallelDims:
        """Return the same mesh with `sequence_parallel` off."""
        _ = self.fsdp_mesh  # created once, for both
        dims = copy.copy(self)
        dims.sequence_parallel = False
        return dims

    @property
    def dp_size(self) -> int:
        """The number of data-parallel ranks, over which a global batch is split."""
        return self.dp_replicate_size * self.dp_shard_size

    @property
    def dp_rank(self) -> int:
        """The index, from 0 to `dp_size` - 1, of this rank's part of the global batch."""
        return self.mesh.get_local_rank("dp_replicate") * self.dp_shard_size + self.mesh.get_local_rank("dp_shard")

    def coordinate_of(self, rank: int) -> tuple[int, ...]:
        """Return the coordinate of any rank on the five axes, the slowest first."""
        sizes = (self.pp_size, self.dp_replicate_size, self.dp_shard_size, self.cp_size, self.tp_size)
        place = []
        for size in reversed(sizes):
            rank, index = divmod(rank, size)
            place.append(index)
        return tuple(reversed(place))

    @property
    def ranks_of_dp_rank(self) -> list[int]:
        """The ranks that receive the same batches as this rank, itself included."""
        axes = tuple(slice(None) if axis in ("pp", "cp", "tp") else self.mesh.get_local_rank(axis) for axis in AXES)
        return self.mesh.mesh[axes].flatten().tolist()

    @property
    def tp_mesh(self) -> DeviceMesh:
        """The tensor-parallel ranks of this rank."""
        return self.mesh["tp"]

    @property
    def cp_mesh(self) -> DeviceMesh:
        """The context-parallel ranks of this rank, which hold the other tokens of its sequences."""
        return self.mesh["cp"]

    @property
    def pp_mesh(self) -> DeviceMesh:
        """The pipeline-parallel ranks of this rank, which hold the other stages for its samples."""
        return self.mesh["pp"]

    @cached_property
    def fsdp_mesh(self) -> DeviceMesh:
        """The mesh for `fully_shard`: one axis to shard over, or two, of which the first replicates (HSDP).

        Context-parallel ranks hold the same weights, as data-parallel ranks do, so weights are sharded over both.
        """
        shard = _along(self.mesh, "dp_shard", "cp")
        return shard if self.dp_replicate_size == 1 else concatenate(self.mesh["dp_replicate"], shard)


@functools.cache
def _mesh(world: dist.ProcessGroup, device_type: str, degrees: tuple[int, ...]) -> DeviceMesh:
    """Return a cached mesh for each shape, since every process group starts threads.

    On CPU an axis with all ranks still gets a group of its own, not the default group: see `backend_of_axes`.
    """
    backend = backend_of_axes(device_type)
    backends: dict[int | str, Any] = {
        axis: backend for axis, size in zip(AXES, degrees, strict=True) if backend and size > 1
    }
    return init_device_mesh(device_type, degrees, mesh_dim_names=AXES, backend_override=backends)


def _along(mesh: DeviceMesh, outer: str, inner: str) -> DeviceMesh:
    """Return two axes flattened into one."""
    if mesh[outer].size() > 1 and mesh[inner].size() > 1:
        return flatten(mesh[outer, inner])
    return mesh[inner] if mesh[outer].size() == 1 else mesh[outer]


def shard_degree(config: ParallelDims.Config, world_size: int) -> int:
    """Return the number of ranks to shard weights over: `world_size` over the product of the other degrees.

    Raises ConfigError for degrees below 1, and for degrees whose product cannot be `world_size`.
    """
    for name in (*DEGREES, "data_parallel_shard_degree", "pipeline_parallel_stages_per_rank"):
        degree = getattr(config, name)
        if degree is not None and degree < 1:
            raise ConfigError(f"{name} must be at least 1, got {degree}.")
    remaining, quotient = world_size, str(world_size)
    for name in DEGREES:
        degree = getattr(config, name)
        _require_divides(name, degree, remaining, quotient)
        remaining //= degree
        if degree > 1:
            quotient += f" / {name} {degree}"
    shard = config.data_parallel_shard_degree
    if shard is not None and shard != remaining:
        product = shard * world_size // remaining
        degrees = " x ".join(f"{name} {getattr(config, name)}" for name in DEGREES if getattr(config, name) > 1)
        raise ConfigError(
            f"The product of the parallel degrees must be the number of ranks ({world_size}), got "
            f"data_parallel_shard_degree {shard}{f' x {degrees}' if degrees else ''} = {product}. Set "
            f"data_parallel_shard_degree to {remaining} or None, or start {product} ranks."
        )
    return remaining


def _require_divides(name: str, degree: int, num_ranks: int, quotient: str) -> None:
    if num_ranks % degree:
        possible = [str(divisor) for divisor in range(1, num_ranks + 1) if num_ranks % divisor == 0]
        ranks = f"remaining ranks ({quotient} = {num_ranks})" if "/" in quotient else f"ranks ({num_ranks})"
        raise ConfigError(f"{name} must divide the number of {ranks}, got {degree}. Use {one_of(possible)}.")


def _require_group(world_size: int) -> None:
    joined = dist.get_world_size() if dist.is_initialized() else 0
    if joined != world_size:
        raise RuntimeError(
            f"world_size must be the size of the default process group ({joined or 'not initialized'}), got "
            f"{world_size}. Call titan_parallel.init_distributed() first, and pass "
            "world_size=torch.distributed.get_world_size()."
        )


def one_of(choices: list[str]) -> str:
    """Return the choices as text: "1, 2 or 4"."""
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
