# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data[hf]==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""Qwen3 8B, pretrained on C4: 8 GPUs of 80 GiB or more.

torchrun --nproc-per-node 8 recipes/qwen3_8b.py --tokenizer.path /path/to/tokenizer.json
"""

from pathlib import Path

from llama3_8b import llama3_run
from titan_config import Configurable
from titan_data import HFTokenizer
from titan_models import qwen3
from titan_trainer import Trainer, main


def qwen3_run(model: Configurable.Config, *, global_batch_size: int, lr: float) -> Trainer.Config:
    """Return the config that the Qwen3 recipes share: llama3_run with Qwen's tokenizer, without bos.

    Qwen has not published learning rates and batches; the recipes' values are our choice.
    """
    config = llama3_run(model, global_batch_size=global_batch_size, lr=lr)
    config.tokenizer = HFTokenizer.Config(path=Path("tokenizer.json"), eos="<|endoftext|>")
    config.dataloader.add_bos = config.validator.dataloader.add_bos = False
    return config


def qwen3_8b() -> Trainer.Config:
    """Return the config: 1 million tokens per step, 143,000 steps. Learning rate: that of llama3_8b."""
    config = qwen3_run(qwen3.qwen3_8b(), global_batch_size=128, lr=1.5e-4)
    config.loss.chunk_tokens = 8192  # the logits of a whole sequence fit in memory
    config.dump_folder = Path("outputs/qwen3_8b")
    return config


if __name__ == "__main__":
    main(qwen3_8b)
