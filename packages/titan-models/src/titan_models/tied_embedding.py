"""A second look-up in the embedding's table."""

from __future__ import annotations

from titan_config import Configurable
from torch import Tensor, nn
from torch.nn import functional

from titan_models.embedding import Embedding
from titan_models.flops import Flops
from titan_models.tied import Tied


class TiedEmbedding(Tied):
    """Row `token` of the embedding's table: a module of its own, for a stage that does not hold the embedding."""

    weight: nn.Parameter

    def __init__(self, config: Configurable.Config, *, embedding: Embedding) -> None:
        nn.Module.__init__(self)
        self.tie(embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.weight)

    def own_flops(self, seq_len: int) -> Flops:
        return Flops(full=0, causal=0)
