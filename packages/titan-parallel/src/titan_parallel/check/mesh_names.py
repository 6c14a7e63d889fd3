"""Short names of meshes, such as `fsdp2_tp2_sp`: axes with their degrees, and options."""

from __future__ import annotations

import re
from typing import get_args, get_type_hints

from titan_config import ConfigError

from titan_parallel.mesh.parallel_dims import ParallelDims

_DEGREES = {
    "fsdp": "data_parallel_shard_degree",
    "ddp": "data_parallel_replicate_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "cp": "context_parallel_degree",
}


def meshes(*names: str) -> dict[str, ParallelDims.Config]:
    """Return `{name: ParallelDims.Config}` for short names, such as "fsdp2", "ddp2_fsdp2", "tp2_sp" or "pp2_tp2".

    A name consists of words joined by "_": an axis and its degree (fsdp, ddp, tp, cp, pp); `sp` for sequence parallel,
    which is off otherwise; a context parallel method or a pipeline schedule in lower case. Raises ConfigError for other
    words.
    """
    return {name: _mesh(name) for name in names}


def describe(config: ParallelDims.Config) -> str:
    """Return the non-default fields of a config: "tensor_parallel_degree=2, sequence_parallel=False"."""
    default = ParallelDims.Config()
    changed = {name: value for name, value in vars(config).items() if value != getattr(default, name)}
    return ", ".join(f"{name}={value}" for name, value in changed.items()) or "one rank"


def ranks_of(config: ParallelDims.Config) -> int:
    """Return the number of ranks of a config: the product of its degrees."""
    product = config.data_parallel_shard_degree or 1
    for name in set(_DEGREES.values()) - {"data_parallel_shard_degree"}:
        product *= getattr(config, name)
    return product


def _mesh(name: str) -> ParallelDims.Config:
    config = ParallelDims.Config()
    choices = _choices()
    words = name.split("_")
    for word in words:
        axis = re.fullmatch(r"([a-z]+)(\d+)", word)
        if axis is not None and axis[1] in _DEGREES:
            setattr(config, _DEGREES[axis[1]], int(axis[2]))
        elif word in choices:
            setattr(config, *choices[word])
        elif word != "sp":
            raise ConfigError(
                f"A mesh name must consist of {', '.join(f'{axis}N' for axis in _DEGREES)}, sp, {', '.join(choices)}, "
                f"joined by '_', got {word!r} in {name!r}. Write fsdp2, tp2_sp or fsdp2_tp2, for example, or give a "
                "ParallelDims.Config."
            )
    if config.tensor_parallel_degree > 1:
        config.sequence_parallel = "sp" in words
    return config


def _choices() -> dict[str, tuple[str, str]]:
    """Return {word: (field, value)} for context parallel methods and pipeline schedules."""
    hints = get_type_hints(ParallelDims.Config)
    fields = ("context_parallel_method", "pipeline_parallel_schedule")
    return {str(value).lower(): (field, value) for field in fields for value in get_args(hints[field])}
