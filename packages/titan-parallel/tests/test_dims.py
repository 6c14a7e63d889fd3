"""The device mesh: its degrees, its views, and the errors of invalid degrees."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from titan_config import ConfigError
from titan_parallel import ParallelDims


def build(world_size, **degrees):
    return ParallelDims.Config(**degrees).build(world_size=world_size, device_type="cpu")


def test_mesh_axes_and_the_data_group(run_ranks):
    def views():
        dims = build(4, data_parallel_replicate_degree=2, tensor_parallel_degree=2)
        one = torch.ones(1)
        dist.all_reduce(one, group=dims.data_group)
        members = dist.get_process_group_ranks(dims.data_group)
        return dims.mesh.mesh_dim_names, dims.dp_size, dims.dp_rank, int(one), members, dims.tp_mesh.size()

    seen = run_ranks(4, views)
    assert [view[2] for view in seen] == [0, 0, 1, 1]
    assert [view[4] for view in seen] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    for axes, dp_size, _, summed, _, tp_size in seen:
        assert axes == ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        assert (dp_size, summed, tp_size) == (2, 2, 2)


def test_the_data_group_spans_replicas_and_shards(run_ranks):
    def members():
        dims = build(4, data_parallel_replicate_degree=2)
        return dims.dp_rank, dist.get_process_group_ranks(dims.data_group), dims.dp_replicate_size, dims.dp_shard_size

    for rank, (dp_rank, ranks, dp_replicate_size, dp_shard_size) in enumerate(run_ranks(4, members)):
        assert (dp_rank, ranks, dp_replicate_size, dp_shard_size) == (rank, [0, 1, 2, 3], 2, 2)


def test_the_data_group_without_data_parallelism_is_one_rank(run_ranks):
    def summed():
        one = torch.ones(1)
        dist.all_reduce(one, group=build(2, tensor_parallel_degree=2).data_group)
        return float(one)

    assert run_ranks(2, summed) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("world_size", "degrees", "says"),
    [
        (4, {"tensor_parallel_degree": 8}, r"must divide the number of ranks \(4\), got 8\. Use 1, 2 or 4\."),
        (6, {"tensor_parallel_degree": 4}, r"tensor_parallel_degree must divide .* got 4\. Use 1, 2, 3 or 6\."),
        (1, {"tensor_parallel_degree": 2}, r"tensor_parallel_degree must divide .* got 2\. Use 1\."),
        (
            8,
            {"tensor_parallel_degree": 2, "data_parallel_replicate_degree": 3},
            r"number of remaining ranks \(8 / tensor_parallel_degree 2 = 4\), got 3\. Use 1, 2 or 4\.",
        ),
        (4, {"data_parallel_shard_degree": 3}, r"ranks \(4\), got .*degree 3 = 3\..* to 4 or .*start 3 ranks"),
        (4, {"data_parallel_shard_degree": 0}, r"data_parallel_shard_degree must be at least 1, got 0\."),
        (4, {"tensor_parallel_degree": -2}, r"tensor_parallel_degree must be at least 1, got -2\."),
    ],
)
def test_invalid_degrees_raise_with_the_valid_ones(world_size, degrees, says):
    with pytest.raises(ConfigError, match=says):
        build(world_size, **degrees)


def test_a_mesh_without_a_process_group_raises():
    with pytest.raises(RuntimeError, match=r"world_size must be .* \(not initialized\), got 2\..*init_distributed"):
        build(2)
