"""A copy of this rank's tensors in CPU memory, which a thread writes while training continues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from titan_ckpt.format.durable_files import FileRecord
from titan_ckpt.format.safetensors_writer import layout_of
from titan_ckpt.save.direct_io import allocate_pages, write_pages


class Staging:
    """A buffer in CPU memory with the content of a safetensors file: `copy` fills it, `write` writes the file.

    The buffer is reused for later saves. Copies from an accelerator are queued on its current stream, after the kernels
    that produce the values and before those that change them next. The caller therefore continues at once, and only the
    writing thread waits for the copies.
    """

    def __init__(self) -> None:
        self._signature: object = None
        self._pages = torch.empty(0, dtype=torch.uint8)
        self._size = 0
        self._views: dict[str, Tensor] = {}
        self._copy_events: list[torch.Event] = []

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the current values of the tensors; the last `write` must have returned."""
        signature = {key: (tensor.dtype, tensor.shape, tensor.device) for key, tensor in tensors.items()}
        if signature != self._signature:
            self._lay_out(tensors)
            self._signature = signature
        for key, tensor in tensors.items():
            self._views[key].copy_(tensor, non_blocking=True)
        self._copy_events = [
            torch.accelerator.current_stream(device).record_event()
            for device in {tensor.device for tensor in tensors.values()}
            if device.type != "cpu"
        ]

    def write(self, path: Path) -> FileRecord:
        """Write the copied tensors as a new safetensors file, once all copies have completed; return its record.

        Raises:
            FileExistsError: if a file of that name exists.
        """
        for event in self._copy_events:
            event.synchronize()
        content = self._pages.numpy().data
        write_pages(path, content, self._size)
        return FileRecord(self._size, xxhash.xxh3_64_hexdigest(content[: self._size]))

    def _lay_out(self, tensors: Mapping[str, Tensor]) -> None:
        layout = layout_of(tensors)
        # Free the old buffer before the new one is allocated.
        self._signature, self._views, self._pages = None, {}, torch.empty(0, dtype=torch.uint8)
        is_pinned = any(tensor.device.type != "cpu" for tensor in tensors.values())
        self._pages = allocate_pages(layout.size, is_pinned)
        self._size = layout.size
        self._pages[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        self._views = {
            key: self._pages[start : start + tensors[key].nbytes].view(tensors[key].dtype).view(tensors[key].shape)
            for key, start in layout.starts.items()
        }
