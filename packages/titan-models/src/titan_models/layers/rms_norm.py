"""Root mean square layer normalization (RMSNorm)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from titan_models.initialization.initializers import Constant, Initializer
from titan_models.layers.flops import Flops
from titan_models.layers.layer import Layer, new_parameter


class RMSNorm(Layer):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim (Zhang and Sennrich, 2019), computed in fp32 or wider."""

    class Config(Layer.Config):
        eps: float = 1e-5
        """Added to the mean square for numerical stability."""

        weight_init: Initializer.Config | None = Constant.Config(value=1.0)
        """The initializer of the weight (gain). None: no weight."""

        def validate(self) -> None:
            if not self.eps > 0:  # nan is not
                raise ValueError(f"RMSNorm eps must be > 0, got {self.eps}.")

    def __init__(self, config: Config, *, dim: int) -> None:
        nn.Module.__init__(self)
        self.eps = config.eps
        self.dim = dim
        self.weight_init: Initializer | None = None if config.weight_init is None else config.weight_init.build()
        self.weight: nn.Parameter | None
        self.register_parameter("weight", None if self.weight_init is None else new_parameter(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (self.dim,), self.weight, self.eps)

    def initializers(self) -> dict[str, Initializer]:
        return {} if self.weight_init is None else {"weight": self.weight_init}

    def own_flops(self, seq_len: int) -> Flops:
        return Flops(full=0, causal=0)
