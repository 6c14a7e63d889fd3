"""The launch files of the docs are syntactically valid, and start a recipe that exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "docs" / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))


def test_there_are_launch_files():
    assert len(SCRIPTS) == 2 and len(MANIFESTS) == 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_launch_script_is_valid_bash(path):
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_valid_yaml_of_a_training_job(path):
    documents = list(yaml.safe_load_all(path.read_text()))
    assert all(document["apiVersion"] and document["kind"] and document["metadata"]["name"] for document in documents)
    assert {document["kind"] for document in documents} & {"PyTorchJob", "TrainJob"}


def test_launch_files_start_recipes_that_exist():
    recipes = {name for path in [*SCRIPTS, *MANIFESTS] for name in re.findall(r"recipes/\w+\.py", path.read_text())}
    assert recipes and all((ROOT / recipe).exists() for recipe in recipes)
