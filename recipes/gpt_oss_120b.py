# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data[hf]==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""GPT-OSS 120B, pretrained on C4: 128 GPUs of 80 GiB or more, tensor parallel over 4 ranks.

torchrun --nnodes 16 --nproc-per-node 8 ... recipes/gpt_oss_120b.py --tokenizer.path /path/to/tokenizer.json
"""

from pathlib import Path

from gpt_oss_20b import gpt_oss_run
from titan_models import gpt_oss
from titan_parallel import FullActivationCheckpoint
from titan_trainer import Trainer, main


def gpt_oss_120b() -> Trainer.Config:
    """Return the config: 4 million tokens per step, 36,000 steps.

    Ranks wait for communication half as long as they compute: without expert parallelism, the weights of all experts
    are gathered.
    """
    config = gpt_oss_run(gpt_oss.gpt_oss_120b(), global_batch_size=512, lr=1.5e-4)
    config.parallelism.tensor_parallel_degree = 4
    config.training.local_batch_size = 16
    config.activation_checkpoint = FullActivationCheckpoint.Config()
    config.dump_folder = Path("outputs/gpt_oss_120b")
    return config


if __name__ == "__main__":
    main(gpt_oss_120b)
