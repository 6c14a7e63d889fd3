"""Model weights as a named part of a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_trainer.protocols import State


class ModelState:
    """Parameters and persistent buffers of a model by fully qualified name; tied parameters appear once."""

    def __init__(self, model: nn.Module) -> None:
        persistent = model.state_dict(keep_vars=True)
        self.tensors: dict[str, Tensor] = dict(model.named_parameters())
        self.tensors |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}

    def state_dict(self) -> State:
        """Return `{name: tensor}` with the live tensors, detached."""
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: State) -> None:
        """Copy `state`, which must have every name, into the model."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state[name])
