# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer[plot]==0.1.*", "titan-models==0.1.*", "titan-data==0.1.*", "titan-ckpt==0.1.*", "torch==2.13.0",
# ]
# ///
"""A GPT-OSS of 81 million parameters with 8 experts in each layer, trained on novels by Jane Austen on a CPU.

torchrun --nproc-per-node 2 recipes/gpt_oss_debug.py [--training.steps 20] [--help]
"""

from pathlib import Path

from llama3_debug import llama3_debug, report
from titan_models import gpt_oss
from titan_models.moe import LoadBalancingLoss
from titan_trainer import Trainer, main


def gpt_oss_debug() -> Trainer.Config:
    """Return the config of llama3_debug with another model and batches of 4 sequences.

    Batches are smaller because the experts are as wide as those of GPT-OSS 20B.
    """
    config = llama3_debug()
    config.model = gpt_oss.gpt_oss_debug()
    for router in config.model.routers():
        router.auxiliary_losses = [LoadBalancingLoss.Config(weight=1e-3)]
    config.training.global_batch_size, config.training.local_batch_size = 4, 2
    config.dump_folder = Path("outputs/gpt_oss_debug")
    return config


if __name__ == "__main__":
    trainer = main(gpt_oss_debug)
    if trainer.is_first_rank:
        report(trainer)
