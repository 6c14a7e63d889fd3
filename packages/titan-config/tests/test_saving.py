"""Configs survive a round trip through plain data, JSON and files."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import titan_config.codec
from titan_config import ConfigError, Configurable, from_dict, from_json, load, save, to_dict, to_json

ALLOW = (__name__,)


class Color(enum.Enum):
    RED = "r"
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1


def double(x: float, by: float = 2.0) -> float:
    return by * x


class Part(Configurable):
    class Config(Configurable.Config):
        size: int = 1

    def __init__(self, config: Config):
        self.config = config


class Special(Part):
    class Config(Part.Config):
        name: str = "s"


class Inherits(Part):
    pass


class All(Configurable):
    class Config(Configurable.Config):
        i: int = 1
        f: float = dataclasses.field(default=1.5, metadata={"finite": False})
        s: str = "a"
        b: bool = False
        path: Path = Path("a/b")
        color: Color | None = Color.RED
        mode: Literal["full", 2] = "full"
        num: int | float | str | None = None
        items: list[float | str] = dataclasses.field(default_factory=list, metadata={"finite": False})
        pair: tuple[float, tuple[int, ...]] = (0.5, (1,))
        d: dict[str, list[int]] = {}
        keyed: dict[int | tuple[int, int], str] = {}
        st: set[int] = set()
        fs: frozenset[str] = frozenset()
        part: Part.Config = Part.Config()
        parts: list[Part.Config | None] = []
        two: tuple[Part.Config, Part.Config] = (Part.Config(), Special.Config())
        named: dict[str, Part.Config] = {}
        node: Configurable.Config | None = None
        fn: Callable[[float], float] | None = double
        any: Any = None

    def __init__(self, config: Config):
        self.config = config


def random_value(rng: random.Random, depth: int = 3) -> Any:
    """Return a random value for a field annotated `Any`."""
    leaves: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice([True, False]),
        lambda: rng.randint(-(10**20), 10**20),
        lambda: rng.choice([rng.gauss(0, 1e10), math.nan, math.inf, -math.inf, -0.0, 5e-324]),
        lambda: "".join(rng.choice('aé"\\\n\u2028\x00$😀') for _ in range(rng.randint(0, 6))),
        lambda: Path(rng.choice(["/x", "x/../y", "."])),
        lambda: rng.choice([*Color, Level.LOW]),
        lambda: rng.choice([double, Part, math.sqrt, functools.partial(double, 1.0, by=math.inf)]),
        lambda: rng.choice([Part.Config(size=rng.randint(0, 9)), Special.Config(), Inherits.Config(size=3)]),
    ]
    containers: list[Callable[[], Any]] = [
        lambda: [random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))],
        lambda: tuple(random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))),
        lambda: {rng.choice(["a", "$type", "b.c", ""]): random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))},
        lambda: {rng.choice([1, (1, "x"), None, True, "k"]): random_value(rng, depth - 1) for _ in range(2)},
        lambda: {rng.choice([1, "a", (2, 3), Color.RED]) for _ in range(3)},
        lambda: frozenset(rng.choice("abc") for _ in range(2)),
    ]
    return rng.choice(leaves + (containers if depth else []))()


def random_config(seed: int) -> All.Config:
    rng = random.Random(seed)
    return All.Config(
        i=rng.randint(-(2**70), 2**70),
        f=rng.choice([math.nan, math.inf, -math.inf, 0.1, 1e300]),
        s=rng.choice(["", "$type", "a\nb", "é"]),
        color=rng.choice([None, *Color]),
        mode=rng.choice(["full", 2]),
        num=rng.choice([1, 1.0, "1", None]),
        items=rng.choices([1.0, "x", math.inf], k=3),
        pair=(rng.random(), tuple(range(rng.randint(0, 3)))),
        d={"$x": [1], "y": []},
        keyed={1: "a", (1, 2): "b"},
        st=set(rng.choices(range(5), k=3)),
        fs=frozenset("ab"),
        parts=rng.choices([None, Part.Config(size=5), Special.Config(name="n")], k=3),
        two=(Special.Config(), Part.Config(size=2)),
        named={"a.b": Special.Config(), "c": Part.Config()},
        node=rng.choice([None, Special.Config(size=7)]),
        fn=rng.choice([double, functools.partial(double, by=3.0), None]),
        any=random_value(rng),
    )


def round_trip(config: All.Config) -> All.Config:
    return from_json(to_json(config), allow=(*ALLOW, "math"))


def test_every_kind_of_value_survives_a_round_trip():
    for seed in range(300):
        config = random_config(seed)
        back = round_trip(config)
        assert back == config, f"seed {seed}"
        assert to_dict(back) == to_dict(config) or "nan" in to_json(config)


@pytest.mark.parametrize(
    ("tag", "wrong"),
    [
        ("$tuple", lambda data, allow: list(data["$tuple"])),
        ("$float", lambda data, allow: 0.0),
        ("$type", lambda data, allow: Part.Config() if "Special" in data["$type"] else DECODERS["$type"](data, allow)),
        ("$function", lambda data, allow: abs),
        ("$enum", lambda data, allow: Color.BLUE),
        ("$path", lambda data, allow: Path()),
        ("$set", lambda data, allow: set()),
        ("$dict", lambda data, allow: {}),
        ("$partial", lambda data, allow: double),
    ],
)
def test_the_round_trip_test_detects_a_loss(monkeypatch, tag, wrong):
    monkeypatch.setitem(titan_config.codec._DECODERS, tag, wrong)
    with pytest.raises((AssertionError, ConfigError)):
        test_every_kind_of_value_survives_a_round_trip()


DECODERS = dict(titan_config.codec._DECODERS)


def test_the_data_is_plain_strict_json():
    text = to_json(All.Config(f=math.nan))
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data == to_dict(All.Config(f=math.nan))
    assert data["$type"] == f"{__name__}:All.Config"
    assert data["f"] == {"$float": "nan"}
    assert data["pair"] == {"$tuple": [0.5, {"$tuple": [1]}]}
    assert data["path"] == {"$path": "a/b"}
    assert data["color"] == {"$enum": f"{__name__}:Color", "name": "RED"}
    assert data["fn"] == {"$function": f"{__name__}:double"}
    assert data["part"] == {"$type": f"{__name__}:Part.Config", "size": 1}


def test_a_generated_config_class_survives_a_round_trip():
    assert type(from_dict(to_dict(Inherits.Config(size=4)), ALLOW).build()) is Inherits


class Derived(Configurable):
    class Config(Configurable.Config):
        width: int = 2

        def __post_init__(self) -> None:
            self.width = 2 * self.width


def test_post_init_does_not_run_again_when_loading():
    assert from_dict(to_dict(Derived.Config(width=3)), ALLOW).width == 6


def test_a_built_config_is_saved_like_any_config():
    config = random_config(1)
    assert to_json(config.build().config) == to_json(config)


def test_dtypes_and_torch_functions_survive_a_round_trip():
    torch = pytest.importorskip("torch")
    functional, init = torch.nn.functional, torch.nn.init
    values = [torch.bfloat16, torch.float8_e4m3fn, init.zeros_, functional.gelu, functional.silu]
    values.append(functools.partial(init.trunc_normal_, std=0.02))
    config = All.Config(any=values)
    assert from_json(to_json(config), allow=(*titan_config.importing.DEFAULT_ALLOW, __name__)) == config
    with pytest.raises(ConfigError, match=r"^any.0: torch has no dtype 'bfloat61'. Did you mean bfloat16"):
        from_dict({"$type": f"{__name__}:All.Config", "any": [{"$dtype": "bfloat61"}]}, ALLOW)
    with pytest.raises(ConfigError, match="torch has no dtype 'load'"):
        from_dict({"$type": f"{__name__}:All.Config", "any": {"$dtype": "load"}}, ALLOW)


@pytest.mark.parametrize("value", [object(), 3j, b"x", lambda: 0, [].append, Part(Part.Config()), sys])
def test_a_value_that_cannot_be_saved_is_an_error_with_its_path(value):
    with pytest.raises(ConfigError) as error:
        to_dict(All.Config(any={"x": [value]}))
    assert error.value.path == "any.x.0"
    assert str(error.value).startswith("any.x.0: A saved ")


def test_a_local_class_cannot_be_saved():
    class Local(Configurable):
        pass

    with pytest.raises(ConfigError, match=r"node: .* must have an import path, got .*Define it at the top level"):
        to_dict(All.Config(node=Local.Config()))


def test_saving_checks_types_and_runs_validate(tmp_path):
    class Checked(Configurable.Config):
        steps: int = 0
        items: list[int] = []

        def validate(self) -> None:
            if self.steps < 1:
                raise ConfigError(f"steps must be at least 1, got {self.steps}.", "steps")

    for write in (to_dict, to_json, lambda config: save(config, tmp_path / "x.json")):
        with pytest.raises(ConfigError, match=r"^steps: steps must be at least 1, got 0"):
            write(Checked())
    assert not list(tmp_path.iterdir())


def test_files_survive_a_round_trip_and_are_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "run" / "config.json"
    save(random_config(2), path)
    assert load(path, (*ALLOW, "math")) == random_config(2)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        save(random_config(3), path)
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{\n  "a": 1,\n  b: 2\n}',
            "config.json:3: A saved config must be JSON, got 'b: 2', column 3: Expecting property name",
        ),
        ("", "config.json:1: A saved config must be JSON, got '', column 1: Expecting value"),
        ("{\n", "config.json:2: A saved config must be JSON, got '', column 1: Expecting property name"),
        ('{"a": 1, "a": 2}', "config.json: Keys of a JSON object must be unique, got a more than once."),
        ("[1]", 'config.json: A saved config must be an object with "$type": "package.module:Owner.Config", got [1]'),
        ('{"i": 1}', 'config.json: A saved config must be an object with "$type": "package.module:Owner.Config", got'),
        ('{"$type": "T:All.Config", "ii": 1}', "config.json: All.Config has no field 'ii'. Did"),
        ('{"$type": "T:All.Config", "part": {"$type": "T:Part.Config", "sise": 1}}',
         "config.json: part: Part.Config has no field 'sise'. Did you mean size?"),
        ('{"$type": "T:All.Config", "parts": [null, {"$type": "T:Part.Config", "size": "1"}]}',
         "config.json: parts.1.size: Part.Config.size must be int, got '1' (str). Write 1 without quotes."),
        ('{"$type": "T:All.Config", "part": {"$tipe": "T:Part.Config"}}',
         "config.json: part: Unknown tag $tipe in a saved config. Did you mean $type?"),
        ('{"$type": "T:All.Config", "color": {"$enum": "T:Color", "name": "GREEN"}}',
         "config.json: color: Color has no member 'GREEN'."),
        ('{"$type": 3}', "config.json: An object with the key $type must have the format that to_dict writes, got {"),
        ('{"$type": "T:All.Config", "f": {"$float": "3"}}', "config.json: f: An object with the key $float must"),
        ('{"$type": "T:All.Config", "keyed": {"$dict": [1]}}', "config.json: keyed: An object with the key $dict must"),
        ('{"$type": "T:All.Config", "path": {"$path": "a", "x": 1}}',
         "config.json: path: An object with the key $path must have the format that to_dict writes, got {'$path':"),
        ('{"$type": "T:All.Config", "st": {"$set": [[1]]}}', "config.json: st: An object with the key $set must"),
        ('{"$type": "T:All.Config", "keyed": {"$dict": [[[1], 2]]}}',
         "config.json: keyed: An object with the key $dict must"),
        ('{"$type": "T:All.Config", "st": {"$set": 1}}', "config.json: st: An object with the key $set must"),
        ('{"$type": "T:All.Config", "fn": {"$partial": null}}', "config.json: fn: An object with the key $partial mu"),
        ('{"$type": "T:Color"}', "config.json: $type must name a Config class, got Color. Use $enum"),
        ('{"$type": "T:All.Config", "any": {"$enum": "T:Part.Config", "name": "x"}}',
         "config.json: any: $enum must name an enum, got Part.Config. Use $type"),
    ],
)  # fmt: skip
def test_an_invalid_file_is_an_error_with_the_place(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text.replace('"T:', f'"{__name__}:'))
    with pytest.raises(ConfigError) as error:
        load(path, ALLOW)
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"none.json: The config file cannot be read: No such file"):
        load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.json: A config file must be UTF-8 text, got invalid bytes"):
        load(tmp_path / "binary.json")


def test_fields_missing_from_saved_data_take_their_defaults():
    data = to_dict(All.Config(i=5))
    del data["num"], data["part"]
    assert from_dict(data, ALLOW) == All.Config(i=5)
