"""Check that the `config.json` of a checkpoint describes the model that loads its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_models.hugging_face.config_reading import HfDefaults, mapping_in, read_config, read_rope

_IGNORED_SETTINGS = {
    *("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "max_position_embeddings"),
    *("initializer_range", "attention_dropout", "output_router_logits", "router_aux_loss_coef"),
    *("num_nextn_predict_layers", "num_mtp_layers"),  # of a module that a model may omit
    *("rope_parameters", "rope_scaling", "rope_theta"),  # compared by `_check_rope`
}
"""Settings that may differ, since they do not change the logits."""

_MODEL_TYPE_ALIASES = [("kimi_k2", "deepseek_v3")]
"""Pairs of model_type: in released checkpoints, and of the same architecture in transformers."""

_ROPE_TYPES = ("default", "llama3", "yarn")
_ROPE_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "partial_rotary_factor": 1.0}
_QUANTIZATION_METHODS = {"fp8": "blocks of e4m3 with scales", "mxfp4": "blocks of 32 with exponents"}


def check_config(theirs: Mapping[str, Any], own: Mapping[str, Any], hf_defaults: HfDefaults) -> None:
    """Raise ValueError, with the differences, unless the config of a checkpoint describes the model of `own`.

    Settings that the checkpoint omits have the values of `hf_defaults`. Other settings that only one of the two configs
    has are not compared; the shapes of the weights decide.
    """
    model_type = theirs.get("model_type")
    if model_type != own["model_type"] and (model_type, own["model_type"]) not in _MODEL_TYPE_ALIASES:
        raise ValueError(
            f"model_type of config.json must be {own['model_type']!r}, which is this model in transformers, got "
            f"{model_type!r}. Use the family and flavor that the weights belong to."
        )
    _check_quantization(mapping_in(theirs, "quantization_config"))
    _check_rope(read_rope(theirs, hf_defaults), read_rope(own, hf_defaults))
    read = read_config(theirs, hf_defaults, sizes=own)
    both = sorted(own.keys() & read.keys() - _IGNORED_SETTINGS)
    differing = [f"{key} {read[key]!r} instead of {own[key]!r}" for key in both if _differ(read[key], own[key])]
    if differing:
        raise ValueError(
            f"config.json must describe this model, got {', '.join(differing)}, as transformers reads it. Use the "
            "flavor that the weights belong to, or change its config."
        )


def block_sizes(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """Return the rows and columns of FP8 blocks in the config of a checkpoint; 128 x 128 by default."""
    quantization = mapping_in(config or {}, "quantization_config") or {}
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    return rows, columns


def _differ(theirs: Any, own: Any) -> bool:
    """Return whether two settings differ. Bools are compared by truth value; a setting with `own` None is ignored."""
    if own is None:
        return False
    return bool(theirs) != own if isinstance(own, bool) else theirs != own


def _check_quantization(quantization: Mapping[str, Any] | None) -> None:
    if not quantization:
        return
    method = quantization.get("quant_method")
    if method not in (*_QUANTIZATION_METHODS,):
        raise ValueError(
            "quant_method of config.json must be "
            f"{' or '.join(f'{name} ({what})' for name, what in _QUANTIZATION_METHODS.items())}, got {method!r}. Use "
            "such a checkpoint, or one that is not quantized."
        )
    sizes = quantization.get("weight_block_size")
    is_known = isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes)
    if method == "fp8" and sizes is not None and not is_known:
        raise ValueError(
            f"weight_block_size of config.json must be [rows, columns], both at least 1, got {sizes}. Download the "
            "checkpoint again."
        )


def _check_rope(theirs: dict[str, Any], own: dict[str, Any]) -> None:
    if theirs["rope_type"] not in _ROPE_TYPES:
        raise ValueError(
            f"rope_type of config.json must be one of {', '.join(_ROPE_TYPES)}, got {theirs['rope_type']!r}."
        )
    theirs, own = _ROPE_DEFAULTS | theirs, _ROPE_DEFAULTS | own
    differing = [
        f"{key} {theirs.get(key)!r} instead of {own.get(key)!r}"
        for key in sorted(theirs.keys() | own.keys())
        if theirs.get(key) != own.get(key)
    ]
    if differing:
        raise ValueError(
            f"RoPE settings of config.json must be those of this model, got {', '.join(differing)}. Use the flavor "
            "that the weights belong to, or change config.rope."
        )
