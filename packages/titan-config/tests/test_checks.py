"""Names and types are checked at each assignment, and again over the whole tree at build."""

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
def test_a_right_value_is_stored_as_it_is(name, value):
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
        ("i", True, "i: Got True (bool). All.Config.i must be int. Give it a number such as 8."),
        ("i", "100", "i: Got '100' (str). All.Config.i must be int. Write 100 without quotes."),
        ("i", 2.0, "i: Got 2.0 (float). All.Config.i must be int. Write 2."),
        ("f", False, "f: Got False (bool). All.Config.f must be float. Give it a number such as 0.1."),
        ("s", 3, "s: Got 3 (int). All.Config.s must be str. Write it with quotes: \"3\"."),
        ("b", 1, "b: Got 1 (int). All.Config.b must be bool. Write True or False."),
        ("path", "x/y", "path: Got 'x/y' (str). All.Config.path must be Path. Write Path(\"x/y\")."),
        ("color", "RED", "color: Got 'RED' (str). All.Config.color must be Color. Use one of: Color.RED, Color.BLUE."),
        ("mode", "half", "mode: Got 'half' (str). All.Config.mode must be one of 'full', 'none', 2. "
                         "Write one of these, such as 'full'."),
        ("opt", "3", "opt: Got '3' (str). All.Config.opt must be int or None. Write 3 without quotes."),
        ("li", (1, 2), "li: Got (1, 2) (tuple). All.Config.li must be list[int]. Write [1, 2]."),
        ("li", [1, "2"], "li.1: Got '2' (str). All.Config.li.1 must be int. Write 2 without quotes."),
        ("pair", [1, 2], "pair: Got [1, 2] (list). All.Config.pair must be tuple[float, int]. Write (1, 2)."),
        ("pair", (1,), "pair: Got (1,) (tuple). All.Config.pair must be tuple[float, int]. Give it 2 items."),
        ("d", {1: 1.0}, "d.1: Got 1 (int). All.Config.d.1 must be str. Write it with quotes: \"1\"."),
        ("d", [1], "d: Got [1] (list). All.Config.d must be dict. Write it with braces: {...}."),
        ("st", {"a"}, "st.0: Got 'a' (str). All.Config.st.0 must be int. Give it a number such as 8."),
        ("norm", None, "norm: Got None. All.Config.norm must be Norm.Config. "
                       "Write Norm.Config(...), or a config of a class derived from it."),
        ("norm", RMS, "norm: Got <class 'test_checks.RMS'>. All.Config.norm must be Norm.Config. "
                      "Write RMS.Config(...)."),
        ("fn", 3, "fn: Got 3 (int). All.Config.fn must be a function. "
                  "Give it the function itself or a functools.partial of it."),
    ],
)  # fmt: skip
def test_a_wrong_value_says_what_was_got_what_is_needed_what_to_do(name, value, message):
    message = message.replace("test_checks.", f"{__name__}.")
    config = All.Config()
    with pytest.raises(ConfigError) as assigned:
        setattr(config, name, value)
    with pytest.raises(ConfigError) as constructed:
        All.Config(**{name: value})
    assert str(assigned.value) == str(constructed.value) == message
    assert config == All.Config()


def test_a_wrong_name_gets_the_nearest_right_one():
    config = Norm.Config()
    message = "Got the name epps. Norm.Config has no such field. Did you mean eps?"
    for use in (
        lambda: setattr(config, "epps", 1.0),
        lambda: config.epps,
        lambda: Norm.Config(epps=1.0),
    ):
        with pytest.raises(ConfigError) as error:
            use()
        assert str(error.value) == message
    assert not hasattr(config, "epps")


def test_a_name_near_to_none_gets_a_list():
    with pytest.raises(ConfigError, match=r"RMS.Config has no such field. Use one of: eps\."):
        RMS.Config(zzz=1)


def test_positions_and_missing_values():
    class Linear(Configurable):
        class Config(Configurable.Config):
            dim: int

    with pytest.raises(ConfigError, match=r"Got 3 \(int\) by position. .* Write Linear.Config\(dim=...\)"):
        Linear.Config(3)
    with pytest.raises(ConfigError, match=r"dim: Got no dim. Linear.Config needs it. Write Linear.Config\(dim=...\)"):
        Linear.Config()
    with pytest.raises(ConfigError, match="Set it to None"):
        del Linear.Config(dim=1).dim


def test_build_checks_what_changed_in_place():
    config = All.Config(norms=[Norm.Config()])
    config.norms.append("norm")
    with pytest.raises(ConfigError, match=r"^norms.1: Got 'norm' \(str\). All.Config.norms.1 must be Norm.Config"):
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
        assert str(error.value).startswith("parts.x.0.li.0: Got '3' (str). All.Config.li.0 must be int.")


class Head(Configurable):
    class Config(Configurable.Config):
        num_heads: int = 8
        num_kv_heads: int = 8

        def validate(self) -> None:
            if self.num_heads % self.num_kv_heads:
                raise ConfigError(
                    f"Got {self.num_heads} heads. num_kv_heads must divide them. Set num_kv_heads to 4.", "num_kv_heads"
                )
            if self.num_heads > 100:
                raise ValueError("Got too many heads.")


class Model(Configurable):
    class Config(Configurable.Config):
        heads: list[Head.Config] = [Head.Config()]
        seen: list[int] = []

        def validate(self) -> None:
            assert all(head.num_heads % head.num_kv_heads == 0 for head in self.heads), "parts come first"

    def __init__(self, config: Config):
        self.config = config


def test_rules_run_over_the_whole_tree_and_errors_get_the_path():
    config = Model.Config()
    config.heads[0].num_kv_heads = 3
    with pytest.raises(ConfigError) as error:
        config.build()
    assert str(error.value) == (
        "heads.0.num_kv_heads: Got 8 heads. num_kv_heads must divide them. Set num_kv_heads to 4."
    )
    config.heads[0] = Head.Config(num_heads=200)
    with pytest.raises(ConfigError, match=r"^heads.0: Got too many heads."):
        config.build()


def test_the_rules_test_notices_a_walk_that_stops_at_the_root(monkeypatch):
    monkeypatch.setattr("titan_config.configurable.children", lambda value: iter(()))
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_rules_run_over_the_whole_tree_and_errors_get_the_path()


def test_dtypes_are_checked_without_importing_torch(monkeypatch):
    class dtype:
        __module__ = "torch"

    class Layer(Configurable):
        class Config(Configurable.Config):
            param: dtype | None = None

    before = "torch" in sys.modules
    assert Layer.Config(param=dtype()).param is not None
    with pytest.raises(ConfigError, match=r"must be torch.dtype or None. Write torch.bfloat16."):
        Layer.Config(param="bfloat16")
    assert ("torch" in sys.modules) == before


def test_an_integer_that_no_float_holds_fits_a_field_that_takes_integers_too() -> None:
    class Count(Configurable):
        class Config(Configurable.Config):
            either: float | int = 0

    assert Count.Config(either=10**400).either == 10**400
