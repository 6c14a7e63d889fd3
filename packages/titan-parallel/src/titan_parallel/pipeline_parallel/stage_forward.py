"""The forward of one pipeline stage, run by the unchanged forward of the model.

While a stage runs, stand-ins replace the modules of other stages. Embeddings return zeros. Blocks before the stage
return their input, except for the last of these blocks, which returns the received hidden states. The forward stops
after the last block of the stage. All other modules run.
B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from titan_parallel.pipeline_parallel.stage_modules import StageModules, skeleton
from titan_parallel.pipeline_parallel.stand_ins import (
    Call,
    StandIns,
    Stream,
    StreamArgument,
    as_stream,
    refuse,
    stream_in,
    zeros_of,
)
from titan_parallel.sharding_plan.roles import Roles

Result = TypeVar("Result")


class StageEnd(Exception):
    """Ends the forward after the last block of a stage; `stream` holds the hidden states for the next stage."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


@dataclass(frozen=True)
class StageModel:
    """The modules of a model by stage; modules that are in none of these fields run on every stage."""

    model: nn.Module
    blocks: Sequence[nn.Module]
    block_names: Sequence[str]
    embeddings: Mapping[nn.Module, str]
    """Modules with the role embedding, with their names; only the first stage runs them."""
    shapes: Mapping[nn.Module, Call]
    """For each embedding, including those called between blocks: a call that returns its output on the meta device."""
    after: Sequence[nn.Module]
    """The modules of the last stage besides its blocks."""
    head: Mapping[nn.Module, Call]
    """The replacement of the head, if there is one, that needs no gathered weight."""
    streams: Sequence[StreamArgument]
    """The hidden-states argument of each block."""

    @classmethod
    def of(cls, model: nn.Module, roles: Roles, pieces: StageModules, dtype: torch.dtype | None) -> StageModel:
        """Collect the modules; `dtype` is that in which weights compute (None: the dtype in which they are stored)."""
        between = [pieces.after[name] for name in roles.named("embedding") if name in pieces.after]
        return cls(
            model,
            blocks=list(pieces.blocks.values()),
            block_names=list(pieces.blocks),
            embeddings={module: name for name, module in pieces.embeddings.items()},
            shapes={module: skeleton(module, dtype) for module in (*pieces.embeddings.values(), *between)},
            after=list(pieces.after.values()),
            head={} if roles.head is None else _without_weights(model.get_submodule(roles.head), roles, dtype),
            streams=[StreamArgument(block) for block in pieces.blocks.values()],
        )


class StageForward:
    """Calls a function such that the forward of the model inside it is the forward of one stage."""

    def __init__(self, parts: StageModel, own: range) -> None:
        """`own` are the numbers of the blocks of this stage."""
        self._received: Tensor | None = None
        self._has_entered = True
        self._first = parts.block_names[own.start]
        blocks, streams = parts.blocks, parts.streams
        calls: dict[nn.Module, Call] = {
            block: _pass_on(stream) for block, stream in zip(blocks[: own.start], streams, strict=False)
        }
        if own.start > 0:
            calls |= {embedding: zeros_of(parts.shapes[embedding]) for embedding in parts.embeddings}
            calls[blocks[own.start - 1]] = lambda *_, **__: as_stream(self._stream())
            calls[blocks[own.start]] = _enter(blocks[own.start], streams[own.start])
        if own.stop < len(blocks):
            calls |= {module: refuse(module) for module in parts.after}
            last = blocks[own.stop - 1]
            calls[last] = _leave(calls.get(last, last))
        self._stand_ins = StandIns(parts.model, calls, parts.embeddings if own.start > 0 else {})

    def __call__(self, run: Callable[[], Result], received: Tensor | None) -> Result | Tensor:
        """Return the result of `run` on the last stage, and hidden states `[B, T, D]` on other stages."""
        self._received, self._has_entered = received, received is None
        try:
            with self._stand_ins.in_place():
                result: Result | Tensor = run()
        except StageEnd as end:
            result = end.stream
        finally:
            self._received = None
        if not self._has_entered:
            raise RuntimeError(
                "A model of a pipeline must call every block in each forward, got one that skipped the block before "
                f"{self._first} (LayerDrop?). Set pipeline_parallel_degree to 1."
            )
        return result

    def _stream(self) -> Tensor:
        assert self._received is not None
        self._has_entered = True
        return self._received


def _pass_on(stream: StreamArgument) -> Call:
    return lambda *args, **kwargs: as_stream(stream.of(args, kwargs))


def _enter(block: nn.Module, stream: StreamArgument) -> Call:
    """Return the first block of a stage with its input unwrapped to a plain tensor.

    Operations of the model between two blocks run on the stage of the second block.
    """

    def enter(*args: Any, **kwargs: Any) -> Any:
        given = stream.of(args, kwargs)
        plain = given.as_subclass(Tensor) if isinstance(given, Stream) else given
        args, kwargs = stream.replaced(plain, args, kwargs)
        return block(*args, **kwargs)

    return enter


def _leave(block: Call) -> Call:
    def leave(*args: Any, **kwargs: Any) -> Any:
        raise StageEnd(stream_in(block(*args, **kwargs)))

    return leave


def _without_weights(head: nn.Module, roles: Roles, dtype: torch.dtype | None) -> dict[nn.Module, Call]:
    """Return a call in place of the head that needs no gathered weight: the loss in the head, or zeros."""
    if roles.head is not None and roles.options(roles.head).get("takes_loss", True):
        return {head: lambda *args, **kwargs: head.forward(*args, **kwargs)}  # `head.forward` is replaced later
    return {head: zeros_of(skeleton(head, dtype))}
