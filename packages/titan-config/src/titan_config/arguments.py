"""The words of a command line, sorted: which flags are set to what, and what else was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from titan_config.components import components_with
from titan_config.errors import ConfigError, nearest
from titan_config.flags import Flag

RESERVED = ("config", "print_config", "help")


@dataclasses.dataclass
class Arguments:
    """What a command line asks for; `settings` are (flag, values) from the top of the tree down, otherwise in order."""

    settings: list[tuple[str, list[str]]]
    file: str | None
    print_config: bool
    help: list[str] | None


def sort_words(words: Sequence[str]) -> Arguments:
    """Split words into flags and their values. Raises ConfigError for values that belong to no flag."""
    pairs: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") or word == "-h":
            name, has_value, value = word.lstrip("-").partition("=")
            pairs.append(("help" if word == "-h" else name, [value] if has_value else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            raise ConfigError(f"Got {word!r} before any flag. Everything is given by a flag. Write --name {word}.")
    reserved = {name.replace("-", "_"): values for name, values in pairs if name.replace("-", "_") in RESERVED}
    file = reserved.get("config")
    if file is not None and len(file) != 1:
        raise ConfigError(f"Got {len(file)} files for --config. It takes one. Write --config run.json.")
    if reserved.get("print_config"):
        raise ConfigError(f"Got {reserved['print_config']} after --print-config. It takes no value. Leave it out.")
    settings = [(name, values) for name, values in pairs if name.replace("-", "_") not in RESERVED]
    settings.sort(key=lambda setting: setting[0].count("."))
    return Arguments(settings, file[0] if file else None, "print_config" in reserved, reserved.get("help"))


def find_flag(name: str, flags: dict[str, Flag]) -> Flag:
    """Return the flag of that name, where - and _ are the same. Raises ConfigError with the nearest right name."""
    plain = name.replace("-", "_")
    found = flags.get(name) or {path.replace("-", "_"): flag for path, flag in flags.items()}.get(plain)
    if found is not None:
        return found
    head, dot, last = plain.rpartition(".")
    negated = flags.get(f"{head}{dot}{last.removeprefix('no_')}")
    if negated is not None and negated.is_switch:
        raise ConfigError(
            f"Got --{name}. A switch is turned off by its value. Write --{negated.path} False.",
        )
    owners = components_with(plain, flags)
    if owners:
        place, names = owners
        has = f"{' and '.join(names)} have it" if len(names) > 1 else f"{names[0]} has it"
        raise ConfigError(
            f"--{name} must be a flag of the chosen component, got none of that name. {has}: --{place} {names[0]}."
        )
    same_name = [path for path in flags if path.rpartition(".")[2] == last]
    if same_name:
        advice = f"Did you mean {' or '.join(f'--{path}' for path in same_name[:4])}?"
    else:
        advice = nearest(f"--{plain}", [f"--{path}" for path in flags])
    raise ConfigError(f"Got the flag --{name}. There is none of that name. {advice}")
