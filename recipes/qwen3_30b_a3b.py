# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data[hf]==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""Qwen3 30B-A3B, pretrained on C4: 32 GPUs of 80 GiB or more, tensor parallel over 2 ranks.

torchrun --nnodes 4 --nproc-per-node 8 ... recipes/qwen3_30b_a3b.py --tokenizer.path /path/to/tokenizer.json
"""

from pathlib import Path

from qwen3_8b import qwen3_run
from titan_models import qwen3
from titan_models.moe import LoadBalancingLoss
from titan_parallel import FullActivationCheckpoint
from titan_trainer import Trainer, main


def qwen3_30b_a3b() -> Trainer.Config:
    """Return the config: 2 million tokens per step, 72,000 steps.

    Learning rate and batch: our choice. Load balancing: Megatron's for this model. Full activation checkpointing frees
    memory for micro-batches so large that their computation hides the gathering of weights.
    """
    config = qwen3_run(qwen3.qwen3_30b_a3b(), global_batch_size=256, lr=3e-4)
    for router in config.model.routers():
        router.auxiliary_losses = [LoadBalancingLoss.Config(weight=1e-3)]
    config.parallelism.tensor_parallel_degree = 2
    config.activation_checkpoint = FullActivationCheckpoint.Config()
    config.training.local_batch_size = 16
    config.dump_folder = Path("outputs/qwen3_30b_a3b")
    return config


if __name__ == "__main__":
    main(qwen3_30b_a3b)
