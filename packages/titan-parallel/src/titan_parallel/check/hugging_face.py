"""Build a small model of the architecture that a Hugging Face config describes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titan_config import ConfigError
from torch import nn

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "sliding_window": 6,
    "max_position_embeddings": 128,
}
"""Upper limits to which sizes are reduced."""


def build_small(path: Path) -> tuple[Callable[[], nn.Module], str]:
    """Return a function that builds a small model of a `config.json`, and a note that lists the reduced sizes.

    Raises ConfigError for a file that is not the config of a causal language model.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"transformers must be installed for --hf {path}. Run pip install transformers.") from error
    file = path / "config.json" if path.is_dir() else path
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        small = _reduced(transformers.AutoConfig.for_model(**given).to_dict())
        config = transformers.AutoConfig.for_model(**small)
        config.use_cache = False
        transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file} must be the config.json of a causal language model that transformers can build, got {error}. Give "
            "another file, or a function that builds the model."
        ) from error
    return lambda: transformers.AutoModelForCausalLM.from_config(config), _note(given, small)


def _reduced(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with reduced sizes, and with 1, 2 or 4 key-value heads: MQA, GQA or MHA as before."""
    names = importlib.import_module("transformers").AutoConfig.for_model(config["model_type"]).attribute_map
    small = dict(config)
    for standard, size in SMALL.items():
        name = names.get(standard, standard)
        if isinstance(small.get(name), int):
            small[name] = min(small[name], size)
    heads, kv_heads = config[names.get("num_attention_heads", "num_attention_heads")], config.get("num_key_value_heads")
    if kv_heads is not None:
        small["num_key_value_heads"] = {1: 1, heads: SMALL["num_attention_heads"]}.get(kv_heads, 2)
    if config.get("layer_types"):
        kinds = sorted(set(config["layer_types"]))
        small["layer_types"] = (kinds * SMALL["num_hidden_layers"])[
            : small[names.get("num_hidden_layers", "num_hidden_layers")]
        ]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if small.get(name) is not None:
            small[name] = 0
    return small


def _note(given: dict[str, Any], small: dict[str, Any]) -> str:
    changed = [
        f"{name} {given[name]} -> {small[name]}" for name in given if name in small and given[name] != small[name]
    ]
    return f"Checking a small model: {', '.join(changed) or 'all sizes as in the config'}."
