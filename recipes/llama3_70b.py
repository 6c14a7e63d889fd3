# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""Llama 3.1 70B, pretrained on C4: 128 GPUs of 80 GiB or more, tensor parallel within a node.

torchrun --nnodes 16 --nproc-per-node 8 ... recipes/llama3_70b.py --tokenizer.path /path/to/tokenizer.model
"""

from pathlib import Path

from llama3_8b import llama3_run
from titan_models import llama3
from titan_parallel import FullActivationCheckpoint
from titan_trainer import Trainer, main


def llama3_70b() -> Trainer.Config:
    """Return the config: 4 million tokens per step, 36,000 steps. Learning rate: the paper's."""
    config = llama3_run(llama3.llama3_70b(), global_batch_size=512, lr=1.5e-4)
    config.parallelism.tensor_parallel_degree = 4
    config.training.local_batch_size = 16
    config.activation_checkpoint = FullActivationCheckpoint.Config()
    config.dump_folder = Path("outputs/llama3_70b")
    return config


if __name__ == "__main__":
    main(llama3_70b)
