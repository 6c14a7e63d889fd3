"""Pin every package that the sessions install: `nox -s lock` writes constraints.txt and minimums.txt.

- constraints.txt: the newest versions that fit together, transitive packages included, for Python 3.11 to 3.13.
- minimums.txt: the lowest versions that the packages declare (tools of the tests as in constraints.txt).

`--upgrade` also moves what is pinned already. `--check` needs no network: it fails when a file was edited by hand, or
when its inputs (the requirements of the packages, the dependency groups of pyproject.toml) have changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from installed import normalize

ROOT = Path(__file__).resolve().parents[1]
REMEDY = "Run `nox -s lock` and commit the result."


def read_project(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def read_requirements() -> tuple[list[str], list[str], list[str]]:
    """Return what users install (dependencies and extras), what only the checks install, and the pins set by hand."""
    groups = read_project(ROOT / "pyproject.toml")["dependency-groups"]
    pins = groups.pop("pins")
    runtime, checks = [], [requirement for group in groups.values() for requirement in group]
    for path in sorted(ROOT.glob("packages/*/pyproject.toml")):
        project = read_project(path)["project"]
        extras = project.get("optional-dependencies", {})
        runtime += project["dependencies"]
        for name, requirements in extras.items():
            (checks if name == "test" else runtime).extend(requirements)
    siblings = tuple(path.name for path in ROOT.glob("packages/*"))
    runtime, checks = (sorted({line for line in lines if not line.startswith(siblings)}) for lines in (runtime, checks))
    return runtime, checks, pins


def resolve(requirements: list[str], target: Path, *options: str) -> None:
    """Write the pins of `requirements`, and of all that they need, to `target`."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--no-annotate"]
    command += ["--no-header", *options, "--output-file", str(target), "-"]
    subprocess.run(command, input="\n".join(requirements), text=True, check=True)


def names_of(requirements: list[str]) -> set[str]:
    """Return the names that requirements begin with, spelled as package indexes spell them."""
    return {normalize(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in requirements}


def pin(requirements: list[str], lock: Path, but: list[str]) -> list[str]:
    """Return the lines of `lock` for the packages that `requirements` name and `but` does not."""
    names = names_of(requirements) - names_of(but)
    lines = lock.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "==" in line and names_of([line]) <= names]


def digest(requirements: list[str], pins: str) -> str:
    return hashlib.sha256("\n".join([*requirements, pins]).encode()).hexdigest()[:32]


def sign(target: Path, title: str, requirements: list[str]) -> None:
    """Put a header above the pins: what the file is, and a digest of the pins and of what they were made from."""
    pins = "".join(line for line in target.read_text(encoding="utf-8").splitlines(True) if not line.startswith("#"))
    header = f"# {title} Generated: `nox -s lock` writes it anew.\n# digest: {digest(requirements, pins)}\n"
    target.write_text(header + pins, encoding="utf-8")


def find_fault(target: Path, requirements: list[str]) -> str | None:
    """Return what is wrong with a committed file, or None."""
    lines = target.read_text(encoding="utf-8").splitlines(True)
    pins = "".join(line for line in lines if not line.startswith("#"))
    if f"# digest: {digest(requirements, pins)}\n" in lines:
        return None
    return f"{target.name} must match the requirements in pyproject.toml and packages/*/pyproject.toml. {REMEDY}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail when a file is stale or was edited by hand")
    parser.add_argument("--upgrade", action="store_true", help="move to the newest versions")
    options = parser.parse_args()
    newest, lowest = ROOT / "constraints.txt", ROOT / "minimums.txt"
    runtime, checks, pins = read_requirements()
    inputs = [*runtime, *checks, *pins]
    if options.check:
        faults = [fault for target in (newest, lowest) if (fault := find_fault(target, inputs))]
        sys.exit("\n".join(faults) or None)
    resolve(inputs, newest, *(["--upgrade"] if options.upgrade else []))
    resolve([*runtime, *pin(checks, newest, but=runtime)], lowest, "--upgrade", "--resolution", "lowest-direct")
    sign(newest, "Everything that the tests and the recipes are run with.", inputs)
    sign(lowest, "The lowest versions that the packages declare.", inputs)


if __name__ == "__main__":
    main()
