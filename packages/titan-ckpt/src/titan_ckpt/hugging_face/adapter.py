"""Interface of the adapters that translate between a model's weights and Hugging Face's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from titan_ckpt.errors import CheckpointError, join_names

T = TypeVar("T")


class WeightMapping(Protocol):
    """Weights of a model, and the tensors in Hugging Face files with the same numbers."""

    @property
    def own(self) -> Sequence[tuple[str, int | None]]:
        """Names of model weights; with an index, one matrix of a stacked weight (such as one expert).

        A mapping without weights is a check: its tensors are passed to `from_hf` before any weight changes.
        """

    @property
    def hf_names(self) -> Sequence[str]:
        """Tensor names in the files: one to write, one or more to read; none for state that is not exported."""

    @property
    def is_quantized(self) -> bool:
        """True if the values are dequantized, and may be rounded to the dtype of the model."""

    @property
    def keeps_dtype(self) -> bool:
        """True if an export keeps the dtype of the model, regardless of the dtype of the export."""

    def to_hf(self, weights: Sequence[Tensor], /) -> Tensor: ...

    def from_hf(self, hf_tensors: Sequence[Tensor], /) -> Sequence[Tensor]: ...


class HFAdapter(Protocol):
    """Translates weights of a model to and from Hugging Face, one mapping at a time; raises ValueError on misfits."""

    def mappings(self) -> Sequence[WeightMapping]:
        """Return mappings that cover the whole model, as it is exported."""

    def find(self, stored: Mapping[str, Tensor], config: Mapping[str, Any] | None, /) -> Sequence[WeightMapping]:
        """Return mappings that cover the model, as it is stored in files with these tensors and this `config.json`.

        `stored` are on the meta device. Every stored tensor belongs to a mapping; tensors that the model does not use
        belong to one without model weights.
        """

    def hf_config(self) -> dict[str, Any]:
        """Return the `config.json` of an export, without its dtype."""


@dataclass(frozen=True)
class Renamed:
    """A mapping of one weight to one tensor of another name; the building block of custom adapters."""

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

    def to_hf(self, weights: Sequence[Tensor]) -> Tensor:
        return weights[0]

    def from_hf(self, hf_tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return hf_tensors


def to_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same full shapes and dtypes on the meta device."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}


def select_weights(mapping: WeightMapping, state: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the model weights of a mapping from the state of the model."""
    return [state[name] if index is None else state[name][index] for name, index in mapping.own]


def call_adapter(adapter: Callable[..., T], *arguments: Any) -> T:
    """Call a method of an adapter or of a mapping.

    Raises:
        CheckpointError: if it raises ValueError or KeyError; the message includes the reason.
    """
    try:
        return adapter(*arguments)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"The model's Hugging Face adapter rejected the weights: {error}") from error


def check_complete(
    mappings: Sequence[WeightMapping], state: Mapping[str, Tensor], nonlocal_weights: Collection[str] = ()
) -> None:
    """Check that the mappings cover each weight of `state` exactly once; `nonlocal_weights` are held by other ranks.

    Raises:
        CheckpointError: if they do not; the message names the weights.
    """
    found = Counter(slot for mapping in mappings for slot in mapping.own if slot[0] not in nonlocal_weights)
    stacked = {name for name, index in found if index is not None and name in state}
    needed: Counter[tuple[str, int | None]]
    needed = Counter((name, index) for name in stacked for index in range(len(state[name])))
    needed += Counter((name, None) for name in state if name not in stacked)
    if found != needed:
        wrong = sorted({name for name, index in found | needed if found[name, index] != needed[name, index]})
        raise CheckpointError(
            f"The Hugging Face adapter must map each weight of the model exactly once, got {join_names(wrong)} "
            f"missing, unexpected or duplicated."
        )


def adapter_of(config: Any) -> HFAdapter:
    """Return the adapter of a run's config, `config.model.hf_adapter()`.

    Raises:
        CheckpointError: if `config` is None.
    """
    if config is None:
        raise CheckpointError(
            "The Hugging Face adapter needs the config of the run (config.model.hf_adapter()), got None. Build the "
            "checkpointer with config=..., or pass an adapter."
        )
    return config.model.hf_adapter()
