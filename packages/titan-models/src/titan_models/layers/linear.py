"""The linear layer."""

from __future__ import annotations

from torch import nn

from titan_models.initialization.initializers import DepthScaledNormal, Initializer, Normal
from titan_models.layers.flops import Flops, matmul_flops
from titan_models.layers.layer import Layer, new_parameter


class Linear(Layer, nn.Linear):
    """`y = x W^T + b` with `W [out, in]`. Subclasses `nn.Linear`, so that tools that look for `nn.Linear` find it."""

    class Config(Layer.Config):
        weight_init: Initializer.Config = Normal.Config()
        """The initializer of the weight."""

        bias_init: Initializer.Config | None = None
        """The initializer of the bias. None: no bias."""

    def __init__(self, config: Config, *, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight = new_parameter(out_features, in_features)
        self.register_parameter("bias", None if config.bias_init is None else new_parameter(out_features))
        self.weight_init: Initializer = config.weight_init.build()
        self.bias_init: Initializer | None = None if config.bias_init is None else config.bias_init.build()

    def initializers(self) -> dict[str, Initializer]:
        return {"weight": self.weight_init} | ({} if self.bias_init is None else {"bias": self.bias_init})

    def own_flops(self, seq_len: int) -> Flops:
        return matmul_flops(self.in_features * self.out_features)


def residual_linear() -> Linear.Config:
    """Return the config of a projection that adds to the residual stream: deeper layers get smaller initial weights."""
    return Linear.Config(weight_init=DepthScaledNormal.Config())
