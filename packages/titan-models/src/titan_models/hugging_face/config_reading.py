"""What transformers reads in a `config.json`: what it says, and what its class takes where it says nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Settings = Mapping[str, Any]
LeftOut = Mapping[str, Any]
"""By setting, what a class of transformers takes where a `config.json` leaves it out.

A value; or a function of the settings, for one that follows from others, called whether it is left out or not. Sizes
that the shapes of the weights decide need no entry.
"""


def read_config(stated: Settings, left_out: LeftOut, sizes: Settings) -> dict[str, Any]:
    """The settings of a `config.json` and those that it leaves out, but for the rope, which is `read_rope`'s.

    `sizes` has the model's width and depth, for where it leaves out these. Raises ValueError for a number that other
    settings follow from and that is none.
    """
    read = {**{key: sizes[key] for key in ("hidden_size", "num_hidden_layers") if key in sizes}, **stated}
    for key, default in left_out.items():
        if callable(default):
            read[key] = default(read)
        else:
            read.setdefault(key, default)
    if read.get("hidden_act") == "swish":  # transformers' other name for the same function
        read["hidden_act"] = "silu"
    return read


def read_rope(stated: Settings, left_out: LeftOut) -> dict[str, Any]:
    """What a `config.json` of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`) says of its rope, as 5 reads it.

    The former wins where both are there. Raises ValueError where one is no object.
    """
    parameters = mapping_in(stated, "rope_parameters")
    if parameters is None:
        parameters = left_out.get("rope_parameters", {})
    scaling = mapping_in(stated, "rope_scaling") or parameters
    rope = {
        "rope_theta": stated.get("rope_theta", left_out.get("rope_theta", 10_000.0)),
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
    """The object under `key`, None where there is none. Raises ValueError for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"Got a config.json whose {key} is {value!r}. It is an object, or null. Download it again.")
    return value


def count_in(config: Settings, key: str, default: int | None = None) -> int:
    """The number under `key`. Raises ValueError unless it is a whole one from 1 to a million."""
    value = config.get(key, default)
    if not isinstance(value, int) or not 1 <= value <= 1_000_000:
        shown = f"one of {value.bit_length()} bits" if isinstance(value, int) and value > 1 else repr(value)
        raise ValueError(f"{key} of config.json must be a whole number from 1 to a million, got {shown}.")
    return value


def heads_left_out(
    num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None
) -> dict[str, int | Callable[[Settings], Any]]:
    """What is taken for heads: None for those of keys and values is as many as of queries, for their width the rest."""

    def read_kv_heads(config: Settings) -> Any:
        return config.get("num_key_value_heads", num_kv_heads) or config["num_attention_heads"]

    def read_head_dim(config: Settings) -> Any:
        stated = config.get("head_dim", head_dim)
        return stated or count_in(config, "hidden_size") // count_in(config, "num_attention_heads")

    return {"num_attention_heads": num_heads, "num_key_value_heads": read_kv_heads, "head_dim": read_head_dim}


LEFT_OUT = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
"""By most families that followed Llama."""
