"""What dataclasses ignore silently is an error when the class is made."""

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
    """Make a Config derived from Base.Config with this body, as a class statement would."""
    annotations = body.pop("annotations", {})
    namespace = {"__module__": __name__, "__qualname__": "Sub.Config", "__annotations__": annotations, **body}
    return type(Base.Config)("Config", (Base.Config,), namespace)


def test_an_override_without_annotation():
    with pytest.raises(ConfigError) as error:
        declare(dim=3)
    assert str(error.value) == (
        "Got Sub.Config.dim = 3 without an annotation. A field states its type, also where a subclass only gives it "
        "another default. Write dim: <type> = ..., or ClassVar[...] for what is no field."
    )
    assert declare(dim=3, annotations={"dim": "int"})().dim == 3


@pytest.mark.parametrize("value", [3, None, "text", [1], len, lambda x: x])
def test_a_new_attribute_without_annotation(value):
    with pytest.raises(ConfigError, match="without an annotation"):
        declare(new=value)


@pytest.mark.parametrize("name", ["build", "validate", "total"])
def test_a_field_that_hides_a_method(name):
    with pytest.raises(ConfigError, match=f"Got a field Sub.Config.{name}. .*Config.{name} is a method"):
        declare(annotations={name: "int"}, **{name: 3})


def test_a_method_that_hides_a_field():
    def dim(self) -> int:
        return 1

    with pytest.raises(ConfigError, match="without an annotation"):
        declare(dim=dim)


def test_a_name_that_would_be_no_flag():
    with pytest.raises(ConfigError, match="do not begin with an underscore"):
        declare(annotations={"_hidden": "int"}, _hidden=1)


def test_a_field_that_is_no_argument():
    with pytest.raises(ConfigError, match="init=False"):
        declare(annotations={"new": "int"}, new=dataclasses.field(default=1, init=False))
    with pytest.raises(ConfigError, match="InitVar"):
        declare(annotations={"new": "dataclasses.InitVar[int]"}, new=1)


def test_a_second_dataclass_decorator():
    with pytest.raises(ConfigError, match=r"Got @dataclass on Twice.Config. .* Remove the decorator."):

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
def test_an_annotation_that_cannot_be_saved(annotation, shown):
    with pytest.raises(ConfigError) as error:
        declare(annotations={"new": annotation}, new=None)()
    assert str(error.value).startswith(f"Got the annotation {shown} for Sub.Config.new. A field holds what can be")
    assert str(error.value).endswith("an owner as Owner.Config.")


def test_an_annotation_that_cannot_be_read():
    with pytest.raises(ConfigError, match=r"'Missing' is not defined.*Import the name outside of TYPE_CHECKING"):
        declare(annotations={"new": "Missing"}, new=None)()


def test_annotations_may_name_what_a_function_defines():
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
