"""Distributed checkpoints that can be trusted: async, atomic, verified, resharding, Hugging Face in and out."""

from titan_ckpt.adapter import HFAdapter, Piece, Renamed
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.errors import BrokenCheckpoint, CheckpointError
from titan_ckpt.hf_export import export_hf, save_hf
from titan_ckpt.hf_import import load_hf
from titan_ckpt.manifest import check_whole
from titan_ckpt.model_export import export_model
from titan_ckpt.reading import TensorReader, read_config
from titan_ckpt.state import Part

__all__ = [
    "BrokenCheckpoint",
    "CheckpointError",
    "Checkpointer",
    "HFAdapter",
    "Part",
    "Piece",
    "Renamed",
    "TensorReader",
    "check_whole",
    "export_hf",
    "export_model",
    "load_hf",
    "read_config",
    "save_hf",
]
