"""Weights to and from Hugging Face's names: a bijection, checked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from titan_models.shards import local_part


class HfAdapter:
    """Renames the parameters of one model; what is only renamed, plain or `DTensor`, stays as it is.

    `rules` maps names of the model to Hugging Face's; `*` is one part of a name, the same on both sides. `#` stands for
    the numbers of the matrices of a 3-D parameter, each of which is a tensor of its own there. Tied parameters go by
    the first name they have in the model, as in `named_parameters`. `repeats` maps names that a checkpoint may hold
    besides (Hugging Face's second name of a tied weight) to those whose values they repeat. `config` is the whole
    `config.json`, but for the dtype.
    """

    def __init__(
        self, model: nn.Module, rules: Mapping[str, str], repeats: Mapping[str, str], config: Mapping[str, Any]
    ) -> None:
        parameters = dict(model.named_parameters())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        renamed = _rename(parameters, rules)
        self._whole = {name: hf_name for name, hf_name in renamed.items() if "#" not in hf_name}
        self._split = {
            name: [hf_name.replace("#", str(number)) for number in range(self._shapes[name][0])]
            for name, hf_name in renamed.items()
            if "#" in hf_name
        }
        self._hf_shapes = {hf_name: self._shapes[name] for name, hf_name in self._whole.items()}
        for name, hf_names in self._split.items():
            self._hf_shapes |= dict.fromkeys(hf_names, self._shapes[name][1:])
        self._repeats = dict(repeats)
        self._config = dict(config)

    def hf_config(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The `config.json` for weights of `dtype`, as transformers 5 reads it."""
        return {**self._config, "dtype": str(dtype).removeprefix("torch.")}

    def to_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's whole state under Hugging Face's names. Raises ValueError, naming keys, for anything else."""
        _check(state, self._shapes, "The model")
        own: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name in self._whole:
                own[self._whole[name]] = tensor
            else:
                own |= dict(zip(self._split[name], tensor.unbind(0), strict=True))
        return own

    def from_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole Hugging Face state under the model's names. Raises ValueError, naming keys, for anything else."""
        own = {hf_name: tensor for hf_name, tensor in state.items() if hf_name not in self._repeats}
        _check(own, self._hf_shapes, "Hugging Face's checkpoint")
        for hf_name, original in self._repeats.items():
            if hf_name in state and not _equal(state[hf_name], state[original]):
                raise ValueError(
                    f"Got {hf_name} with other values than {original}. This model has one weight for both. Take the "
                    "flavor that does not tie them."
                )
        whole = {name: own[hf_name] for name, hf_name in self._whole.items()}
        stacked = {name: torch.stack([own[part] for part in parts]) for name, parts in self._split.items()}
        return {name: (whole | stacked)[name] for name in self._shapes}


def _rename(names: Iterable[str], rules: Mapping[str, str]) -> dict[str, str]:
    """`{name: HF's name}`. Raises ValueError unless names have one rule each, rules a name, and no two names meet."""
    renamed: dict[str, str] = {}
    used = set()
    for name in names:
        fitting = [pattern for pattern in rules if re.fullmatch(_expression(pattern), name)]
        if len(fitting) != 1:
            raise ValueError(
                f"Got {len(fitting)} rules for the parameter {name}. Each parameter has one name in Hugging Face's "
                "checkpoint. Give it one rule."
            )
        used.add(fitting[0])
        renamed[name] = re.sub(_expression(fitting[0]), rules[fitting[0]].replace("*", r"\1"), name)
    if unused := sorted(rules.keys() - used):
        raise ValueError(f"Got rules that fit no parameter: {_listed(unused)}. A rule renames something. Remove them.")
    if met := [name for name, count in Counter(renamed.values()).items() if count > 1]:
        raise ValueError(f"Got two parameters for {_listed(met)}. Names map one to one. Correct the rules.")
    return renamed


def _expression(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"([^.]+)")


def _check(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], whose: str) -> None:
    """Raise ValueError, naming keys, unless `state` has exactly these names and shapes, and one floating dtype."""
    missing, unexpected = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(
            f"Got a state that lacks {_listed(missing)} and has {_listed(unexpected)} besides. {whose} has "
            f"{len(shapes)} tensors, all needed, and no others. Take the flavor that the weights belong to."
        )
    wrong = [name for name, shape in shapes.items() if tuple(state[name].shape) != shape]
    if wrong:
        told = [f"{name} {list(state[name].shape)} instead of {list(shapes[name])}" for name in wrong]
        raise ValueError(f"Got {_listed(told)}. Shapes must agree. Take the flavor that the weights belong to.")
    dtypes = Counter(tensor.dtype for tensor in state.values())
    common = dtypes.most_common(1)[0][0]
    other = [f"{name} ({tensor.dtype})" for name, tensor in state.items() if tensor.dtype != common]
    if other:
        raise ValueError(f"Got {_listed(other)} among {common}. Weights have one dtype. Cast them to one before.")
    if not common.is_floating_point:
        raise ValueError(f"Got weights of {common}. They are floating-point numbers. Dequantise them before.")


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same values, as far as this rank holds them; on the meta device it holds none."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.is_meta or second.is_meta:
        return True
    first, second = local_part(first)[0], local_part(second)[0]
    return first is second or torch.equal(first, second)


def _listed(names: list[str]) -> str:
    """Names for an error that fits on a screen."""
    shown = ", ".join(names[:8]) or "nothing"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
