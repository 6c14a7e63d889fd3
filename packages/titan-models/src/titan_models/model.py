"""What every model family offers."""

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
    """A plain `nn.Module` that states the role of each part and draws its own weights. It knows nothing of meshes."""

    config: Config

    class Config(Configurable.Config):
        vocab_size: int
        """Token ids are below it."""

        max_seq_len: int
        """Tokens that the model is meant for; exported as max_position_embeddings."""

        def on_meta(self) -> Model:
            """The model without memory: names, shapes and roles in an instant."""
            with torch.device("meta"):
                return self.build()

        def num_parameters(self) -> int:
            """Number of parameters, tied ones once."""
            return count_parameters(self.on_meta())

        def num_active_parameters(self) -> int:
            """Number of parameters that a token meets: without the experts that it does not go to."""
            return count_active_parameters(self.on_meta())

        def flops_per_token(self, seq_len: int) -> Flops:
            """Matrix products of one token of a sequence of `seq_len`, forward and backward."""
            return count_flops_per_token(self.on_meta(), seq_len)

    @abc.abstractmethod
    def roles(self) -> Roles:
        """What each part is; see `titan_models.layers.roles`."""

    def init_weights(self, seed: int) -> None:
        """Draw all weights in place: the same bits for a seed on any mesh; see `titan_models.init_weights`."""
        init_weights(self, seed)

    def scale_auxiliary_losses(self, scale: float) -> None:
        """To call before the forward, in one process, where routers have losses: 1 / what loss sums are divided by."""
        scale_auxiliary_losses(self, scale)

    def after_step(self) -> dict[str, float]:
        """To call after each step of the optimizer, in one process: experts are balanced by what they got since.

        Returns what is worth telling, such as `expert_load`. On a mesh, call that of what `parallelize` returned.
        """
        return after_step(self)
