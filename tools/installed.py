"""Compare the packages of this environment with a lock: `python tools/installed.py constraints.txt [--moved]`.

Exits with 1 when something is installed that the lock does not list; with `--moved`, only lists it.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

SEEDS = {"pip", "setuptools", "wheel"}  # what virtual environments begin with


def normalize(name: str) -> str:
    """Return the name of a package as package indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> dict[str, set[str]]:
    """Return the versions of each package; there are several where they depend on the version of Python."""
    versions: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if "==" in line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            versions.setdefault(normalize(name), set()).add(version)
    return versions


def find_differences(locked: dict[str, set[str]]) -> list[str]:
    """Return a line for each third-party package that is not as locked. "2.13.0+cpu" is 2.13.0."""
    lines = []
    for found in sorted(distributions(), key=lambda found: normalize(found.name)):
        name, version = normalize(found.name), found.version.split("+")[0]
        if not name.startswith("titan-") and name not in SEEDS and version not in locked.get(name, set()):
            lines.append(f"  {name}: {' or '.join(sorted(locked.get(name, {'not locked'})))} -> {version}")
    return lines


if __name__ == "__main__":
    lock = Path(sys.argv[1])
    differences = find_differences(read_lock(lock))
    if "--moved" in sys.argv:
        print("\n".join([f"Other than {lock.name} says:", *differences] if differences else ["All as locked."]))
    elif differences:
        title = f"Installed packages must be those of {lock.name}. Run `nox -s lock`. What differs:"
        sys.exit("\n".join([title, *differences]))
