"""The device mesh of a run and its views."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch.distributed as dist
from titan_config import ConfigError, Configurable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_parallel._torch import flatten

# The order of the axes, slowest first: ranks next to each other exchange most. A pipeline axis comes before all of
# them, a context axis between dp_shard and tp; experts are a second view of the same ranks.
AXES = ("dp_replicate", "dp_shard", "tp")


class ParallelDims(Configurable):
    """How many ways each kind of parallelism splits a run, and the mesh that follows."""

    class Config(Configurable.Config):
        data_parallel_replicate_degree: int = 1
        """Ranks that hold the same part of the weights and see other samples."""
        data_parallel_shard_degree: int | None = None
        """Ranks over which weights, gradients and optimizer state are split. None: all ranks that are left."""
        tensor_parallel_degree: int = 1
        """Ranks that share the work of each matrix product."""
        sequence_parallel: bool = True
        """Under tensor parallel, split the residual stream over the sequence between regions."""
        loss_parallel: bool = True
        """Under tensor parallel, take the loss on logits that stay split over the vocabulary."""
        fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
        """Whether gathered weights are freed between forward and backward. Default: all but those of the head."""

        def validate(self) -> None:
            for name in ("data_parallel_replicate_degree", "data_parallel_shard_degree", "tensor_parallel_degree"):
                degree = getattr(self, name)
                if degree is not None and degree < 1:
                    raise ConfigError(
                        f"Got {name} {degree}. A degree is 1 (off) or more. Set {name} to a positive number."
                    )

    def __init__(self, config: Config, *, world_size: int, device_type: str) -> None:
        self.config = config
        self.world_size = world_size
        self.device_type = device_type
        self.num_replicate, self.num_shard, self.num_tensor = _degrees(config, world_size)
        self.sequence_parallel = config.sequence_parallel and self.num_tensor > 1
        self.loss_parallel = config.loss_parallel and self.num_tensor > 1
        _require_group(world_size)
        self.mesh: DeviceMesh = init_device_mesh(
            device_type, (self.num_replicate, self.num_shard, self.num_tensor), mesh_dim_names=AXES
        )
        self.data_group: dist.ProcessGroup = self._data_mesh.get_group()
        """The ranks that see other samples and hold the same part of each matrix; never None, also for a rank alone."""

    @property
    def num_data_ranks(self) -> int:
        """Into how many parts a global batch is split."""
        return self.num_replicate * self.num_shard

    @property
    def data_rank(self) -> int:
        """Which part of the global batch is this rank's."""
        return self.mesh.get_local_rank("dp_replicate") * self.num_shard + self.mesh.get_local_rank("dp_shard")

    @property
    def tp_mesh(self) -> DeviceMesh:
        """The ranks that share each matrix product with this one."""
        return self.mesh["tp"]

    @cached_property
    def fsdp_mesh(self) -> DeviceMesh:
        """What `fully_shard` takes: one axis that shards, or two, the first of which replicates."""
        return self.mesh["dp_shard"] if self.num_replicate == 1 else self.mesh["dp_replicate", "dp_shard"]

    @property
    def _data_mesh(self) -> DeviceMesh:
        if self.num_replicate > 1 and self.num_shard > 1:
            return flatten(self.mesh["dp_replicate", "dp_shard"])
        return self.mesh["dp_shard"] if self.num_replicate == 1 else self.mesh["dp_replicate"]


def _degrees(config: ParallelDims.Config, world_size: int) -> tuple[int, int, int]:
    """(replicate, shard, tensor), whose product is the world size."""
    tensor, replicate, shard = (
        config.tensor_parallel_degree,
        config.data_parallel_replicate_degree,
        config.data_parallel_shard_degree,
    )
    _require_divides("tensor_parallel_degree", tensor, world_size, f"{world_size} ranks")
    data_ranks = world_size // tensor
    of = f"{data_ranks} data ranks ({world_size} ranks / tensor_parallel_degree {tensor})"
    _require_divides("data_parallel_replicate_degree", replicate, data_ranks, of)
    left = data_ranks // replicate
    if shard is not None and shard != left:
        product = replicate * shard * tensor
        raise ConfigError(
            f"Got data_parallel_replicate_degree {replicate} x data_parallel_shard_degree {shard} x "
            f"tensor_parallel_degree {tensor} = {product} on {world_size} ranks. The product of the degrees is the "
            f"number of ranks. Set data_parallel_shard_degree to {left} (or None: what is left), or start {product} "
            "ranks."
        )
    return replicate, left, tensor


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
