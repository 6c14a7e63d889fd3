"""A config builds its owner class, which gets a private, read-only copy of the config."""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import math
import pickle
from typing import Any, ClassVar

import pytest
import titan_config.configurable
from titan_config import ConfigError, Configurable


class Module:
    """Stand-in for torch's nn.Module: attributes can be set only after its `__init__`."""

    def __init__(self) -> None:
        object.__setattr__(self, "_parameters", {})

    def __setattr__(self, name: str, value: Any) -> None:
        assert self._parameters is not None
        object.__setattr__(self, name, value)


class Norm(Configurable, Module):
    class Config(Configurable.Config):
        dim: int
        eps: float = 1e-5

    def __init__(self, config: Config, device: str = "cpu"):
        super().__init__()
        self.config, self.device = config, device


class Stack(Configurable):
    class Config(Configurable.Config):
        norm: Norm.Config = Norm.Config(dim=4)
        layers: list[Norm.Config] = [Norm.Config(dim=8)]
        names: dict[str, list[int]] = {"a": [1]}
        tags: set[str] = {"x"}

    def __init__(self, config: Config):
        self.config = config


def test_build_returns_the_owner_and_passes_runtime_objects():
    norm = Norm.Config(dim=64).build(device="meta")
    assert type(norm) is Norm
    assert (norm.config.dim, norm.config.eps, norm.device) == (64, 1e-5, "meta")


def test_configurable_may_be_the_first_or_the_last_base():
    class Reversed(Module, Configurable):
        class Config(Configurable.Config):
            dim: int = 1

        def __init__(self, config: Config):
            super().__init__()
            self.dim = config.dim

    assert Reversed.Config(dim=3).build().dim == 3


def test_the_owner_has_a_private_copy_of_the_config():
    config = Stack.Config()
    built = config.build()
    config.norm.eps = 1.0
    config.layers.append(Norm.Config(dim=9))
    config.names["a"].append(2)
    assert built.config == Stack.Config()


def test_the_private_copy_test_detects_a_shared_config(monkeypatch):
    monkeypatch.setattr(titan_config.configurable, "copied", lambda value, frozen=False: value)
    with pytest.raises(AssertionError):
        test_the_owner_has_a_private_copy_of_the_config()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c.norm, "dim", 2),
        lambda c: setattr(c, "norm", Norm.Config(dim=2)),
        lambda c: c.layers.append(Norm.Config(dim=2)),
        lambda c: c.layers.__setitem__(0, Norm.Config(dim=2)),
        lambda c: c.layers.sort(),
        lambda c: setattr(c.layers[0], "dim", 2),
        lambda c: c.names.update(b=[1]),
        lambda c: c.names.pop("a"),
        lambda c: c.names["a"].extend([1]),
        lambda c: c.tags.add("y"),
        lambda c: c.tags.__ior__({"y"}),
    ],
)
def test_a_built_config_is_read_only(change):
    config = Stack.Config().build().config
    with pytest.raises(ConfigError, match=r"A built config is read-only, got .* Change the config before build\(\)"):
        change(config)
    assert config == Stack.Config()


def test_a_deep_copy_of_a_built_config_is_mutable():
    config = copy.deepcopy(Stack.Config().build().config)
    config.layers.append(Norm.Config(dim=2))
    config.names["b"] = [3]
    config.norm.eps = 1.0
    assert len(config.build().config.layers) == 2


def test_an_owner_builds_children_from_its_frozen_config():
    class Parent(Configurable):
        class Config(Configurable.Config):
            norm: Norm.Config = Norm.Config(dim=2)

        def __init__(self, config: Config):
            self.norms = [config.norm.build() for _ in range(2)]

    norms = Parent.Config().build().norms
    assert norms[0].config is norms[1].config
    with pytest.raises(ConfigError, match="is read-only"):
        norms[0].config.dim = 3


def test_a_runtime_argument_must_not_be_a_field():
    with pytest.raises(ConfigError) as error:
        Norm.Config(dim=2).build(eps=3)
    assert str(error.value) == (
        "Arguments of Norm.Config.build() must not be fields of the config, got eps. Set config.eps instead."
    )


def test_a_config_outside_of_a_configurable_class_cannot_be_built():
    class Training(Configurable.Config):
        steps: int = 1

    for config in (Training(), Configurable.Config()):
        with pytest.raises(ConfigError, match="needs a Config that is defined inside a Configurable class, got"):
            config.build()


def test_a_subclass_without_a_config_gets_its_own():
    class Special(Norm):
        pass

    assert type(Special.Config(dim=2).build()) is Special
    assert type(Norm.Config(dim=2).build()) is Norm
    assert isinstance(Special.Config(dim=2), Norm.Config)
    assert repr(Special.Config(dim=2)) == "Special.Config(dim=2, eps=1e-05)"


def test_the_config_of_an_abstract_class_cannot_be_built():
    class Shape(Configurable, abc.ABC):
        @abc.abstractmethod
        def area(self) -> float: ...

    class Unit(Shape):
        def __init__(self, config: Configurable.Config):
            self.config = config

        def area(self) -> float:
            return 1.0

    assert Unit.Config().build().area() == 1.0
    with pytest.raises(
        ConfigError, match=r"got Shape.Config of an abstract class. Use .* a concrete subclass of Shape."
    ):
        Shape.Config().build()


def test_the_config_of_several_bases_has_the_fields_of_all():
    class Left(Configurable):
        class Config(Configurable.Config):
            left: int = 1

    class Right(Configurable):
        class Config(Configurable.Config):
            right: int = 2

    class Both(Left, Right):
        def __init__(self, config: Any):
            self.config = config

    class Own(Left, Right):
        class Config(Left.Config, Right.Config):
            own: int = 3

        def __init__(self, config: Config):
            self.config = config

    assert Both.Config(left=5).build().config.right == 2
    assert type(Both.Config().build()) is Both
    assert [field.name for field in dataclasses.fields(Own.Config)] == ["right", "left", "own"]


def test_a_config_has_one_owner():
    with pytest.raises(ConfigError) as error:

        class Second(Norm):
            Config = Norm.Config

    assert str(error.value).startswith("Second.Config must be a new class, got ")
    assert str(error.value).endswith(
        "Norm.Config, which builds Norm. Remove the assignment, or write class Config(Norm.Config) inside Second."
    )
    assert type(Norm.Config(dim=1).build()) is Norm


def test_a_config_must_be_a_subclass_of_configurable_config():
    with pytest.raises(ConfigError, match=r"Wrong.Config must be a subclass of Configurable.Config, got"):

        class Wrong(Configurable):
            class Config:
                dim: int = 1


def test_an_experiment_adds_fields_by_subclassing():
    class Trainer(Configurable):
        class Config(Configurable.Config):
            steps: int = 10

        def __init__(self, config: Config):
            self.config = config

    class Experiment(Trainer):
        class Config(Trainer.Config):
            steps: int = 20
            ema: float = 0.999

    assert Experiment.Config(ema=0.9).build().config.steps == 20


def test_defaults_are_copied_for_each_config():
    first, second = Stack.Config(), Stack.Config()
    first.norm.dim = 100
    first.layers[0].dim = 100
    first.names["a"].append(5)
    first.tags.add("z")
    assert second == Stack.Config(norm=Norm.Config(dim=4), layers=[Norm.Config(dim=8)], names={"a": [1]}, tags={"x"})


def test_configs_are_dataclasses():
    config = Norm.Config(dim=2)
    assert dataclasses.is_dataclass(config)
    assert dataclasses.asdict(config) == {"dim": 2, "eps": 1e-5}
    assert dataclasses.replace(config, eps=1.0) == Norm.Config(dim=2, eps=1.0)
    assert Norm.Config.__dataclass_fields__.keys() == {"dim", "eps"}


def test_class_variables_and_methods_are_not_fields():
    class Model(Configurable):
        class Config(Configurable.Config):
            family: ClassVar[str] = "llama"
            width: int = 4

            def __post_init__(self) -> None:
                self.width = 2 * self.width

            @property
            def hidden(self) -> int:
                return 4 * self.width

    class Special(Model):
        class Config(Model.Config):
            family = "special"

    assert (Model.Config(width=2).hidden, Special.Config.family) == (16, "special")
    assert [field.name for field in dataclasses.fields(Special.Config)] == ["width"]


def test_equality_handles_nan_partials_and_types():
    class Any_(Configurable):
        class Config(Configurable.Config):
            value: Any = None

    def same(one: Any, two: Any) -> bool:
        return Any_.Config(value=one) == Any_.Config(value=two)

    assert same(math.nan, math.nan)
    assert same(functools.partial(max, key=len), functools.partial(max, key=len))
    assert same([{"a": (1, 2)}], [{"a": (1, 2)}])
    assert not same(functools.partial(max, key=len), functools.partial(max, key=abs))
    assert not same(1, True)
    assert not same(1, 1.0)
    assert not same([1], (1,))
    assert not same([1], [1, 2])
    assert not same({1: "a"}, {"1": "a"})
    assert not same({1: "a"}, {True: "a"})
    assert not same(Norm.Config(dim=1), Norm.Config(dim=2))
    assert Any_.Config() != "another kind"


def test_configs_and_frozen_configs_can_be_pickled():
    frozen = Stack.Config().build().config
    for config in (Stack.Config(), frozen):
        assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ConfigError, match="is read-only"):
        pickle.loads(pickle.dumps(frozen)).layers.append(Norm.Config(dim=1))
