"""Tokens a second of recipes/qwen3_moe_debug.py beside a loop in bare PyTorch over the same module.

Experts are balanced by a bias, without the recipe's auxiliary losses. Everything the trainer does in a step is counted:
drawing the data, metrics, the checks, the counts of experts. The bare loop has none of it.
"""

from __future__ import annotations

import bare
import torch
import turns
from sizes import sized
from titan_models.moe import BalancingBias
from torch import Tensor
from torch.nn import functional

BLOCKS, STEPS_A_BLOCK = sized((12, 3), (2, 1))


def compare(dtype: str) -> None:
    config = turns.config_of("qwen3_moe_debug", dtype)
    for router in config.model.routers():
        router.balancing, router.losses = BalancingBias.Config(), []
    model = config.model.build()
    model.init_weights(0)
    positions = torch.arange(bare.T).expand(bare.B, bare.T)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(tokens, positions)
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    bare_run = bare.BareRun(model, loss, getattr(torch, dtype), config.model.vocab_size)
    turns.measure(dtype, config, bare_run, BLOCKS, STEPS_A_BLOCK, limit=0.9)


if __name__ == "__main__":
    turns.in_processes_of_their_own(compare)
