"""The private side of torch that planning uses: ranks that are not there, tensors without memory, kernels' shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor


def join_fake_ranks(rank: int, world_size: int) -> None:
    """Be `rank` of `world_size` ranks that are not there: collectives return at once, with nothing received."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


@contextmanager
def pipelines_of_shapes() -> Iterator[None]:
    """Let stages trust the shapes they are given: from torch 2.13 on they vote about that in their first step."""
    from torch.distributed.pipelining import schedules

    base: Any = schedules._PipelineSchedule
    with ExitStack() as stack:
        if "_warmup_p2p" in vars(base):
            stack.enter_context(patch.object(base, "_warmup_p2p", _trust_shapes))
        yield


def _trust_shapes(_schedule: Any, stages: list[Any], *_options: Any) -> None:
    from torch.distributed.pipelining.stage import InferenceMode  # type: ignore[attr-defined]

    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


def fake_tensors() -> Any:
    """While it is entered tensors have shapes and no memory; constants of models may come from outside."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def unwatched_shapes_of_dtensors() -> Iterator[None]:
    """Let DTensor find shapes unseen: the whole tensors it uses, which no rank has, are nobody's memory."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.utils._python_dispatch import _disable_current_modes

    find = ShardingPropagator._propagate_tensor_meta_non_cached

    def find_unseen(self: ShardingPropagator, op_schema: Any) -> Any:
        with _disable_current_modes():
            return find(self, op_schema)

    with patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", find_unseen):
        yield


def in_backward() -> bool:
    """Whether autograd is running a backward."""
    return torch._C._current_graph_task_id() != -1


def group_of(arguments: list[Any]) -> dist.ProcessGroup:
    """The process group of a collective: the first object among its arguments, or the last name."""
    objects = [argument for argument in arguments if isinstance(argument, torch.ScriptObject)]
    if objects:
        return dist.ProcessGroup.unbox(objects[0])
    names = [argument for argument in arguments if isinstance(argument, str)]
    return dist.distributed_c10d._resolve_process_group(names[-1])  # type: ignore[attr-defined, arg-type]


@contextmanager
def flex_attention_of_shapes() -> Iterator[None]:
    """Let flex attention run on tensors without memory, backward too: what it keeps is what flash attention keeps."""
    module = "torch.nn.attention.flex_attention"
    with (
        patch(f"{module}._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
        patch(f"{module}._validate_device", lambda query, key, value: None),
        patch(f"{module}.flex_attention_hop", _flash_attention),
        patch(f"{module}.create_mask", _mask_without_memory),
    ):
        yield


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, _score: Any, _mask: Any, scale: float, *_options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash attention knows heads of one width: others get that of the same products, between their two."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    width, value_width = (query.size(-1) + value.size(-1)) // 2, value.size(-1)
    query, key, value = (_of_width(x, width) for x in (query, key, value))
    output, log_sum_exp = flash(query, key, value, 0.0, query.size(-2) == key.size(-2), scale=scale)
    return _of_width(output, value_width), log_sum_exp, query.new_empty(())


def _of_width(x: Tensor, width: int) -> Tensor:
    """The tensor with a last dim cut or padded to `width`; it itself, where that is its width."""
    if x.size(-1) == width:
        return x
    return x.narrow(-1, 0, width) if x.size(-1) > width else torch.nn.functional.pad(x, (0, width - x.size(-1)))


def _mask_without_memory(
    _function: Any, batch: int | None, heads: int | None, queries: int, keys: int, device: str = "cpu"
) -> Tensor:
    """A compiled mask is made block by block: the dense one never exists."""
    return torch.zeros((), dtype=torch.bool, device=device).expand(batch or 1, heads or 1, queries, keys)


@contextmanager
def watched_resizes(resized: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Call `resized(storage)` after each change of a storage's size: how FSDP2 frees gathered weights."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        resized(storage)
        return result

    with patch.object(torch.UntypedStorage, "resize_", resize_):
        yield
