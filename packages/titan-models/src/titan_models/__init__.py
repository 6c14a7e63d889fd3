"""Model families as plain nn.Modules built from configs, with checked Hugging Face weight adapters."""

from titan_models.attention.base import Attention, MaskCache, RotaryPositions
from titan_models.attention.grouped_query_attention import GroupedQueryAttention
from titan_models.attention.kernels import AttentionCore, Flex, Sdpa, Varlen
from titan_models.attention.latent_attention import MultiHeadLatentAttention
from titan_models.attention.mask import Chunks, Mask, MaskModifier, SlidingWindow
from titan_models.attention.temperature import Temperature
from titan_models.block import Block
from titan_models.decoder import Decoder
from titan_models.generation.generate import generate
from titan_models.generation.kv_cache import KVCache
from titan_models.hugging_face.adapter import HfAdapter, NestedCheckpoint
from titan_models.hugging_face.rules import HfTensor
from titan_models.initialization.initializers import (
    Constant,
    DepthScaledNormal,
    FanInNormal,
    Initializer,
    Normal,
    TruncatedNormal,
)
from titan_models.layers.embedding import Embedding
from titan_models.layers.feed_forward import FeedForward
from titan_models.layers.flops import Flops
from titan_models.layers.layer import Layer
from titan_models.layers.linear import Linear
from titan_models.layers.rms_norm import RMSNorm
from titan_models.layers.rope import Llama3Scaling, Rope
from titan_models.layers.swiglu import SwiGLU
from titan_models.layers.yarn import Yarn
from titan_models.model import Model
from titan_models.weights import init_weights

__all__ = [
    "Attention",
    "AttentionCore",
    "Block",
    "Chunks",
    "Constant",
    "Decoder",
    "DepthScaledNormal",
    "Embedding",
    "FanInNormal",
    "FeedForward",
    "Flex",
    "Flops",
    "GroupedQueryAttention",
    "HfAdapter",
    "HfTensor",
    "Initializer",
    "KVCache",
    "Layer",
    "Linear",
    "Llama3Scaling",
    "Mask",
    "MaskCache",
    "MaskModifier",
    "Model",
    "MultiHeadLatentAttention",
    "NestedCheckpoint",
    "Normal",
    "RMSNorm",
    "Rope",
    "RotaryPositions",
    "Sdpa",
    "SlidingWindow",
    "SwiGLU",
    "Temperature",
    "TruncatedNormal",
    "Varlen",
    "Yarn",
    "generate",
    "init_weights",
]
