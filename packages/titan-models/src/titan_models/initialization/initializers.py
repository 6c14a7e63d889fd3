"""Initializers: distributions of initial weights, chosen by config fields of the modules."""

from __future__ import annotations

import abc
import math

from titan_config import Configurable
from torch import Tensor

from titan_models.initialization.counter_based_rng import ShardLocation, fill_with_uniform_


class Initializer(Configurable, abc.ABC):
    """The distribution of the initial values of a parameter."""

    @abc.abstractmethod
    def fill_(self, local: Tensor, location: ShardLocation) -> None:
        """Fill `local`, the shard of a parameter at `location`, with initial values."""


class Constant(Initializer):
    """All weights are `value`."""

    class Config(Initializer.Config):
        value: float

    def __init__(self, config: Config) -> None:
        self.value = config.value

    def fill_(self, local: Tensor, location: ShardLocation) -> None:
        local.fill_(self.value)


class Normal(Initializer):
    """Normal distribution with mean 0 and standard deviation `std`."""

    class Config(Initializer.Config):
        std: float = 0.02

        def validate(self) -> None:
            _check_positive("std", self.std)

    def __init__(self, config: Config) -> None:
        self.std = config.std

    def fill_(self, local: Tensor, location: ShardLocation) -> None:
        fill_with_uniform_(local, location, lambda uniform: _inverse_normal_(uniform, self.std))


class TruncatedNormal(Initializer):
    """Normal distribution with mean 0 and `std`, truncated (not clamped) at `cutoff` times `std` on both sides."""

    class Config(Initializer.Config):
        std: float = 0.02
        cutoff: float = 3.0

        def validate(self) -> None:
            _check_positive("std", self.std)
            _check_positive("cutoff", self.cutoff)

    def __init__(self, config: Config) -> None:
        self.std = config.std
        self.probability = math.erf(config.cutoff / math.sqrt(2))  # of a normal number within the cutoff

    def fill_(self, local: Tensor, location: ShardLocation) -> None:
        fill_with_uniform_(local, location, lambda uniform: _inverse_normal_(uniform.mul_(self.probability), self.std))


class FanInNormal(Initializer):
    """Normal distribution with mean 0 and standard deviation `fan_in ** -0.5`, truncated at `cutoff` times that.

    `fan_in` is the size of the last dim of the parameter. For inputs of variance 1 the variance of the outputs is about
    1 (0.97 at a cutoff of 3).
    """

    class Config(Initializer.Config):
        cutoff: float = 3.0

        def validate(self) -> None:
            _check_positive("cutoff", self.cutoff)

    def __init__(self, config: Config) -> None:
        self.cutoff = config.cutoff

    def fill_(self, local: Tensor, location: ShardLocation) -> None:
        TruncatedNormal.Config(std=location.shape[-1] ** -0.5, cutoff=self.cutoff).build().fill_(local, location)


class DepthScaledNormal(Initializer):
    """Normal distribution with mean 0 and standard deviation `std / sqrt(2 (layer + 1))`, for layers numbered from 0.

    For the projections that add to the residual stream, two in each layer: deeper ones add less. Source: Zhang et
    al., "Improving deep transformer with depth-scaled initialization and merged attention" (2019).
    """

    class Config(Initializer.Config):
        std: float = 0.02

        def validate(self) -> None:
            _check_positive("std", self.std)

    def __init__(self, config: Config) -> None:
        self.std = config.std

    def fill_(self, local: Tensor, location: ShardLocation) -> None:
        if location.layer is None:
            raise ValueError(
                "DepthScaledNormal needs a parameter with a layer number in its name, such as "
                "layers.0.attention.o_proj.weight, got one without. Use Normal for it."
            )
        Normal.Config(std=self.std / math.sqrt(2 * (location.layer + 1))).build().fill_(local, location)


def _inverse_normal_(uniform: Tensor, std: float) -> Tensor:
    return uniform.erfinv_().mul_(math.sqrt(2) * std)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} of an initializer must be > 0, got {value}. For zeros, use Constant.")
