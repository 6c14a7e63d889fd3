"""Read a `config.json` as transformers does, with its defaults for missing settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Settings = Mapping[str, Any]
HfDefaults = Mapping[str, Any]
"""Defaults of a transformers class for settings missing in `config.json`, by setting.

A default is a value, or a function of the settings for one that follows from others; a function is called even if the
setting is present. Sizes that the weight shapes determine need no entry.
"""


def read_config(stated: Settings, hf_defaults: HfDefaults, sizes: Settings) -> dict[str, Any]:
    """Return the settings of a `config.json` with defaults for missing ones, except RoPE (see `read_rope`).

    `sizes` are the settings of the model, used if the width or the depth is missing. Raises ValueError for a setting
    that must be a number because others follow from it, and is none.
    """
    read = {**{key: sizes[key] for key in ("hidden_size", "num_hidden_layers") if key in sizes}, **stated}
    for key, default in hf_defaults.items():
        if callable(default):
            read[key] = default(read)
        else:
            read.setdefault(key, default)
    if read.get("hidden_act") == "swish":  # transformers' other name for the same function
        read["hidden_act"] = "silu"
    return read


def read_rope(stated: Settings, hf_defaults: HfDefaults) -> dict[str, Any]:
    """Return the RoPE settings of a `config.json` as transformers 5 reads them.

    They are in `rope_scaling` (transformers 4) or `rope_parameters` (5); the former takes precedence. Raises ValueError
    if one of them is no JSON object.
    """
    parameters = mapping_in(stated, "rope_parameters")
    if parameters is None:
        parameters = hf_defaults.get("rope_parameters", {})
    scaling = mapping_in(stated, "rope_scaling") or parameters
    rope = {
        "rope_theta": stated.get("rope_theta", hf_defaults.get("rope_theta", 10_000.0)),
        "rope_type": scaling.get("type", "default"),
        **{key: value for key, value in scaling.items() if key != "type"},
    }
    if rope["rope_type"] in ("llama3", "yarn"):
        nested = rope.get("original_max_position_embeddings", stated.get("max_position_embeddings"))
        rope["original_max_position_embeddings"] = stated.get("original_max_position_embeddings", nested)
    if "truncate" in rope:
        rope["truncate"] = bool(rope["truncate"])
    return {key: value for key, value in rope.items() if value is not None or key == "rope_type"}


def mapping_in(config: Settings, key: str) -> Settings | None:
    """Return the JSON object under `key`, or None if missing or null. Raises ValueError for any other value."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key} of config.json must be a JSON object or null, got {value!r}. Download it again.")
    return value


def count_in(config: Settings, key: str, default: int | None = None) -> int:
    """Return the number under `key`. Raises ValueError unless it is a whole number from 1 to a million."""
    value = config.get(key, default)
    if not isinstance(value, int) or not 1 <= value <= 1_000_000:
        shown = f"a number of {value.bit_length()} bits" if isinstance(value, int) and value > 1 else repr(value)
        raise ValueError(f"{key} of config.json must be a whole number from 1 to a million, got {shown}.")
    return value


def head_defaults(
    num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None
) -> dict[str, int | Callable[[Settings], Any]]:
    """Return the defaults of settings of attention heads.

    None for `num_kv_heads`: as many as query heads. None for `head_dim`: hidden_size / num_attention_heads.
    """

    def read_kv_heads(config: Settings) -> Any:
        return config.get("num_key_value_heads", num_kv_heads) or config["num_attention_heads"]

    def read_head_dim(config: Settings) -> Any:
        stated = config.get("head_dim", head_dim)
        return stated or count_in(config, "hidden_size") // count_in(config, "num_attention_heads")

    return {"num_attention_heads": num_heads, "num_key_value_heads": read_kv_heads, "head_dim": read_head_dim}


COMMON_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
"""Defaults of most classes that are derived from Llama in transformers."""
