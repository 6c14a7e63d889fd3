"""Mixtures of experts: a router that chooses, experts as 3-D weights, and what joins them."""

from titan_models.moe.experts import Experts, SwiGLUExperts
from titan_models.moe.groups import ExpertGroups
from titan_models.moe.kernels import GroupedMM, Kernel, Loop
from titan_models.moe.moe import MoE
from titan_models.moe.router import Router, TopKRouter

__all__ = ["ExpertGroups", "Experts", "GroupedMM", "Kernel", "Loop", "MoE", "Router", "SwiGLUExperts", "TopKRouter"]
