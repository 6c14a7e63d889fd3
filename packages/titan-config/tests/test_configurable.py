"""A config builds the object that owns it, from a private copy that no longer changes."""

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
    """Behaves as torch's nn.Module does: attributes only work after its own `__init__`."""

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


def test_a_config_builds_its_owner_and_hands_it_runtime_objects():
    norm = Norm.Config(dim=64).build(device="meta")
    assert type(norm) is Norm
    assert (norm.config.dim, norm.config.eps, norm.device) == (64, 1e-5, "meta")


def test_the_base_may_stand_on_either_side():
    class Reversed(Module, Configurable):
        class Config(Configurable.Config):
            dim: int = 1

        def __init__(self, config: Config):
            super().__init__()
            self.dim = config.dim

    assert Reversed.Config(dim=3).build().dim == 3


def test_the_owner_holds_a_private_copy():
    config = Stack.Config()
    built = config.build()
    config.norm.eps = 1.0
    config.layers.append(Norm.Config(dim=9))
    config.names["a"].append(2)
    assert built.config == Stack.Config()


def test_the_private_copy_test_notices_a_shared_config(monkeypatch):
    monkeypatch.setattr(titan_config.configurable, "copied", lambda value, frozen=False: value)
    with pytest.raises(AssertionError):
        test_the_owner_holds_a_private_copy()


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
def test_a_built_config_refuses_every_change(change):
    config = Stack.Config().build().config
    with pytest.raises(ConfigError, match=r"A built config no longer changes. Make the change before build\(\)"):
        change(config)
    assert config == Stack.Config()


def test_a_deep_copy_of_a_built_config_can_be_changed():
    config = copy.deepcopy(Stack.Config().build().config)
    config.layers.append(Norm.Config(dim=2))
    config.names["b"] = [3]
    config.norm.eps = 1.0
    assert len(config.build().config.layers) == 2


def test_parts_are_built_by_their_owner_from_the_frozen_config():
    class Parent(Configurable):
        class Config(Configurable.Config):
            norm: Norm.Config = Norm.Config(dim=2)

        def __init__(self, config: Config):
            self.norms = [config.norm.build() for _ in range(2)]

    norms = Parent.Config().build().norms
    assert norms[0].config is norms[1].config
    with pytest.raises(ConfigError, match="no longer changes"):
        norms[0].config.dim = 3


def test_a_runtime_argument_may_not_shadow_a_field():
    with pytest.raises(ConfigError) as error:
        Norm.Config(dim=2).build(eps=3)
    assert str(error.value) == (
        "Got eps as an argument of Norm.Config.build(). It is a field of the config, and a value has one place. "
        "Set config.eps instead."
    )


def test_a_config_of_no_class_cannot_be_built():
    class Training(Configurable.Config):
        steps: int = 1

    for config in (Training(), Configurable.Config()):
        with pytest.raises(ConfigError, match="belongs to no class"):
            config.build()


def test_a_subclass_without_a_config_gets_one_that_builds_it():
    class Special(Norm):
        pass

    assert type(Special.Config(dim=2).build()) is Special
    assert type(Norm.Config(dim=2).build()) is Norm
    assert isinstance(Special.Config(dim=2), Norm.Config)
    assert repr(Special.Config(dim=2)) == "Special.Config(dim=2, eps=1e-05)"


def test_an_abstract_owner_needs_no_config_of_its_own():
    class Shape(Configurable, abc.ABC):
        @abc.abstractmethod
        def area(self) -> float: ...

    class Unit(Shape):
        def __init__(self, config: Configurable.Config):
            self.config = config

        def area(self) -> float:
            return 1.0

    assert Unit.Config().build().area() == 1.0
    with pytest.raises(ConfigError, match=r"whose class is abstract. .* Use the config of a class derived from Shape."):
        Shape.Config().build()


def test_several_bases_join_their_configs():
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

    assert str(error.value).endswith(
        "Norm.Config as the Config of Second. It builds Norm already, and a Config has one owner. "
        "Leave the line out, or write class Config(Norm.Config) inside Second."
    )
    assert type(Norm.Config(dim=1).build()) is Norm


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match=r"derives from Configurable.Config"):

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


def test_class_variables_and_methods_are_no_fields():
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


def test_equality_knows_nan_partials_and_types():
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


def test_configs_pickle_frozen_ones_included():
    frozen = Stack.Config().build().config
    for config in (Stack.Config(), frozen):
        assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ConfigError, match="no longer changes"):
        pickle.loads(pickle.dumps(frozen)).layers.append(Norm.Config(dim=1))
