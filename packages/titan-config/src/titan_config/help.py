"""`--help`: all flags with type, default and docstring, rendered by tyro; `--help optimizer` prints one section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, cast

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from titan_config.codec import encode
from titan_config.components import known_components, name_of
from titan_config.configurable import Config
from titan_config.docs import class_doc, field_doc
from titan_config.errors import ConfigError, nearest
from titan_config.flags import UNSET, Flag, flags_of
from titan_config.text import readable
from titan_config.values import spec_of

_MAX_CHOICES = 8
DESCRIPTION = """\
Every field is a flag. --SECTION NAME chooses another component and adds its flags. \
--help SECTION shows one section. --config FILE starts from a saved run. \
--print-config shows every value and its origin."""


class Section:
    """A group of flags; `entries` maps names to flags or nested sections."""

    def __init__(self, doc: str = "") -> None:
        self.doc = doc
        self.entries: dict[str, Section | Flag] = {}


def print_help(config: Config, program: str, sections: Sequence[str], allow: Sequence[str]) -> None:
    """Print the flags of `config`, or only those of `sections`. Raises ConfigError for an unknown section."""
    flags = flags_of(config)
    names = [name.lstrip("-").replace("-", "_") for name in sections]
    for name in names:
        if name not in flags:
            raise ConfigError(
                f"--help must be followed by the name of a section or flag, got {name}. {nearest(name, flags)}"
            )
    shown = {path: flag for path, flag in flags.items() if not names or any(_is_in(path, name) for name in names)}
    tyro.cli(
        Section,
        default=_section(shown),
        args=["--help"],
        prog=program,
        description=" ".join(part for part in (class_doc(type(config)._owner or type(config)), DESCRIPTION) if part),
        use_underscores=True,
        registry=_registry(allow),
    )


def _is_in(path: str, section: str) -> bool:
    return f"{path}.".startswith(f"{section}.")


def _section(flags: dict[str, Flag]) -> Section:
    """Return the flags nested by their paths; each component, and each container of components, is a section."""
    root = Section()
    for path, flag in flags.items():
        *parents, name = path.split(".")
        section = root
        for parent in parents:  # a flag with flags below it is always a section
            section = cast(Section, section.entries.setdefault(parent, Section()))
        is_section = any(other.startswith(f"{path}.") for other in flags)
        section.entries[name] = Section(_component_doc(flag)) if is_section else flag
    return root


def _component_doc(flag: Flag) -> str:
    doc = field_doc(flag.owner, flag.path.rpartition(".")[2])
    if not isinstance(flag.value, Config):
        return doc
    others = list(known_components(flag.component_types)) + ["None"] * flag.is_optional
    named = f"one of {', '.join(others)}" if len(others) <= _MAX_CHOICES else "another component"
    choice = f"Currently {name_of(type(flag.value))}; --{flag.path} chooses {named}." if len(others) > 1 else ""
    return " ".join(part for part in (doc or class_doc(type(flag.value)._owner or type(flag.value)), choice) if part)


def _registry(allow: Sequence[str]) -> ConstructorRegistry:
    registry = ConstructorRegistry()

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not isinstance(info.default, Section):
            return None
        fields = tuple(_field(name, entry, allow) for name, entry in info.default.entries.items())
        return StructConstructorSpec(instantiate=Section, fields=fields)

    return registry


def _field(name: str, entry: Section | Flag, allow: Sequence[str]) -> StructFieldSpec:
    if isinstance(entry, Section):
        return StructFieldSpec(name=name, type=Section, default=entry, helptext=entry.doc)
    shown = tyro.conf.arg(help=field_doc(entry.owner, name), help_behavior_hint=f"({_state(entry.value)})")
    written = PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar(entry, allow),
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [""],
    )
    return StructFieldSpec(name=name, type=Annotated[Any, written, shown], default=entry)  # type: ignore[arg-type]


def _state(value: Any) -> str:
    if value is UNSET:
        return "required"
    if isinstance(value, Config):  # a config without fields: one with fields is a section
        return f"default: {name_of(type(value))}"
    return f"default: {readable(encode(value, strict=False))!r}"


def metavar(flag: Flag, allow: Sequence[str]) -> str:
    """Return the metavar of a flag, the placeholder for its value in help texts: INT, {a,b}, {None,AdamW,Muon}."""
    types = flag.component_types or flag.item_types
    if not types:
        return spec_of(flag.annotation, allow).metavar
    names = [*known_components(types), *(["None"] * flag.is_optional)]
    choice = "{" + ",".join(names) + "}" if 0 < len(names) <= _MAX_CHOICES else "COMPONENT"
    return f"[{choice} ...]" if flag.item_types else choice
