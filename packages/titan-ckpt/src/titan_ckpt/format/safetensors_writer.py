"""Layout of a safetensors file, and writing it one tensor at a time."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from titan_ckpt.format.durable_files import FileRecord, write_blocks

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch dtypes and their names in a safetensors file."""

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Layout:
    """The header of a safetensors file, the offset of each tensor in it (in file order), and its size in bytes.

    The offset of each tensor is a multiple of its item size; the tensors follow each other without gaps.
    """

    header: bytes
    starts: dict[str, int]
    size: int


def layout_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Layout:
    """Return the layout of a safetensors file with these tensors.

    Source: https://github.com/huggingface/safetensors, "Format".
    """
    keys = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)  # aligns every item
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ends = [0]
    for key in keys:
        tensor = tensors[key]
        ends.append(ends[-1] + tensor.nbytes)
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": ends[-2:]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    starts = {key: begin + end for key, end in zip(keys, ends[:-1], strict=True)}
    return Layout(len(text).to_bytes(8, "little") + text, starts, begin + ends[-1])


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Write tensors as a new safetensors file, one after the other without a copy in memory; return its record.

    `safetensors` itself writes an equivalent file, but builds it in memory and cannot hash it while writing.

    Raises:
        FileExistsError: if a file of that name exists.
    """
    layout = layout_of(tensors, metadata)
    return write_blocks(path, chain([layout.header], map(_content, map(tensors.__getitem__, layout.starts))))


def write_streamed(path: Path, meta_tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a new safetensors file for Hugging Face; each tensor is read only when it is written, then freed.

    `meta_tensors` have their shapes and dtypes. Other ranks call `read_through` meanwhile: if `read` is a collective,
    it is called for all tensors, even after the disk has failed on one.

    Raises:
        FileExistsError: if a file of that name exists.
    """
    layout = layout_of(meta_tensors, {"format": "pt"})
    contents = (_content(read(key)) for key in layout.starts)
    try:
        write_blocks(path, chain([layout.header], contents))
    finally:
        deque(contents, maxlen=0)


def read_through(meta_tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Call `read` for the tensors that another rank writes, in the same order."""
    for key in layout_of(meta_tensors).starts:
        read(key)


def _content(tensor: Tensor) -> memoryview | bytes:
    """Return the bytes of a tensor; no copy if it is contiguous and on the CPU."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
