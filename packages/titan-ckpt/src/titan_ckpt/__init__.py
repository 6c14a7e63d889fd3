"""Distributed checkpoints: asynchronous, atomic, verified, resharded on load, with Hugging Face import and export."""

from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.errors import BrokenCheckpoint, CheckpointError
from titan_ckpt.format.readers import TensorReader, read_config
from titan_ckpt.format.state_tree import Part
from titan_ckpt.format.verify import check_whole
from titan_ckpt.hugging_face.adapter import HFAdapter, Renamed, WeightMapping
from titan_ckpt.hugging_face.export import export_hf, save_hf
from titan_ckpt.hugging_face.load import load_hf
from titan_ckpt.model_export import export_model

__all__ = [
    "BrokenCheckpoint",
    "CheckpointError",
    "Checkpointer",
    "HFAdapter",
    "Part",
    "Renamed",
    "TensorReader",
    "WeightMapping",
    "check_whole",
    "export_hf",
    "export_model",
    "load_hf",
    "read_config",
    "save_hf",
]
