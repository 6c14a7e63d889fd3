# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data[hf]==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""Llama 4 Scout 17B-16E, pretrained on C4: 128 GPUs of 80 GiB or more, tensor parallel over 2 ranks.

torchrun --nnodes 16 --nproc-per-node 8 ... recipes/llama4_scout.py --tokenizer.path /path/to/tokenizer.json
"""

from pathlib import Path

from llama3_8b import llama3_run
from titan_data import HFTokenizer
from titan_models import llama4
from titan_models.moe import LoadBalancingLoss
from titan_parallel import FullActivationCheckpoint
from titan_trainer import Trainer, main


def llama4_run(model: llama4.Llama4.Config, *, global_batch_size: int, lr: float) -> Trainer.Config:
    """Return the config that the Llama 4 recipes share: llama3_run with Llama 4's tokenizer.

    Meta has not published learning rates, batches and load balancing; the recipes' values are our choice.
    """
    config = llama3_run(model, global_batch_size=global_batch_size, lr=lr)
    config.tokenizer = HFTokenizer.Config(path=Path("tokenizer.json"), bos="<|begin_of_text|>", eos="<|end_of_text|>")
    config.training.local_batch_size = 8
    config.activation_checkpoint = FullActivationCheckpoint.Config()
    for router in config.model.routers():
        router.auxiliary_losses = [LoadBalancingLoss.Config(weight=1e-3)]
    return config


def llama4_scout() -> Trainer.Config:
    """Return the config: 4 million tokens per step, 36,000 steps."""
    config = llama4_run(llama4.llama4_scout(), global_batch_size=512, lr=1.5e-4)
    config.parallelism.tensor_parallel_degree = 2
    config.dump_folder = Path("outputs/llama4_scout")
    return config


if __name__ == "__main__":
    main(llama4_scout)
