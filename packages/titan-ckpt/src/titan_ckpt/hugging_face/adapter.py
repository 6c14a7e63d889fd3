"""What titan-ckpt asks of an adapter between a model's weights and Hugging Face's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from titan_ckpt.errors import CheckpointError, listed

T = TypeVar("T")


class WeightMapping(Protocol):
    """Weights of a model, and the tensors in Hugging Face's files that hold the same numbers."""

    @property
    def own(self) -> Sequence[tuple[str, int | None]]:
        """Names of weights; with a number, of one of the matrices that a weight is a stack of.

        A mapping without any is a check: it is read before any weight is touched.
        """

    @property
    def hf_names(self) -> Sequence[str]:
        """Names in the files: one to write, one or several to read; none for state that is not exported."""

    @property
    def is_quantized(self) -> bool:
        """Whether its numbers are computed from quantized ones, and may be rounded to the model's dtype."""

    @property
    def keeps_dtype(self) -> bool:
        """Whether it is exported in the dtype that it has in the model, whatever the others are rounded to."""

    def to_hf(self, own: Sequence[Tensor], /) -> Tensor: ...

    def from_hf(self, theirs: Sequence[Tensor], /) -> Sequence[Tensor]: ...


class HFAdapter(Protocol):
    """Translates the weights of a model mapping by mapping; ValueErrors say what does not fit."""

    def mappings(self) -> Sequence[WeightMapping]:
        """All of the model, as it is exported."""

    def find(self, stored: Mapping[str, Tensor], config: Mapping[str, Any] | None, /) -> Sequence[WeightMapping]:
        """All of the model, as it is in files with these tensors (on the meta device) and this `config.json`.

        Every tensor is in a mapping; those that the model has no use for are in one without own weights.
        """

    def hf_config(self) -> dict[str, Any]:
        """The `config.json` to export, but for the dtype."""


@dataclass(frozen=True)
class Renamed:
    """A mapping that is a weight under another name: what an adapter of one's own is made of."""

    name: str
    hf_name: str
    is_quantized: bool = False
    keeps_dtype: bool = False

    @property
    def own(self) -> list[tuple[str, int | None]]:
        return [(self.name, None)]

    @property
    def hf_names(self) -> list[str]:
        return [self.hf_name]

    def to_hf(self, own: Sequence[Tensor]) -> Tensor:
        return own[0]

    def from_hf(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        return theirs


def on_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same (whole) shapes and types, without data."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}


def parts_of(mapping: WeightMapping, state: Mapping[str, Tensor]) -> list[Tensor]:
    """The own tensors of a mapping, out of a model's state."""
    return [state[name] if index is None else state[name][index] for name, index in mapping.own]


def asked(adapter: Callable[..., T], *arguments: Any) -> T:
    """Ask an adapter.

    Raises:
        CheckpointError: with the adapter's reason, when it refuses.
    """
    try:
        return adapter(*arguments)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"The model's Hugging Face adapter refused the weights: {error}") from error


def check_complete(
    mappings: Sequence[WeightMapping], state: Mapping[str, Tensor], elsewhere: Collection[str] = ()
) -> None:
    """Check that mappings are all of a state, and nothing of it twice; `elsewhere` are weights that other ranks have.

    Raises:
        CheckpointError: naming weights that are not.
    """
    found = Counter(slot for mapping in mappings for slot in mapping.own if slot[0] not in elsewhere)
    stacked = {name for name, index in found if index is not None and name in state}
    needed: Counter[tuple[str, int | None]]
    needed = Counter((name, index) for name in stacked for index in range(len(state[name])))
    needed += Counter((name, None) for name in state if name not in stacked)
    if found != needed:
        wrong = sorted({name for name, index in found | needed if found[name, index] != needed[name, index]})
        raise CheckpointError(
            f"Got an adapter that makes other tensors than the model has. It must be a bijection: {listed(wrong)} are "
            f"missing, unexpected or there twice. Correct the adapter."
        )


def adapter_of(config: Any) -> HFAdapter:
    """Return the adapter of a run's config, found as `config.model.hf_adapter()`.

    Raises:
        CheckpointError: when there is no such config.
    """
    if config is None:
        raise CheckpointError(
            "Got no config of the run. The Hugging Face adapter is found as config.model.hf_adapter(). Build the "
            "checkpointer with config=..., or give an adapter."
        )
    return config.model.hf_adapter()
