"""How initial weights are distributed: a config field of the module that owns them."""

from __future__ import annotations

import abc
import math

from titan_config import Configurable
from torch import Tensor

from titan_models.initialization.counter_based_rng import Place, fill_with_uniform_


class Initializer(Configurable, abc.ABC):
    """The distribution of one parameter's initial values."""

    @abc.abstractmethod
    def fill_(self, local: Tensor, place: Place) -> None:
        """Write the initial values of the part of a parameter that `local` holds and `place` describes."""


class Constant(Initializer):
    """Every weight is `value`."""

    class Config(Initializer.Config):
        value: float

    def __init__(self, config: Config) -> None:
        self.value = config.value

    def fill_(self, local: Tensor, place: Place) -> None:
        local.fill_(self.value)


class Normal(Initializer):
    """Normal with mean 0 and standard deviation `std`."""

    class Config(Initializer.Config):
        std: float = 0.02

        def validate(self) -> None:
            _check_positive("std", self.std)

    def __init__(self, config: Config) -> None:
        self.std = config.std

    def fill_(self, local: Tensor, place: Place) -> None:
        fill_with_uniform_(local, place, lambda uniform: _inverse_normal_(uniform, self.std))


class TruncatedNormal(Initializer):
    """Normal with mean 0 and `std`, conditioned on lying within `cutoff` times `std`: nothing piles up at the ends."""

    class Config(Initializer.Config):
        std: float = 0.02
        cutoff: float = 3.0

        def validate(self) -> None:
            _check_positive("std", self.std)
            _check_positive("cutoff", self.cutoff)

    def __init__(self, config: Config) -> None:
        self.std = config.std
        self.probability = math.erf(config.cutoff / math.sqrt(2))  # of lying within the cutoff

    def fill_(self, local: Tensor, place: Place) -> None:
        fill_with_uniform_(local, place, lambda uniform: _inverse_normal_(uniform.mul_(self.probability), self.std))


class FanInNormal(Initializer):
    """Normal with mean 0 and standard deviation `fan_in ** -0.5`, conditioned on lying within `cutoff` times that.

    `fan_in` is the last dim of the parameter. Outputs for an input of variance 1 have a variance of about 1 (0.97 at a
    cutoff of 3).
    """

    class Config(Initializer.Config):
        cutoff: float = 3.0

        def validate(self) -> None:
            _check_positive("cutoff", self.cutoff)

    def __init__(self, config: Config) -> None:
        self.cutoff = config.cutoff

    def fill_(self, local: Tensor, place: Place) -> None:
        TruncatedNormal.Config(std=place.shape[-1] ** -0.5, cutoff=self.cutoff).build().fill_(local, place)


class DepthScaledNormal(Initializer):
    """Normal with mean 0 and standard deviation `std / sqrt(2 (layer + 1))`, for layers numbered from 0.

    Projections that add to the residual stream, two in each layer, then add less the deeper they are. Source: Zhang et
    al., "Improving deep transformer with depth-scaled initialization and merged attention" (2019).
    """

    class Config(Initializer.Config):
        std: float = 0.02

        def validate(self) -> None:
            _check_positive("std", self.std)

    def __init__(self, config: Config) -> None:
        self.std = config.std

    def fill_(self, local: Tensor, place: Place) -> None:
        if place.layer is None:
            raise ValueError(
                "DepthScaledNormal must initialize a parameter of a numbered layer (such as "
                "layers.0.attention.o_proj.weight), got one without a number in its name. Use Normal."
            )
        Normal.Config(std=self.std / math.sqrt(2 * (place.layer + 1))).build().fill_(local, place)


def _inverse_normal_(uniform: Tensor, std: float) -> Tensor:
    return uniform.erfinv_().mul_(math.sqrt(2) * std)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(
            f"Got {name} {value}. It must be above 0. Set it to 0.02 or 3, say, or use Constant for zeros."
        )
