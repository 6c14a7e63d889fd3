"""One stage's part of a model's own forward.

What is not the stage's has a stand-in while it runs: a module before the blocks gives zeros, a block before the stage's
first passes on what it got, the stage's first block gets what was received, and after its last block the forward stops.
B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from titan_parallel._torch import has_no_memory

Result = TypeVar("Result")


class StageEnd(Exception):
    """The stage's last block is done; `stream` is what the next stage gets."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


class StageForward:
    """Runs what calls the model so that the model's forward is that of one stage."""

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: list[nn.Module],
        own: range,
        shapes: Mapping[nn.Module, Callable[..., Any]],
        after: list[nn.Module],
    ) -> None:
        """`own` are the stage's among the `blocks`; with none of them the forward stops before the first.

        `shapes` are the modules before the blocks that the stage does not run, each with a function for the shape of
        its output, a meta tensor. `after` are the modules after the blocks that the stage does not run.
        """
        self._received: Tensor | None = None
        self._entered = False
        calls: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(blocks[: own.start], _pass_on)
        calls |= {module: self._zeros(module, shape_of) for module, shape_of in shapes.items()}
        calls |= {module: _refuse(module) for module in after}
        if not own:
            calls[blocks[own.start]] = _leave(_pass_on)
        elif own.start > 0:
            calls[blocks[own.start]] = self._enter(blocks[own.start])
        if own and own.stop < len(blocks):
            last = blocks[own.stop - 1]
            calls[last] = _leave(calls.get(last, last))
        stand_ins = {module: StandIn(module, call) for module, call in calls.items()}
        self._slots = [
            (parent._modules, name, child, stand_ins[child])
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child in stand_ins
        ]

    def __call__(self, run: Callable[[], Result], received: Tensor | None) -> Result | Tensor:
        """What `run` returns on the last stage, and the stream `[B, T, D]` on others."""
        self._received, self._entered = received, False
        try:
            with self._swapped():
                return run()
        except StageEnd as end:
            return end.stream
        finally:
            self._received = None

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        for modules, name, _, stand_in in self._slots:
            modules[name] = stand_in
        try:
            yield
        finally:
            for modules, name, module, _ in self._slots:
                modules[name] = module

    def _enter(self, block: nn.Module) -> Callable[..., Any]:
        def enter(*args: Any, **kwargs: Any) -> Any:
            self._entered = True
            if args:
                return block(self._received, *args[1:], **kwargs)
            return block(**{**kwargs, next(iter(kwargs)): self._received})

        return enter

    def _zeros(self, module: nn.Module, shape_of: Callable[..., Any]) -> Callable[..., Any]:
        def zeros(*args: Any, **kwargs: Any) -> Any:
            if self._entered:
                raise RuntimeError(
                    f"Got a call of {type(module).__name__} after the blocks, which is defined before them. What is "
                    "defined before the blocks belongs to the first stage. Define it after the blocks."
                )
            device = next(tensor.device for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor))
            meta_args, meta_kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            with torch.no_grad():
                shape = shape_of(*meta_args, **meta_kwargs)
            return tree_map_only(Tensor, lambda meta: torch.zeros_like(meta, device=device), shape)

        return zeros


class StandIn(nn.Module):
    """In the place of a module while a stage runs: `call` is its forward, all else is the module's."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["_stood_in_for"] = module  # no child: the stand-in holds no parameters
        self.__dict__["forward"] = call
        del self.__dict__["training"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stood_in_for"], name)


class Stream(Tensor):
    """What a skipped block returns: a tensor that may be taken as if it were the first of a tuple."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            if index == 0:
                return self
            raise RuntimeError(
                f"Got a model that reads output {index} of a block. Stages of a pipeline exchange the stream alone, "
                "the first output. Set pipeline_parallel_degree to 1."
            )
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        raise RuntimeError(
            "Got a model that unpacks what a block returns. Stages of a pipeline exchange the stream alone. Take it "
            "as output[0], or set pipeline_parallel_degree to 1."
        )


def stream_of(output: Any) -> Tensor:
    """The stream in what a block returns: that, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A block's first argument, which is the stream."""
    return args[0] if args else next(iter(kwargs.values()))


def _pass_on(*args: Any, **kwargs: Any) -> Tensor:
    stream: Tensor = first_argument(args, kwargs)
    return stream if has_no_memory(stream) else stream.as_subclass(Stream)  # those of plans have a class of their own


def _leave(block: Callable[..., Any]) -> Callable[..., Any]:
    def leave(*args: Any, **kwargs: Any) -> Any:
        raise StageEnd(stream_of(block(*args, **kwargs)))

    return leave


def _refuse(module: nn.Module) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"Got a call of {type(module).__name__} before the blocks, which is defined after them. What is defined "
            "after the blocks belongs to the last stage. Define it before the blocks."
        )

    return refuse
