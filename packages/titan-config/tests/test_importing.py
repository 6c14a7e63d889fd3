"""Loading imports only modules on the allow-list, and accepts only objects defined at their import path."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import titan_config.importing
from titan_config import ConfigError, Configurable, from_dict, to_dict
from titan_config.importing import DEFAULT_ALLOW


class Part(Configurable):
    pass


HERE = __name__


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Importable packages with classes and functions, some of them misleading."""
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


def test_listed_classes_enums_and_functions_load(packages):
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
def test_unlisted_modules_are_refused_before_import(packages, data, allow):
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=r"The import path .* is not on the allow-list \("):
        decode(data, *allow)
    assert set(sys.modules) - before == set()


def test_the_allow_list_error_has_the_fix(packages):
    with pytest.raises(ConfigError) as error:
        from_dict({"$type": "evil:A.Config"}, ("titan_", "pkg"))
    assert str(error.value).startswith("The import path evil:A.Config is not on the allow-list (titan_*, pkg, ")
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
def test_objects_not_defined_at_their_path_are_refused(packages, data):
    with pytest.raises(ConfigError, match=r"import path .*must|The module "):
        decode(data, "titan_")


def test_the_attack_works_without_the_check(packages, monkeypatch):
    monkeypatch.setattr(titan_config.importing, "_is_defined_at", lambda found, path: True)
    import os

    with pytest.raises(ConfigError, match="does not exist"):  # a module is imported only for a name that it defines
        decode({"$function": "titan_x:os.system"}, "titan_")
    decode({"$function": "titan_x:start"}, "titan_")
    assert decode({"$function": "titan_x:os.system"}, "titan_") is os.system


def test_an_error_about_an_imported_name_has_its_defining_module(packages):
    source = "from .sub import A as B\nfrom evil import Color\nfrom pkg import sub"
    (packages / "pkg" / "__init__.py").write_text(source)
    message = r"path pkg:B must name a component .* got a name that pkg only imports\. Write pkg\.sub:A\.$"
    with pytest.raises(ConfigError, match=message):
        titan_config.importing.find_config("pkg:B", ("pkg",))
    with pytest.raises(ConfigError, match=r"Write evil:Color\.$"):
        decode({"$enum": "pkg:Color", "name": "RED"}, "pkg")
    assert "pkg" not in sys.modules and "evil" not in sys.modules
    assert titan_config.importing.find_config("pkg.sub:A", ("pkg",)).__qualname__ == "A.Config"
    with pytest.raises(ConfigError, match=r"got the class pkg\.sub:A\.$"):
        titan_config.importing.find_config("pkg:B", ("pkg",))


def test_an_import_path_has_the_package_that_exports_the_class(packages):
    (packages / "pkg" / "__init__.py").write_text('from pkg.sub import A, Color\n__all__ = ["A"]')
    saved = {"$type": "pkg:A.Config", "x": 3}
    config = decode(saved, "pkg")
    assert type(config).__module__ == "pkg.sub" and to_dict(config) == saved
    assert titan_config.importing.path_of(sys.modules["pkg.sub"].Color) == "pkg.sub:Color"  # not in __all__
    assert decode({"$type": "pkg.sub:A.Config", "x": 3}, "pkg") == config  # where it is defined works too
    for entry in ("pkg.sub", "pkg.sub.*", "pkg.sub:A"):  # what was allowed where it is defined
        assert decode(saved, entry) == config
    (packages / "pkg" / "sub.py").rename(packages / "pkg" / "moved.py")
    (packages / "pkg" / "__init__.py").write_text('from pkg.moved import A\n__all__ = ["A"]')
    for name in ("pkg", "pkg.sub"):
        del sys.modules[name]
    assert decode(saved, "pkg").x == 3


def test_a_reexport_without_all_is_not_public(packages):
    (packages / "pkg" / "__init__.py").write_text("from pkg.sub import A, start")
    with pytest.raises(ConfigError, match=r"imported there, not defined|must name"):
        decode({"$function": "pkg:start"}, "pkg")
    with pytest.raises(ConfigError):
        decode({"$type": "pkg:A.Config", "x": 3}, "pkg")
    assert "pkg.sub" not in sys.modules


def test_a_star_import_goes_by_the_module_of_the_class(packages):
    (packages / "pkg" / "__init__.py").write_text('from pkg.sub import *\n__all__ = ["A"]')
    config = decode({"$type": "pkg.sub:A.Config", "x": 3}, "pkg")
    assert to_dict(config)["$type"] == "pkg.sub:A.Config"


@pytest.mark.parametrize(
    ("name", "source"),
    [("pkg", b"class A(:\n"), ("pkg", b"\xff"), ("pkg", b"A = 1\0"), ("sub", b"class A(:\n")],
)
def test_a_module_with_invalid_python_is_a_short_error(packages, name, source):
    (packages / "pkg" / f"{'__init__' if name == 'pkg' else name}.py").write_bytes(source)
    (packages / "titan_x" / "__init__.py").write_text(f"import pkg.{name}\nclass A: pass")
    for module in ("pkg" if name == "pkg" else f"pkg.{name}", "titan_x"):
        if module == "titan_x" and source != b"class A(:\n":
            continue
        with pytest.raises(ConfigError, match=f"The module {module} must be valid Python, got "):
            decode({"$type": f"{module}:A.Config"}, "pkg", "titan_x")


def test_a_module_that_is_not_installed_is_an_error():
    with pytest.raises(ConfigError, match=r"module titan_config.none cannot be imported: .* Install its package"):
        from_dict({"$type": "titan_config.none:A.Config"})


def test_allow_must_not_be_a_string():
    with pytest.raises(ConfigError, match=r"must be a sequence of strings, got a string. Write allow=\('titan_',\)"):
        from_dict({"$type": "titan_x:A.Config"}, allow="titan_")


def test_the_default_allow_list_has_the_seven_packages_and_the_script(packages):
    assert decode({"$function": "titan_config.codec:encode"}, *DEFAULT_ALLOW) is titan_config.codec.encode
    with pytest.raises(ConfigError, match="is not on the allow-list"):
        from_dict(to_dict(Part.Config()))
    assert from_dict(to_dict(Part.Config()), allow=(HERE,)) == Part.Config()


@pytest.mark.parametrize("name", ["titan_x:A.Config", "titan_x.sub:A.Config", "titan_models_x:A.Config", "titanic:A"])
def test_a_package_whose_name_begins_like_a_titan_package_is_refused(packages, name):
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="is not on the allow-list"):
        from_dict({"$type": name})
    assert set(sys.modules) - before == set()


@pytest.mark.parametrize(
    ("data", "allow"),
    [
        ({"$type": "pkg.sub:os.system"}, ("pkg",)),
        ({"$type": "pkg.sub:nothing"}, ("pkg",)),
        ({"$function": "pkg.sub:system"}, ("pkg.*",)),
        ({"$function": "pkg.sub:math.sqrt"}, ("pkg.sub",)),
        ({"$function": "titan_config.docs:ast.parse"}, DEFAULT_ALLOW),
        ({"$type": "titan_config.__main__:A"}, DEFAULT_ALLOW),
        ({"$type": "titan_config..docs:A"}, DEFAULT_ALLOW),
        ({"$type": "titan_config.docs.:A"}, DEFAULT_ALLOW),
        ({"$type": ".titan_config:A"}, DEFAULT_ALLOW),
    ],
)
def test_a_module_that_does_not_define_the_name_is_not_imported(packages, monkeypatch, data, allow):
    import_module = importlib.import_module
    monkeypatch.delitem(sys.modules, "titan_config.docs", raising=False)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}") or import_module(name))
    with pytest.raises(ConfigError, match=r"import path"):
        decode(data, *allow)


SHADOWED = """
import json, sys
sys.path.insert(0, "")                      # as `python -m` has it
from titan_config import ConfigError, from_dict
for name in json.loads(sys.argv[1]):
    try:
        print(type(from_dict({"$type": name})))
    except ConfigError as error:
        print(error)
"""


def test_nothing_is_imported_from_the_current_folder(tmp_path):
    source = "from titan_config import Configurable\nprint('EXECUTED')\nclass A(Configurable): pass\n"
    for file in ("titan_theirs.py", "titan_ft/__init__.py", "titan_data.py", "titan_parallel/sub.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(source)
    names = ["titan_theirs:A.Config", "titan_ft:A.Config", "titan_data:A.Config", "titan_parallel.sub:A.Config"]
    alone = tmp_path / "installed"  # the other packages exist only in the current folder
    alone.mkdir()
    (alone / "titan_config").symlink_to(Path(titan_config.__file__).parent)
    command = [
        sys.executable,
        "-S",
        "-c",
        f"import sys; sys.path.append({str(alone)!r})" + SHADOWED,
        json.dumps(names),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert "titan_theirs:A.Config is not on the allow-list" in lines[0]
    for package, line in zip(("titan_ft", "titan_data", "titan_parallel"), lines[1:], strict=True):
        assert line.startswith(f"{package} must be an installed package, got "), line
        assert line.endswith("in the current folder. Run from another folder.")


def test_a_package_of_the_current_folder_is_executed_without_the_check(tmp_path, monkeypatch):
    (tmp_path / "titan_ft.py").write_text("from titan_config import Configurable\nclass A(Configurable): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.delitem(sys.modules, "titan_ft", raising=False)
    with pytest.raises(ConfigError, match="must be an installed package"):
        from_dict({"$type": "titan_ft:A.Config"})
    monkeypatch.setattr(titan_config.importing, "DEFAULT_ALLOW", ())  # the packages that are checked
    assert type(from_dict({"$type": "titan_ft:A.Config"})).__module__ == "titan_ft"
    del sys.modules["titan_ft"]


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


def test_a_class_of_a_script_is_saved_under_the_name_of_the_script(tmp_path):
    recipe, run = tmp_path / "my_recipe.py", tmp_path / "run.json"
    recipe.write_text(textwrap.dedent(RECIPE))
    subprocess.run([sys.executable, recipe, "save", run], check=True)
    assert '"$type": "my_recipe:Experiment.Config"' in run.read_text()
    out = subprocess.run([sys.executable, recipe, "load", run], check=True, capture_output=True, text=True)
    assert out.stdout == "True 7\n"
    with pytest.raises(ConfigError, match="is not on the allow-list"):
        titan_config.load(run)
    loaded = titan_config.load(run, allow=(str(recipe),))
    assert (loaded.steps, type(loaded.build()).__name__) == (7, "Experiment")
    assert titan_config.load(run, allow=(str(recipe),)) == loaded
    del sys.modules["my_recipe"]
