"""Gather sharded tensors and gradients on every rank."""

from __future__ import annotations

from torch import Tensor, nn

from titan_parallel._torch.distributed import is_dtensor


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return `{parameter name: full gradient}`. A collective: every rank of the mesh must call it and gets all."""
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    """Return a full copy of a tensor that may be sharded. A collective: every rank of its mesh must call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if is_dtensor(tensor) else tensor).clone()  # type: ignore[attr-defined]
