# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data[hf]==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""Llama 4 Maverick 17B-128E, pretrained on C4: 512 GPUs of 80 GiB or more, tensor parallel within a node.

torchrun --nnodes 64 --nproc-per-node 8 ... recipes/llama4_maverick.py --tokenizer.path /path/to/tokenizer.json
"""

from pathlib import Path

from llama4_scout import llama4_run
from titan_models import llama4
from titan_trainer import Trainer, main


def llama4_maverick() -> Trainer.Config:
    """Return the config: 4 million tokens per step, 36,000 steps.

    Ranks wait for communication twice as long as they compute, and half of the memory is free: without expert
    parallelism, the weights of all experts are gathered.
    """
    config = llama4_run(llama4.llama4_maverick(), global_batch_size=512, lr=1.5e-4)
    config.parallelism.tensor_parallel_degree = 8
    config.dump_folder = Path("outputs/llama4_maverick")
    return config


if __name__ == "__main__":
    main(llama4_maverick)
