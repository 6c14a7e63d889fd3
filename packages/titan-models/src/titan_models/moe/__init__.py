"""Mixture of experts (MoE): routers, experts with stacked 3-D weights, and load balancing."""

from titan_models.moe.auxiliary_losses import LoadBalancingLoss, RouterLoss, ZLoss
from titan_models.moe.balancing_bias import BalancingBias
from titan_models.moe.experts import Experts, SwiGLUExperts
from titan_models.moe.gating import ClampedGating, Gating, SiluGating
from titan_models.moe.grouped_linear import GroupedLinear
from titan_models.moe.groups import ExpertGroups
from titan_models.moe.kernels import ForLoop, GroupedMM, Kernel
from titan_models.moe.moe import MoE
from titan_models.moe.router import Router, TopKRouter

__all__ = [
    "BalancingBias",
    "ClampedGating",
    "ExpertGroups",
    "Experts",
    "ForLoop",
    "Gating",
    "GroupedLinear",
    "GroupedMM",
    "Kernel",
    "LoadBalancingLoss",
    "MoE",
    "Router",
    "RouterLoss",
    "SiluGating",
    "SwiGLUExperts",
    "TopKRouter",
    "ZLoss",
]
