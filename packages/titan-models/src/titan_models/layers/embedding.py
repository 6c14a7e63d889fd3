"""The token embedding."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from titan_models.initialization.initializers import Initializer, Normal
from titan_models.layers.flops import Flops
from titan_models.layers.layer import Layer, new_parameter


class Embedding(Layer):
    """Token embedding: row `token` of a weight `[V, D]`. Raises IndexError for a token id outside the vocabulary."""

    class Config(Layer.Config):
        weight_init: Initializer.Config = Normal.Config()
        """The initializer of the weight."""

    def __init__(self, config: Config, *, vocab_size: int, dim: int) -> None:
        nn.Module.__init__(self)
        self.weight = new_parameter(vocab_size, dim)
        self.weight_init: Initializer = config.weight_init.build()

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.weight)

    def initializers(self) -> dict[str, Initializer]:
        return {"weight": self.weight_init}

    def own_flops(self, seq_len: int) -> Flops:
        return Flops(full=0, causal=0)
