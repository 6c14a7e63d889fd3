"""Compare the packages of this environment with a lock file: `python tools/installed.py constraints.txt [--moved]`.

Exits with code 1 if a package or version is installed that the lock file does not list; with `--moved`, only lists it.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

PREINSTALLED = {"pip", "setuptools", "wheel"}  # in new virtual environments


def normalize(name: str) -> str:
    """Return the normalized name of a package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> dict[str, set[str]]:
    """Return the versions of each package: several if they depend on the Python version."""
    versions: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if "==" in line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            versions.setdefault(normalize(name), set()).add(version)
    return versions


def find_differences(locked: dict[str, set[str]]) -> list[str]:
    """Return a line for each third-party package whose version is not locked. "2.13.0+cpu" counts as 2.13.0."""
    lines = []
    for found in sorted(distributions(), key=lambda found: normalize(found.name)):
        name, version = normalize(found.name), found.version.split("+")[0]
        if not name.startswith("titan-") and name not in PREINSTALLED and version not in locked.get(name, set()):
            lines.append(f"  {name}: {' or '.join(sorted(locked.get(name, {'not locked'})))} -> {version}")
    return lines


if __name__ == "__main__":
    lock = Path(sys.argv[1])
    differences = find_differences(read_lock(lock))
    if "--moved" in sys.argv:
        lines = (
            [f"Differences from {lock.name}:", *differences] if differences else [f"No differences from {lock.name}."]
        )
        print("\n".join(lines))
    elif differences:
        title = f"Installed packages must be those of {lock.name}. Run `nox -s lock`. Differences:"
        sys.exit("\n".join([title, *differences]))
