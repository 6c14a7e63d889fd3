"""The adapter that converts the weights of a model to and from Hugging Face names and layouts."""

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
from titan_models.hugging_face.config_reading import HfDefaults, mapping_in
from titan_models.hugging_face.fp8 import Fp8Blocks
from titan_models.hugging_face.rules import Rules, mappings_of
from titan_models.hugging_face.stored_weights import stored_weights_in
from titan_models.hugging_face.weight_mapping import WeightMapping
from titan_models.moe.auxiliary_losses import RouterLoss
from titan_models.weights import init_weights

_ROTARY_BUFFERS = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached"))
"""Buffers in old checkpoints; transformers computes them from the config."""


@dataclass(frozen=True)
class NestedCheckpoint:
    """A checkpoint of a larger model that contains this model, such as a vision-language model with a text model.

    The tensor names of this model begin with `prefix`, those of other modules with one of `others`. `config_key` is the
    key of the config of this model in `config.json`.
    """

    prefix: str
    others: tuple[str, ...]
    config_key: str = "text_config"


class HfAdapter:
    """Converts the weights of one model to and from Hugging Face names and layouts; the mapping is bijective.

    `rules` maps names of parameters and persistent buffers to Hugging Face names. `*` matches one dot-separated
    component of a name, the same on both sides. `HfTensor(name, *transforms)` adds layout transforms such as
    `Transposed`. A tuple of several model names is one tensor in the checkpoint. `#` stands for the index into a
    stacked 3-D weight whose matrices are separate tensors in the checkpoint; transforms then apply to single matrices.
    Weights without transforms, plain or `DTensor`, are returned as the same objects.

        rules = {
            "layers.*.attention.q_proj.weight": HfTensor("model.layers.*.self_attn.q_proj.weight", NeighborPairs(128)),
            "layers.*.experts.down_proj.weight": "model.layers.*.mlp.experts.#.down_proj.weight",
            ("layers.*.experts.gate_proj.weight", "layers.*.experts.up_proj.weight"): HfTensor(
                "model.layers.*.mlp.experts.gate_up_proj", Alternating(dim=-2), Transposed()
            ),
        }

    A tied parameter has the first of its names in the model, as in `named_parameters`. `repeats` maps additional names
    that a checkpoint may contain (such as the second name of a tied weight in Hugging Face) to the names whose values
    they repeat. `ignored` are prefixes of names that a checkpoint may contain, for modules that this model does not
    have. `nested` describes the checkpoint of a larger model that contains this one. `config` is the whole
    `config.json` except the dtype. `hf_defaults` are the values that transformers uses for settings missing in a
    `config.json`.

    All parameters of a model have one floating-point dtype; buffers keep their own. In a checkpoint each weight has its
    own dtype. A checkpoint may store weights quantized, as FP8 blocks (`NAME` and `NAME_scale_inv`) or MXFP4
    (`NAME_blocks` and `NAME_scales`): these are loaded as fp32. Buffers of rotary embeddings in old checkpoints are
    ignored. The state of router losses needs no rule: it is not exported, and starts from its initial values when
    weights are imported.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        repeats: Mapping[str, str],
        config: Mapping[str, Any],
        ignored: tuple[str, ...] = (),
        nested: NestedCheckpoint | None = None,
        hf_defaults: HfDefaults | None = None,
    ) -> None:
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        state = {name: tensor for name, tensor in model.state_dict().items() if name in parameters | buffers}
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in meta.items()}
        self._buffers = {*buffers}
        self._loss_state = _initial_loss_state(model)
        stored = {name: shape for name, shape in self._shapes.items() if name not in self._loss_state}
        self._mappings = [
            replace(mapping, keeps_dtype=mapping.own[0][0] in buffers) for mapping in mappings_of(stored, rules)
        ]
        self._hf_shapes = {mapping.hf_name: tuple(_to_hf(mapping, meta).shape) for mapping in self._mappings}
        self._hf_buffers = {mapping.hf_name for mapping in self._mappings if mapping.keeps_dtype}
        self._repeats = dict(repeats)
        self._config = dict(config)
        self._ignored = ignored
        self._nested = nested
        self._hf_defaults = hf_defaults or {}

    def hf_config(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Return the `config.json` for weights of `dtype`, in the format of transformers 5."""
        return {**self._config, "dtype": str(dtype).removeprefix("torch.")}

    def mappings(self) -> list[WeightMapping]:
        """Return the mappings of all weights of the model."""
        return [*self._mappings, *self._loss_state_mappings()]

    def find(self, stored: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> list[WeightMapping]:
        """Return the mappings of all weights to the tensors of a checkpoint.

        Only shapes and dtypes of `stored` are read. `config` is the `config.json` of the checkpoint, if it has one.
        Raises ValueError, with the keys, for a config of another model and for tensors that are missing, unexpected, of
        a wrong shape or of an unsupported dtype.
        """
        if config is not None:
            text = None if self._nested is None else mapping_in(config, self._nested.config_key)
            if text is not None:
                config = {
                    **text,
                    "quantization_config": config.get("quantization_config", text.get("quantization_config")),
                }
            check_config(config, self._config, self._hf_defaults)
        known, ignored = self._own_and_ignored_names(stored)
        stored_weights = stored_weights_in(known, stored, Fp8Blocks(*block_sizes(config)))
        weights = {hf_name: weight for hf_name, weight in stored_weights.items() if hf_name not in self._repeats}
        check_shapes({hf_name: weight.shape for hf_name, weight in weights.items()}, self._hf_shapes, "A checkpoint")
        plain = [name for name, weight in weights.items() if weight.is_plain and name not in self._hf_buffers]
        check_floats({hf_name: stored[weights[hf_name].names[0]].dtype for hf_name in plain})
        mappings = [WeightMapping((), tuple(ignored))] if ignored else []
        mappings += self._loss_state_mappings()
        for hf_name, original in self._repeats.items():
            if hf_name in stored_weights:
                names = stored_weights[hf_name].names + stored_weights[original].names
                if not (stored_weights[hf_name].is_plain and stored_weights[original].is_plain):
                    raise ValueError(
                        f"Tied weights must not be quantized, since their values are compared, got {hf_name} and "
                        f"{original}, at least one of them quantized. Use a checkpoint that is not quantized."
                    )
                mappings.append(WeightMapping((), names, decode=partial(check_same, names)))
        for mapping in self._mappings:
            mappings += weights[mapping.hf_name].find(mapping)
        return mappings

    def to_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict of the model in Hugging Face format. Raises ValueError unless it is complete."""
        check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, self._shapes, "A state dict")
        check_dtypes({name: tensor.dtype for name, tensor in state.items() if name not in self._buffers})
        return {mapping.hf_name: _to_hf(mapping, state) for mapping in self._mappings}

    def from_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict of the model from one in Hugging Face format. Raises ValueError as `find` does."""
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

    def _loss_state_mappings(self) -> list[WeightMapping]:
        return [WeightMapping(((name, None),), (), decode=tensor.clone) for name, tensor in self._loss_state.items()]

    def _own_and_ignored_names(self, stored: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
        """Return `{name without the prefix: name in the checkpoint}` of this model, and the names to ignore."""
        prefix, ignored = "", self._ignored
        if self._nested is not None and any(name.startswith(self._nested.prefix) for name in stored):
            prefix = self._nested.prefix
            ignored = (*self._nested.others, *(prefix + name for name in ignored))
        known, ignored_names = {}, []
        for name in stored:
            own = name.removeprefix(prefix)
            if name.startswith(ignored) or (name.endswith(_ROTARY_BUFFERS) and own not in self._hf_shapes):
                ignored_names.append(name)
            else:
                known[own] = name
        return known, ignored_names


def _to_hf(mapping: WeightMapping, state: Mapping[str, Tensor]) -> Tensor:
    return mapping.to_hf([state[name] if index is None else state[name][index] for name, index in mapping.own])


def _initial_loss_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the initial state of all router losses."""
    initial: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, RouterLoss):
            loss = copy.deepcopy(module).to_empty(device="cpu")
            init_weights(loss, seed=0)
            initial |= {f"{name}.{own}": tensor for own, tensor in loss.state_dict().items()}
    return initial
