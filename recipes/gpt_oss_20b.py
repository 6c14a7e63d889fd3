# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data[hf]==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""GPT-OSS 20B, pretrained on C4: 32 GPUs of 80 GiB or more, tensor parallel over 2 ranks.

torchrun --nnodes 4 --nproc-per-node 8 ... recipes/gpt_oss_20b.py --tokenizer.path /path/to/tokenizer.json
"""

from pathlib import Path

from llama3_8b import llama3_run
from titan_data import HFTokenizer
from titan_models import gpt_oss
from titan_models.moe import LoadBalancingLoss
from titan_parallel import FullActivationCheckpoint
from titan_trainer import Trainer, main


def gpt_oss_run(model: gpt_oss.GptOss.Config, *, global_batch_size: int, lr: float) -> Trainer.Config:
    """Return the config that the GPT-OSS recipes share: llama3_run with GPT-OSS's tokenizer, without bos.

    OpenAI has not published learning rates, batches and load balancing; the recipes' values are our choice.
    """
    config = llama3_run(model, global_batch_size=global_batch_size, lr=lr)
    config.tokenizer = HFTokenizer.Config(path=Path("tokenizer.json"), eos="<|endoftext|>")
    config.dataloader.add_bos = config.validator.dataloader.add_bos = False
    for router in config.model.routers():
        router.auxiliary_losses = [LoadBalancingLoss.Config(weight=1e-3)]
    return config


def gpt_oss_20b() -> Trainer.Config:
    """Return the config: 2 million tokens per step, 72,000 steps."""
    config = gpt_oss_run(gpt_oss.gpt_oss_20b(), global_batch_size=256, lr=3e-4)
    config.parallelism.tensor_parallel_degree = 2
    config.training.local_batch_size = 16
    config.activation_checkpoint = FullActivationCheckpoint.Config()
    config.dump_folder = Path("outputs/gpt_oss_20b")
    return config


if __name__ == "__main__":
    main(gpt_oss_20b)
