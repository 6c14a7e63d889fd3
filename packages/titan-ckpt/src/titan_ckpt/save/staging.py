"""The copy of this rank's tensors from which a thread writes while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from titan_ckpt.format.durable_files import FileRecord
from titan_ckpt.format.safetensors_writer import layout_of
from titan_ckpt.save.direct_io import whole_pages, write_pages


class Staging:
    """The content of a safetensors file in CPU memory that is kept: `copy` fills it, `write` makes the file.

    Copies from an accelerator are queued on its current stream behind the work that makes the values and before
    whatever changes them next, so the caller goes on at once and only the thread that writes waits for them.
    """

    def __init__(self) -> None:
        self._held: object = None
        self._pages = torch.empty(0, dtype=torch.uint8)
        self._size = 0
        self._places: dict[str, Tensor] = {}
        self._arrived: list[torch.Event] = []

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values that the tensors have now; the last `write` must have ended."""
        held = {key: (tensor.dtype, tensor.shape, tensor.device) for key, tensor in tensors.items()}
        if held != self._held:
            self._lay_out(tensors)
            self._held = held
        for key, tensor in tensors.items():
            self._places[key].copy_(tensor, non_blocking=True)
        self._arrived = [
            torch.accelerator.current_stream(device).record_event()
            for device in {tensor.device for tensor in tensors.values()}
            if device.type != "cpu"
        ]

    def write(self, path: Path) -> FileRecord:
        """Write what was copied as a new safetensors file, once all of it has arrived; returns its record.

        Raises:
            FileExistsError: when there is a file of that name.
        """
        for event in self._arrived:
            event.synchronize()
        content = self._pages.numpy().data
        write_pages(path, content, self._size)
        return FileRecord(self._size, xxhash.xxh3_64_hexdigest(content[: self._size]))

    def _lay_out(self, tensors: Mapping[str, Tensor]) -> None:
        layout = layout_of(tensors)
        self._held, self._places, self._pages = None, {}, torch.empty(0, dtype=torch.uint8)  # frees the old first
        self._pages = whole_pages(layout.size, pinned=any(tensor.device.type != "cpu" for tensor in tensors.values()))
        self._size = layout.size
        self._pages[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        self._places = {
            key: self._pages[start : start + tensors[key].nbytes].view(tensors[key].dtype).view(tensors[key].shape)
            for key, start in layout.starts.items()
        }
