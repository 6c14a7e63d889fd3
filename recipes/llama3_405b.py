# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""Llama 3.1 405B, pretrained on C4: 512 GPUs of 80 GiB or more, tensor parallel within a node.

torchrun --nnodes 64 --nproc-per-node 8 ... recipes/llama3_405b.py --tokenizer.path /path/to/tokenizer.model
"""

from pathlib import Path

from llama3_8b import llama3_run
from titan_models import llama3
from titan_parallel import FullActivationCheckpoint
from titan_trainer import Trainer, main


def llama3_405b() -> Trainer.Config:
    """Return the config: 4 million tokens per step, 36,000 steps.

    Learning rate, warm-up and minimum learning rate: the paper's. Batch: that of the beginning of the paper's run.
    """
    config = llama3_run(llama3.llama3_405b(), global_batch_size=512, lr=8e-5, warmup_steps=8000)
    config.lr_scheduler.min_lr_factor = 0.01
    config.parallelism.tensor_parallel_degree = 8
    config.training.local_batch_size = 8
    config.activation_checkpoint = FullActivationCheckpoint.Config()
    config.dump_folder = Path("outputs/llama3_405b")
    return config


if __name__ == "__main__":
    main(llama3_405b)
