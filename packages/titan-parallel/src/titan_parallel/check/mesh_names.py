"""Short names of meshes: `fsdp2_tp2_sp` says which degrees, and what comes with them."""

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
    """`{name: ParallelDims.Config}` of short names, such as "fsdp2", "ddp2_fsdp2", "tp2_sp" or "pp2_tp2".

    Words joined by "_": an axis and its degree (fsdp, ddp, tp, cp, pp); `sp` for sequence parallel, without which
    tensor ranks hold the whole stream; a context method or a pipeline schedule, in small letters. Raises ConfigError
    for another word.
    """
    return {name: _mesh(name) for name in names}


def describe(config: ParallelDims.Config) -> str:
    """What a config changes: "tensor_parallel_degree=2, sequence_parallel=False"."""
    default = ParallelDims.Config()
    changed = {name: value for name, value in vars(config).items() if value != getattr(default, name)}
    return ", ".join(f"{name}={value}" for name, value in changed.items()) or "one rank"


def ranks_of(config: ParallelDims.Config) -> int:
    """How many ranks a config needs: the product of its degrees."""
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
                f"Got {word!r} in the mesh {name!r}. A mesh is made of {', '.join(f'{axis}N' for axis in _DEGREES)}, "
                f"sp, {', '.join(choices)}, joined by '_'. Write fsdp2, tp2_sp or fsdp2_tp2, say, or name the degrees."
            )
    if config.tensor_parallel_degree > 1:
        config.sequence_parallel = "sp" in words
    return config


def _choices() -> dict[str, tuple[str, str]]:
    """What is chosen by name: word -> field and value."""
    hints = get_type_hints(ParallelDims.Config)
    fields = ("context_parallel_method", "pipeline_parallel_schedule")
    return {str(value).lower(): (field, value) for field in fields for value in get_args(hints[field])}
