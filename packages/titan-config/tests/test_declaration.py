"""Definitions that dataclasses silently ignore are errors when the class is created."""

from __future__ import annotations

import dataclasses

import pytest
from titan_config import ConfigError, Configurable


class Base(Configurable):
    class Config(Configurable.Config):
        dim: int = 1

        def total(self) -> int:
            return self.dim


def declare(**body: object) -> type:
    """Return a subclass of Base.Config with this body, created as a class statement would."""
    annotations = body.pop("annotations", {})
    namespace = {"__module__": __name__, "__qualname__": "Sub.Config", "__annotations__": annotations, **body}
    return type(Base.Config)("Config", (Base.Config,), namespace)


def test_an_override_without_annotation_is_an_error():
    with pytest.raises(ConfigError) as error:
        declare(dim=3)
    assert str(error.value) == (
        "Sub.Config.dim must have a type annotation, got dim = 3. Write dim: <type> = ..., also to override a default, "
        "or annotate with ClassVar[...] to declare a class variable."
    )
    assert declare(dim=3, annotations={"dim": "int"})().dim == 3


@pytest.mark.parametrize("value", [3, None, "text", [1], len, lambda x: x])
def test_a_new_attribute_without_annotation_is_an_error(value):
    with pytest.raises(ConfigError, match=r"Sub.Config.new must have a type annotation"):
        declare(new=value)


@pytest.mark.parametrize("name", ["build", "validate", "total"])
def test_a_field_with_the_name_of_a_method_is_an_error(name):
    with pytest.raises(ConfigError, match=f"Field Sub.Config.{name} must not have the name of the method .*{name}"):
        declare(annotations={name: "int"}, **{name: 3})


def test_a_method_with_the_name_of_a_field_is_an_error():
    def dim(self) -> int:
        return 1

    with pytest.raises(ConfigError, match=r"Sub.Config.dim must have a type annotation"):
        declare(dim=dim)


def test_a_field_name_with_an_underscore_is_an_error():
    with pytest.raises(ConfigError, match=r"must not begin with an underscore .*got Sub.Config._hidden"):
        declare(annotations={"_hidden": "int"}, _hidden=1)


def test_init_false_and_init_var_are_errors():
    with pytest.raises(ConfigError, match="init=False"):
        declare(annotations={"new": "int"}, new=dataclasses.field(default=1, init=False))
    with pytest.raises(ConfigError, match="InitVar"):
        declare(annotations={"new": "dataclasses.InitVar[int]"}, new=1)


def test_a_dataclass_decorator_is_an_error():
    with pytest.raises(
        ConfigError, match=r"Twice.Config must not be decorated with @dataclass.* Remove the decorator."
    ):

        class Twice(Configurable):
            @dataclasses.dataclass(kw_only=True)
            class Config(Configurable.Config):
                size: int = 1

    with pytest.raises(ConfigError, match="Remove the decorator"):

        @dataclasses.dataclass(slots=True)
        class Slotted(Configurable.Config):
            size: int = 1


@pytest.mark.parametrize(
    ("annotation", "shown"),
    [(bytes, "bytes"), (Base, "Base"), (type, "type"), (complex, "complex"), (list[bytes], "bytes")],
)
def test_an_annotation_of_a_type_that_cannot_be_saved_is_an_error(annotation, shown):
    with pytest.raises(ConfigError) as error:
        declare(annotations={"new": annotation}, new=None)()
    assert str(error.value).startswith("The type of Sub.Config.new must be one that can be saved (")
    assert f", got {shown}. " in str(error.value)
    assert str(error.value).endswith("annotate a component as Owner.Config.")


def test_an_annotation_that_cannot_be_resolved_is_an_error():
    with pytest.raises(ConfigError, match=r"got name 'Missing' is not defined.*Import the name outside of TYPE_CHECK"):
        declare(annotations={"new": "Missing"}, new=None)()


def test_annotations_may_use_local_classes_of_a_function():
    class Inner(Configurable.Config):
        size: int = 2

    class Outer(Configurable):
        class Part(Configurable.Config):
            inner: Inner = Inner(size=3)

        class Config(Configurable.Config):
            part: Part | None = None  # noqa: F821
            nodes: list[Outer.Config] = []

    config = Outer.Config(part=Outer.Part(), nodes=[Outer.Config()])
    assert config.part.inner.size == 3
    with pytest.raises(ConfigError, match=r"must be Outer.Part or None"):
        config.part = Inner()
