"""GPT-OSS: OpenAI, "gpt-oss-120b & gpt-oss-20b model card" (2025)."""

from titan_models.gpt_oss.flavors import gpt_oss_20b, gpt_oss_120b, gpt_oss_debug
from titan_models.gpt_oss.model import GptOss

__all__ = ["GptOss", "gpt_oss_20b", "gpt_oss_120b", "gpt_oss_debug"]
