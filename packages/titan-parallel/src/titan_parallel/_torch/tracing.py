"""Private torch APIs of the dry run: fake process groups, fake tensors, and kernels that only compute shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def join_fake_ranks(rank: int, world_size: int) -> None:
    """Join a fake process group as `rank` of `world_size`: collectives return at once and receive nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


@contextmanager
def stages_of_given_shapes() -> Iterator[None]:
    """Make pipeline stages use the shapes they are given; from torch 2.13 on ranks vote on them in their first step."""
    from torch.distributed.pipelining import schedules

    base: Any = schedules._PipelineSchedule
    replacements = {"_warmup_p2p": _trust_shapes} if hasattr(base, "_warmup_p2p") else {}
    with _replaced_attributes(base, **replacements):
        yield


def _trust_shapes(_schedule: Any, stages: list[Any], *_options: Any) -> None:
    from torch.distributed.pipelining.stage import InferenceMode  # type: ignore[attr-defined]

    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


def fake_tensors() -> Any:
    """Return a mode under which tensors have shapes and no memory; real tensors, such as constants, are allowed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def unrecorded_dtensor_shapes() -> Iterator[None]:
    """Hide DTensor's shape propagation from the recorder: its full-size tensors are in no rank's memory."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.utils._python_dispatch import _disable_current_modes

    find = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate_unrecorded(self: ShardingPropagator, op_schema: Any) -> Any:
        with _disable_current_modes():
            return find(self, op_schema)

    with _replaced_attributes(ShardingPropagator, _propagate_tensor_meta_non_cached=propagate_unrecorded):
        yield


def in_backward() -> bool:
    """Return whether autograd is running a backward."""
    return torch._C._current_graph_task_id() != -1


def group_of(arguments: list[Any]) -> dist.ProcessGroup:
    """Return the process group of a collective op: its first ScriptObject argument, or else its last string."""
    objects = [argument for argument in arguments if isinstance(argument, torch.ScriptObject)]
    if objects:
        return dist.ProcessGroup.unbox(objects[0])
    names = [argument for argument in arguments if isinstance(argument, str)]
    return dist.distributed_c10d._resolve_process_group(names[-1])  # type: ignore[attr-defined, arg-type]


@contextmanager
def flex_attention_on_fake_tensors() -> Iterator[None]:
    """Let flex attention run on fake tensors, forward and backward.

    Flash attention stands in for the kernel: both save the same tensors for the backward.
    """
    from torch.nn.attention import flex_attention

    with _replaced_attributes(
        flex_attention,
        _FLEX_ATTENTION_DISABLE_COMPILE_DEBUG=True,
        _validate_device=lambda query, key, value: None,
        flex_attention_hop=_flash_attention,
        create_mask=_mask_without_memory,
    ):
        yield


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, _score: Any, _mask: Any, scale: float, *_options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Run flash attention in place of the flex kernel.

    Flash attention needs queries, keys and values of the same head width. If the width of values differs, the mean of
    the two widths gives the same number of FLOPs.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    width, value_width = (query.size(-1) + value.size(-1)) // 2, value.size(-1)
    query, key, value = (_of_width(x, width) for x in (query, key, value))
    output, log_sum_exp = flash(query, key, value, 0.0, query.size(-2) == key.size(-2), scale=scale)
    return _of_width(output, value_width), log_sum_exp, query.new_empty(())


def _of_width(x: Tensor, width: int) -> Tensor:
    """Return `x` with its last dim cut or padded to `width`; `x` itself if it has that width."""
    if x.size(-1) == width:
        return x
    return x.narrow(-1, 0, width) if x.size(-1) > width else torch.nn.functional.pad(x, (0, width - x.size(-1)))


def _mask_without_memory(
    _function: Any, batch: int | None, heads: int | None, queries: int, keys: int, device: str = "cpu"
) -> Tensor:
    """Return an expanded scalar: the compiled `create_block_mask` never materializes the dense mask."""
    return torch.zeros((), dtype=torch.bool, device=device).expand(batch or 1, heads or 1, queries, keys)


@contextmanager
def reported_resizes(resized: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Call `resized(storage)` after each resize of a storage, by which FSDP2 frees gathered weights."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        resized(storage)
        return result

    with _replaced_attributes(torch.UntypedStorage, resize_=resize_):
        yield


@contextmanager
def _replaced_attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of a module or class, and restore them at exit.

    Raises AttributeError for a name that `owner` does not have: another release of torch may have renamed it.
    """
    if missing := [name for name in values if not hasattr(owner, name)]:
        raise AttributeError(
            f"{owner.__name__} must have the private attribute {missing[0]}, got torch {torch.__version__} without it. "
            "The dry run replaces it; it was tried with torch 2.11 and 2.13."
        )
    originals = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in originals:
                setattr(owner, name, originals[name])
            else:  # inherited
                delattr(owner, name)
