"""Tokens per second of recipes/qwen3_moe_debug.py, compared to a loop in plain PyTorch over the same module.

Experts are balanced by a bias, without the recipe's auxiliary losses. The trainer's time includes all that it does in a
step: loading data, metrics, checks, counting tokens per expert. The plain loop does none of it.
"""

from __future__ import annotations

import bare
import interleaved
import torch
from sizes import sized
from titan_models.moe import BalancingBias
from torch import Tensor
from torch.nn import functional

BLOCKS, STEPS_PER_BLOCK = sized((12, 3), (2, 1))


def compare(dtype: str) -> None:
    config = interleaved.config_of("qwen3_moe_debug", dtype)
    for router in config.model.routers():
        router.balancing, router.auxiliary_losses = BalancingBias.Config(), []
    model = config.model.build()
    model.init_weights(0)
    positions = torch.arange(bare.T).expand(bare.B, bare.T)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(tokens, positions)
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    bare_run = bare.BareRun(model, loss, getattr(torch, dtype), config.model.vocab_size)
    interleaved.measure(dtype, config, bare_run, BLOCKS, STEPS_PER_BLOCK, limit=0.9)


if __name__ == "__main__":
    interleaved.in_subprocesses(compare)
