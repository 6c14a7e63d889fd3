"""The device mesh of a run and its views."""

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

# The order of the axes, slowest first: ranks next to each other exchange most. (Experts will be a second view of the
# same ranks.)
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DEGREES = (
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "context_parallel_degree",
    "data_parallel_replicate_degree",
)
"""The fields of ParallelDims.Config that are stated; `data_parallel_shard_degree` takes what they leave."""


class ParallelDims(Configurable):
    """How many ways each kind of parallelism splits a run, and the mesh that follows."""

    class Config(Configurable.Config):
        data_parallel_replicate_degree: int = 1
        """Ranks that hold the same part of the weights and see other samples."""
        data_parallel_shard_degree: int | None = None
        """Ranks over which weights, gradients and optimizer state are split. None: all ranks that are left."""
        tensor_parallel_degree: int = 1
        """Ranks that share the work of each matrix product."""
        pipeline_parallel_degree: int = 1
        """Ranks that hold one after the other part of the stack."""
        pipeline_parallel_schedule: Literal[
            "GPipe",
            "1F1B",
            "Interleaved1F1B",
            "LoopedBFS",
            "InterleavedZeroBubble",
            "ZBVZeroBubble",
            "DualPipeV",
        ] = "1F1B"
        """In which order stages run micro-batches forward and backward."""
        pipeline_parallel_schedule_csv: Path | None = None
        """A schedule of your own in torch's CSV format, in place of the named one."""
        pipeline_parallel_stages_per_rank: int | None = None
        """Stages on each rank. None: what the schedule wants (1, or 2 where stages are interleaved or form a V)."""
        pipeline_parallel_splits: list[str] = []
        """Names of the blocks at which the second, third, ... stage begins. Empty: cut so that stages cost alike."""
        context_parallel_degree: int = 1
        """Ranks that share the tokens of each sequence."""
        context_parallel_method: Literal["gather", "ulysses", "ring"] = "gather"
        """How their queries meet all keys: keys are gathered, tokens exchanged for heads, or keys sent round a ring."""
        context_parallel_load_balance: bool = True
        """Give each context rank an early and a late part of a sequence: equal work under causal masks."""
        sequence_parallel: bool | None = None
        """Under tensor parallel, split the residual stream over the sequence between regions. None: where it can be."""
        loss_parallel: bool = True
        """Under tensor parallel, take the loss on logits that stay split over the vocabulary."""
        fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
        """Whether gathered weights are freed between forward and backward. Default: all but those of the head."""
        fsdp_reduce_gradients: Literal["always", "once"] = "always"
        """After each micro-batch, so that a rank keeps its part alone, or with a step's last one. Stages: once."""

    @staticmethod
    def count_data_ranks(config: Config, world_size: int) -> int:
        """Into how many parts a global batch is split on `world_size` ranks. Raises ConfigError as `build` does."""
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
        """Whether it is on; `parallelize` decides where the config says None."""
        self.loss_parallel = config.loss_parallel and self.tp_size > 1
        self.mesh: DeviceMesh = _mesh(
            default_group(),
            device_type,
            (self.pp_size, self.dp_replicate_size, self.dp_shard_size, self.cp_size, self.tp_size),
        )
        self.data_group: dist.ProcessGroup = _along(self.mesh, "dp_replicate", "dp_shard").get_group()
        """The ranks that see other samples, and are alike in all else; never None, also for a rank alone."""

    def without_sequence_parallel(self) -> ParallelDims:
        """Return the same mesh for a model whose stream is not split over the sequence."""
        _ = self.fsdp_mesh  # made once, for both
        dims = copy.copy(self)
        dims.sequence_parallel = False
        return dims

    @property
    def dp_size(self) -> int:
        """Into how many parts a global batch is split."""
        return self.dp_replicate_size * self.dp_shard_size

    @property
    def dp_rank(self) -> int:
        """Which part of the global batch is this rank's."""
        return self.mesh.get_local_rank("dp_replicate") * self.dp_shard_size + self.mesh.get_local_rank("dp_shard")

    def coordinate_of(self, rank: int) -> tuple[int, ...]:
        """The place of any rank on the five axes, the slowest first."""
        sizes = (self.pp_size, self.dp_replicate_size, self.dp_shard_size, self.cp_size, self.tp_size)
        place = []
        for size in reversed(sizes):
            rank, index = divmod(rank, size)
            place.append(index)
        return tuple(reversed(place))

    @property
    def ranks_of_dp_rank(self) -> list[int]:
        """The ranks that are given the same batches as this one, this one among them."""
        axes = tuple(slice(None) if axis in ("pp", "cp", "tp") else self.mesh.get_local_rank(axis) for axis in AXES)
        return self.mesh.mesh[axes].flatten().tolist()

    @property
    def tp_mesh(self) -> DeviceMesh:
        """The ranks that share each matrix product with this one."""
        return self.mesh["tp"]

    @property
    def cp_mesh(self) -> DeviceMesh:
        """The ranks that share the tokens of each sequence with this one."""
        return self.mesh["cp"]

    @property
    def pp_mesh(self) -> DeviceMesh:
        """The ranks that hold the rest of the stack, for the samples of this one."""
        return self.mesh["pp"]

    @cached_property
    def fsdp_mesh(self) -> DeviceMesh:
        """What `fully_shard` takes: one axis that shards, or two, the first of which replicates.

        Ranks that share a sequence hold the same weights, like those that see other samples, and shard them too.
        """
        shard = _along(self.mesh, "dp_shard", "cp")
        return shard if self.dp_replicate_size == 1 else concatenate(self.mesh["dp_replicate"], shard)


@functools.cache
def _mesh(world: dist.ProcessGroup, device_type: str, degrees: tuple[int, ...]) -> DeviceMesh:
    """One mesh for all who ask for its shape: each of its groups has threads of its own.

    On CPU an axis of all ranks has another group than the default one; see `backend_of_axes`.
    """
    backend = backend_of_axes(device_type)
    backends: dict[int | str, Any] = {
        axis: backend for axis, size in zip(AXES, degrees, strict=True) if backend and size > 1
    }
    return init_device_mesh(device_type, degrees, mesh_dim_names=AXES, backend_override=backends)


def _along(mesh: DeviceMesh, outer: str, inner: str) -> DeviceMesh:
    """Two axes as one."""
    if mesh[outer].size() > 1 and mesh[inner].size() > 1:
        return flatten(mesh[outer, inner])
    return mesh[inner] if mesh[outer].size() == 1 else mesh[outer]


def shard_degree(config: ParallelDims.Config, world_size: int) -> int:
    """Over how many ranks weights are split: what is left, as the product of all degrees is the world size."""
    for name in (*DEGREES, "data_parallel_shard_degree", "pipeline_parallel_stages_per_rank"):
        degree = getattr(config, name)
        if degree is not None and degree < 1:
            raise ConfigError(f"Got {name} {degree}. It is 1 or more. Set {name} to a positive number.")
    left, of = world_size, f"{world_size} ranks"
    for name in DEGREES:
        degree = getattr(config, name)
        _require_divides(name, degree, left, of)
        left //= degree
        if degree > 1:
            of = f"{left} ranks (what is left of {of} by {name} {degree})"
    shard = config.data_parallel_shard_degree
    if shard is not None and shard != left:
        product = shard * world_size // left
        degrees = " x ".join(f"{name} {getattr(config, name)}" for name in DEGREES if getattr(config, name) > 1)
        raise ConfigError(
            f"Got data_parallel_shard_degree {shard}{f' x {degrees}' if degrees else ''} = {product} on {world_size} "
            f"ranks. The product of the degrees is the number of ranks. Set data_parallel_shard_degree to {left} (or "
            f"None: what is left), or start {product} ranks."
        )
    return left


def _require_divides(name: str, degree: int, number: int, of: str) -> None:
    if number % degree:
        possible = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
        raise ConfigError(
            f"Got {name} {degree} on {of}. The product of the degrees is the number of ranks, so each divides it. "
            f"Set {name} to {one_of(possible)}."
        )


def _require_group(world_size: int) -> None:
    joined = dist.get_world_size() if dist.is_initialized() else 0
    if joined != world_size:
        raise RuntimeError(
            f"Got a mesh of {world_size} ranks in a process group of {joined}. The mesh covers the whole group. "
            "Call titan_parallel.init_distributed() first, and build with "
            "world_size=torch.distributed.get_world_size()."
        )


def one_of(choices: list[str]) -> str:
    """The choices as a person lists them: "1, 2 or 4"."""
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
