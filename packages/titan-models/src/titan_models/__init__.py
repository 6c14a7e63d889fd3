"""Model families as plain nn.Modules built from configs, with checked Hugging Face weight adapters."""

from titan_models.attention import Attention, Masks, Places
from titan_models.block import Block
from titan_models.cores import AttentionCore, Flex, Sdpa, Varlen
from titan_models.decoder import Decoder
from titan_models.embedding import Embedding
from titan_models.feed_forward import FeedForward
from titan_models.flops import Flops
from titan_models.generation import generate
from titan_models.grouped_query_attention import GroupedQueryAttention
from titan_models.hugging_face.adapter import HfAdapter, Inside
from titan_models.hugging_face.rules import Stored
from titan_models.initializers import Constant, DepthScaledNormal, FanInNormal, Initializer, Normal, TruncatedNormal
from titan_models.kv_cache import KVCache
from titan_models.latent_attention import MultiHeadLatentAttention
from titan_models.linear import Linear
from titan_models.mask import Chunks, Mask, MaskLimit, SlidingWindow
from titan_models.model import Model
from titan_models.part import Part
from titan_models.rms_norm import RMSNorm
from titan_models.rope import Llama3Scaling, Rope
from titan_models.swiglu import SwiGLU
from titan_models.temperature import Temperature
from titan_models.weights import init_weights
from titan_models.yarn import Yarn

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
    "Initializer",
    "Inside",
    "KVCache",
    "Linear",
    "Llama3Scaling",
    "Mask",
    "MaskLimit",
    "Masks",
    "Model",
    "MultiHeadLatentAttention",
    "Normal",
    "Part",
    "Places",
    "RMSNorm",
    "Rope",
    "Sdpa",
    "SlidingWindow",
    "Stored",
    "SwiGLU",
    "Temperature",
    "TruncatedNormal",
    "Varlen",
    "Yarn",
    "generate",
    "init_weights",
]
