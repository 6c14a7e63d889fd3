"""Llama 4, text model only: Meta, "The Llama 4 herd" (2025)."""

from titan_models.llama4.flavors import llama4_debug, llama4_maverick, llama4_scout
from titan_models.llama4.model import Llama4

__all__ = ["Llama4", "llama4_debug", "llama4_maverick", "llama4_scout"]
