"""Development tasks: `nox` runs all default checks, `nox -s train` trains a small Llama, `nox --list` lists the others.

Environments are made with pip (`nox -db uv`: with uv). Arguments after `--` go to pytest or the recipe.
"""

from __future__ import annotations

import os
import shutil
import tomllib
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import nox

PACKAGES = ("config", "models", "parallel", "data", "ckpt", "ft", "trainer")
nox.needs_version = ">=2025.2.9"  # for `requires`
nox.options.sessions = ["lint", "boundaries", *PACKAGES, "types", "golden", "together", "docs"]

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
LOCK = ROOT / "constraints.txt"
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
# Compile bytecode at the first import, not at installation: torch has thousands of modules, and a process imports few.
PIP = ("--quiet", "--no-compile")
KEEP_BYTECODE = {"PYTHONDONTWRITEBYTECODE": None}
NIGHTLY_TORCH = "https://download.pytorch.org/whl/nightly/cpu"


def folder_of(package: str) -> Path:
    return ROOT / "packages" / f"titan-{package}"


def install(session: nox.Session, *requirements: str, constraints: Path | None = LOCK) -> None:
    """Install `requirements` in the versions of `constraints`, and fail if other packages or versions are installed."""
    session.install(*PIP, *(("--constraint", str(constraints)) if constraints else ()), *requirements)
    if constraints:
        session.run("python", "tools/installed.py", str(constraints), silent=True)


def install_wheels(session: nox.Session, extras: dict[str, str], *, constraints: Path | None = LOCK) -> None:
    """Install the wheels of these packages with their extras ("" for none), and the dependencies that they declare."""
    wheel = {package: str(next(DIST.glob(f"titan_{package}-*.whl"))) for package in extras}
    session.install(*PIP, "--no-deps", "--force-reinstall", *wheel.values())  # an older build may have the same version
    with_extras = [f"{wheel[name]}[{extra}]" if extra else wheel[name] for name, extra in extras.items()]
    install(session, *with_extras, constraints=constraints)


def install_everything(session: nox.Session, *, constraints: Path | None = LOCK) -> None:
    """Install the seven wheels, and the requirements of tests, recipes, examples of docs/ and mypy."""
    extras = dict.fromkeys(PACKAGES, "test") | {"trainer": "test,plot,tensorboard"}
    install_wheels(session, extras, constraints=constraints)
    install(session, *GROUPS["types"], *GROUPS["docs"], constraints=constraints)


def all_tests() -> Sequence[Path]:
    return ROOT / "tests", *(folder_of(package) / "tests" for package in PACKAGES)


def run_pytest(session: nox.Session, bin_folder: str | Path, *arguments: str | Path) -> None:
    """Run pytest in an empty folder, so that the wheels are imported and not the checkout."""
    command = (Path(bin_folder, "pytest"), "-c", ROOT / "pyproject.toml", "--durations=5", "--durations-min=5")
    with session.chdir(session.create_tmp()):
        session.run(*command, *arguments, *session.posargs, env=KEEP_BYTECODE, external=True)


@nox.session(reuse_venv=True)
def wheels(session: nox.Session) -> None:
    """Build the wheels of the seven packages into dist/."""
    install(session, *GROUPS["build"])
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES:
        with session.chdir(folder_of(package)):
            session.run("hatchling", "build", "--target", "wheel", "--directory", str(DIST), silent=True)


for package in PACKAGES:

    @nox.session(name=package, requires=["wheels"])
    def alone(session: nox.Session, package: str = package) -> None:
        """Test one package with only its declared dependencies installed: import every module, run its tests."""
        project = tomllib.loads(folder_of(package).joinpath("pyproject.toml").read_text())["project"]
        declared = " ".join(project["dependencies"])
        needed = [name for name in PACKAGES if f"titan-{name}" in declared]
        install_wheels(session, dict.fromkeys([*needed, package], ""))
        session.run("python", "-P", "tools/import_all.py", f"titan_{package}", env=KEEP_BYTECODE)
        install_wheels(session, {package: "test"})
        run_pytest(session, session.bin, folder_of(package) / "tests")


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules and formatting with ruff, spelling, retired words, and that the lock files match the requirements."""
    install(session, *GROUPS["lint"])
    session.run("python", "tools/lock.py", "--check")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    session.run("python", "tools/retired_words.py")


@nox.session
def boundaries(session: nox.Session) -> None:
    """Check imports between packages with import-linter; docs/concepts/design.md shows the allowed ones."""
    install(session, *GROUPS["boundaries"])
    sources = os.pathsep.join(str(folder_of(package) / "src") for package in PACKAGES)
    session.run("lint-imports", "--no-cache", "--no-logo", env={"PYTHONPATH": sources})


@nox.session(reuse_venv=True, requires=["wheels"])
def everything(session: nox.Session) -> None:
    """Create the environment that the sessions below share."""
    install_everything(session)


def bin_of_everything(session: nox.Session) -> Path:
    return session.cache_dir.resolve().parent / "everything" / "bin"


@nox.session(venv_backend="none", requires=["everything"])
def types(session: nox.Session) -> None:
    """Check the types of all sources with mypy in strict mode."""
    sources = [str(folder_of(package) / "src") for package in PACKAGES]
    session.run(bin_of_everything(session) / "mypy", *sources)


@nox.session(venv_backend="none", requires=["everything"])
def golden(session: nox.Session) -> None:
    """Check that the full config of every recipe is the committed text."""
    run_pytest(session, bin_of_everything(session), ROOT / "tests" / "test_golden.py")


@nox.session(venv_backend="none", requires=["everything"])
def together(session: nox.Session) -> None:
    """Test the packages together: recipes on several processes, resume, invalid input."""
    run_pytest(session, bin_of_everything(session), ROOT / "tests", "--ignore", ROOT / "tests" / "test_golden.py")


@nox.session(venv_backend="none", requires=["everything"])
def docs(session: nox.Session) -> None:
    """Run every fenced `python` and `bash` example of the READMEs and the docs."""
    pages = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md")), ROOT / "docs"]
    session.run(bin_of_everything(session) / "python", "tools/run_docs.py", *pages, env=KEEP_BYTECODE)


@nox.session(reuse_venv=True)
def site(session: nox.Session) -> None:
    """Build the documentation site in build/site; warnings and broken links are errors."""
    install(session, *GROUPS["site"])
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def release(session: nox.Session) -> None:
    """Build sdist and wheel of the seven packages, check their metadata, and install them in an empty environment."""
    install(session, *GROUPS["build"], *GROUPS["release"])
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES:
        with session.chdir(folder_of(package)):
            session.run("hatchling", "build", "--directory", str(DIST), silent=True)
    session.run("twine", "check", "--strict", *map(str, sorted(DIST.iterdir())))
    install_wheels(session, dict.fromkeys(PACKAGES, ""))
    for package in PACKAGES:
        session.run("python", "-P", "tools/import_all.py", f"titan_{package}", env=KEEP_BYTECODE)


@nox.session(venv_backend="none", requires=["everything"])
def train(session: nox.Session) -> None:
    """Train recipes/llama3_debug.py on two ranks; arguments after `--` are flags of the recipe."""
    num_threads = max(1, (os.cpu_count() or 2) // 2)
    session.run(
        bin_of_everything(session) / "torchrun",
        *("--standalone", "--nproc-per-node=2", "recipes/llama3_debug.py"),
        *session.posargs,
        env={**KEEP_BYTECODE, "OMP_NUM_THREADS": str(num_threads)},
    )


@nox.session(venv_backend="none", requires=["everything"])
def bench(session: nox.Session) -> None:
    """Run the benchmarks against plain PyTorch: all scripts of bench/, or those named after `--`."""
    scripts = ("train_speed", "moe_speed", "experts", "startup", "data", "checkpoint", "parallel_overhead")
    for name in session.posargs or scripts:
        session.run(bin_of_everything(session) / "python", f"bench/{name}.py", env=KEEP_BYTECODE)


@nox.session(requires=["everything"])
def learning_curve(session: nox.Session) -> None:
    """Compare learning curves of Llama 3 with torchtitan, which is installed in a separate environment."""
    install(session, "torch", "tyro")
    session.install(*PIP, "--no-deps", "--requirement", "bench/torchtitan/requirements.txt")
    python = Path(session.bin, "python").absolute()
    command = (bin_of_everything(session) / "python", "bench/learning_curve.py", python)
    session.run(*command, *session.posargs, env=KEEP_BYTECODE, external=True)


@nox.session(venv_backend="none", requires=["everything"])
def full(session: nox.Session) -> None:
    """Run the tests marked full, which the sessions above skip; `-- --shard 2/8` runs the second eighth of them."""
    run_pytest(session, bin_of_everything(session), "-m", "full", *all_tests())


@nox.session
def lock(session: nox.Session) -> None:
    """Write constraints.txt and minimums.txt; `-- --upgrade` upgrades existing pins to the newest versions."""
    install(session, *GROUPS["lock"])
    session.run("python", "tools/lock.py", *session.posargs)


@nox.session(reuse_venv=True, requires=["wheels"])
def minimums(session: nox.Session) -> None:
    """Run the default tests with the lowest versions that the packages declare."""
    install_everything(session, constraints=ROOT / "minimums.txt")
    run_pytest(session, session.bin, *all_tests())


@nox.session(reuse_venv=True, requires=["wheels"])
def newest(session: nox.Session) -> None:
    """Run the default tests with the newest releases of all dependencies."""
    session.install(*PIP, "--upgrade", "torch")
    install_everything(session, constraints=None)
    run_pytest(session, session.bin, *all_tests())


@nox.session(reuse_venv=True, requires=["wheels"])
def canary(session: nox.Session) -> None:
    """Run the default tests with the newest releases, and torch nightly if reachable; list versions that changed."""
    try:
        urllib.request.urlopen(f"{NIGHTLY_TORCH}/torch/", timeout=20).close()
        session.install(*PIP, "--pre", "torch", "--index-url", NIGHTLY_TORCH)
    except OSError as error:
        session.warn(f"torch is the newest release: its nightly index cannot be reached ({error}).")
        session.install(*PIP, "--upgrade", "torch")
    install_everything(session, constraints=None)
    try:
        run_pytest(session, session.bin, *all_tests())
    finally:
        session.run("python", "tools/installed.py", str(LOCK), "--moved")
