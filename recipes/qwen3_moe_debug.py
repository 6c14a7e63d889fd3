# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer[plot]==0.1.*", "titan-models==0.1.*", "titan-data==0.1.*", "titan-ckpt==0.1.*", "torch==2.13.0",
# ]
# ///
"""A Qwen3 of 11 million parameters with 8 experts in each layer, trained on novels by Jane Austen on a CPU.

torchrun --nproc-per-node 2 recipes/qwen3_moe_debug.py [--training.steps 20] [--help]
"""

from pathlib import Path

from llama3_debug import llama3_debug, report
from titan_models import qwen3
from titan_models.moe import LoadBalancingLoss
from titan_trainer import Trainer, main


def qwen3_moe_debug() -> Trainer.Config:
    """Return the config of llama3_debug with another model."""
    config = llama3_debug()
    config.model = qwen3.qwen3_moe_debug()
    for router in config.model.routers():
        router.auxiliary_losses = [LoadBalancingLoss.Config(weight=1e-3)]
    config.dump_folder = Path("outputs/qwen3_moe_debug")
    return config


if __name__ == "__main__":
    trainer = main(qwen3_moe_debug)
    if trainer.is_first_rank:
        report(trainer)
