"""The command line of a config: `cli(config)` applies the flags and returns the checked config."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from titan_config.checks import describe
from titan_config.configurable import Config, check
from titan_config.errors import ConfigError, NotAllowed, join, label, nearest
from titan_config.files import load, read_json
from titan_config.importing import DEFAULT_ALLOW
from titan_config.named import import_components, paths_in, paths_of_program
from titan_config.text import flatten
from titan_config.tree import copied, replaced_at, traverse

if TYPE_CHECKING:
    from titan_config.arguments import Arguments

C = TypeVar("C", bound=Config)


def cli(config: C | Callable[[], C], argv: Sequence[str] | None = None, allow: Sequence[str] = DEFAULT_ALLOW) -> C:
    """Return a copy of `config` with the flags of `argv` (default: `sys.argv[1:]`) applied.

    `config` is a config or a function that returns one. Exits with code 2 and a short message on an error, with code 0
    after --help and --print-config. Import paths given on the command line may be imported. A file (--config) may
    name those paths, classes that the program has imported, and entries of `allow`; see `titan_config.importing`.
    """
    try:
        return _run(config, list(sys.argv[1:] if argv is None else argv), allow)
    except ConfigError as error:
        _print_on_rank_0(f"{_program()}: {error}", sys.stderr)
        sys.exit(2)


def _run(source: Any, words: list[str], allow: Sequence[str]) -> Any:
    from titan_config.arguments import RESERVED, sort_words

    config = copied(source if isinstance(source, Config) else source())
    taken = [name for name in RESERVED if name in type(config)._fields]
    if taken:
        raise ConfigError(
            f"Field {label(type(config))}.{taken[0]} must not have the name of the built-in flag --{taken[0]}. "
            "Rename the field."
        )
    arguments = sort_words(words)
    allow = (*allow, *paths_in([word for _, values in arguments.settings for word in values]))
    if arguments.file is not None:
        config = _loaded(arguments, config, allow)
    start = copied(config)
    config, given = _apply(config, arguments.settings, allow, only_components=arguments.help is not None)
    if arguments.help is not None:
        _print_help(config, arguments.help, allow)
    _check_complete(config)
    check(config)
    if arguments.print_config:
        _print_config(config, start, arguments.file, given)
    return config


def _loaded(arguments: Arguments, recipe: Config, allow: Sequence[str]) -> Config:
    from titan_config.flags import flags_of

    file, expected = str(arguments.file), type(recipe)
    import_components(arguments.settings, flags_of(recipe), allow)
    try:
        config = load(file, (*allow, *paths_of_program(recipe)))
    except NotAllowed as error:
        do = f"add --{error.path} {error.import_path}" if error.path else "import its module in the recipe"
        raise NotAllowed(
            "Classes and functions in a config file must be imported by the program or named on the command line, got "
            f"{error.import_path}. If you trust that code, {do}.",
            error.path,
            file,
        ) from error
    if not (isinstance(config, expected) or issubclass(expected, type(config))):
        raise ConfigError(
            f"The config file must contain a {label(expected)}, got a {label(type(config))}.",
            file=file,
        )
    return config


def _apply(
    config: Config, settings: list[tuple[str, list[str]]], allow: Sequence[str], only_components: bool
) -> tuple[Any, set[str]]:
    """Apply settings, each component before its own flags. Return the config and the paths that were set."""
    from titan_config.arguments import find_flag
    from titan_config.components import read_components
    from titan_config.flags import flags_of

    flags = flags_of(config)
    given: set[str] = set()
    for name, words in settings:
        if only_components and name.replace("-", "_") not in flags:
            continue
        flag = find_flag(name, flags)
        if flag.component_types or flag.item_types:
            config = replaced_at(config, flag.path, read_components(flag, words, allow))
            flags = flags_of(config)
        elif not only_components:
            config = _with_value(config, flag, words, allow)
        given.add(flag.path)
    return config, given


def _with_value(config: Config, flag: Any, words: list[str], allow: Sequence[str]) -> Config:
    from titan_config.values import read_value, spec_of

    if flag.is_switch and not words:
        words = ["True"]
    try:
        return replaced_at(config, flag.path, read_value(flag.annotation, words, allow))
    except ConfigError as error:
        raise ConfigError(error.message, f"--{flag.path}") from error
    except ValueError as error:
        spec = spec_of(flag.annotation, allow)
        got = repr(_shortened(" ".join(words))) if words else "no value"
        advice = f"Write --{flag.path} {spec.metavar}."
        if spec.choices and words:
            advice = nearest(words[0], spec.choices)
        raise ConfigError(f"--{flag.path} must be {describe(flag.annotation)}, got {got}. {advice}") from error


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_complete(config: Config) -> None:
    for path, node in traverse(config):
        missing = [name for name in node._fields if name not in vars(node)]
        if missing:
            flag = f"--{join(path, missing[0])}"
            raise ConfigError(f"Required flag {flag} is missing: {label(type(node))}.{missing[0]} has no default.")


def _print_help(config: Config, sections: list[str], allow: Sequence[str]) -> NoReturn:
    from titan_config.help import print_help

    if _is_first_rank():
        print_help(config, _program(), sections, allow)
    sys.exit(0)


def _print_config(config: Config, start: Config, file: str | None, given: set[str]) -> NoReturn:
    """Print every value and its origin: default, recipe, config file or command line.

    Of a component chosen on the command line, fields copied from the old component keep their origin.
    """
    before, values = flatten(start), flatten(config)
    saved = flatten(read_json(file)) if file else before
    nodes = {path for path, _ in traverse(config)}
    lines = {path: f"{path or '$type'}: {value!r}" for path, value in sorted(values.items())}
    width = min(max(map(len, lines.values())), 80)
    for path, line in lines.items():
        origin = "default"
        if path in given or (path not in nodes and any(name.startswith(f"{path}.") for name in given)):
            origin = "command line"
        elif path in saved and repr(before.get(path)) == repr(values[path]):
            origin = file or "recipe"
        _print_on_rank_0(f"{line:{width}}  # {origin}", sys.stdout)
    sys.exit(0)


def _program() -> str:
    return os.path.basename(sys.argv[0])


def _is_first_rank() -> bool:
    """Return whether this process should print: torchrun starts every rank with the same command line."""
    return os.environ.get("RANK", "0") == "0"


def _print_on_rank_0(text: str, stream: Any) -> None:
    if _is_first_rank():
        print(text, file=stream)
