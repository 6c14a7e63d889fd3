"""A config file may load only classes that the command line names or the program imports."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

LOSSES = """
    print("imported {name}")
    from titan_config import Configurable
    from {recipe} import Loss

    def soft(x): return x
    def run_command(x): raise SystemExit("attacked")

    class Scale(Configurable):
        class Config(Configurable.Config):
            factor: float = 2.0

    class ZLoss(Loss):
        class Config(Loss.Config):
            z_weight: float = 1e-4
            scale: Configurable.Config = Scale.Config()
            act: "Callable" = soft

    class YLoss(Loss):
        pass
"""
BASE = """
    from titan_config import Configurable
    class Loss(Configurable):
        class Config(Configurable.Config): ...
"""
RECIPE = """
    import functools
    from collections.abc import Callable
    from titan_config import Configurable, cli, save
    from base import Loss
    {imports}

    class Run(Configurable):
        class Config(Configurable.Config):
            loss: Loss.Config = {loss}
            losses: list[Loss.Config] = []
            init: Callable | None = None
            note: str = ""
            data: list[list[Callable]] = []

    if __name__ == "__main__":
        config = cli(Run.Config)
        save(config, "run.json")
        print(config.loss._owner.__name__, [loss._owner.__name__ for loss in config.losses], config.init)
"""


@pytest.fixture
def call(tmp_path):
    """`call(recipe, words)` runs a recipe in a process and returns its output; "mine" and "evil" are importable."""
    (tmp_path / "base.py").write_text(textwrap.dedent(BASE))
    for name in ("mine", "evil"):
        source = textwrap.dedent(LOSSES).format(name=name, recipe="base")
        source = source.replace("from base", "from collections.abc import Callable\nfrom base", 1)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "losses.py").write_text(source)
    recipes = {
        "plain": ("", "Loss.Config()"),
        "imports": ("import mine.losses", "Loss.Config()"),
        "uses": ("from mine.losses import ZLoss", "ZLoss.Config()"),
    }
    for name, (imports, loss) in recipes.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(RECIPE).format(imports=imports, loss=loss))

    def call(recipe: str, words: str) -> str:
        command = [sys.executable, f"{recipe}.py", *words.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    call.folder = tmp_path
    return call


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("recipe", "words", "then"),
    [
        ("uses", "", ""),
        ("plain", "--loss mine.losses:ZLoss", "--loss mine.losses:ZLoss"),
        ("imports", "--loss ZLoss", ""),
        ("imports", "--loss mine.losses:ZLoss", ""),
        ("plain", "--losses mine.losses:YLoss mine.losses:ZLoss", "--losses mine.losses:YLoss mine.losses:ZLoss"),
        ("plain", "--losses mine.losses:YLoss mine.losses:ZLoss", "--note mine.losses:YLoss --loss mine.losses:ZLoss"),
        ("plain", "--init mine.losses:soft", "--init mine.losses:soft"),
    ],
)
def test_classes_named_by_the_recipe_or_the_command_line_load(call, recipe, words, then):
    first = call(recipe, words)
    assert "error" not in first and "got" not in first.lower(), first
    again = call(recipe, f"--config run.json {then}")
    first, again = (text.split(" at 0x")[0].splitlines()[-1] for text in (first, again))
    if "--loss mine" in then and "--loss mine" not in words:
        first = first.replace("Loss [", "ZLoss [", 1)
    assert again == first


@pytest.mark.parametrize(
    ("recipe", "spoil", "flag"),
    [
        ("plain", {"loss": {"$type": "evil.losses:ZLoss.Config"}}, "--loss evil.losses:ZLoss.Config"),
        ("uses", {"loss": {"$type": "evil.losses:ZLoss.Config"}}, "--loss evil.losses:ZLoss.Config"),
        ("uses", {"init": {"$function": "evil.losses:soft"}}, "--init evil.losses:soft"),
        ("uses", {"init": {"$function": "mine.losses:run_command"}}, "--init mine.losses:run_command"),
        ("uses", {"losses": [{"$type": "evil.losses:YLoss.Config"}]}, "--losses.0 evil.losses:YLoss.Config"),
        ("plain", {"$type": "evil.losses:Scale.Config"}, "import its module in the recipe"),
    ],
)
def test_classes_named_only_in_a_file_are_refused_before_import(call, recipe, spoil, flag):
    call(recipe, "")
    change(call.folder / "run.json", **spoil)
    said = call(recipe, "--config run.json")
    assert "must be imported by the program or named on the command line" in said
    assert flag in said
    assert "imported evil" not in said


def test_the_flag_in_the_error_message_allows_the_class(call):
    call("plain", "--loss mine.losses:ZLoss")
    refused = call("plain", "--config run.json")
    flag = refused.partition(" add ")[2].strip().removesuffix(".")
    assert flag == "--loss mine.losses:ZLoss.Config"
    assert call("plain", f"--config run.json {flag}").splitlines()[-1].startswith("ZLoss")


def test_json_on_the_command_line_may_name_functions(call):
    data = json.dumps([[{"$function": "mine.losses:soft"}]]).replace(" ", "")
    assert "got" not in call("plain", f"--data {data}").lower()
