"""The full config of every recipe is the text that was committed: a change of any value shows in review."""

from __future__ import annotations

from pathlib import Path

import pytest
from titan_config import to_text

REPO = Path(__file__).parent.parent
RECIPES = [
    "llama3_debug",
    "llama3_debug_ft",
    "llama3_8b",
    "llama3_70b",
    "llama3_405b",
    "deepseek_debug",
    "deepseek_v2_lite_16b",
    "deepseek_v3_671b",
    "qwen3_debug",
    "qwen3_0_6b",
    "qwen3_8b",
    "qwen3_moe_debug",
    "qwen3_30b_a3b",
    "llama4_debug",
    "llama4_scout",
    "llama4_maverick",
    "gpt_oss_debug",
    "gpt_oss_20b",
    "gpt_oss_120b",
]


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_the_committed_text(recipe, name, request):
    text = to_text(getattr(recipe(name), name)()).replace(str(REPO), "<repository>")
    file = REPO / "recipes" / "golden" / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        file.write_text(text)
    assert text == file.read_text(), "Read the difference, then: nox -s golden -- --update-golden"


def test_every_recipe_has_a_golden_text():
    recipes = {path.stem for path in (REPO / "recipes").glob("*.py")} - {"loop"}
    assert recipes == set(RECIPES) == {path.stem for path in (REPO / "recipes" / "golden").glob("*.txt")}
