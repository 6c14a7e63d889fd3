"""The lock of the tests' environment, and the parts that `nox -s full` is run in."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the lock is made from."""
    for path in [*ROOT.glob("*.t*"), *ROOT.glob("tools/*.py"), *ROOT.glob("packages/*/pyproject.toml")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


def check_lock(checkout: Path) -> str:
    return subprocess.run(
        [sys.executable, checkout / "tools/lock.py", "--check"], capture_output=True, text=True
    ).stderr


def test_the_lock_is_made_from_what_is_declared(checkout):
    assert check_lock(checkout) == ""


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("packages/titan-data/pyproject.toml", "datasets>=4", "datasets>=4.1"),
        ("packages/titan-ckpt/pyproject.toml", "pytest>=8", "pytest>=8.1"),
        ("pyproject.toml", 'lint = ["codespell", "ruff"]', 'lint = ["codespell", "pyyaml", "ruff"]'),
        ("constraints.txt", r"tyro==[\d.]+", "tyro==1.0.1"),
        ("minimums.txt", r"tyro==[\d.]+", "tyro==1.0.1"),
    ],
)
def test_a_stale_lock_is_noticed(checkout, name, old, new):
    path = checkout / name
    text = path.read_text()
    path.write_text(re.sub(old, new, text) if "\\" in old else text.replace(old, new))
    assert path.read_text() != text
    assert "Run `nox -s lock`" in check_lock(checkout)


def test_a_package_outside_the_lock_is_noticed(tmp_path):
    lock = tmp_path / "lock.txt"
    lock.write_text("pytest==0.1\n")
    command = [sys.executable, ROOT / "tools/installed.py", lock]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and re.search(r"pytest: 0\.1 -> \d", refused.stderr)
    listed = subprocess.run([*command, "--moved"], capture_output=True, text=True)
    assert listed.returncode == 0 and "tyro: not locked ->" in listed.stdout


def test_shards_are_all_the_tests_each_once(tmp_path):
    test_file = tmp_path / "test_seven.py"
    test_file.write_text("import pytest\n\n@pytest.mark.parametrize('n', range(7))\ndef test(n): pass\n")
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # not the options of the checkout

    def collect(*options: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--rootdir", tmp_path, "--collect-only", "-q", test_file, *options]
        return re.findall(r"test\[(\d)\]", subprocess.run(command, capture_output=True, text=True).stdout)

    shards = [collect("--shard", f"{k}/3") for k in (1, 2, 3)]
    assert [len(shard) for shard in shards] == [3, 2, 2]
    assert sorted(n for shard in shards for n in shard) == collect() == [*"0123456"]
    assert collect("--shard", "4/3") == []  # refused
