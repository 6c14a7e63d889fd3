"""Metrics of a run: lines on the terminal, `metrics.jsonl` with one object per step, and optionally TensorBoard."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from titan_config import ConfigError, Configurable, require_local

Record = dict[str, Any]


class Sink(Configurable, ABC):
    """A destination of metrics records. A custom one is a subclass, whose config goes into `metrics.sinks`."""

    class Config(Configurable.Config):
        pass

    @abstractmethod
    def write(self, record: Record) -> None:
        """Write the record of one step."""

    @abstractmethod
    def close(self) -> None:
        """Flush and close the destination."""


class TensorBoard(Sink):
    """TensorBoard scalars in `dump_folder/<folder>`. Needs `pip install titan-trainer[tensorboard]`."""

    class Config(Sink.Config):
        folder: str = "tb"
        """Folder of the event files, relative to dump_folder."""

        def validate(self) -> None:
            require_local(self.folder, "metrics.sinks.folder")

    def __init__(self, config: Config, *, dump_folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(dump_folder / config.folder), purge_step=first_step + 1)

    def write(self, record: Record) -> None:
        """Write one scalar per number of the record."""
        for key, value in record.items():
            if key != "step":
                self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


class Metrics(Configurable):
    """The metrics writer: on the first rank it records each step in a file and in sinks, and prints lines.

    `dump_folder/metrics.jsonl` has one object per step: `step`, `loss`, `grad_norm`, `lr`, `tokens` (of the step),
    `tokens_per_second`, `seconds` (of the step), `memory_gib` (peak), metrics of model layers (such as `expert_load`),
    `mfu` if the device's peak FLOP/s is known, and `validation_loss` after a validation. A resumed run continues the
    file after the step of the loaded checkpoint.
    """

    class Config(Configurable.Config):
        log_freq: int = 10
        """Steps from one line on the terminal to the next."""
        sinks: list[Sink.Config] = []
        """Additional destinations of the records, such as TensorBoard."""

        def validate(self) -> None:
            if self.log_freq < 1:
                raise ConfigError(f"metrics.log_freq must be at least 1, got {self.log_freq}.")

    def __init__(
        self,
        config: Config,
        *,
        dump_folder: Path,
        first_step: int,
        steps: int,
        seconds_per_token_at_peak: float | None,
        is_first_rank: bool,
    ) -> None:
        self.log_freq, self.steps, self.is_first_rank = config.log_freq, steps, is_first_rank
        self.seconds_per_token_at_peak = seconds_per_token_at_peak
        self.started = self.step_started = self.step_ended = time.perf_counter()
        self.num_steps = 0
        self.tokens_since_line, self.seconds_since_line = 0, 0.0
        if is_first_rank:
            self.file = open_after_step(dump_folder / "metrics.jsonl", first_step)
            self.sinks = [sink.build(dump_folder=dump_folder, first_step=first_step) for sink in config.sinks]

    def stop_clock(self) -> None:
        """End the time of the step, which began when the previous step was recorded."""
        self.step_ended = time.perf_counter()

    def record_step(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        memory_gib: float,
        num_replicas: int = 1,
        measured: Mapping[str, float] | None = None,
        validation_loss: float | None = None,
    ) -> Record:
        """Record step number `step` (counted from 1) and the validation after it; begin the time of the next step.

        `tokens` is the total over all `num_replicas` replicas; `measured` has the metrics of model layers. Returns the
        record, on every rank; the first rank writes it.
        """
        seconds, self.step_started = self.step_ended - self.step_started, time.perf_counter()
        record: Record = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "memory_gib": memory_gib,
            **(measured or {}),
        }
        if self.seconds_per_token_at_peak is not None:
            record["mfu"] = tokens * self.seconds_per_token_at_peak / (seconds * num_replicas)
        if validation_loss is not None:
            record["validation_loss"] = validation_loss
        if not self.is_first_rank:
            return record
        self.num_steps += 1
        self._write(record)
        self.tokens_since_line += tokens
        self.seconds_since_line += seconds
        if step % self.log_freq == 0 or step == self.steps or self.num_steps == 1:
            self._print_line(record, measured or {})
        if validation_loss is not None:
            print(f"step {step:>6}/{self.steps}  validation loss {validation_loss:.4f}", flush=True)
        return record

    def close(self) -> None:
        """Close the file and the sinks."""
        if self.is_first_rank:
            self.file.close()
            for sink in self.sinks:
                sink.close()

    def _write(self, record: Record) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for sink in self.sinks:
            sink.write(record)

    def _print_line(self, record: Record, measured: Mapping[str, float]) -> None:
        tokens_per_second = self.tokens_since_line / self.seconds_since_line
        remaining_s = (time.perf_counter() - self.started) / self.num_steps * (self.steps - record["step"])
        mfu = f"  mfu {record['mfu']:.1%}" if "mfu" in record else ""
        layer_metrics = "".join(f"{name.replace('_', ' ')} {value:.2f}  " for name, value in measured.items())
        print(
            f"step {record['step']:>6}/{self.steps}  loss {record['loss']:.4f}  grad norm {record['grad_norm']:.3f}  "
            f"lr {record['lr']:.2e}  {tokens_per_second:,.0f} tokens/s{mfu}  {record['memory_gib']:.2f} GiB  "
            f"{layer_metrics}{format_duration(remaining_s)} left",
            flush=True,
        )
        self.tokens_since_line, self.seconds_since_line = 0, 0.0


def open_after_step(path: Path, step: int) -> TextIO:
    """Open `path` for appending after truncating it to the records up to `step`: later steps will be run again.

    Raises ConfigError, with the file unchanged, if a complete line up to `step` is not a record.
    """
    if path.exists():
        kept_bytes = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}:{number} must be a metrics record (a JSON object with a step), got {line[:60]!r}. "
                    "Fix the line, or move the file away."
                ) from error
            kept_bytes += len(line)
        os.truncate(path, kept_bytes)
    return path.open("a")


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a `metrics.jsonl`, skipping an incomplete last line: a run may be writing the file."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: `7s`, `3m20s`, `5h07m`, `2d04h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02}h"
