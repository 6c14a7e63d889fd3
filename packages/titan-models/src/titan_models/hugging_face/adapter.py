"""Weights to and from Hugging Face's names and layouts: a bijection, checked."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from titan_models.hugging_face.checks import check_dtypes, check_floats, check_same, check_shapes
from titan_models.hugging_face.config_check import block_sizes, check_config
from titan_models.hugging_face.config_reading import LeftOut, mapping_in
from titan_models.hugging_face.fp8 import Fp8Blocks
from titan_models.hugging_face.rules import Rules, mappings_of
from titan_models.hugging_face.stored_weights import stored_weights_in
from titan_models.hugging_face.weight_mapping import WeightMapping
from titan_models.moe.auxiliary_losses import RouterLoss
from titan_models.weights import init_weights

_ROTARY_BUFFERS = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached"))
"""What old files hold besides weights; transformers computes it from the config."""


@dataclass(frozen=True)
class NestedCheckpoint:
    """A checkpoint of a larger model that holds this one, as one of text and images holds that of text.

    Its names of this model begin with `prefix`. Those that begin with one of `others` belong to its other parts. Its
    `config.json` holds this one's under `config_key`.
    """

    prefix: str
    others: tuple[str, ...]
    config_key: str = "text_config"


class HfAdapter:
    """Brings the weights of one model to Hugging Face's names and layouts, and back.

    `rules` maps names of parameters (and persistent buffers) to Hugging Face's; `*` is one part of a name, the same on
    both sides. `HfTensor(name, *transforms)` adds transforms of layout: transposed, permuted. Several own names are a tuple: they
    are one tensor there. `#` stands for the numbers of the matrices of a 3-D weight, each of which is a tensor of its
    own there; transforms then see one matrix. What is only renamed, plain or `DTensor`, stays the object that it is.

        rules = {
            "layers.*.attention.q_proj.weight": HfTensor("model.layers.*.self_attn.q_proj.weight", NeighborPairs(128)),
            "layers.*.experts.down_proj.weight": "model.layers.*.mlp.experts.#.down_proj.weight",
            ("layers.*.experts.gate_proj.weight", "layers.*.experts.up_proj.weight"): HfTensor(
                "model.layers.*.mlp.experts.gate_up_proj", Alternating(dim=-2), Transposed()
            ),
        }

    Tied parameters go by the first name they have in the model, as in `named_parameters`. `repeats` maps names that a
    checkpoint may hold besides (Hugging Face's second name of a tied weight) to those whose values they repeat.
    `ignored` are beginnings of names that a checkpoint may hold besides, for parts that this model does without.
    `nested` says how a larger model's checkpoint holds this one. `config` is the whole `config.json`, but for its
    dtype; `left_out` what transformers takes for settings that somebody else's leaves out.

    A model's parameters share one floating dtype; buffers have theirs. In a checkpoint each weight has its own dtype. A
    checkpoint may hold weights quantized, as FP8 blocks (`NAME` and `NAME_scale_inv`) or MXFP4 (`NAME_blocks` and
    `NAME_scales`): they come in as fp32. Buffers of rotary embeddings, which old files hold, are passed over. What
    losses of routers remember is no weight: it needs no rule, is not exported, and begins anew with weights that come
    in.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        repeats: Mapping[str, str],
        config: Mapping[str, Any],
        ignored: tuple[str, ...] = (),
        nested: NestedCheckpoint | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        state = {name: tensor for name, tensor in model.state_dict().items() if name in parameters | buffers}
        stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in stand_ins.items()}
        self._buffers = {*buffers}
        self._begun = _begun_losses(model)
        stored = {name: shape for name, shape in self._shapes.items() if name not in self._begun}
        self._mappings = [
            replace(mapping, keeps_dtype=mapping.own[0][0] in buffers) for mapping in mappings_of(stored, rules)
        ]
        self._hf_shapes = {mapping.hf_name: tuple(_to_hf(mapping, stand_ins).shape) for mapping in self._mappings}
        self._hf_buffers = {mapping.hf_name for mapping in self._mappings if mapping.keeps_dtype}
        self._repeats = dict(repeats)
        self._config = dict(config)
        self._ignored = ignored
        self._nested = nested
        self._left_out = left_out or {}

    def hf_config(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The `config.json` for weights of `dtype`, as transformers 5 reads it."""
        return {**self._config, "dtype": str(dtype).removeprefix("torch.")}

    def mappings(self) -> list[WeightMapping]:
        """What the model's weights are to Hugging Face, one after the other."""
        return [*self._mappings, *self._beginnings()]

    def find(self, stored: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> list[WeightMapping]:
        """Where the model's weights are in a checkpoint of these tensors; only shapes and dtypes are looked at.

        `config` is its `config.json`, if it has one. Raises ValueError, naming them, for settings of another model, and
        for tensors that are missing, unexpected, of another shape, or no floating-point numbers.
        """
        if config is not None:
            text = None if self._nested is None else mapping_in(config, self._nested.config_key)
            if text is not None:
                config = {
                    **text,
                    "quantization_config": config.get("quantization_config", text.get("quantization_config")),
                }
            check_config(config, self._config, self._left_out)
        known, ignored = self._own_and_ignored(stored)
        stored_weights = stored_weights_in(known, stored, Fp8Blocks(*block_sizes(config)))
        theirs = {hf_name: source for hf_name, source in stored_weights.items() if hf_name not in self._repeats}
        check_shapes({hf_name: source.shape for hf_name, source in theirs.items()}, self._hf_shapes, "A checkpoint")
        plain = [name for name, source in theirs.items() if source.is_plain and name not in self._hf_buffers]
        check_floats({hf_name: stored[theirs[hf_name].names[0]].dtype for hf_name in plain})
        mappings = [WeightMapping((), tuple(ignored))] if ignored else []
        mappings += self._beginnings()
        for hf_name, original in self._repeats.items():
            if hf_name in stored_weights:
                names = stored_weights[hf_name].names + stored_weights[original].names
                if not (stored_weights[hf_name].is_plain and stored_weights[original].is_plain):
                    raise ValueError(
                        f"Got {hf_name} or {original} quantized. This model has one weight for both, and they are "
                        "compared as they are. Take a checkpoint where they are not quantized."
                    )
                mappings.append(WeightMapping((), names, decode=partial(check_same, names)))
        for mapping in self._mappings:
            mappings += theirs[mapping.hf_name].find(mapping)
        return mappings

    def to_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's whole state under Hugging Face's names. Raises ValueError, naming keys, for anything else."""
        check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, self._shapes, "The model")
        check_dtypes({name: tensor.dtype for name, tensor in state.items() if name not in self._buffers})
        return {mapping.hf_name: _to_hf(mapping, state) for mapping in self._mappings}

    def from_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole Hugging Face state under the model's names. Raises ValueError, naming keys, for anything else."""
        whole: dict[str, Tensor] = {}
        matrices: dict[str, list[Tensor]] = {}
        for mapping in self.find(state):
            tensors = mapping.from_hf([state[name] for name in mapping.hf_names])
            for (name, index), tensor in zip(mapping.own, tensors, strict=True):
                if index is None:
                    whole[name] = tensor
                else:
                    matrices.setdefault(name, []).append(tensor)
        whole |= {name: torch.stack(tensors) for name, tensors in matrices.items()}
        return {name: whole[name] for name in self._shapes}

    def _beginnings(self) -> list[WeightMapping]:
        return [WeightMapping(((name, None),), (), decode=tensor.clone) for name, tensor in self._begun.items()]

    def _own_and_ignored(self, stored: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
        """`{name when the model is alone: name in the checkpoint}`, and names of what the model does without."""
        prefix, ignored = "", self._ignored
        if self._nested is not None and any(name.startswith(self._nested.prefix) for name in stored):
            prefix = self._nested.prefix
            ignored = (*self._nested.others, *(prefix + name for name in ignored))
        known, without = {}, []
        for name in stored:
            own = name.removeprefix(prefix)
            if name.startswith(ignored) or (name.endswith(_ROTARY_BUFFERS) and own not in self._hf_shapes):
                without.append(name)
            else:
                known[own] = name
        return known, without


def _to_hf(mapping: WeightMapping, state: Mapping[str, Tensor]) -> Tensor:
    return mapping.to_hf([state[name] if index is None else state[name][index] for name, index in mapping.own])


def _begun_losses(model: nn.Module) -> dict[str, Tensor]:
    """The state of losses of routers as it is in the beginning."""
    begun: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, RouterLoss):
            loss = copy.deepcopy(module).to_empty(device="cpu")
            init_weights(loss, seed=0)
            begun |= {f"{name}.{own}": tensor for own, tensor in loss.state_dict().items()}
    return begun
