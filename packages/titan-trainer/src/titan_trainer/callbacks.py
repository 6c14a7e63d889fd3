"""Callbacks: what watches a run, or keeps state beside it, without a subclass of the Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from titan_config import Configurable

from titan_trainer.protocols import Run, State

Record = Mapping[str, Any]


class Callback(Configurable):
    """Methods that a Trainer calls at points of a run; override those that are needed. All are called on every rank.

    A callback is a context around the run: `__enter__` is called before the first step, after a checkpoint was loaded,
    and `__exit__` at the end of the run or on an error. An error on one rank alone leaves the others waiting until the
    timeout of collectives, so a callback handles errors of servers itself. Methods are given the Trainer, with the
    attributes of `titan_trainer.Run`. A custom callback is a subclass, whose config goes into `callbacks` of the
    config of the Trainer.
    """

    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def setup(self, run: Run) -> None:
        """Create state. Called once, when the model is initialized and before a checkpoint is loaded.

        A checkpoint is loaded into the tensors of `state_dict`, so they exist from here on.
        """

    def on_train_begin(self, run: Run) -> None:
        """Called before the first step, after a checkpoint, or the weights of `initial_load_path`, were loaded."""

    def on_step_begin(self, run: Run) -> None:
        """Called before the batches of a step are loaded. A step that is not committed has no `on_step_end`."""

    def on_gradients_ready(self, run: Run) -> None:
        """Called when `.grad` holds the gradients of a step, summed over all ranks and replicas, before clipping."""

    def on_step_end(self, run: Run, record: Record) -> None:
        """Called after a committed step, its validation and its metrics; `record` is that of `metrics.jsonl`.

        A checkpoint of the step is saved afterwards. Durations, `memory_gib` and `mfu` are those of the calling rank.
        """

    def on_validation_end(self, run: Run, loss: float) -> None:
        """Called after a validation with its mean loss."""

    def on_save(self, run: Run, step: int) -> None:
        """Called after a checkpoint of `step` was saved, or copied for the background thread that writes it."""

    def state_dict(self) -> State:
        """Return state for the checkpoint: tensors (plain, equal on every rank, or `DTensor`) and JSON values."""
        return {}

    def load_state_dict(self, state: State, /) -> None:
        """Restore the result of `state_dict`."""


class CallbackStates:
    """The states of callbacks as one part of a checkpoint, by class name and place among callbacks of that class."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._named: dict[str, Callback] = {}
        for callback in callbacks:
            if type(callback).state_dict is not Callback.state_dict:
                name = type(callback).__name__
                same = sum(type(other).__name__ == name for other in self._named.values())
                self._named[f"{name}_{same}"] = callback

    def __bool__(self) -> bool:
        """Return whether any callback has state."""
        return bool(self._named)

    def state_dict(self) -> State:
        """Return `{name: state}`."""
        return {name: callback.state_dict() for name, callback in self._named.items()}

    def load_state_dict(self, state: State, /) -> None:
        """Restore the state of each callback. Raises ValueError for a checkpoint of other callbacks."""
        if state.keys() != self._named.keys():
            raise ValueError(
                f"Callbacks with state must be those of the checkpoint ({', '.join(state) or 'none'}), got "
                f"{', '.join(self._named)}."
            )
        for name, callback in self._named.items():
            callback.load_state_dict(state[name])
