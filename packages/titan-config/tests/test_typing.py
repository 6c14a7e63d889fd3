"""Type checkers understand the fields of a config: mypy accepts correct uses and rejects wrong ones."""

from __future__ import annotations

import textwrap

import pytest

SAMPLE = """
from titan_config import Configurable, cli

class Norm(Configurable):
    class Config(Configurable.Config):
        dim: int
        eps: float = 1e-5

    def __init__(self, config: Config):
        self.dim: int = config.dim

class RMS(Norm):
    class Config(Norm.Config):
        bias: bool = False

class Outer(Configurable):
    class Config(Configurable.Config):
        norm: Norm.Config = RMS.Config(dim=3)
        names: list[str] = []

config = RMS.Config(dim=1, bias=True, eps=1)
config.build(device="cpu")
outer: Outer.Config = cli(Outer.Config(), [])
outer = cli(lambda: Outer.Config())
outer.norm = RMS.Config(dim=3)
RMS.Config(dmi=1)  # wrong
RMS.Config(dim="1")  # wrong
RMS.Config(1)  # wrong
RMS.Config()  # wrong
config.bais = True  # wrong
config.dim = "x"  # wrong
config.nope  # wrong
outer.norm = outer  # wrong
"""


def test_strict_mypy_accepts_correct_uses_and_rejects_wrong_ones(tmp_path):
    api = pytest.importorskip("mypy.api")
    (tmp_path / "sample.py").write_text(textwrap.dedent(SAMPLE))
    out, err, _ = api.run(["--strict", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "sample.py")])
    found = sorted({int(line.split(":")[1]) for line in out.splitlines() if ": error:" in line})
    wrong = [number for number, line in enumerate(SAMPLE.splitlines(), 1) if line.endswith("# wrong")]
    assert found == wrong, out + err
