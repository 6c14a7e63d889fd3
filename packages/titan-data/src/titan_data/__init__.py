"""Data loading for training: tokenizers, text sources, sequence packing, rank-independent order, exact resumption."""

from titan_data.batch import IGNORED_LABEL, Batch
from titan_data.byte_tokenizer import ByteTokenizer
from titan_data.entropy import unigram_entropy
from titan_data.hf_tokenizer import HFTokenizer
from titan_data.hugging_face_source import HuggingFaceSource
from titan_data.jsonl_source import JsonlSource
from titan_data.loader import TokenLoader
from titan_data.mtp import with_mtp_targets
from titan_data.parquet_source import ParquetSource
from titan_data.source import MapSource, Source
from titan_data.text_source import TextSource
from titan_data.tiktoken_tokenizer import LLAMA3_PATTERN, TiktokenTokenizer
from titan_data.tokenizer import Tokenizer

__all__ = [
    "IGNORED_LABEL",
    "LLAMA3_PATTERN",
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
    "with_mtp_targets",
]
