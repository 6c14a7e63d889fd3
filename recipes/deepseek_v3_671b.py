# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer==0.1.*", "titan-models==0.1.*", "titan-data[hf]==0.1.*", "titan-ckpt==0.1.*", "torch>=2.11",
# ]
# ///
"""DeepSeek-V3 671B, pretrained on C4: 512 GPUs of 80 GiB or more.

Pipeline parallel over 16 nodes, because gathering all weights for each micro-batch would take too long: a rank keeps
the weights of its stage for the whole step. Tensor parallel within a node.

torchrun --nnodes 64 --nproc-per-node 8 ... recipes/deepseek_v3_671b.py --tokenizer.path /path/to/tokenizer.json
"""

from pathlib import Path

from deepseek_v2_lite_16b import deepseek_run
from titan_models import deepseek
from titan_parallel import FullActivationCheckpoint
from titan_trainer import MultiTokenPredictionLoss, ScheduledNumber, Trainer, main


def deepseek_v3_671b() -> Trainer.Config:
    """Return the config: 8 million tokens per step, 18,000 steps, with multi-token prediction (MTP).

    Learning rate, warm-up, minimum learning rate, update rate of the balancing bias and MTP loss weight (0.3 for the
    first two thirds of the run, then 0.1): "DeepSeek-V3 technical report" (2024), section 4.2, whose batches begin at
    13 million tokens. The report's sequence-wise balance loss is left out.

    Ranks wait for communication half as long as they compute: without expert parallelism, eight ranks share each
    expert by tensor parallelism.
    """
    config = deepseek_run(deepseek.deepseek_v3_671b(), global_batch_size=2048, lr=2.2e-4)
    config.model.mtp = config.dataloader.mtp = True
    config.loss = MultiTokenPredictionLoss.Config(weight=0.3)
    steps = config.training.steps
    config.scheduled = [
        ScheduledNumber.Config(
            attribute="loss.weight", points=[(0, 0.3), (2 * steps // 3, 0.3), (2 * steps // 3, 0.1)]
        ),
        ScheduledNumber.Config(
            attribute="model.layers.*.feed_forward.router.balancing.rate",
            points=[(0, 1e-3), (29 * steps // 30, 1e-3), (29 * steps // 30, 0.0)],
        ),
    ]
    config.parallelism.tensor_parallel_degree = 8
    config.parallelism.pipeline_parallel_degree = 16
    config.activation_checkpoint = FullActivationCheckpoint.Config()
    config.dump_folder = Path("outputs/deepseek_v3_671b")
    return config


if __name__ == "__main__":
    main(deepseek_v3_671b)
