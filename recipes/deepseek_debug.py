# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer[plot]==0.1.*", "titan-models==0.1.*", "titan-data==0.1.*", "titan-ckpt==0.1.*", "torch==2.13.0",
# ]
# ///
"""A DeepSeek-V3 of 8 million parameters, trained on novels by Jane Austen on a CPU.

torchrun --nproc-per-node 2 recipes/deepseek_debug.py [--training.steps 20] [--help]
"""

from pathlib import Path

from llama3_debug import llama3_debug, report
from titan_models import deepseek
from titan_trainer import Trainer, main


def deepseek_debug() -> Trainer.Config:
    """Return the config of llama3_debug with another model."""
    config = llama3_debug()
    config.model = deepseek.deepseek_v3_debug()
    config.dump_folder = Path("outputs/deepseek_debug")
    return config


if __name__ == "__main__":
    trainer = main(deepseek_debug)
    if trainer.is_first_rank:
        report(trainer)
