"""The table for people who come from torchtitan names flags that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from titan_config import Configurable
from titan_parallel import Compile
from titan_trainer import Profiler

PAGE = Path(__file__).parent.parent / "docs" / "coming_from" / "torchtitan.md"


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def config(recipe) -> Configurable.Config:
    """The debug recipe with everything on."""
    run = recipe("llama3_debug").llama3_debug()
    run.compile, run.profiling = Compile.Config(), Profiler.Config()
    return run


@pytest.mark.parametrize(("theirs", "ours", "difference"), rows(), ids=[row[0] for row in rows()])
def test_the_flag_exists_or_the_table_says_why_not(config, theirs, ours, difference):
    if not ours:
        assert difference.startswith(("not yet", "dropped: "))
    elif not ours.startswith("--"):
        node = config
        for name in ours.split("."):
            assert name in vars(node), f"{ours} is no setting of the recipe"
            node = getattr(node, name)


def test_a_flag_of_the_same_name_needs_no_words_and_another_name_needs_some():
    assert all(difference for theirs, ours, difference in rows() if ours != theirs)
    assert len(rows()) > 100
