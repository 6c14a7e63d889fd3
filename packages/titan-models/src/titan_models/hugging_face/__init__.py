"""Conversion of weights to and from Hugging Face checkpoints: names, layouts, tensor formats and config checks."""

from titan_models.hugging_face.adapter import HfAdapter, NestedCheckpoint
from titan_models.hugging_face.decoder import (
    DENSE_RULES,
    GROUPED_QUERY_RULES,
    SPLIT_EXPERTS_RULES,
    decoder_adapter,
    dense_hidden_dim,
    grouped_query_fields,
    refuse_mask_modifiers,
    refuse_uneven_heads,
    same_in_all,
)
from titan_models.hugging_face.layout_transforms import Alternating, Halves, LayoutTransform, NeighborPairs, Transposed
from titan_models.hugging_face.rules import HfTensor, Rules

__all__ = [
    "DENSE_RULES",
    "GROUPED_QUERY_RULES",
    "SPLIT_EXPERTS_RULES",
    "Alternating",
    "Halves",
    "HfAdapter",
    "HfTensor",
    "LayoutTransform",
    "NeighborPairs",
    "NestedCheckpoint",
    "Rules",
    "Transposed",
    "decoder_adapter",
    "dense_hidden_dim",
    "grouped_query_fields",
    "refuse_mask_modifiers",
    "refuse_uneven_heads",
    "same_in_all",
]
