"""Command-line parsing: words to flags with values, and the built-in flags --config, --print-config and --help."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from titan_config.components import components_with
from titan_config.errors import ConfigError, nearest
from titan_config.flags import Flag

RESERVED = ("config", "print_config", "help")


@dataclasses.dataclass
class Arguments:
    """A parsed command line; `settings` are (flag, values) pairs, outer flags before nested ones."""

    settings: list[tuple[str, list[str]]]
    file: str | None
    print_config: bool
    help: list[str] | None


def sort_words(words: Sequence[str]) -> Arguments:
    """Group words into flags and their values. Raises ConfigError for a value before the first flag."""
    pairs: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") or word == "-h":
            name, has_value, value = word.lstrip("-").partition("=")
            pairs.append(("help" if word == "-h" else name, [value] if has_value else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            raise ConfigError(f"The first argument must be a flag, got {word!r}. Write --name {word}.")
    reserved = {name.replace("-", "_"): values for name, values in pairs if name.replace("-", "_") in RESERVED}
    file = reserved.get("config")
    if file is not None and len(file) != 1:
        raise ConfigError(f"--config must be followed by one file, got {len(file)}. Write --config run.json.")
    if reserved.get("print_config"):
        raise ConfigError(f"--print-config takes no value, got {' '.join(reserved['print_config'])!r}.")
    settings = [(name, values) for name, values in pairs if name.replace("-", "_") not in RESERVED]
    settings.sort(key=lambda setting: setting[0].count("."))
    return Arguments(settings, file[0] if file else None, "print_config" in reserved, reserved.get("help"))


def find_flag(name: str, flags: dict[str, Flag]) -> Flag:
    """Return the flag called `name`; - and _ are equivalent. Raises ConfigError with the nearest known name."""
    plain = name.replace("-", "_")
    found = flags.get(name) or {path.replace("-", "_"): flag for path, flag in flags.items()}.get(plain)
    if found is not None:
        return found
    head, dot, last = plain.rpartition(".")
    negated = flags.get(f"{head}{dot}{last.removeprefix('no_')}")
    if negated is not None and negated.is_switch:
        raise ConfigError(f"Unknown flag --{name}. To turn the switch off, write --{negated.path} False.")
    owners = components_with(plain, flags)
    if owners:
        place, names = owners
        choices = " or ".join(f"--{place} {each}" for each in names)
        raise ConfigError(f"The chosen component has no flag --{name}. The flag is available with {choices}.")
    same_name = [path for path in flags if path.rpartition(".")[2] == last]
    if same_name:
        advice = f"Did you mean {' or '.join(f'--{path}' for path in same_name[:4])}?"
    else:
        advice = nearest(f"--{plain}", [f"--{path}" for path in flags])
    raise ConfigError(f"Unknown flag --{name}. {advice}")
