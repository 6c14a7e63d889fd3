"""Field names and types are checked at every assignment, and again over the whole tree at build."""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
from titan_config import ConfigError, Configurable, to_dict


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Mode(enum.StrEnum):
    FULL = "full"


class Norm(Configurable):
    class Config(Configurable.Config):
        eps: float = 1e-5

    def __init__(self, config: Config):
        self.config = config


class RMS(Norm):
    pass


class All(Configurable):
    class Config(Configurable.Config):
        i: int = 1
        f: float = 1.0
        s: str = "a"
        b: bool = False
        any: Any = None
        path: Path = Path("a")
        color: Color = Color.RED
        mode: Literal["full", "none", 2] = "full"
        opt: Optional[int] = None  # noqa: UP045
        num: int | float | str = 1
        li: list[int] = []
        lf: list[float] = []
        pair: tuple[float, int] = (0.5, 1)
        many: tuple[int, ...] = ()
        empty: tuple[()] = ()
        d: dict[str, float] = {}
        st: set[int] = set()
        fs: frozenset[str] = frozenset()
        bare: list = []
        norm: Norm.Config = Norm.Config()
        maybe: Union[Norm.Config, None] = None  # noqa: UP007
        norms: list[Norm.Config] = []
        node: Configurable.Config | None = None
        fn: Callable[[int], int] = abs
        plain: Callable = abs

    def __init__(self, config: Config):
        self.config = config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("i", -3), ("f", 2.5), ("s", ""), ("b", True), ("any", object()), ("path", Path("x")), ("color", Color.BLUE),
        ("mode", 2), ("opt", 3), ("opt", None), ("num", 1), ("num", 1.5), ("num", "x"), ("li", [1, 2]), ("lf", [1.0]),
        ("pair", (1.0, 2)), ("many", (1, 2, 3)), ("d", {"a": 1.0}), ("st", {1}), ("fs", frozenset("ab")),
        ("bare", [1, "a"]), ("norm", RMS.Config()), ("maybe", RMS.Config()), ("maybe", None), ("empty", ()),
        ("norms", [Norm.Config(), RMS.Config()]), ("node", RMS.Config()), ("fn", functools.partial(pow, 2)),
        ("plain", len),
    ],
)  # fmt: skip
def test_a_valid_value_is_stored_unchanged(name, value):
    config = All.Config()
    setattr(config, name, value)
    assert getattr(config, name) is value
    assert getattr(All.Config(**{name: value}), name) is value


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("f", 3, 3.0), ("lf", [1, 2.0], [1.0, 2.0]), ("pair", (1, 2), (1.0, 2)), ("d", {"a": 1}, {"a": 1.0}),
        ("s", Mode.FULL, "full"),
    ],
)  # fmt: skip
def test_a_number_is_stored_as_the_type_of_its_field(name, value, stored):
    config = All.Config(**{name: value})
    assert repr(getattr(config, name)) == repr(stored)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("i", True, "i: All.Config.i must be int, got True (bool)."),
        ("i", "100", "i: All.Config.i must be int, got '100' (str). Write 100 without quotes."),
        ("i", 2.0, "i: All.Config.i must be int, got 2.0 (float). Write 2."),
        ("f", False, "f: All.Config.f must be float, got False (bool)."),
        ("s", 3, "s: All.Config.s must be str, got 3 (int). Write \"3\" with quotes."),
        ("b", 1, "b: All.Config.b must be bool, got 1 (int). Write True or False."),
        ("path", "x/y", "path: All.Config.path must be Path, got 'x/y' (str). Write Path(\"x/y\")."),
        ("color", "RED", "color: All.Config.color must be Color, got 'RED' (str). Use one of: Color.RED, Color.BLUE."),
        ("mode", "half", "mode: All.Config.mode must be one of 'full', 'none', 2, got 'half' (str)."),
        ("opt", "3", "opt: All.Config.opt must be int or None, got '3' (str). Write 3 without quotes."),
        ("li", (1, 2), "li: All.Config.li must be list[int], got (1, 2) (tuple). Write [1, 2]."),
        ("li", [1, "2"], "li.1: All.Config.li.1 must be int, got '2' (str). Write 2 without quotes."),
        ("pair", [1, 2], "pair: All.Config.pair must be tuple[float, int], got [1, 2] (list). Write (1, 2)."),
        ("pair", (1,), "pair: All.Config.pair must be tuple[float, int], got (1,) (tuple). "
                       "The tuple must have 2 items."),
        ("d", {1: 1.0}, "d.1: All.Config.d.1 must be str, got 1 (int). Write \"1\" with quotes."),
        ("d", [1], "d: All.Config.d must be dict, got [1] (list). Write {key: value}."),
        ("st", {"a"}, "st.0: All.Config.st.0 must be int, got 'a' (str)."),
        ("norm", None, "norm: All.Config.norm must be Norm.Config, got None. "
                       "Write Norm.Config(...) or the Config of a subclass."),
        ("norm", RMS, "norm: All.Config.norm must be Norm.Config, got <class 'test_checks.RMS'>. "
                      "Write RMS.Config(...)."),
        ("fn", 3, "fn: All.Config.fn must be a function, got 3 (int). "
                  "Pass the function itself or a functools.partial of it."),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_an_error_with_the_fix(name, value, message):
    message = message.replace("test_checks.", f"{__name__}.")
    config = All.Config()
    with pytest.raises(ConfigError) as assigned:
        setattr(config, name, value)
    with pytest.raises(ConfigError) as constructed:
        All.Config(**{name: value})
    assert str(assigned.value) == str(constructed.value) == message
    assert config == All.Config()


def test_an_unknown_name_error_suggests_the_nearest_field():
    config = Norm.Config()
    message = "Norm.Config has no field 'epps'. Did you mean eps?"
    for use in (
        lambda: setattr(config, "epps", 1.0),
        lambda: config.epps,
        lambda: Norm.Config(epps=1.0),
    ):
        with pytest.raises(ConfigError) as error:
            use()
        assert str(error.value) == message
    assert not hasattr(config, "epps")


def test_an_unknown_name_error_lists_the_fields_if_none_is_near():
    with pytest.raises(ConfigError, match=r"RMS.Config has no field 'zzz'. Use one of: eps\."):
        RMS.Config(zzz=1)


def test_positional_arguments_missing_fields_and_del_are_errors():
    class Linear(Configurable):
        class Config(Configurable.Config):
            dim: int

    with pytest.raises(ConfigError, match=r"keyword arguments only, got .* 3 \(int\)\. Write Linear.Config\(dim=...\)"):
        Linear.Config(3)
    with pytest.raises(
        ConfigError, match=r"dim: Required field Linear.Config.dim is missing. Write Linear.Config\(dim="
    ):
        Linear.Config()
    with pytest.raises(ConfigError, match=r"Linear.Config.dim cannot be deleted. Assign None"):
        del Linear.Config(dim=1).dim


def test_build_checks_lists_that_changed_in_place():
    config = All.Config(norms=[Norm.Config()])
    config.norms.append("norm")
    with pytest.raises(ConfigError, match=r"^norms.1: All.Config.norms.1 must be Norm.Config, got 'norm' \(str\)"):
        config.build()
    config.norms[1] = Norm.Config()
    config.lf.append(2)
    assert repr(config.build().config.lf) == "[2.0]"


def test_errors_carry_the_full_path():
    class Outer(Configurable):
        class Config(Configurable.Config):
            parts: dict[str, list[All.Config]] = {"x": [All.Config()]}

    config = Outer.Config()
    config.parts["x"][0].li.append("3")
    for act in (config.build, lambda: to_dict(config)):
        with pytest.raises(ConfigError) as error:
            act()
        assert error.value.path == "parts.x.0.li.0"
        assert str(error.value).startswith("parts.x.0.li.0: All.Config.li.0 must be int, got '3' (str).")


class Head(Configurable):
    class Config(Configurable.Config):
        num_heads: int = 8
        num_kv_heads: int = 8

        def validate(self) -> None:
            if self.num_heads % self.num_kv_heads:
                raise ConfigError(
                    f"num_kv_heads must divide num_heads ({self.num_heads}), got {self.num_kv_heads}.", "num_kv_heads"
                )
            if self.num_heads > 100:
                raise ValueError("num_heads must be at most 100.")


class Model(Configurable):
    class Config(Configurable.Config):
        heads: list[Head.Config] = [Head.Config()]
        seen: list[int] = []

        def validate(self) -> None:
            assert all(head.num_heads % head.num_kv_heads == 0 for head in self.heads), "children are validated first"

    def __init__(self, config: Config):
        self.config = config


def test_validate_runs_over_the_whole_tree_and_errors_have_the_path():
    config = Model.Config()
    config.heads[0].num_kv_heads = 3
    with pytest.raises(ConfigError) as error:
        config.build()
    assert str(error.value) == ("heads.0.num_kv_heads: num_kv_heads must divide num_heads (8), got 3.")
    config.heads[0] = Head.Config(num_heads=200)
    with pytest.raises(ConfigError, match=r"^heads.0: num_heads must be at most 100."):
        config.build()


def test_the_validate_test_detects_a_traversal_that_stops_at_the_root(monkeypatch):
    monkeypatch.setattr("titan_config.configurable.children", lambda value: iter(()))
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_validate_runs_over_the_whole_tree_and_errors_have_the_path()


def test_dtypes_are_checked_without_importing_torch(monkeypatch):
    class dtype:
        __module__ = "torch"

    class Layer(Configurable):
        class Config(Configurable.Config):
            param: dtype | None = None

    before = "torch" in sys.modules
    assert Layer.Config(param=dtype()).param is not None
    with pytest.raises(ConfigError, match=r"must be torch.dtype or None, got 'bfloat16' .*Write torch.bfloat16."):
        Layer.Config(param="bfloat16")
    assert ("torch" in sys.modules) == before


def test_an_integer_too_large_for_float_is_valid_in_a_field_of_float_or_int() -> None:
    class Count(Configurable):
        class Config(Configurable.Config):
            either: float | int = 0

    assert Count.Config(either=10**400).either == 10**400
