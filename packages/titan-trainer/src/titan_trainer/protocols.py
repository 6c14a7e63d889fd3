"""Protocols of the components that a recipe combines; classes of any package may implement them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import titan_parallel
import torch
from torch import Tensor, nn

State = dict[str, Any]
"""A nested dictionary of JSON values and tensors: plain (the same on every rank) or `DTensor` (may be sharded)."""


class Batch(titan_parallel.Batch, Protocol):
    """One micro-batch, with the ids of its samples."""

    @property
    def sample_ids(self) -> list[list[int]]:
        """The ids of the samples in each sequence."""


class Stateful(Protocol):
    """A part of a run's state that is saved in checkpoints and sent to healing replicas."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State, /) -> None: ...


class Model(Protocol):
    """The methods that the trainer needs in addition to `nn.Module`; the forward is `model(**batch.inputs)`."""

    def roles(self) -> Mapping[str, Any]:
        """Return the roles of modules by name pattern, as `titan_parallel.parallelize` takes them."""
        ...

    def init_weights(self, seed: int) -> None:
        """Initialize the weights, bitwise equal on every mesh."""
        ...


class ModelConfig(Protocol):
    """The fields and methods that the trainer needs of a model's config."""

    vocab_size: int
    """Number of token ids; read if the run has a tokenizer."""

    def build(self) -> Any:
        """Return a `Model` that is an `nn.Module`."""
        ...

    def flops_per_token(self, seq_len: int) -> Any:
        """Return the FLOPs per token of forward and backward; needed for MFU and `--plan`.

        `.full` counts attention to the full sequence, `.causal` to earlier tokens only.
        """
        ...


class Loss(Protocol):
    """A loss that is a sum over targets, computed in place of the call of the model's head."""

    def count(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the number of valid targets, an int64 scalar, before the forward."""
        ...

    def __call__(
        self, head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the loss sum over valid targets and their count; `head(hidden)` returns the logits."""
        ...


class Loader(Protocol):
    """A source of micro-batches for one data-parallel rank, whose position advances only when a step is committed."""

    def next_batches(self, rank: int, num_ranks: int) -> Sequence[Batch]:
        """Return the micro-batches of the next step for data-parallel rank `rank`; empty once the data has ended."""
        ...

    def cursor_delta(self) -> Tensor:
        """Return the number of positions that the last `next_batches` advanced each data stream.

        An int64 tensor; zero for streams that only other ranks read.
        """
        ...

    def commit(self, cursor_delta: Tensor) -> None:
        """Make the step final; `cursor_delta` is the sum over all data-parallel ranks."""
        ...

    def rollback(self) -> None:
        """Return to the position before the last `next_batches`."""
        ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State, /) -> None: ...


class LoaderConfig(Protocol):
    """The method that `--plan` needs of a loader's config.

    If the config has a field `infinite` that is True, a validation with it needs validator.tokens.
    """

    def batch_spec(self, *, seq_len: int, global_batch_size: int, local_batch_size: int) -> tuple[Batch, Tensor]:
        """Return a micro-batch and a cursor delta with the right shapes and dtypes, without reading data."""
        ...


class Checkpointer(Protocol):
    """A store of checkpoints: the named parts of a run's state."""

    def load(self, parts: Mapping[str, Stateful]) -> int | None:
        """Load the newest complete checkpoint into `parts`; return its step, or None if there is no checkpoint."""
        ...

    def save(self, step: int, parts: Mapping[str, Stateful], *, last: bool | Literal["stopped"] = False) -> bool:
        """Save `parts` if `step` is due or `last`, each step once; return whether they were saved.

        Writing may continue in the background. `last` is True at the end of the run, and "stopped" if a signal ended
        the run before its last step.
        """
        ...

    def close(self) -> None:
        """Wait until pending checkpoints are written."""
        ...


class CheckpointConfig(Protocol):
    """The method that `--generate` needs of a checkpointer's config."""

    def read(self, dump_folder: Path, parts: Mapping[str, Stateful]) -> int | None:
        """Load the newest complete checkpoint into `parts`, without changing files; return its step, or None."""
        ...


class ReplicaGroup(Protocol):
    """Replicas of the whole mesh that train one model together; they may join and leave between steps."""

    def register_state(
        self,
        state_dict: Callable[[], State],
        load_state_dict: Callable[[State], None],
        step: int = 0,
        identity: Any = None,
    ) -> None:
        """Register the functions that heal a joining replica: `state_dict` of a live one, `load_state_dict` of the new.

        `step` is the number of steps that this replica has done. `identity` has JSON values that must be equal on all
        replicas; a replica with other values cannot join.
        """
        ...

    def begin_step(self) -> tuple[int, int]:
        """Form the quorum of this step, healing this replica first if it is behind.

        Return the index of this replica and the number of replicas.
        """
        ...

    def reduce_(self, tensor: Tensor) -> None:
        """Sum `tensor` over the replicas of this step, in place."""
        ...

    def commit(self) -> bool:
        """Return True if every replica of this step completed it, so that weights may be updated."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class Run(Protocol):
    """The Trainer, as callbacks see it."""

    config: Any
    """The config of the run, with `dump_folder`."""
    step: int
    """Number of steps done."""
    is_first_rank: bool
    device: torch.device
    model: nn.Module
    """The model as it was built: parameters are sharded, and have their names."""
    parallel: titan_parallel.ParallelModel
    parts: dict[str, Stateful]
    """The state of the run by name, as a checkpoint holds it."""


class Converter(Protocol):
    """A change of a model before it is parallelized (other linear layers, adapters), and after each optimizer step."""

    def convert(self, model: nn.Module, roles: titan_parallel.RoleTable) -> titan_parallel.RoleTable:
        """Change `model`, which is on the meta device, in place; return the table of roles of the changed model.

        Parameters keep their names: `q_proj.weight` of a wrapped linear is still `q_proj.weight`.
        """
        ...

    def after_step(self, model: nn.Module) -> None: ...


class Tokenizer(Protocol):
    """A tokenizer. The trainer reads `vocab_size` only, `--generate` everything."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> Iterable[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class Generator(Protocol):
    """A model that `--generate` can use."""

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
        """Return the new token ids of each prompt, up to a `stop` token (included); greedy if `temperature` is None."""
        ...
