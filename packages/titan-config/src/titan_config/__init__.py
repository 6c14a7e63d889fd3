"""A typed config that builds the object that owns it: JSON, diff and a command line included."""

from titan_config.configurable import Configurable
from titan_config.errors import ConfigError
from titan_config.tree import traverse

__all__ = ["ConfigError", "Configurable", "traverse"]
