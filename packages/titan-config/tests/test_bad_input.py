"""Invalid numbers, JSON and paths are short, clear errors, in files and on the command line."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import pytest
from titan_config import ConfigError, Configurable, cli, diff, from_dict, from_json, load, save, to_json

ALLOW = (__name__,)


class Part(Configurable):
    class Config(Configurable.Config):
        lr: float = 1.0
        pair: tuple[float, float] = (1.0, 1.0)
        optional: float | None = None
        named: dict[str, float] = {}


class Run(Configurable):
    class Config(Configurable.Config):
        part: Part.Config = Part.Config()
        limit: float = math.inf
        bound: float | None = dataclasses.field(default=1.0, metadata={"finite": False})
        count: int = 1
        folder: Path = Path("out")
        source: str | Path = "text.jsonl"
        start: Path | None = None
        folders: list[Path] = []
        note: str = ""

    def __init__(self, config: Config) -> None:
        self.config = config


@pytest.fixture
def fails(tmp_path, capsys):
    """`fails("--flag", ...)` returns the message of a command line; `fails(text=...)` that of a config file."""

    def fails(*words: str, text: str | None = None) -> str:
        if text is not None:
            (tmp_path / "run.json").write_text(text.replace("Run:", f'"$type": "{__name__}:Run.Config"'))
            words = ("--config", str(tmp_path / "run.json"))
        with pytest.raises(SystemExit) as end:
            cli(Run.Config(), words, allow=ALLOW)
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert len(error) < 800
        assert "Traceback" not in error
        return error

    return fails


NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_must_be_finite_unless_the_field_opts_out(fails, text):
    number = NUMBERS[text]
    for flag, words in {
        "part.lr": [text],
        "part.pair.1": ["1", text],
        "part.optional": [text],
        "part.named.a": ["a", text],
    }.items():
        said = fails(f"--{flag.removesuffix('.1').removesuffix('.a')}", *words)
        assert f"{flag}: Part.Config.{flag.removeprefix('part.')} must be a finite number, got {number}." in said
    for setting in ({"lr": number}, {"pair": (1.0, number)}, {"named": {"x": number}}):
        with pytest.raises(ConfigError, match="must be a finite number"):
            Run.Config(part=Part.Config(**setting)).build()
    config = cli(Run.Config(), ["--limit", text, "--bound", text], allow=ALLOW)
    assert [repr(config.limit), repr(config.build().config.bound)] == [repr(number)] * 2
    assert from_json(to_json(config), ALLOW) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{Run:, "part": {"$type": "T:Part.Config", "lr": NaN}}', ["finite, got NaN"]),
        ('{Run:, "part": {"$type": "T:Part.Config", "lr": -Infinity}}', ["finite, got -Infinity"]),
        ('{Run:, "part": {"$type": "T:Part.Config", "lr": 1e999}}', ["finite, got 1e999"]),
        ('{Run:, "part": {"$type": "T:Part.Config", "lr": {"$float": "nan"}}}', ["part.lr", "finite number, got nan"]),
        ('{Run:, "count": ' + "9" * 5000 + "}", ["at most 4300 digits, got 5000"]),
        ('{Run:, "part": {"$type": "T:Part.Config", "lr": ' + "9" * 400 + "}}", ["part.lr", "float", "1.8e308"]),
        ('{Run:, "note": ' + "[" * 100_000 + "]" * 100_000 + "}", ["nested at most 100 levels deep"]),
        ('{Run:, "note": ' + '{"a": ' * 500 + "1" + "}" * 500 + "}", ["nested at most 100 levels deep"]),
        ('{Run:, "count": 1, "count": 2}', ["unique, got count more than once"]),
        ('{Run:, "part": {"$type": "T:Part.Config", "lr": 1, "lr": 2}}', ["unique, got lr more than once"]),
        ('{Run:, "folder": {"$path": "s3:/bucket/run"}}', ["folder", "must be a local path"]),
    ],
    ids=range(11),
)
def test_invalid_json_is_a_short_error(fails, text, words):
    said = fails(text=text.replace("T:", f"{__name__}:"))
    assert all(word in said for word in words), said


def test_deep_data_and_huge_numbers_are_short_errors(fails):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ConfigError, match="nested at most 100 levels deep"):
        from_dict({"$type": f"{__name__}:Run.Config", "note": deep}, ALLOW)
    assert "must be int" in fails("--count", "9" * 5000)
    with pytest.raises(ConfigError, match=r"must be float, got .*The largest float is 1\.8e308"):
        Part.Config(lr=10**5000)


def test_a_config_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(to_json(Run.Config()), encoding="utf-8-sig")
    assert load(path, ALLOW) == Run.Config()


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a fifo"])
def test_a_file_that_is_not_regular_is_an_error_and_does_not_block(tmp_path, kind, fails):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link to a fifo").symlink_to("fifo")
    path = "/dev/zero" if kind == "device" else str(tmp_path / kind)
    with pytest.raises(ConfigError, match="A config file must be a regular file, got a fifo or a device"):
        load(path)
    assert "must be a regular file" in fails("--config", path)


def test_a_file_that_is_too_large_is_an_error(tmp_path):
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(2**27)
    with pytest.raises(ConfigError, match="must have at most"):
        load(tmp_path / "run.json")


REMOTE = [
    "s3://bucket/run",
    "s3:/x",
    "S3://bucket",
    "gs://b/a/b",
    "hdfs://host:8020/x",
    "file:///tmp/x",
    "https://a.b/c",
]


@pytest.mark.parametrize("path", REMOTE)
def test_a_path_with_a_scheme_is_an_error_in_every_place(fails, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in ("folder", "source", "start", "folders"):
        said = fails(f"--{flag}", path)
        assert "must be a local path" in said
        assert "PosixPath" not in said
        assert path in said or "://" not in path
        assert ("Remove file://." if path.startswith("file") else "Remote storage is not supported yet") in said
    for setting in ({"folder": Path(path)}, {"source": path}, {"source": Path(path)}, {"folders": [Path(path)]}):
        with pytest.raises(ConfigError, match=r"must be a local path, got "):
            Run.Config(**setting)
    assert "A config file must be a local path" in fails("--config", path)
    for use in (lambda: save(Run.Config(), path), lambda: load(path), lambda: diff(path, path)):
        with pytest.raises(ConfigError, match="must be a local path"):
            use()
    assert [each.name for each in tmp_path.iterdir()] == []


@pytest.mark.parametrize("path", ["C:/run", "C:\\run", "a:b", "runs/s3:x", "/s3://x", "s3:x", "run-12:30", "."])
def test_other_names_are_local_paths(path):
    config = cli(Run.Config(), ["--folder", path, "--source", path, "--note", "s3://bucket"], allow=ALLOW)
    assert (config.folder, str(config.source), config.note) == (Path(path), path, "s3://bucket")
