"""Shape probe: runs a model without its blocks before the first step of a pipeline, and checks what stages exchange.

Stages exchange hidden states only. Therefore the other arguments of blocks, and values read after the blocks, must not
depend on values that only some stages have: outputs of embeddings and outputs of blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from titan_config import ConfigError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titan_parallel._torch.distributed import StorageWeakRef, has_no_memory, is_dtensor
from titan_parallel.pipeline_parallel.stage_forward import StageEnd, StageModel
from titan_parallel.pipeline_parallel.stand_ins import Call, StandIns, as_stream, embedding_role_fix, refuse, zeros_of
from titan_parallel.step.batch import Head
from titan_parallel.step.loss_unit import per_token

Shape = tuple[torch.Size, torch.dtype]
Label = int | str
"""The number of a block, or the name of an embedding."""


class StageProbe:
    """Runs the forward of a model whose blocks return zeros, and tracks the origins of tensors.

    Every rank runs the same forward up to the last block; only the rank of the last stage runs the rest.
    """

    def __init__(self, parts: StageModel, *, has_end: bool) -> None:
        self._parts = parts
        self._has_end = has_end
        self._followed = Followed()
        self._shape: Shape | None = None
        self._past_blocks = False
        calls: dict[nn.Module, Call] = {
            module: self._marked(zeros_of(shape_of)) for module, shape_of in parts.shapes.items()
        }
        calls |= {module: self._after(module, module) for module in parts.after if module not in parts.shapes}
        calls |= {module: self._after(module, self._marked(call)) for module, call in parts.head.items()}
        calls |= {module: self._embedding(module, name) for module, name in parts.embeddings.items()}
        calls |= {block: self._block(number) for number, block in enumerate(parts.blocks)}
        self._stand_ins = StandIns(parts.model, calls, parts.embeddings)

    def shape_of_stream(self, run: Callable[[], Any]) -> Shape:
        """Return the shape and dtype of the hidden states that enter the first block.

        `run` runs the model with `self.loss`. Raises ConfigError if blocks exchange more than hidden states.
        """
        self._shape, self._past_blocks, self._followed = None, False, Followed()
        try:
            with _preserve_state(self._parts.model), self._stand_ins.in_place(), self._refusing_calls(), self._followed:
                run()
        except StageEnd:
            pass
        except ValueError:
            raise
        except Exception as error:  # third-party model code may raise anything without its blocks
            name = type(self._parts.model).__name__
            raise ConfigError(
                f"A model of a pipeline must run without the blocks and embeddings of other stages, got {name}, which "
                f"raises {type(error).__name__} without them: {error}. Code outside of the blocks may read weights or "
                "outputs of a block. Set pipeline_parallel_degree to 1."
            ) from error
        assert self._shape is not None
        return self._shape

    @per_token
    def loss(self, head: Head, hidden: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """Return a zero loss. Raises ConfigError if `hidden` depends on an embedding or on a block before the last."""
        labels = self._followed.labels_of(hidden) - {len(self._parts.blocks) - 1}
        if labels:
            raise self._error(labels, "after the blocks")
        return torch.zeros((), device=hidden.device), torch.zeros((), dtype=torch.int64, device=hidden.device)

    def _block(self, number: int) -> Call:
        stream, name = self._parts.streams[number], self._parts.block_names[number]
        allowed: set[Label] = {number - 1} if number else set(self._parts.embeddings.values())

        def passed(*args: Any, **kwargs: Any) -> Tensor:
            entering = stream.of(args, kwargs)
            if labels := self._followed.labels_of(entering) - allowed:
                raise self._error(labels, f"in the hidden states of {name}")
            for place, value in stream.others(args, kwargs).items():
                if labels := self._followed.labels_of(value):
                    raise self._error(labels, f"in {place} of {name}")
            if not number:
                self._shape = entering.shape, entering.dtype
            output = torch.zeros_like(entering)
            self._followed.mark(output, {number})
            if number == len(self._parts.blocks) - 1:
                if not self._has_end:
                    raise StageEnd(output)
                self._past_blocks = True
            return as_stream(output)

        return passed

    def _embedding(self, module: nn.Module, name: str) -> Call:
        zeros = zeros_of(self._parts.shapes[module])

        def embedding(*args: Any, **kwargs: Any) -> Any:
            output = zeros(*args, **kwargs)
            self._followed.mark(output, {name})
            return output

        return embedding

    def _marked(self, call: Call) -> Call:
        """Return `call` with its output marked with the labels of its arguments."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            self._followed.mark(output, self._followed.labels_of((args, kwargs)))
            return output

        return marked

    @contextmanager
    def _refusing_calls(self) -> Iterator[None]:
        """Reject calls of modules inside blocks: no block runs in the probe, so the caller is outside."""
        elsewhere = {inner for module in (*self._parts.after, *self._parts.embeddings) for inner in module.modules()}
        handles = [
            module.register_forward_pre_hook(_refusing(f"{block_name}.{name}"), prepend=True)
            for block, block_name in zip(self._parts.blocks, self._parts.block_names, strict=True)
            for name, module in block.named_modules()
            if module is not block and module not in elsewhere
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after(self, module: nn.Module, call: Call) -> Call:
        def check() -> None:
            if not self._past_blocks:
                refuse(module)()

        def after(*args: Any, **kwargs: Any) -> Any:
            check()
            return call(*args, **kwargs)

        after.check = check  # type: ignore[attr-defined]
        return after

    def _error(self, labels: set[Label], where: str) -> ConfigError:
        label = min(labels, key=str)
        if isinstance(label, str):
            return ConfigError(
                "The output of an embedding must enter the first block only, as hidden states, got the output of "
                f"{label} {where}. Stages after the first get zeros for that output. {embedding_role_fix(label)}"
            )
        return ConfigError(
            f"Blocks of a pipeline must exchange hidden states only, got an output of {self._parts.block_names[label]} "
            f"{where}. Other stages do not have that output. Pass it to the next block in the hidden states, or set "
            "pipeline_parallel_degree to 1."
        )


def _refusing(name: str) -> Callable[..., None]:
    def refuse_call(*_: Any) -> None:
        raise ConfigError(
            f"A module inside a block must be called by that block only, got a model that calls {name} from outside. "
            "Other stages of a pipeline do not hold the module. Set pipeline_parallel_degree to 1."
        )

    return refuse_call


class Followed(TorchDispatchMode):
    """Propagates labels from tensors to the results computed from them, by storage."""

    def __init__(self) -> None:
        super().__init__()
        self._labels: dict[StorageWeakRef, frozenset[Label]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: functions that the model compiles (masks) are compiled under this mode as usual."""
        return True

    def mark(self, value: Any, labels: set[Label]) -> None:
        """Add `labels` to all tensors in `value`; results computed from these tensors inherit the labels."""
        for tensor in _tensors(value):
            place = StorageWeakRef(tensor.untyped_storage())
            self._labels[place] = self._labels.get(place, frozenset()) | labels

    def labels_of(self, value: Any) -> set[Label]:
        """Return the labels of all tensors in `value`, including inherited labels."""
        places = [StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors(value)]
        return {label for place in places for label in self._labels.get(place, ())}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not (name.endswith("_like") or name.startswith("new_")) and (labels := self.labels_of((args, kwargs))):
            self.mark(output, labels)
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.is_write:
                    self.mark(value, labels)
        return output


def _tensors(value: Any) -> list[Tensor]:
    """Return the plain strided tensors in nested containers and dataclasses; DTensors are left out."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if dataclasses.is_dataclass(leaf):
            found += _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
        elif isinstance(leaf, Tensor) and not is_dtensor(leaf) and leaf.layout is torch.strided:
            found.append(leaf)
    return found


@contextmanager
def _preserve_state(model: nn.Module) -> Iterator[None]:
    """Disable gradients; restore buffers and the random state of the host and this GPU afterwards."""
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    on_cuda = any(parameter.is_cuda for parameter in model.parameters())
    is_planned = any(has_no_memory(parameter) for parameter in model.parameters())
    devices = [torch.cuda.current_device()] if on_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices, enabled=not is_planned):
        try:
            yield
        finally:
            for of_module, name, buffer, before in buffers:
                of_module[name] = buffer.copy_(before)  # a replaced buffer is put back
