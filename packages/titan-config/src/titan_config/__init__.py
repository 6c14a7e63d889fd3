"""Typed configs that build the objects they describe, with JSON, diff and a command line."""

from titan_config.codec import from_dict, to_dict
from titan_config.command_line import cli
from titan_config.configurable import Configurable
from titan_config.errors import ConfigError
from titan_config.files import from_json, load, save, to_json
from titan_config.local_path import require_local
from titan_config.text import diff, to_text
from titan_config.tree import replace, traverse

__all__ = [
    "ConfigError",
    "Configurable",
    "cli",
    "diff",
    "from_dict",
    "from_json",
    "load",
    "replace",
    "require_local",
    "save",
    "to_dict",
    "to_json",
    "to_text",
    "traverse",
]
