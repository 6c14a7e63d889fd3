"""What titan-ckpt asks of an adapter between a model's names and Hugging Face's, and how it uses one without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_ckpt.errors import CheckpointError


class HFAdapter(Protocol):
    """A bijection between a model's state and Hugging Face's; it refuses a state that is not complete.

    Tensors that are only renamed must come out as the same objects. That is how `translate` finds them, so that they
    can be copied shard by shard; the others are read whole.
    """

    def to_hf(self, state: Mapping[str, Tensor], /) -> Mapping[str, Tensor]: ...

    def from_hf(self, state: Mapping[str, Tensor], /) -> Mapping[str, Tensor]: ...

    def hf_config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Translation:
    """Hugging Face's state of a model, on the meta device; `renamed` maps its names to the model's."""

    hf_state: Mapping[str, Tensor]
    renamed: Mapping[str, str]


def translate(adapter: HFAdapter, state: Mapping[str, Tensor]) -> Translation:
    """Find out what an adapter does to a state, looking at shapes and types only.

    Raises:
        CheckpointError: when the adapter refuses the state.
    """
    stand_ins = on_meta(state)
    hf_state = asked(adapter.to_hf, stand_ins)
    names = {id(tensor): name for name, tensor in stand_ins.items()}
    renamed = {key: names[id(tensor)] for key, tensor in hf_state.items() if id(tensor) in names}
    return Translation(hf_state, renamed)


def on_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same (whole) shapes and types, without data."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}


def asked(conversion: Any, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Apply an adapter's conversion.

    Raises:
        CheckpointError: with the adapter's reason, when it refuses.
    """
    try:
        return conversion(state)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"The model's Hugging Face adapter refused the weights: {error}") from error


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
