"""Tokens a second of recipes/qwen3_moe_debug.py beside a loop in bare PyTorch over the same module.

Experts are balanced by a bias. Everything the trainer does in a step is counted: drawing the data, metrics, the checks,
the counts of experts. The bare loop has none of it.
"""

from __future__ import annotations

import bare
import torch
import turns
from titan_models.moe import BalancingBias
from torch import Tensor
from torch.nn import functional

BLOCKS, STEPS_A_BLOCK = 12, 3


def compare(dtype: str) -> None:
    config = turns.config_of("qwen3_moe_debug", dtype, steps=BLOCKS * STEPS_A_BLOCK)
    config.model.block.feed_forward.router.balancing = BalancingBias.Config()
    model = config.model.build()
    model.init_weights(0)
    positions = torch.arange(bare.T).expand(bare.B, bare.T)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(tokens, positions)
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    bare_run = bare.BareRun(model, loss, getattr(torch, dtype), config.model.vocab_size)
    taken = turns.train_in_turns(config, bare_run, STEPS_A_BLOCK)
    turns.report(dtype, taken, tokens=STEPS_A_BLOCK * bare.B * bare.T, limit=0.9)


if __name__ == "__main__":
    turns.in_processes_of_their_own(compare)
