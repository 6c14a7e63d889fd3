# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "titan-trainer[plot]==0.1.*", "titan-models==0.1.*", "titan-data==0.1.*", "titan-ckpt==0.1.*", "titan-ft==0.1.*",
#     "torch==2.13.0",
# ]
# ///
"""Fault-tolerant training of llama3_debug: kill one of the replicas during training, and start it again.

torchft_lighthouse --min_replicas 1 --heartbeat_timeout_ms 2000 &
export TORCHFT_LIGHTHOUSE=http://localhost:29510
torchrun --standalone recipes/llama3_debug_ft.py --replica_group.replica_id 0 --dump_folder outputs/replica_0 &
torchrun --standalone recipes/llama3_debug_ft.py --replica_group.replica_id 1 --dump_folder outputs/replica_1
"""

from pathlib import Path

from llama3_debug import llama3_debug
from titan_ft import TorchftReplicaGroup
from titan_trainer import Trainer, main


def llama3_debug_ft() -> Trainer.Config:
    """Return the config: the global batches of llama3_debug, split over the replicas of each step."""
    config = llama3_debug()
    config.replica_group = TorchftReplicaGroup.Config(replica_id=0)
    config.dump_folder = Path("outputs/llama3_debug_ft")
    return config


if __name__ == "__main__":
    main(llama3_debug_ft)
