"""Attention cores: scaled dot-product attention under a described mask, one kernel each."""

from titan_models.attention.kernels.flex import Flex
from titan_models.attention.kernels.kernel import AttentionCore
from titan_models.attention.kernels.sdpa import Sdpa
from titan_models.attention.kernels.varlen import Varlen

__all__ = ["AttentionCore", "Flex", "Sdpa", "Varlen"]
