"""The same run on any mesh: gradients, gradient norm and losses equal those of a plain loop in one process."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from titan_parallel import (
    Compile,
    EveryNthBlock,
    FullRecompute,
    MixedPrecision,
    ParallelDims,
    SelectiveRecompute,
    cross_entropy,
    parallelize,
)
from titan_parallel.testing import check_same_gradients, full_gradients
from torch.utils.checkpoint import checkpoint

MESHES = {
    "fsdp2": (2, {}),
    "ddp2": (2, {"data_parallel_replicate_degree": 2}),
    "tp2": (2, {"tensor_parallel_degree": 2, "sequence_parallel": False, "loss_parallel": False}),
    "tp2_lp": (2, {"tensor_parallel_degree": 2, "sequence_parallel": False}),
    "tp2_sp": (2, {"tensor_parallel_degree": 2, "loss_parallel": False}),
    "tp2_sp_lp": (2, {"tensor_parallel_degree": 2}),
    "fsdp4": (4, {}),
    "hsdp2x2": (4, {"data_parallel_replicate_degree": 2}),
    "fsdp2_tp2": (4, {"tensor_parallel_degree": 2}),
    "ddp2_tp2": (4, {"tensor_parallel_degree": 2, "data_parallel_replicate_degree": 2}),
}
RECOMPUTATIONS = {
    "none": None,
    "full": FullRecompute.Config(),
    "selective": SelectiveRecompute.Config(),
    "every_2nd": EveryNthBlock.Config(n=2),
}


def chunked_loss(head, hidden, targets):
    """As a trainer takes it: logits in two chunks, each made again in the backward."""

    def chunk_loss(hidden_ND, labels_N):
        return cross_entropy(head(hidden_ND), labels_N)

    labels = targets["labels"].flatten()
    chunks = zip(hidden.flatten(0, -2).chunk(2), labels.chunk(2), strict=True)
    return sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks), (labels != -100).sum()


@dataclass(frozen=True)
class Case:
    mesh: str
    recomputation: str = "none"
    dtype: torch.dtype = torch.float64
    micro_batches: int = 1
    shape: dict = field(default_factory=dict, hash=False)
    options: dict = field(default_factory=dict, hash=False)


def micro_batches(batch, dims, number):
    rows = len(batch.targets["labels"]) // dims.num_data_ranks
    first, step = dims.data_rank * rows, rows // number
    return [batch.rows(first + i * step, first + (i + 1) * step) for i in range(number)]


def run_case(small, case: Case):
    """None, or what went wrong on this rank."""
    world_size, degrees = MESHES[case.mesh]
    model = small.make_model(small.Shape(**case.shape), case.dtype)
    vocab = model.head.weight.size(0)
    batch = small.make_batch(vocab=vocab)
    expected_loss, expected, count = small.plain_step(model, batch)
    dims = ParallelDims.Config(**degrees).build(world_size=world_size, device_type="cpu")
    names = [name for name, _ in model.named_parameters()]
    parallel = parallelize(
        model, small.ROLES, dims, activation_checkpoint=RECOMPUTATIONS[case.recomputation], **case.options
    )
    assert [name for name, _ in model.named_parameters()] == names
    batches = micro_batches(batch, dims, case.micro_batches)
    loss = parallel.forward_backward(batches, chunked_loss, count)
    check_same_gradients(full_gradients(model), expected)
    rtol = 1e-11 if case.dtype is torch.float64 else 1e-6
    torch.testing.assert_close(loss, expected_loss.double(), rtol=rtol, atol=0)
