"""Writer of a folder of safetensors files in the layout of Hugging Face."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.format.durable_files import publish, write_json
from titan_ckpt.format.safetensors_writer import read_through, write_streamed
from titan_ckpt.hugging_face.metadata import ExportMetadata
from titan_ckpt.hugging_face.weight_files import INDEX


def write_folder(
    folder: Path,
    meta_tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: ExportMetadata | None,
    max_file_bytes: int,
    guard: CollectiveGuard,
) -> None:
    """Write tensors as `model-00001-of-00002.safetensors` and so on, with their index and the other files of an export.

    Every rank calls `read(key)` once for each key of `meta_tensors`, in the same order. Rank 0, which has the
    `metadata`, writes one tensor after the other. The folder is renamed to `folder` when it is complete.
    """

    def write(action: Callable[[], Any]) -> None:
        guard.run_on_all(lambda: action() if guard.is_first else None)

    temporary = folder.with_name(f"{folder.name}.saving-{uuid.uuid4().hex[:8]}")
    write(lambda: temporary.mkdir(parents=True))
    groups = _groups(meta_tensors, max_file_bytes)
    weight_map: dict[str, str] = {}
    for place, keys in enumerate(groups, start=1):
        name = f"model-{place:05}-of-{len(groups):05}.safetensors"
        weight_map.update(dict.fromkeys(keys, name))
        tensors = {key: meta_tensors[key] for key in keys}
        write_or_read = partial(write_streamed, temporary / name) if guard.is_first else read_through
        guard.run_on_all(partial(write_or_read, tensors, read))
    total = sum(tensor.nbytes for tensor in meta_tensors.values())
    write(lambda: write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}))
    write(lambda: metadata.write(temporary) if metadata else None)
    write(lambda: publish(temporary, folder))


def _groups(meta_tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for key, tensor in meta_tensors.items():
        if groups[-1] and filled + tensor.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += tensor.nbytes
    return groups
