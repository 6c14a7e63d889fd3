"""Attention cores: the product of queries, keys and values under a described mask, one kernel each."""

from titan_models.cores.core import AttentionCore
from titan_models.cores.flex import Flex
from titan_models.cores.sdpa import Sdpa
from titan_models.cores.varlen import Varlen

__all__ = ["AttentionCore", "Flex", "Sdpa", "Varlen"]
