"""DeepSeek-V2 and V3: DeepSeek-AI, "DeepSeek-V2" (2024) and "DeepSeek-V3 technical report" (2024)."""

from titan_models.deepseek.flavors import (
    deepseek_debug,
    deepseek_v2_236b,
    deepseek_v2_lite_16b,
    deepseek_v3_671b,
    deepseek_v3_debug,
)
from titan_models.deepseek.model import DeepSeek

__all__ = [
    "DeepSeek",
    "deepseek_debug",
    "deepseek_v2_236b",
    "deepseek_v2_lite_16b",
    "deepseek_v3_671b",
    "deepseek_v3_debug",
]
