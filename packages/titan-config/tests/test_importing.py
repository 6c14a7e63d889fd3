"""Loading imports only what is listed, and takes only what is what its path says."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import titan_config.importing
from titan_config import ConfigError, Configurable, from_dict, to_dict


class Part(Configurable):
    pass


HERE = __name__


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages on the path that say so when they are imported."""
    source = """
        import os, math
        from os import system
        from functools import partial as helper
        from titan_config import Configurable
        from enum import Enum

        class A(Configurable):
            class Config(Configurable.Config):
                x: int = 1

        class Color(Enum):
            RED = 1

        def start(x): return x
        Alias = A.Config
        class Plain: pass
        class Liar: __qualname__ = "A.Config"
        A.Config.hidden = staticmethod(os.system)
    """
    for name in ("titan_x", "evil", "pkg", "titanic"):
        (tmp_path / name).mkdir()
        for file in ("__init__", "sub"):
            (tmp_path / name / f"{file}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in [m for m in sys.modules if m.partition(".")[0] in ("titan_x", "evil", "pkg", "titanic")]:
        del sys.modules[module]


def decode(data, *allow):
    return titan_config.codec.decode(data, allow)


def test_listed_things_load(packages):
    assert decode({"$type": "titan_x.sub:A.Config", "x": 3}, "titan_").x == 3
    assert decode({"$enum": "pkg.sub:Color", "name": "RED"}, "pkg").name == "RED"
    assert decode({"$function": "titan_x.sub:start"}, "titan_")(3) == 3
    assert decode({"$function": "pkg.sub:start"}, "pkg.sub")(3) == 3


@pytest.mark.parametrize(
    ("data", "allow"),
    [
        ({"$type": "evil:A.Config"}, ("titan_",)),
        ({"$type": "titanic:A.Config"}, ("titan_",)),
        ({"$type": "pkg:A.Config"}, ("pk", "pkg.sub", "g", "")),
        ({"$enum": "evil:Color", "name": "RED"}, ("titan_",)),
        ({"$function": "evil:start"}, ("titan_",)),
        ({"$function": "os:system"}, ("titan_", "pkg")),
        ({"$function": "builtins:eval"}, ("titan_", "pkg")),
        ({"$function": "pkg.sub:start"}, ("pkg",)),
        ({"$partial": {"$function": "os:system"}, "args": ["true"], "keywords": {}}, ("titan_",)),
    ],
)
def test_what_is_not_listed_is_refused_before_it_is_imported(packages, data, allow):
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=r"which the allow-list does not hold. Only what is listed may be imported"):
        decode(data, *allow)
    assert set(sys.modules) - before == set()


def test_the_refusal_says_what_to_do(packages):
    with pytest.raises(ConfigError) as error:
        from_dict({"$type": "evil:A.Config"}, ("titan_", "pkg"))
    assert str(error.value).startswith("Got the import path evil:A.Config, which the allow-list does not hold.")
    assert "titan_*, pkg, " in str(error.value)
    assert str(error.value).endswith('If you trust that code, pass allow=(..., "evil").')


@pytest.mark.parametrize(
    "data",
    [
        {"$type": "titan_x:os.system"},
        {"$type": "titan_x:system"},
        {"$type": "titan_x:Alias"},
        {"$type": "titan_x:Plain"},
        {"$type": "titan_x:Liar"},
        {"$type": "titan_x:start"},
        {"$type": "titan_x:A"},
        {"$type": "titan_x:Configurable.Config"},
        {"$type": "titan_x:nothing"},
        {"$type": "titan_x.nothing:A.Config"},
        {"$function": "titan_x:os.system"},
        {"$function": "titan_x:system"},
        {"$function": "titan_x:helper"},
        {"$function": "titan_x:math.sqrt"},
        {"$function": "titan_x:A.Config.hidden"},
        {"$function": "titan_x:A.Config.__init__"},
        {"$function": "titan_x:__builtins__.eval"},
        {"$function": "titan_x:__loader__"},
        {"$function": "titan_x.os:system"},
        {"$function": "titan_x:"},
        {"$function": ":start"},
        {"$function": "titan_x"},
        {"$function": "titan_x:start()"},
        {"$enum": "titan_x:A", "name": "RED"},
    ],
)
def test_what_is_not_what_its_path_says_is_refused(packages, data):
    with pytest.raises(ConfigError, match=r"Got the (import path|module)"):
        decode(data, "titan_")


def test_the_attack_would_work_without_the_check(packages, monkeypatch):
    monkeypatch.setattr(titan_config.importing, "_says", lambda found, path: True)
    import os

    assert decode({"$function": "titan_x:os.system"}, "titan_") is os.system


def test_a_module_that_is_not_installed_says_so():
    with pytest.raises(ConfigError, match=r"module titan_none, which cannot be imported: .* Install the package"):
        from_dict({"$type": "titan_none:A.Config"})


def test_a_string_is_no_list():
    with pytest.raises(ConfigError, match=r"Got allow='titan_'. It is a list of names"):
        from_dict({"$type": "titan_x:A.Config"}, allow="titan_")


def test_by_default_titan_packages_and_the_script_may_be_loaded(packages):
    assert from_dict({"$type": "titan_x:A.Config"}).x == 1
    with pytest.raises(ConfigError, match="does not hold"):
        from_dict(to_dict(Part.Config()))
    assert from_dict(to_dict(Part.Config()), allow=(HERE,)) == Part.Config()


RECIPE = """
    import sys
    from titan_config import Configurable, load, save

    class Experiment(Configurable):
        class Config(Configurable.Config):
            steps: int = 1
        def __init__(self, config): self.config = config

    if __name__ == "__main__":
        action, path = sys.argv[1:]
        if action == "save":
            save(Experiment.Config(steps=7), path)
        else:
            print(type(load(path)) is Experiment.Config, load(path).steps)
"""


def test_a_class_of_a_script_is_saved_under_its_name_and_loads_with_it(tmp_path):
    recipe, run = tmp_path / "my_recipe.py", tmp_path / "run.json"
    recipe.write_text(textwrap.dedent(RECIPE))
    subprocess.run([sys.executable, recipe, "save", run], check=True)
    assert '"$type": "my_recipe:Experiment.Config"' in run.read_text()
    out = subprocess.run([sys.executable, recipe, "load", run], check=True, capture_output=True, text=True)
    assert out.stdout == "True 7\n"
    with pytest.raises(ConfigError, match="does not hold"):
        titan_config.load(run)
    loaded = titan_config.load(run, allow=(str(recipe),))
    assert (loaded.steps, type(loaded.build()).__name__) == (7, "Experiment")
    assert titan_config.load(run, allow=(str(recipe),)) == loaded
    del sys.modules["my_recipe"]
