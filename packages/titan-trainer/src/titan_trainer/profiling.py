"""Profiler traces of single steps for Perfetto, and snapshots of accelerator memory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from titan_config import ConfigError, require_local
from torch.profiler import ProfilerActivity, profile, schedule

from titan_trainer.callbacks import Callback, Record
from titan_trainer.protocols import Run


class Profiler(Callback):
    """Traces of the last `profiler_active` steps of every `profile_freq`.

    Each rank writes `dump_folder/<save_traces_folder>/step-<n>/rank<r>.json.gz`, and with `enable_memory_snapshot`
    also `rank<r>_memory.pickle` in the same folder (for https://pytorch.org/memory_viz).
    """

    class Config(Callback.Config):
        profile_freq: int = 10
        """Steps from one trace to the next."""
        profiler_active: int = 1
        """Steps in each trace."""
        profiler_warmup: int = 3
        """Warm-up steps before each trace, in which the profiler runs without recording."""
        save_traces_folder: str = "profile_traces"
        """Folder of the traces, relative to dump_folder."""
        enable_memory_snapshot: bool = False
        """Also record memory allocations (CUDA only)."""

        def validate(self) -> None:
            require_local(self.save_traces_folder, "profiling.save_traces_folder")
            if (
                self.profiler_active < 1
                or self.profiler_warmup < 0
                or self.profile_freq < self.profiler_active + self.profiler_warmup
            ):
                raise ConfigError(
                    "profiling must have profiler_active >= 1, profiler_warmup >= 0 and profile_freq >= "
                    "profiler_active + profiler_warmup, got "
                    f"{self.profiler_active}, {self.profiler_warmup} and {self.profile_freq}."
                )

    config: Config

    def __init__(self, config: Config, *, dump_folder: Path, device: torch.device, first_step: int) -> None:
        if config.enable_memory_snapshot and device.type != "cuda":
            raise ConfigError(f"profiling.enable_memory_snapshot must be False without CUDA, got device {device.type}.")
        self.config, self.device, self.step = config, device, first_step
        self.is_closed = False
        self.folder = dump_folder / config.save_traces_folder
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        wait = config.profile_freq - config.profiler_warmup - config.profiler_active
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=config.profiler_warmup, active=config.profiler_active),
            on_trace_ready=self._write,
            record_shapes=True,
        )

    def __enter__(self) -> Self:
        if self.config.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history()
        self.profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_closed = True
        self.profile.__exit__(kind, error, trace)
        if self.config.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)

    def on_step_end(self, run: Run, record: Record) -> None:
        """Advance the schedule of the profiler."""
        self.step = record["step"]
        self.profile.step()

    def _write(self, finished: profile) -> None:
        if self.is_closed:  # the run ended before the trace was complete
            return
        folder = self.folder / f"step-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / f"rank{dist.get_rank()}.json.gz"))
        if self.config.enable_memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(folder / f"rank{dist.get_rank()}_memory.pickle"))
