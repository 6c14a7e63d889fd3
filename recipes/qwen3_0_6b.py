# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data[hf]==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""Qwen3 0.6B, pretrained on C4: 8 GPUs of 40 GiB or more.

torchrun --nproc-per-node 8 recipes/qwen3_0_6b.py --tokenizer.path /path/to/tokenizer.json
"""

from pathlib import Path

from qwen3_8b import qwen3_run
from titan_models import qwen3
from titan_trainer import Trainer, main


def qwen3_0_6b() -> Trainer.Config:
    """Return the config: 0.5 million tokens per step, 286,000 steps.

    Learning rate: our choice, typical of models of this size.
    """
    config = qwen3_run(qwen3.qwen3_0_6b(), global_batch_size=64, lr=1e-3)
    config.training.local_batch_size = 4
    config.dump_folder = Path("outputs/qwen3_0_6b")
    return config


if __name__ == "__main__":
    main(qwen3_0_6b)
