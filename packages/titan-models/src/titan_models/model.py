"""The base class of all model families."""

from __future__ import annotations

import abc

import torch
from titan_config import Configurable
from torch import nn

from titan_models.layers.flops import Flops
from titan_models.layers.roles import Roles
from titan_models.model_size import count_active_parameters, count_flops_per_token, count_parameters
from titan_models.training.auxiliary_loss import scale_auxiliary_losses
from titan_models.training.step_counter import after_step
from titan_models.weights import init_weights


class Model(Configurable, nn.Module, abc.ABC):
    """A plain `nn.Module` that states the roles of its modules and initializes its weights. It knows no meshes."""

    config: Config

    class Config(Configurable.Config):
        vocab_size: int
        """Number of token ids; ids are 0 to vocab_size - 1."""

        max_seq_len: int
        """Maximum sequence length in tokens; exported as max_position_embeddings."""

        def on_meta(self) -> Model:
            """Return the model on the meta device: names, shapes and roles, without memory."""
            with torch.device("meta"):
                return self.build()

        def num_parameters(self) -> int:
            """Return the number of parameters; tied parameters count once."""
            return count_parameters(self.on_meta())

        def num_active_parameters(self) -> int:
            """Return the number of parameters that a token uses: without experts that it is not routed to."""
            return count_active_parameters(self.on_meta())

        def flops_per_token(self, seq_len: int) -> Flops:
            """Return the FLOPs of the matrix products of one token in a sequence of `seq_len`, forward and backward."""
            return count_flops_per_token(self.on_meta(), seq_len)

    @abc.abstractmethod
    def roles(self) -> Roles:
        """Return the role of each module; see `titan_models.layers.roles`."""

    def init_weights(self, seed: int) -> None:
        """Initialize all weights in place, bitwise the same for a seed on any mesh; see `titan_models.init_weights`."""
        init_weights(self, seed)

    def scale_auxiliary_losses(self, scale: float) -> None:
        """Scale the sums of auxiliary losses by `scale`: 1 / the denominator of the loss sum at the head.

        In a single process, call it before the forward of a model whose routers have auxiliary losses.
        """
        scale_auxiliary_losses(self, scale)

    def after_step(self) -> dict[str, float]:
        """Apply the per-step statistics (expert load balancing) and return metrics such as `expert_load`.

        In a single process, call it after each step of the optimizer. On a mesh, call `after_step` of the object that
        `parallelize` returned.
        """
        return after_step(self)
