"""A trace of some steps for Perfetto, and a snapshot of accelerator memory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from titan_config import ConfigError, Configurable, require_local
from torch.profiler import ProfilerActivity, profile, schedule


class Profiler(Configurable):
    """A context that traces `active` steps out of every `profile_freq`, after `warmup` steps of preparation.

    Each rank writes `dump_folder/<save_traces_folder>/step-<n>/rank<r>.json.gz`, and with `enable_memory_snapshot`
    on an accelerator `rank<r>_memory.pickle` beside it (for https://pytorch.org/memory_viz).
    """

    class Config(Configurable.Config):
        profile_freq: int = 10
        """Steps from one trace to the next."""
        profiler_active: int = 1
        """Steps in a trace."""
        profiler_warmup: int = 3
        """Steps before them that the profiler runs without recording."""
        save_traces_folder: str = "profile_traces"
        """Below dump_folder."""
        enable_memory_snapshot: bool = False
        """Also record allocations; accelerators only."""

        def validate(self) -> None:
            require_local(self.save_traces_folder, "profiling.save_traces_folder")
            if (
                self.profiler_active < 1
                or self.profiler_warmup < 0
                or self.profile_freq < self.profiler_active + self.profiler_warmup
            ):
                raise ConfigError(
                    f"Got {self.profiler_warmup} warm-up and {self.profiler_active} traced steps out of every "
                    f"{self.profile_freq}. One step at least is traced, and both fit in profile_freq. "
                    "Raise --profiling.profile_freq."
                )

    def __init__(self, config: Config, *, dump_folder: Path, device: torch.device, first_step: int) -> None:
        if config.enable_memory_snapshot and device.type != "cuda":
            raise ConfigError(
                f"Got enable_memory_snapshot on {device.type}. Only CUDA's allocator keeps a history. "
                "Turn --profiling.enable_memory_snapshot off here."
            )
        self.config, self.device, self.step = config, device, first_step
        self.is_over = False
        self.folder = dump_folder / config.save_traces_folder
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        wait = config.profile_freq - config.profiler_warmup - config.profiler_active
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=config.profiler_warmup, active=config.profiler_active),
            on_trace_ready=self._write,
            record_shapes=True,
        )

    def __enter__(self) -> Profiler:
        if self.config.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history()
        self.profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_over = True
        self.profile.__exit__(kind, error, trace)
        if self.config.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)

    def step_ended(self, step: int) -> None:
        """Take note that step number `step` is over."""
        self.step = step
        self.profile.step()

    def _write(self, finished: profile) -> None:
        if self.is_over:  # the run ended within a trace
            return
        folder = self.folder / f"step-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / f"rank{dist.get_rank()}.json.gz"))
        if self.config.enable_memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(folder / f"rank{dist.get_rank()}_memory.pickle"))
