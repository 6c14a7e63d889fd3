"""One stage's part of a model's own forward.

What is not the stage's has a stand-in while it runs: embeddings give zeros, blocks before the stage's first pass on
what they get, the last of them what was received, and after the stage's last block the forward stops. All else runs.
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
    """The stage's last block is done; `stream` is what the next stage gets."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


@dataclass(frozen=True)
class StageModel:
    """A model as stages see it; what is in none of these parts runs on every stage."""

    model: nn.Module
    blocks: Sequence[nn.Module]
    block_names: Sequence[str]
    embeddings: Mapping[nn.Module, str]
    """What enters the stream, with its names: the first stage's alone."""
    shapes: Mapping[nn.Module, Call]
    """For each embedding, and for what is looked up between blocks, the shape of its output, a meta tensor."""
    after: Sequence[nn.Module]
    """The last stage's, besides its blocks."""
    head: Mapping[nn.Module, Call]
    """What takes the place of the head, if there is one, where its weight is not gathered."""
    streams: Sequence[StreamArgument]
    """For each block."""

    @classmethod
    def of(cls, model: nn.Module, roles: Roles, pieces: StageModules, dtype: torch.dtype | None) -> StageModel:
        """`dtype` is what weights compute in (None: what they are stored in)."""
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
    """Runs what calls the model so that the model's forward is that of one stage."""

    def __init__(self, parts: StageModel, own: range) -> None:
        """`own` are the stage's among the blocks."""
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
        """What `run` returns on the last stage, and the stream `[B, T, D]` on others."""
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
                f"A model of a pipeline must call every block in each forward, got one that passed over the block "
                f"before {self._first}, by layer-drop perhaps. Set pipeline_parallel_degree to 1."
            )
        return result

    def _stream(self) -> Tensor:
        assert self._received is not None
        self._has_entered = True
        return self._received


def _pass_on(stream: StreamArgument) -> Call:
    return lambda *args, **kwargs: as_stream(stream.of(args, kwargs))


def _enter(block: nn.Module, stream: StreamArgument) -> Call:
    """The block, given a plain tensor: what a model does between two blocks runs on the stage of the second."""

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
    """The head as a call that needs no weight: it takes the loss, or makes zeros."""
    if roles.head is not None and roles.options(roles.head).get("takes_loss", True):
        return {head: lambda *args, **kwargs: head.forward(*args, **kwargs)}  # which is replaced later
    return {head: zeros_of(skeleton(head, dtype))}
