"""Whether the `config.json` of a checkpoint describes the model that is to have its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_models.hugging_face.config_reading import LeftOut, mapping_in, read_config, read_rope

_NO_MATTER = {
    *("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "max_position_embeddings"),
    *("initializer_range", "attention_dropout", "output_router_logits", "router_aux_loss_coef"),
    *("num_nextn_predict_layers", "num_mtp_layers"),  # of a module that a model may do without
    *("rope_parameters", "rope_scaling", "rope_theta"),  # looked at by themselves
}
"""What a checkpoint may say otherwise without being another function of its tokens."""

_SAME_MODELS = [("kimi_k2", "deepseek_v3")]
"""Names under which models were released, and those that transformers has for them."""

_ROPE_TYPES = ("default", "llama3", "yarn")
_ROPE_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "partial_rotary_factor": 1.0}
_QUANTISED = {"fp8": "e4m3 in blocks with factors", "mxfp4": "blocks of 32 with exponents"}


def check_config(theirs: Mapping[str, Any], own: Mapping[str, Any], left_out: LeftOut) -> None:
    """Raise ValueError, naming what differs, unless a checkpoint's config describes the model of the `own` one.

    What it leaves out is what `left_out` says that transformers takes then. Other settings that only one of them has
    are left to the shapes of the weights.
    """
    model_type = theirs.get("model_type")
    if model_type != own["model_type"] and (model_type, own["model_type"]) not in _SAME_MODELS:
        raise ValueError(
            f"model_type of config.json must be {own['model_type']!r}, which is this model in transformers, got "
            f"{model_type!r}. Take the family and flavor that the weights belong to."
        )
    _check_quantization(mapping_in(theirs, "quantization_config"))
    _check_rope(read_rope(theirs, left_out), read_rope(own, left_out))
    read = read_config(theirs, left_out, sizes=own)
    both = sorted(own.keys() & read.keys() - _NO_MATTER)
    differing = [f"{key} {read[key]!r} instead of {own[key]!r}" for key in both if _differ(read[key], own[key])]
    if differing:
        raise ValueError(
            f"Got a config.json with {', '.join(differing)}, as transformers reads it. Weights go into a model of "
            "their own size and kind. Take the flavor that they belong to, or change its config."
        )


def block_sizes(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """Rows and columns of the blocks of FP8 weights, as a checkpoint's config tells them: 128 x 128 unless it does."""
    quantization = mapping_in(config or {}, "quantization_config") or {}
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    return rows, columns


def _differ(theirs: Any, own: Any) -> bool:
    """Whether two settings say different things. A switch is on or off; what has no value here has no meaning there."""
    if own is None:
        return False
    return bool(theirs) != own if isinstance(own, bool) else theirs != own


def _check_quantization(quantization: Mapping[str, Any] | None) -> None:
    if not quantization:
        return
    method = quantization.get("quant_method")
    if method not in (*_QUANTISED,):
        raise ValueError(
            f"Got a config.json with weights quantized by {method!r}. What can be read is "
            f"{' and '.join(f'{name} ({what})' for name, what in _QUANTISED.items())}. Take a checkpoint of those, or "
            "one that is not quantized."
        )
    sizes = quantization.get("weight_block_size")
    is_known = isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes)
    if method == "fp8" and sizes is not None and not is_known:
        raise ValueError(
            f"Got a config.json with weight_block_size {sizes}. A block has rows and columns. Download it again."
        )


def _check_rope(theirs: dict[str, Any], own: dict[str, Any]) -> None:
    if theirs["rope_type"] not in _ROPE_TYPES:
        raise ValueError(
            f"Got a config.json of rope type {theirs['rope_type']!r}. Models here know {', '.join(_ROPE_TYPES)}. Take "
            "a checkpoint of those."
        )
    theirs, own = _ROPE_DEFAULTS | theirs, _ROPE_DEFAULTS | own
    differing = [
        f"{key} {theirs.get(key)!r} instead of {own.get(key)!r}"
        for key in sorted(theirs.keys() | own.keys())
        if theirs.get(key) != own.get(key)
    ]
    if differing:
        raise ValueError(
            f"Got a config.json with a rope of {', '.join(differing)}. Weights mean something only with the angles "
            "they were trained with. Take the flavor that they belong to, or change config.rope."
        )
