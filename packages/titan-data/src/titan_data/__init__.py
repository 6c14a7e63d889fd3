"""Text to token batches: tokenizers, sources, packing, elastic order, exact state."""

from titan_data.batch import IGNORED_LABEL, Batch
from titan_data.byte_tokenizer import ByteTokenizer
from titan_data.entropy import unigram_entropy
from titan_data.hf_tokenizer import HFTokenizer
from titan_data.hugging_face_source import HuggingFaceSource
from titan_data.jsonl_source import JsonlSource
from titan_data.loader import TokenLoader
from titan_data.parquet_source import ParquetSource
from titan_data.source import MapSource, Source
from titan_data.text_source import TextSource
from titan_data.tiktoken_tokenizer import TiktokenTokenizer
from titan_data.tokenizer import Tokenizer

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "ByteTokenizer",
    "HFTokenizer",
    "HuggingFaceSource",
    "JsonlSource",
    "MapSource",
    "ParquetSource",
    "Source",
    "TextSource",
    "TiktokenTokenizer",
    "TokenLoader",
    "Tokenizer",
    "unigram_entropy",
]
