"""What the trainer asks of the parts that a recipe joins. Whoever satisfies these may be another package, or yours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import titan_parallel
from torch import Tensor, nn

State = dict[str, Any]
"""A nested dictionary of tensors (plain: the same on every rank; `DTensor`: sharded) and of JSON values."""


class Batch(titan_parallel.Batch, Protocol):
    """One micro-batch, which says what it is made of."""

    @property
    def sample_ids(self) -> list[list[int]]:
        """Per row, the ids of the samples in it."""


class Stateful(Protocol):
    """A part of a run that a checkpoint holds, or that heals a replica."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State, /) -> None: ...


class Model(Protocol):
    """What the trainer calls besides what every `nn.Module` has; the forward is `model(**batch.inputs)`."""

    def roles(self) -> Mapping[str, Any]:
        """What each part is: see `titan_parallel`."""
        ...

    def init_weights(self, seed: int) -> None:
        """Draw the weights: the same bits on any mesh."""
        ...


class ModelConfig(Protocol):
    """What the trainer reads of a model's config."""

    vocab_size: int
    """Needed where there is a tokenizer."""

    def build(self) -> Any:
        """A `Model` that is an `nn.Module`."""
        ...

    def flops_per_token(self, seq_len: int) -> Any:
        """FLOPs of forward and backward, with the attention to a whole row as `.full`; read where MFU is."""
        ...


class Loss(Protocol):
    """A loss that is a sum over targets, taken in place of the model's head."""

    def count(self, targets: Mapping[str, Tensor]) -> Tensor:
        """How many targets count: an int64 scalar, known before the forward."""
        ...

    def __call__(
        self, head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The loss's sum over the valid targets, and their count."""
        ...


class Loader(Protocol):
    """Draws a data rank's share of the global batch; a step that was not committed gives its samples back."""

    def next_batches(self, rank: int, num_ranks: int) -> Sequence[Batch]:
        """The micro-batches of the next step; none once the data has ended."""
        ...

    def cursor_delta(self) -> Tensor:
        """How far the last draw moved each stream: int64; zero for streams that other ranks drew from."""
        ...

    def commit(self, cursor_delta: Tensor) -> None:
        """Make the step final; `cursor_delta` is the sum over all data ranks."""
        ...

    def rollback(self) -> None: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State, /) -> None: ...


class LoaderConfig(Protocol):
    """What `--plan` reads of a loader's config. One that has an `infinite` which is True needs validator.tokens."""

    def batch_spec(self, *, seq_len: int, global_batch_size: int, local_batch_size: int) -> tuple[Batch, Tensor]:
        """A micro-batch and an `cursor_delta`, of which only the shapes count: nothing is read."""
        ...


class Checkpointer(Protocol):
    """Saves and loads named parts."""

    def load(self, parts: Mapping[str, Stateful]) -> int | None:
        """Load the newest whole checkpoint into `parts`; its step, or None where there is none."""
        ...

    def save(self, step: int, parts: Mapping[str, Stateful], *, last: bool | Literal["stopped"] = False) -> bool:
        """Save the parts if `step` is due or the `last` of the run, once; may go on writing while training does.

        `last` is "stopped" where the run was asked to stop, and may go on later.
        """
        ...

    def close(self) -> None:
        """Wait for what is still being written."""
        ...


class CheckpointConfig(Protocol):
    """What `--generate` reads of a checkpointer's config."""

    def read(self, dump_folder: Path, parts: Mapping[str, Stateful]) -> int | None:
        """Fill parts from the newest whole checkpoint, and change nothing; its step, or None where there is none."""
        ...


class ReplicaGroup(Protocol):
    """Replicas of the whole mesh that train one model together, and may come and go between steps."""

    def register_state(
        self,
        state_dict: Callable[[], State],
        load_state_dict: Callable[[State], None],
        step: int = 0,
        identity: Any = None,
    ) -> None:
        """State what heals a newcomer: read from a live replica, written into the new one.

        step: how far this replica is. identity: JSON values that all replicas share; one that differs may not join.
        """
        ...

    def begin_step(self) -> tuple[int, int]:
        """Fix who takes part in this step, healing this replica first if it is behind: (my index, how many)."""
        ...

    def reduce_(self, tensor: Tensor) -> None:
        """Sum `tensor` over the replicas of this step, in place."""
        ...

    def commit(self) -> bool:
        """Whether every replica of this step got through it, so that it may change the weights."""
        ...

    def close(self) -> None: ...


class Converter(Protocol):
    """Changes a model before it is parallelized (other linears, adapters), and may act after each optimizer step."""

    def convert(self, model: nn.Module) -> None: ...

    def after_step(self, model: nn.Module) -> None: ...


class Tokenizer(Protocol):
    """What the trainer reads of a tokenizer, and `--generate` besides."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> Iterable[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class Generator(Protocol):
    """A model that `--generate` can ask."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float | None,
        top_p: float,
        stop: Collection[int],
        seed: int,
    ) -> list[list[int]]:
        """What it continues each prompt with, up to a token of `stop`; without a temperature, the likeliest tokens."""
        ...
