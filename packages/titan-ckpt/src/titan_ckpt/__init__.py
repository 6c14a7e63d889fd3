"""Distributed checkpoints that can be trusted: async, atomic, verified, resharding, Hugging Face in and out."""

from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.errors import BrokenCheckpoint, CheckpointError
from titan_ckpt.state import Part

__all__ = ["BrokenCheckpoint", "CheckpointError", "Checkpointer", "Part"]
