"""The communication of a step: number and bytes of collectives, by kind and by axis of the mesh."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from titan_parallel._torch.tracing import group_of
from titan_parallel.mesh.parallel_dims import AXES, ParallelDims

KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "send": "send",
    "recv_": "receive",
}
"""operator of c10d or of the functional collectives -> kind"""

Key = tuple[str, str]
"""(axis, kind)"""


class Traffic:
    """Counts of collectives over more than one rank, and their bytes: the larger of input and output on this rank."""

    def __init__(self, dims: ParallelDims) -> None:
        self._dims = dims
        self.calls: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()
        self._axis_of = functools.cache(self._find_axis)

    def operator_ran(self, name: str, arguments: Any, output: Any) -> None:
        """Count an operator of a c10d namespace, if it is a collective."""
        if name not in KINDS:
            return
        group = group_of(pytree.tree_leaves(arguments))
        if group.size() == 1:
            return
        key = self._axis_of(group), KINDS[name]
        self.calls[key] += 1
        sides = arguments[:1] if isinstance(arguments[0], list) else (*arguments[:2], output)
        self.bytes[key] += max(_num_bytes(side) for side in sides)

    def _find_axis(self, group: dist.ProcessGroup) -> str:
        """Return the axes of the mesh along which the coordinates of the ranks of `group` differ, joined by " x "."""
        coordinates = [self._dims.coordinate_of(rank) for rank in dist.get_process_group_ranks(group)]
        return " x ".join(
            axis for axis, indices in zip(AXES, zip(*coordinates, strict=True), strict=True) if len({*indices}) > 1
        )


def _num_bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
