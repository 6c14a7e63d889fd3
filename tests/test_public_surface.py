"""Recipes, docs, benchmarks, and the code and tests of other packages use the public surface of a package alone."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PUBLIC_SUBMODULES = {
    "titan_data.testing",
    "titan_models.deepseek",
    "titan_models.gpt_oss",
    "titan_models.hugging_face",
    "titan_models.llama3",
    "titan_models.llama4",
    "titan_models.moe",
    "titan_models.qwen3",
    "titan_parallel.check",
    "titan_parallel.hugging_face",
    "titan_parallel.testing",
}
"""The documented submodules, beside the seven packages themselves; each states its `__all__`."""

BREAKS_ON_PURPOSE = {
    "tests/test_balancing.py": "replaces the sums over ranks by wrong ones",
    "tests/test_check_gpt_oss.py": "replaces the split of biases by a wrong one",
    "tests/test_modes.py": "compares a file that two packages have",
    "tests/test_base_model.py": "calls the command line of titan_ckpt",
    "tests/test_plan.py": "calls the command line of titan_trainer",
}
"""Test files that may import what is private, with the reason."""


def imported_modules(source: str) -> list[str]:
    """The modules that `source` imports from, and `module.name` for names that a public module does not state."""
    nodes = list(ast.walk(ast.parse(source)))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and re.match(r"titan_\w+", node.module or ""):
            public = node.module in PUBLIC_SUBMODULES or "." not in node.module
            stated = importlib.import_module(node.module).__all__ if public else ()
            hidden = [
                alias.name for alias in node.names if alias.name not in stated and not alias.name.startswith("__")
            ]
            modules += [f"{node.module}.{name}" for name in hidden] if public else [node.module]
    return [module for module in modules if re.match(r"titan_\w+\.", module)]


def sources() -> list[tuple[str, str]]:
    """`(path, code)` of all Python files, and of the Python examples in Markdown pages."""
    files = [path for pattern in ("packages/*/src/**/*.py", "packages/*/tests/*.py") for path in ROOT.glob(pattern)]
    files += [path for folder in ("recipes", "bench", "tests", "tools") for path in (ROOT / folder).rglob("*.py")]
    found = [(str(path.relative_to(ROOT)), path.read_text()) for path in files]
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("packages/*/README.md")]
    for page in pages:
        for block in re.findall(r"^```python[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S):
            found.append((str(page.relative_to(ROOT)), block))
    return found


def private_imports(path: str, source: str) -> list[str]:
    own = re.match(r"packages/(titan-\w+)/", path)
    package = own[1].replace("-", "_") if own and not path.endswith(".md") else None
    foreign = [module for module in imported_modules(source) if module.partition(".")[0] != package]
    return [f"{path}: {module}" for module in foreign if module not in PUBLIC_SUBMODULES]


def test_other_packages_recipes_and_docs_import_the_public_surface_alone():
    found = [
        line for path, source in sources() if path not in BREAKS_ON_PURPOSE for line in private_imports(path, source)
    ]
    assert found == []


def test_a_deep_import_is_noticed():
    source = "from titan_parallel.mesh.collectives import Axis\nimport titan_models.moe\n"
    assert private_imports("recipes/mine.py", source) == ["recipes/mine.py: titan_parallel.mesh.collectives"]
    assert private_imports("packages/titan-parallel/tests/test_x.py", source) == []


def test_files_that_break_code_on_purpose_exist():
    assert all((ROOT / path).exists() for path in BREAKS_ON_PURPOSE)


@pytest.mark.parametrize("name", sorted(PUBLIC_SUBMODULES))
def test_public_submodules_state_their_names(name):
    module = importlib.import_module(name)
    assert module.__all__ and all(hasattr(module, each) for each in module.__all__)
