# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer[plot]==0.1.*", "titan-models==0.1.*", "titan-data==0.1.*", "titan-ckpt==0.1.*", "torch==2.13.0",
# ]
# ///
"""A Qwen3 of 5 million parameters, trained on novels by Jane Austen on a CPU in about a minute.

torchrun --nproc-per-node 2 recipes/qwen3_debug.py [--training.steps 20] [--help]
"""

from pathlib import Path

from llama3_debug import llama3_debug, report
from titan_models import qwen3
from titan_trainer import Trainer, main


def qwen3_debug() -> Trainer.Config:
    """Return the config of llama3_debug with another model."""
    config = llama3_debug()
    config.model = qwen3.qwen3_debug()
    config.dump_folder = Path("outputs/qwen3_debug")
    return config


if __name__ == "__main__":
    trainer = main(qwen3_debug)
    if trainer.is_first_rank:
        report(trainer)
