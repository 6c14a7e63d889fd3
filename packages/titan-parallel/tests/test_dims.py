"""The mesh: its degrees, its views, and what is said of degrees that do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from titan_config import ConfigError
from titan_parallel import ParallelDims


def build(world_size, **degrees):
    return ParallelDims.Config(**degrees).build(world_size=world_size, device_type="cpu")


def test_axes_keep_their_order_and_data_ranks_their_groups(run_ranks):
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


def test_a_group_of_data_ranks_spans_replicas_and_shards(run_ranks):
    def members():
        dims = build(4, data_parallel_replicate_degree=2)
        return dims.dp_rank, dist.get_process_group_ranks(dims.data_group), dims.dp_replicate_size, dims.dp_shard_size

    for rank, (dp_rank, ranks, dp_replicate_size, dp_shard_size) in enumerate(run_ranks(4, members)):
        assert (dp_rank, ranks, dp_replicate_size, dp_shard_size) == (rank, [0, 1, 2, 3], 2, 2)


def test_the_data_group_of_tensor_parallel_ranks_is_each_rank_alone(run_ranks):
    def summed():
        one = torch.ones(1)
        dist.all_reduce(one, group=build(2, tensor_parallel_degree=2).data_group)
        return float(one)

    assert run_ranks(2, summed) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("world_size", "degrees", "says"),
    [
        (4, {"tensor_parallel_degree": 8}, r"Got tensor_parallel_degree 8 on 4 ranks\..*Set .* to 1, 2 or 4\."),
        (6, {"tensor_parallel_degree": 4}, r"Set tensor_parallel_degree to 1, 2, 3 or 6\."),
        (1, {"tensor_parallel_degree": 2}, r"Set tensor_parallel_degree to 1\."),
        (
            8,
            {"tensor_parallel_degree": 2, "data_parallel_replicate_degree": 3},
            r"on 4 ranks \(what is left of 8 ranks by tensor_parallel_degree 2\).* to 1, 2 or 4\.",
        ),
        (4, {"data_parallel_shard_degree": 3}, r"degree 3 = 3 on 4 ranks.* to 4 \(or None.*start 3 ranks"),
        (4, {"data_parallel_shard_degree": 0}, r"Got data_parallel_shard_degree 0\."),
        (4, {"tensor_parallel_degree": -2}, r"Got tensor_parallel_degree -2\."),
    ],
)
def test_degrees_that_do_not_fit_say_which_would(world_size, degrees, says):
    with pytest.raises(ConfigError, match=says):
        build(world_size, **degrees)


def test_a_mesh_before_its_process_group_is_refused():
    with pytest.raises(RuntimeError, match=r"Got a mesh of 2 ranks in a process group of 0\..*init_distributed"):
        build(2)
