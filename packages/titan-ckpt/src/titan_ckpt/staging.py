"""Copies of tensors in CPU memory that is kept from one save to the next."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from titan_ckpt.chunks import Chunk


class Staging:
    """CPU buffers for chunks; `copy` fills them, `wait` returns once the copies have arrived.

    Copies from an accelerator are queued on its current stream behind the work that makes the values and before
    whatever changes them next, so the caller goes on at once and only the thread that writes has to `wait`.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._arrived: list[torch.Event] = []

    def copy(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """Return the chunks with their data in CPU buffers, which the next `copy` overwrites."""
        staged, devices = [], set()
        for chunk in chunks:
            buffer = self._buffer(chunk)
            buffer.copy_(chunk.data, non_blocking=True)
            staged.append(chunk.holding(buffer))
            devices.add(chunk.data.device)
        self._arrived = [
            torch.accelerator.current_stream(device).record_event() for device in devices if device.type != "cpu"
        ]
        return staged

    def wait(self) -> None:
        """Block until everything copied is in CPU memory."""
        for event in self._arrived:
            event.synchronize()
        self._arrived = []

    def _buffer(self, chunk: Chunk) -> Tensor:
        buffer = self._buffers.get(chunk.key)
        if buffer is None or buffer.shape != chunk.data.shape or buffer.dtype != chunk.data.dtype:
            pinned = chunk.data.device.type != "cpu"
            buffer = torch.empty(chunk.data.shape, dtype=chunk.data.dtype, pin_memory=pinned)
            self._buffers[chunk.key] = buffer
        return buffer
