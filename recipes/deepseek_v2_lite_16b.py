# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data[hf]==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""DeepSeek-V2-Lite 16B, pretrained on C4: 32 GPUs of 80 GiB or more, tensor parallel over 2 ranks.

torchrun --nnodes 4 --nproc-per-node 8 ... recipes/deepseek_v2_lite_16b.py --tokenizer.path /path/to/tokenizer.json
"""

from pathlib import Path

from llama3_8b import llama3_run
from titan_data import HFTokenizer
from titan_models import Decoder, deepseek
from titan_models.moe import LoadBalancingLoss
from titan_trainer import Trainer, main


def deepseek_run(model: Decoder.Config, *, global_batch_size: int, lr: float) -> Trainer.Config:
    """Return the config that the DeepSeek recipes share: llama3_run with DeepSeek's tokenizer and seq_len 4096."""
    config = llama3_run(model, global_batch_size=global_batch_size, lr=lr, seq_len=4096)
    names = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}
    config.tokenizer = HFTokenizer.Config(path=Path("tokenizer.json"), **names)
    return config


def deepseek_v2_lite_16b() -> Trainer.Config:
    """Return the config: 2 million tokens per step, 72,000 steps.

    Learning rate: 4.2e-4 of the report "DeepSeek-V2" (2024), appendix B, for 19 million tokens per step, divided by the
    square root of 9. Load balancing: the same report's.
    """
    config = deepseek_run(deepseek.deepseek_v2_lite_16b(), global_batch_size=512, lr=1.4e-4)
    for router in config.model.routers():
        router.auxiliary_losses = [LoadBalancingLoss.Config(weight=1e-3)]
    config.parallelism.tensor_parallel_degree = 2
    config.parallelism.data_parallel_replicate_degree = 4  # weights are gathered within a node
    config.training.local_batch_size = 8
    config.dump_folder = Path("outputs/deepseek_v2_lite_16b")
    return config


if __name__ == "__main__":
    main(deepseek_v2_lite_16b)
