"""Llama 3: Grattafiori et al., "The Llama 3 herd of models" (2024)."""

from titan_models.llama3.flavors import llama3_1b, llama3_3b, llama3_8b, llama3_70b, llama3_405b, llama3_debug
from titan_models.llama3.model import Llama3

__all__ = ["Llama3", "llama3_1b", "llama3_3b", "llama3_8b", "llama3_70b", "llama3_405b", "llama3_debug"]
