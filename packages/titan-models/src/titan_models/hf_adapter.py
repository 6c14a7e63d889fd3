"""Weights to and from Hugging Face's names and layouts: a bijection, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from titan_models.hf_rules import Piece, Rules, Slot, listed, pieces_of
from titan_models.shards import local_part


@dataclass(frozen=True)
class Inside:
    """A checkpoint of a larger model that holds this one, as one of text and images holds that of text.

    Its names of this model begin with `prefix`. Those that begin with one of `others` belong to its other parts.
    """

    prefix: str
    others: tuple[str, ...]


class HfAdapter:
    """Brings the weights of one model to Hugging Face's names and layouts, and back.

    `rules` maps names of parameters (and persistent buffers) to Hugging Face's; `*` is one part of a name, the same on
    both sides. `Stored(name, *steps)` adds steps of layout: transposed, permuted. Several own names are a tuple: they
    are one tensor there. `#` stands for the numbers of the matrices of a 3-D weight, each of which is a tensor of its
    own there; steps then see one matrix. What is only renamed, plain or `DTensor`, stays the object that it is.

        rules = {
            "layers.*.attention.q_proj.weight": Stored("model.layers.*.self_attn.q_proj.weight", NeighbourPairs(128)),
            "layers.*.experts.down_proj": "model.layers.*.mlp.experts.#.down_proj.weight",
            ("layers.*.experts.gate_proj", "layers.*.experts.up_proj"): Stored(
                "model.layers.*.mlp.experts.gate_up_proj", Alternating(dim=-2), Transposed()
            ),
        }

    Tied parameters go by the first name they have in the model, as in `named_parameters`. `repeats` maps names that a
    checkpoint may hold besides (Hugging Face's second name of a tied weight) to those whose values they repeat.
    `ignored` are beginnings of names that a checkpoint may hold besides, for parts that this model does without.
    `inside` says how a larger model's checkpoint holds this one. `config` is the whole `config.json`, but for its
    dtype.

    Parameters share one floating dtype; buffers have theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        repeats: Mapping[str, str],
        config: Mapping[str, Any],
        ignored: tuple[str, ...] = (),
        inside: Inside | None = None,
    ) -> None:
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        state = {name: tensor for name, tensor in model.state_dict().items() if name in parameters | buffers}
        stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in stand_ins.items()}
        self._pieces = pieces_of(self._shapes, rules)
        self._hf_shapes = {piece.hf_name: tuple(_to_hf(piece, stand_ins).shape) for piece in self._pieces}
        self._buffers = {*buffers}
        self._hf_buffers = {piece.hf_name for piece in self._pieces if piece.own[0].name in buffers}
        self._repeats = dict(repeats)
        self._config = dict(config)
        self._ignored = ignored
        self._inside = inside

    def hf_config(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The `config.json` for weights of `dtype`, as transformers 5 reads it."""
        return {**self._config, "dtype": str(dtype).removeprefix("torch.")}

    def to_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's whole state under Hugging Face's names. Raises ValueError, naming keys, for anything else."""
        _check(state, self._shapes, self._buffers, "The model")
        return {piece.hf_name: _to_hf(piece, state) for piece in self._pieces}

    def from_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole Hugging Face state under the model's names. Raises ValueError, naming keys, for anything else."""
        state = self._without_others(state)
        theirs = {hf_name: tensor for hf_name, tensor in state.items() if hf_name not in self._repeats}
        _check(theirs, self._hf_shapes, self._hf_buffers, "Hugging Face's checkpoint")
        for hf_name, original in self._repeats.items():
            if hf_name in state and not _equal(state[hf_name], state[original]):
                raise ValueError(
                    f"Got {hf_name} with other values than {original}. This model has one weight for both. Take the "
                    "flavor that does not tie them."
                )
        parts: dict[str, list[Tensor]] = {name: [] for name in self._shapes}
        stacked = set()
        for piece in self._pieces:
            for slot, tensor in zip(piece.own, piece.from_hf(theirs[piece.hf_name]), strict=True):
                parts[slot.name].append(tensor)
                if slot.index is not None:
                    stacked.add(slot.name)
        return {name: torch.stack(tensors) if name in stacked else tensors[0] for name, tensors in parts.items()}

    def _without_others(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint without what the model does without, and by the names that it has when it is alone."""
        if self._inside is not None and any(name.startswith(self._inside.prefix) for name in state):
            within, others = self._inside.prefix, self._inside.others
            state = {name.removeprefix(within): state[name] for name in state if not name.startswith(others)}
        return {name: tensor for name, tensor in state.items() if not name.startswith(self._ignored)}


def _to_hf(piece: Piece, state: Mapping[str, Tensor]) -> Tensor:
    return piece.to_hf([_in(slot, state) for slot in piece.own])


def _in(slot: Slot, state: Mapping[str, Tensor]) -> Tensor:
    return state[slot.name] if slot.index is None else state[slot.name][slot.index]


def _check(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], buffers: Collection[str], whose: str
) -> None:
    """Raise ValueError, naming keys, unless `state` has these names and shapes, and weights one floating dtype."""
    missing, unexpected = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(
            f"Got a state that lacks {listed(missing)} and has {listed(unexpected)} besides. {whose} has "
            f"{len(shapes)} tensors, all needed, and no others. Take the flavor that the weights belong to."
        )
    wrong = [name for name, shape in shapes.items() if tuple(state[name].shape) != shape]
    if wrong:
        told = [f"{name} {list(state[name].shape)} instead of {list(shapes[name])}" for name in wrong]
        raise ValueError(f"Got {listed(told)}. Shapes must agree. Take the flavor that the weights belong to.")
    weights = {name: tensor for name, tensor in state.items() if name not in buffers}
    common = Counter(tensor.dtype for tensor in weights.values()).most_common(1)[0][0]
    other = [f"{name} ({tensor.dtype})" for name, tensor in weights.items() if tensor.dtype != common]
    if other:
        raise ValueError(f"Got {listed(other)} among {common}. Weights have one dtype. Cast them to one before.")
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
