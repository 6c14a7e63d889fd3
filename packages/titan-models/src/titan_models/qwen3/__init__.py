"""Qwen3: Yang et al., "Qwen3 technical report" (2025)."""

from titan_models.qwen3.flavors import (
    qwen3_0_6b,
    qwen3_1_7b,
    qwen3_4b,
    qwen3_8b,
    qwen3_14b,
    qwen3_30b_a3b,
    qwen3_32b,
    qwen3_235b_a22b,
    qwen3_debug,
    qwen3_moe_debug,
)
from titan_models.qwen3.model import Qwen3

__all__ = [
    "Qwen3",
    "qwen3_0_6b",
    "qwen3_1_7b",
    "qwen3_4b",
    "qwen3_8b",
    "qwen3_14b",
    "qwen3_30b_a3b",
    "qwen3_32b",
    "qwen3_235b_a22b",
    "qwen3_debug",
    "qwen3_moe_debug",
]
