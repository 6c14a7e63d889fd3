# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer[plot]==0.1.*", "titan-models==0.1.*", "titan-data==0.1.*", "titan-ckpt==0.1.*", "torch==2.13.0",
# ]
# ///
"""A Llama 4 of 15 million parameters with 8 experts in every second layer, trained on novels by Jane Austen on a CPU.

torchrun --nproc-per-node 2 recipes/llama4_debug.py [--training.steps 20] [--help]
"""

from pathlib import Path

from llama3_debug import llama3_debug, report
from titan_models import llama4
from titan_models.moe import LoadBalancingLoss
from titan_trainer import Trainer, main


def llama4_debug() -> Trainer.Config:
    """Return the config of llama3_debug with another model."""
    config = llama3_debug()
    config.model = llama4.llama4_debug()
    for router in config.model.routers():
        router.auxiliary_losses = [LoadBalancingLoss.Config(weight=1e-3)]
    config.dump_folder = Path("outputs/llama4_debug")
    return config


if __name__ == "__main__":
    trainer = main(llama4_debug)
    if trainer.is_first_rank:
        report(trainer)
