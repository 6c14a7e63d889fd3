"""Private APIs of torch.distributed.pipelining that this package uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from torch.distributed.pipelining.schedules import _Action as Action
from torch.distributed.pipelining.schedules import _add_send_recv, _PipelineScheduleRuntime, _validate_schedule

__all__ = [
    "Action",
    "NumberedStage",
    "parse_action",
    "reduce_gradients",
    "schedule_of_actions",
    "stage_ranks",
    "validate_actions",
]


class NumberedStage(PipelineStage):
    """A `PipelineStage` that sets `module.micro_batch` to the index of the micro-batch before each forward."""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.submod.__dict__["micro_batch"] = fwd_chunk_id
        try:
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        except RuntimeError as error:  # torch wraps the model's exception in one that has few details
            raise error.__cause__ or error from None

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Drop the P2P warm-up ops from a rank to itself (torch 2.11, V schedules), which gloo rejects."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def parse_action(text: str) -> Action | None:
    """Parse a cell of a schedule's CSV: `0F1` is stage 0, forward, micro-batch 1; an empty cell (idle) is None."""
    return Action.from_str(text)


def stage_ranks(num_ranks: int, num_stages: int, layout: str) -> tuple[int, ...]:
    """Return the rank of each stage: layout "loop" starts again at rank 0, layout "v" turns back at the last rank."""
    ranks = generate_stage_to_rank_mapping(num_ranks, num_stages, layout)
    return tuple(ranks[stage] for stage in range(num_stages))


def validate_actions(
    actions: dict[int, list[Action | None]], num_ranks: int, num_stages: int, num_micro_batches: int
) -> dict[int, int]:
    """Return the rank of each stage. Raises AssertionError for an invalid schedule and for one that deadlocks."""
    ranks = _validate_schedule(actions, num_ranks, num_stages, num_micro_batches)
    to_do = {rank: [action for action in own if action is not None] for rank, own in actions.items()}
    _add_send_recv(to_do, lambda stage: ranks[stage], num_stages)
    return ranks


def schedule_of_actions(
    actions: Sequence[list[Action | None]],
    stages: Sequence[PipelineStage],
    num_micro_batches: int,
    loss: Callable[..., Tensor],
) -> Any:
    """Return a schedule that runs these actions of each rank; torch adds the sends and receives."""
    schedule = _PipelineScheduleRuntime(list(stages), num_micro_batches, loss_fn=loss, scale_grads=False)
    schedule._prepare_schedule_with_comms(dict(enumerate(actions)))
    return schedule


def reduce_gradients(root: FSDPModule) -> None:
    """Reduce the gradients that the FSDP units below `root` have accumulated, as after their last backward.

    torch's stages do the same at the end of a step; this is for a root that several stages share.
    """
    stage: Any = SimpleNamespace(submod=root)
    PipelineStage.perform_reduce_grad(stage, 1)
