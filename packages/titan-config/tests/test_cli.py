"""The command line of a config: one flag per field, components chosen by name, one short message per error."""

from __future__ import annotations

import enum
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from titan_config import ConfigError, Configurable, cli, save, to_text
from titan_config.text import flatten


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Optimizer(Configurable):
    class Config(Configurable.Config):
        lr: float = 8e-4
        """The learning rate."""
        decay: float = 0.1

    def __init__(self, config: Config):
        self.config = config


class AdamW(Optimizer):
    """Adam with decoupled weight decay. As in its paper."""

    class Config(Optimizer.Config):
        betas: tuple[float, float] = (0.9, 0.95)


class Muon(Optimizer):
    class Config(Optimizer.Config):
        lr: float = 0.02
        momentum: float = 0.95
        betas: str = "none"


class Needy(Optimizer):
    class Config(Optimizer.Config):
        rank: int


class Converter(Configurable):
    class Config(Configurable.Config):
        names: list[str] = []


class LoRA(Converter):
    class Config(Converter.Config):
        rank: int = 8


class Validator(Configurable):
    class Config(Configurable.Config):
        steps: int = 5


class Training(Configurable.Config):
    steps: int = 10
    """How many steps to take."""
    seq_len: int = 2048
    dtype: Literal["float32", "bfloat16"] = "float32"
    deterministic: bool = False
    color: Color = Color.RED
    seed: int | None = None
    limit: float | None = 1.0

    def validate(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}.", "steps")


def zeros(x: float) -> float:
    return 0 * x


class Trainer(Configurable):
    """Trains a model. At length."""

    class Config(Configurable.Config):
        training: Training = Training()
        """The loop itself."""
        optimizer: Optimizer.Config = AdamW.Config()
        validator: Validator.Config | None = None
        converters: list[Converter.Config] = []
        pair: tuple[Optimizer.Config, ...] = (AdamW.Config(), Muon.Config())
        named: dict[str, Optimizer.Config] = {"head-1": AdamW.Config()}
        dump_folder: Path = Path("outputs")
        note: str = ""
        numbers: list[int] = [1]
        words: tuple[str, ...] = ()
        groups: list[list[str]] | None = None
        weights: dict[str, float] = {"a": 1.0, "b-c": 2.0}
        init: Callable[[float], float] | None = None
        anything: Any = None
        open: float = math.inf

    def __init__(self, config: Config):
        self.config = config


def run(*argv: str) -> Trainer.Config:
    return cli(Trainer.Config(), list(argv), allow=(__name__,))


@pytest.fixture
def fails(capsys):
    """Return the error message of a wrong command line, after checking its length, the exit code 2 and empty stdout."""

    def fails(*argv: str, config: Any = None) -> str:
        with pytest.raises(SystemExit) as end:
            cli(config or Trainer.Config(), list(argv), allow=(__name__,))
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert len(err) < 1500
        assert "Traceback" not in err
        assert err.startswith(f"{Path(sys.argv[0]).name}: ")
        return err.partition(": ")[2].strip()

    return fails


@pytest.fixture
def prints(capsys):
    def prints(*argv: str) -> str:
        with pytest.raises(SystemExit) as end:
            run(*argv)
        assert end.value.code == 0
        return capsys.readouterr().out

    return prints


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("--training.steps 100", "training.steps", 100),
        ("--training.steps=100", "training.steps", 100),
        ("--training.seq-len 64", "training.seq_len", 64),
        ("--optimizer.lr 3e-4", "optimizer.lr", 3e-4),
        ("--optimizer.lr 1", "optimizer.lr", 1.0),
        ("--optimizer.lr -1e-3", "optimizer.lr", -1e-3),
        ("--optimizer.lr 1e308", "optimizer.lr", 1e308),
        ("--open inf", "open", float("inf")),
        ("--optimizer.betas 0.8 0.9", "optimizer.betas", (0.8, 0.9)),
        ("--training.dtype bfloat16", "training.dtype", "bfloat16"),
        ("--training.color BLUE", "training.color", Color.BLUE),
        ("--training.deterministic", "training.deterministic", True),
        ("--training.deterministic True", "training.deterministic", True),
        ("--training.deterministic false", "training.deterministic", False),
        ("--training.seed 3", "training.seed", 3),
        ("--training.seed None", "training.seed", None),
        ("--training.limit None", "training.limit", None),
        ("--dump_folder a/b", "dump_folder", Path("a/b")),
        ("--dump-folder a/b", "dump_folder", Path("a/b")),
        ("--note None", "note", "None"),
        ("--note=--x=1", "note", "--x=1"),
        ("--note=", "note", ""),
        ("--numbers 1 -2 3", "numbers", [1, -2, 3]),
        ("--numbers", "numbers", []),
        ("--words a b", "words", ("a", "b")),
        ('--groups [["a","b"],[]]', "groups", [["a", "b"], []]),
        ("--groups None", "groups", None),
        ("--weights c 3", "weights", {"c": 3.0}),
        ("--weights.a 3", "weights", {"a": 3.0, "b-c": 2.0}),
        ("--weights.b-c 3", "weights", {"a": 1.0, "b-c": 3.0}),
        ("--anything 3", "anything", 3),
        ("--anything text", "anything", "text"),
        ("--named.head-1.lr 1", "named.head-1.lr", 1.0),
        ("--pair.1.momentum 0.5", "pair.1.momentum", 0.5),
        ("--training.steps 1 --training.steps 2", "training.steps", 2),
    ],
)
def test_a_flag_sets_only_its_own_field(words, path, value):
    config = run(*words.split())
    flat, start = flatten(config), flatten(Trainer.Config())
    at = config
    for name in path.split("."):
        at = at[int(name)] if name.isdigit() else at[name] if isinstance(at, dict) else getattr(at, name)
    assert repr(at) == repr(value)
    assert {name for name in flat if repr(flat[name]) != repr(start[name])} <= {path}


def test_a_function_is_chosen_by_its_import_path():
    assert run("--init", f"{__name__}:zeros").init is zeros
    assert run("--init", "None").init is None


def test_dtypes_are_chosen_by_name():
    torch = pytest.importorskip("torch")

    class Layer(Configurable):
        class Config(Configurable.Config):
            dtype: torch.dtype | None = None

    assert cli(Layer.Config(), ["--dtype", "bfloat16"]).dtype is torch.bfloat16


def test_cli_returns_a_mutable_copy():
    config = Trainer.Config()
    result = cli(config, ["--training.steps", "3"])
    result.numbers.append(4)
    assert config == Trainer.Config()


def test_cli_takes_a_function_or_class_and_defaults_to_sys_argv(monkeypatch):
    assert cli(lambda: Trainer.Config(note="x"), []).note == "x"
    assert cli(Trainer.Config, ["--note", "y"]).note == "y"
    monkeypatch.setattr(sys, "argv", ["prog", "--note", "z"])
    assert cli(Trainer.Config()).note == "z"


def test_choosing_a_component_by_name_adds_its_flags():
    config = run("--optimizer.momentum", "0.5", "--optimizer", "Muon")
    assert config.optimizer == Muon.Config(lr=8e-4, momentum=0.5)


def test_a_chosen_component_keeps_only_the_fields_of_the_common_base():
    config = Trainer.Config(optimizer=AdamW.Config(lr=1.0, decay=0.5, betas=(0.1, 0.2)))
    chosen = cli(config, ["--optimizer", "Muon"]).optimizer
    assert chosen == Muon.Config(lr=1.0, decay=0.5)
    assert chosen.betas == "none"


def test_choosing_the_same_component_changes_nothing():
    config = Trainer.Config(optimizer=AdamW.Config(betas=(0.1, 0.2)))
    assert cli(config, ["--optimizer", "AdamW"]) == config


def test_a_component_is_chosen_by_its_import_path():
    for path in (f"{__name__}:Muon", f"{__name__}:Muon.Config"):
        assert isinstance(run("--optimizer", path).optimizer, Muon.Config)


def test_a_component_with_required_fields_takes_them_from_the_command_line(fails):
    assert run("--optimizer", "Needy", "--optimizer.rank", "4").optimizer == Needy.Config(lr=8e-4, rank=4)
    assert fails("--optimizer", "Needy") == (
        "Required flag --optimizer.rank is missing: Needy.Config.rank has no default."
    )


def test_a_component_is_turned_off_and_on():
    config = Trainer.Config(validator=Validator.Config(steps=3))
    assert cli(config, ["--validator", "None"]).validator is None
    assert run("--validator", "Validator", "--validator.steps", "7").validator == Validator.Config(steps=7)


def test_components_in_lists_tuples_and_dicts():
    config = run("--converters", "LoRA", "Converter", "--converters.0.rank", "3", "--converters.1.names", "a", "b")
    assert config.converters == [LoRA.Config(rank=3), Converter.Config(names=["a", "b"])]
    assert cli(config, ["--converters"]).converters == []
    assert cli(config, ["--converters.1", "LoRA"]).converters[1] == LoRA.Config(names=["a", "b"])
    assert run("--pair.0", "Muon", "--pair.0.momentum", "0").pair == (Muon.Config(lr=8e-4, momentum=0), Muon.Config())
    assert run("--pair", "Muon").pair == (Muon.Config(lr=8e-4),)
    assert isinstance(run("--named.head-1", "Muon").named["head-1"], Muon.Config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--training.step 3", "Unknown flag --training.step. Did you mean --training.steps?"),
        ("--steps 3", "Unknown flag --steps. Did you mean --training.steps?"),
        ("--optimzer Muon", "Unknown flag --optimzer. Did you mean --optimizer?"),
        ("--optimizer.momentum 1", "The chosen component has no flag --optimizer.momentum. "
                                   "The flag is available with --optimizer Muon."),
        ("--optimizer Optimizer --optimizer.betas 1", "The chosen component has no flag --optimizer.betas. The flag is "
                                                      "available with --optimizer AdamW or --optimizer Muon."),
        ("--converters.0.rank 1", "The chosen component has no flag --converters.0.rank. "
                                  "The flag is available with --converters LoRA."),
        ("--optimizer.lr nan", "optimizer.lr: AdamW.Config.lr must be a finite number, got nan."),
        ("--optimizer.lr 1e999", "optimizer.lr: AdamW.Config.lr must be a finite number, got inf."),
        ("--optimizer.betas 0.9 inf", "optimizer.betas.1: AdamW.Config.betas.1 must be a finite number, got inf."),
        ("--training.limit nan", "training.limit: Training.limit must be a finite number, got nan."),
        ("--training.steps ten", "--training.steps must be int, got 'ten'. Write --training.steps INT."),
        ("--training.steps 1.5", "--training.steps must be int, got '1.5'. Write --training.steps INT."),
        ("--training.steps", "--training.steps must be int, got no value. Write --training.steps INT."),
        ("--training.steps 1 2", "--training.steps must be int, got '1 2'. Write --training.steps INT."),
        ("--training.seed x", "--training.seed must be int or None, got 'x'. Write --training.seed {None}|INT."),
        ("--training.dtype bfloat", "--training.dtype must be one of 'float32', 'bfloat16', got 'bfloat'. "
                                    "Did you mean bfloat16?"),
        ("--training.color GREEN", "--training.color must be Color, got 'GREEN'. Use one of: BLUE, RED."),
        ("--training.deterministic maybe", "--training.deterministic must be bool, got 'maybe'. "
                                           "Write --training.deterministic True|False."),
        ("--training.no-deterministic", "Unknown flag --training.no-deterministic. "
                                        "To turn the switch off, write --training.deterministic False."),
        ("--optimizer.betas 1", "--optimizer.betas must be tuple[float, float], got '1'. "
                                "Write --optimizer.betas FLOAT FLOAT."),
        ("--numbers 1 x", "--numbers must be list[int], got '1 x'. Write --numbers [INT [INT ...]]."),
        ("--weights a", "--weights must be dict[str, float], got 'a'. Write --weights [STR FLOAT [STR FLOAT ...]]."),
        ("--groups [1]", "--groups: Trainer.Config.groups.0 must be list[str], got 1 (int). Write [1]."),
        ("--training.steps 0", "training.steps: steps must be at least 1, got 0."),
        ("--optimizer Muno", "--optimizer must be the name of a component or an import path such as "
                             "package.module:Class, got Muno. Did you mean Muon?"),
        ("--optimizer None", "--optimizer must be a component (the field of Trainer.Config is not optional), got None. "
                             "Use one of: AdamW, Muon, Needy, Optimizer."),
        ("--optimizer", "--optimizer must be followed by the name of one component, got 0 values."),
        ("--optimizer HERE:LoRA", "--optimizer must be Optimizer or a subclass, got HERE:LoRA. "
                                  "Use one of: AdamW, Muon, Needy, Optimizer."),
        ("--optimizer HERE:zeros", "The import path HERE:zeros must name a component defined in HERE, got the "
                                   "function HERE:zeros."),
        ("--validator None --validator.steps 3", "The chosen component has no flag --validator.steps. "
                                                 "The flag is available with --validator Validator."),
        ("extra", "The first argument must be a flag, got 'extra'. Write --name extra."),
        ("--config", "--config must be followed by one file, got 0. Write --config run.json."),
        ("--print-config x", "--print-config takes no value, got 'x'."),
        ("--help optimzer", "--help must be followed by the name of a section or flag, got optimzer. "
                            "Did you mean optimizer?"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_exits_with_code_2_and_a_message(fails, words, message):
    assert fails(*words.replace("HERE", __name__).split()) == message.replace("HERE", __name__)


def test_an_import_path_to_something_else_is_an_error(fails):
    assert "The import path os:system must name a component" in fails("--optimizer", "os:system")
    assert fails("--init", "os:system").startswith("--init: The import path os:system must name a function")


def test_an_ambiguous_component_name_is_an_error(fails):
    class Base(Configurable):
        pass

    def make() -> type:
        class Twin(Base):
            pass

        return Twin

    twins = [make()]
    twins.append(type("Twin", (Base,), {"__module__": __name__, "__qualname__": "Other.Twin"}))

    class Owner(Configurable):
        class Config(Configurable.Config):
            part: Base.Config | None = None

    message = fails("--part", "Twin", config=Owner.Config())
    assert message.startswith("--part must name exactly one component, got Twin, the name of 2 components.")
    assert f"Write one of: {__name__}:" not in message


def test_an_error_in_the_recipe_function_is_a_short_message(fails):
    def recipe() -> Trainer.Config:
        return Trainer.Config(traning=Training())

    assert fails(config=recipe) == "Trainer.Config has no field 'traning'. Did you mean training?"


def test_a_field_may_not_have_the_name_of_a_built_in_flag(fails):
    class Clash(Configurable):
        class Config(Configurable.Config):
            config: int = 1

    assert fails(config=Clash.Config()).startswith("Field Clash.Config.config must not have the name")


def test_config_flag_starts_from_a_saved_run(tmp_path, fails):
    path = tmp_path / "run.json"
    save(Trainer.Config(note="saved", optimizer=Muon.Config(momentum=0.1)), path)
    config = run("--config", str(path), "--training.steps", "5", "--optimizer.momentum", "0.2")
    assert config == Trainer.Config(note="saved", optimizer=Muon.Config(momentum=0.2), training=Training(steps=5))
    save(Training(), path)
    assert fails("--config", str(path)) == (f"{path}: The config file must contain a Trainer.Config, got a Training.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n 1}", "run.json:2: A saved config must be JSON, got '1}', column 2"),
        ('{"$type": "T:Trainer.Config", "nte": ""}', "run.json: Trainer.Config has no field 'nte'. Did you mean note"),
        (
            '{"$type": "os:Trainer.Config"}',
            "run.json: Classes and functions in a config file must be imported by the program or named on the command "
            "line, got os:Trainer.Config. If you trust that code, import its module in the recipe.",
        ),
        (
            '{"$type": "T:Trainer.Config", "training": {"$type": "T:Training", "steps": 0}}',
            "training.steps: steps must be at least 1, got 0.",
        ),
    ],
)
def test_an_invalid_config_file_is_a_short_message(tmp_path, fails, text, message):
    path = tmp_path / "run.json"
    path.write_text(text.replace("T:", f"{__name__}:"))
    assert message in fails("--config", str(path))


def test_print_config_shows_every_value_and_its_origin(tmp_path, prints):
    lines = prints("--print-config", "--optimizer", "Muon", "--training.steps", "5", "--weights.a", "3").splitlines()
    shown = {line.partition(": ")[0]: line.partition(": ")[2].split("  # ") for line in lines}
    shown = {path: (value.strip(), origin) for path, (value, origin) in shown.items()}
    config = run("--optimizer", "Muon", "--training.steps", "5", "--weights.a", "3")
    assert "".join(f"{path}: {value}\n" for path, (value, _) in shown.items()) == to_text(config)
    assert shown["training.steps"] == ("5", "command line")
    assert shown["training.seq_len"] == ("2048", "recipe")
    assert shown["training"] == (f"{__name__}:Training", "recipe")
    assert shown["optimizer"] == (f"{__name__}:Muon.Config", "command line")
    assert shown["optimizer.lr"] == ("0.0008", "recipe")
    assert shown["optimizer.momentum"] == ("0.95", "default")
    assert shown["weights"] == ("{'a': 3.0, 'b-c': 2.0}", "command line")


def test_print_config_distinguishes_file_and_recipe(tmp_path, prints):
    path = tmp_path / "run.json"
    save(Trainer.Config(note="saved"), path)
    data = json.loads(path.read_text())
    del data["words"]
    path.write_text(json.dumps(data))
    lines = prints("--config", str(path), "--print_config", "--numbers", "4").splitlines()
    origins = {line.partition(": ")[0]: line.rpartition("# ")[2] for line in lines}
    assert origins["note"] == str(path)
    assert origins["words"] == "default"
    assert origins["numbers"] == "command line"


def test_help_shows_types_defaults_docstrings_and_choices(prints):
    text = " ".join(prints("--help").replace("│", " ").replace("| ", " ").replace(" |", " ").split())
    assert "Trains a model." in text
    assert "--training.steps INT How many steps to take. (default: 10)" in text
    assert "The loop itself." in text
    assert "--training.dtype {float32,bfloat16}" in text
    assert "--training.seed {None}|INT" in text
    assert "--optimizer.lr FLOAT The learning rate. (default: 0.0008)" in text
    assert "Adam with decoupled weight decay. Currently AdamW; --optimizer chooses one of AdamW, Muon, Needy," in text
    assert "--validator {Validator,None}" in text
    assert "--converters [{Converter,LoRA} ...]" in text
    assert "--init {None}|MODULE:FUNCTION" in text
    assert "--weights.a FLOAT" in text


def test_help_of_a_section_shows_only_that_section(prints):
    text = prints("--help", "optimizer")
    assert "--optimizer.betas" in text
    assert "--training.steps" not in text
    text = prints("--training.steps", "wrong", "--help", "training.steps", "dump-folder")
    assert "--training.steps" in text
    assert "--dump_folder" in text
    assert "--optimizer.betas" not in text


def test_help_shows_the_flags_of_the_chosen_component(prints):
    text = prints("--optimizer", "Needy", "--help", "optimizer")
    assert "--optimizer.rank INT" in text
    assert "(required)" in text
    assert "--optimizer.betas" not in text


def test_only_rank_0_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    for words, code in ((["--nope"], 2), (["--help"], 0), (["--print-config"], 0)):
        with pytest.raises(SystemExit) as end:
            run(*words)
        assert end.value.code == code
    assert capsys.readouterr() == ("", "")


RECIPE = """
    from titan_config import Configurable, cli

    class Trainer(Configurable):
        class Config(Configurable.Config):
            steps: int = 10
            '''How many.'''
        def __init__(self, config):
            print("steps", config.steps)

    def recipe():
        return Trainer.Config()

    if __name__ == "__main__":
        cli(recipe).build()
"""


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        ("--steps 3", 0, "steps 3\n", ""),
        ("--stepz 3", 2, "", "my_recipe.py: Unknown flag --stepz. Did you mean --steps?\n"),
        ("--steps x", 2, "", "my_recipe.py: --steps must be int, got 'x'. Write --steps INT.\n"),
        ("--print-config", 0, f"$type: my_recipe:Trainer.Config  # recipe\n{'steps: 10':31}  # recipe\n", ""),
    ],
)
def test_exit_codes_of_a_script(tmp_path, words, code, out, err):
    script = tmp_path / "my_recipe.py"
    script.write_text(textwrap.dedent(RECIPE))
    done = subprocess.run([sys.executable, script, *words.split()], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_import_is_light_and_does_not_import_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    (tmp_path / "my_recipe.py").write_text(textwrap.dedent(RECIPE))
    code = "import sys, titan_config; print(sorted({'tyro', 'json', 'difflib', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr
    done = subprocess.run([sys.executable, "my_recipe.py", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert "How many." in done.stdout, done.stderr


def big_config() -> Configurable.Config:
    """A config of 231 fields: 11 sections of 20 fields, and the 11 fields that hold them."""

    def made(name: str, fields: dict[str, tuple[str, Any]]) -> type[Configurable.Config]:
        annotations = {field: annotation for field, (annotation, _) in fields.items()}
        body = {"__module__": __name__, "__qualname__": name, "__annotations__": annotations}
        return type(name, (Configurable.Config,), {**body, **{field: value for field, (_, value) in fields.items()}})

    kinds = [("int", 1), ("float | None", None), ("str", "x"), ("bool", False), ("list[str]", ["a"])]
    section = made("Section", {f"{'ab'[i % 2]}_field_{i}": kinds[i % 5] for i in range(20)})
    globals()["Section"] = section
    return made("Big", {f"section_{i}": ("Section", section()) for i in range(11)})()


def test_parsing_231_fields_needs_fewer_than_quadratic_calls():
    config = big_config()
    words = [w for i in range(11) for w in (f"--section_{i}.a_field_0", "3", f"--section_{i}.b_field_3", "True")]
    import tyro  # noqa: F401  (excludes the import from the count)

    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        result = cli(config, words)
    finally:
        sys.setprofile(None)
    assert calls < 231 * 231, calls
    assert [getattr(result, f"section_{i}").a_field_0 for i in range(11)] == [3] * 11
