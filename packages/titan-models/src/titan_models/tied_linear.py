"""A projection to the vocabulary whose weight is the embedding's."""

from __future__ import annotations

from titan_config import Configurable
from torch import nn

from titan_models.embedding import Embedding
from titan_models.flops import Flops, matmul_flops
from titan_models.tied import Tied


class TiedLinear(Tied, nn.Linear):
    """`y = x W^T` with the embedding's `W`."""

    def __init__(self, config: Configurable.Config, *, embedding: Embedding) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = embedding.weight.shape
        self.tie(embedding)
        self.register_parameter("bias", None)

    def own_flops(self, seq_len: int) -> Flops:
        return matmul_flops(self.in_features * self.out_features)
