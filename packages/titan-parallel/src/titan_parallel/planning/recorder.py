"""Record every operator of a step: memory, communication, FLOPs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from titan_parallel._torch.tracing import in_backward, reported_resizes, unrecorded_dtensor_shapes
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.planning.flops import ForwardFlops
from titan_parallel.planning.timeline import Timeline
from titan_parallel.planning.traffic import Traffic


class Recorder(TorchDispatchMode):
    """Records the operators that run within it, on real or on fake tensors."""

    def __init__(self, dims: ParallelDims, vocab_size: int | None) -> None:
        """`vocab_size`: the last dim of one rank's logits; None for a model without a head."""
        from torch.distributed.tensor import DTensor

        super().__init__()
        self._subclass = DTensor
        self._vocab_size = vocab_size
        self._stack = ExitStack()
        self.timeline, self.traffic, self.flops = Timeline(), Traffic(dims), ForwardFlops()

    def __enter__(self) -> Recorder:
        self._stack.enter_context(unrecorded_dtensor_shapes())
        self._stack.enter_context(reported_resizes(self.timeline.resized))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if self._subclass in types:
            return NotImplemented  # DTensor runs the operator on local tensors, which are recorded
        keywords = keywords or {}
        output = operator(*arguments, **keywords)
        namespace, _, name = operator._schema.name.partition("::")
        if namespace == "prim":
            return output
        backward = in_backward()
        outputs = [output] if isinstance(output, Tensor) else pytree.tree_leaves(output)
        tensors = [tensor for tensor in outputs if isinstance(tensor, Tensor)]
        self.timeline.operator_ran(name, tensors, backward)
        if "c10d" in namespace:
            self.traffic.operator_ran(name, arguments, output)
            self._label_buffers(name, arguments)
        elif not backward:
            self.flops.operator_ran(operator, arguments, keywords, output)
        if self._vocab_size is not None:
            self._label_logits(tensors)
        return output

    def _label_buffers(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Label the flat tensors in which FSDP2 gathers weights and reduces gradients."""
        if name == "_allgather_base_":
            self.timeline.label([arguments[0]], "gathered_weights")
        elif name in ("_reduce_scatter_base_", "allreduce_"):
            sides = pytree.tree_leaves(arguments[:2])
            self.timeline.label_unlabeled([side for side in sides if isinstance(side, Tensor)], "gradient_buckets")

    def _label_logits(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.dim() > 1 and tensor.size(-1) == self._vocab_size and torch.is_floating_point(tensor):
                self.timeline.label_unlabeled([tensor], "logits")
