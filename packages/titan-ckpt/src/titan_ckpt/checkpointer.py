"""The checkpointer of a run: saves named parts, finds the newest whole checkpoint, keeps the latest k."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from titan_config import Configurable
from torch.distributed.tensor import DTensor

from titan_ckpt.chunks import is_writer, local_chunks
from titan_ckpt.errors import BrokenCheckpoint
from titan_ckpt.loading import PassedOver, damage_of, find_newest_whole, load_parts
from titan_ckpt.ranks import Ranks
from titan_ckpt.saving import Snapshot, save
from titan_ckpt.shelf import Shelf
from titan_ckpt.staging import Staging
from titan_ckpt.state import Part, split_parts

logger = logging.getLogger(__name__)


class Checkpointer(Configurable):
    """Saves and loads the parts of a run; every method is a collective of all ranks.

    Args:
        config: what to do.
        dump_folder: where the run writes; the checkpoints are in `dump_folder / config.folder`.
        run_config: the run's whole config as plain data, saved with each checkpoint.

    `passed_over` holds the broken checkpoints that the last `load` found newer than the one it took.
    """

    class Config(Configurable.Config):
        folder: str = "checkpoint"
        """Folder of the checkpoints, below the dump folder."""
        interval: int = 500
        """Steps from one save to the next."""
        keep_latest_k: int | None = 10
        """How many checkpoints stay; older ones are deleted after a newer one is published. None keeps all."""
        async_mode: Literal["disabled", "async"] = "async"
        """Whether training goes on while a thread writes a copy ("async") or waits for the disk ("disabled")."""
        load_step: int | None = None
        """The step to go on from; newer checkpoints are set aside. None takes the newest whole one."""

        def validate(self) -> None:
            if self.interval < 1:
                raise ValueError(
                    f"Got interval {self.interval}. The steps between two saves must be 1 or more. To save nothing, leave the "
                    f"checkpointer out."
                )
            if self.keep_latest_k is not None and self.keep_latest_k < 1:
                raise ValueError(
                    f"Got keep_latest_k {self.keep_latest_k}. At least 1 checkpoint must stay. Set it to None to keep all."
                )

    def __init__(self, config: Config, dump_folder: Path, run_config: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.shelf = Shelf(Path(dump_folder) / config.folder)
        self.passed_over: list[PassedOver] = []
        self._run_config = run_config
        self._ranks = Ranks()
        self._staging = Staging()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="titan-ckpt")
        self._pending: Future[None] | None = None
        if self._ranks.is_first:
            self.shelf.clean()

    def due(self, step: int) -> bool:
        """Whether the interval asks for a save after this step."""
        return step % self.config.interval == 0

    def save(self, step: int, parts: Mapping[str, Part]) -> None:
        """Save the parts as the checkpoint of `step`; in the mode "async" this returns once they are copied.

        Raises:
            CheckpointError: when this save fails, or (in the mode "async") the one before it did.
        """
        self.wait()
        snapshot = self._ranks.together(lambda: self._take(step, parts))
        self._pending = self._writer.submit(self._write, snapshot)
        if self.config.async_mode == "disabled":
            self.wait()

    def load(self, parts: Mapping[str, Part]) -> int | None:
        """Load the newest whole checkpoint, or that of `load_step`, into the parts; return its step (None: there is none).

        Every file is checked before a weight is touched. Broken checkpoints are passed over (see `passed_over`), and what
        is newer than the loaded one is renamed to `step-N.set-aside-*`, so that the run can go on from there.

        Raises:
            CheckpointError: when the one asked for is broken or absent, when all are broken, or when it does not fit the parts.
        """
        self.wait()
        step = self._step_to_load()
        if step is None:
            return None
        load_parts(self.shelf.path(step), parts, self._ranks, self._run_config)
        self._ranks.together(lambda: self._set_aside_after(step) if self._ranks.is_first else None)
        logger.info("Loaded %s.", self.shelf.path(step))
        return step

    def wait(self) -> None:
        """Block until the save that is under way is published.

        Raises:
            CheckpointError: when it failed; it is said once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the save that is under way, and end the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _take(self, step: int, parts: Mapping[str, Part]) -> Snapshot:
        tensors, values, _ = split_parts(parts)
        chunks = [chunk for name, chunk in local_chunks(tensors).items() if is_writer(name, tensors[name])]
        replicated = frozenset(name for name, tensor in tensors.items() if not isinstance(tensor, DTensor))
        if self.config.async_mode == "async":
            chunks = self._staging.copy(chunks)
        return Snapshot(step, chunks, replicated, values)

    def _write(self, snapshot: Snapshot) -> None:
        self._staging.wait()
        save(snapshot, self.shelf, self._ranks, self._run_config)
        logger.info("Saved %s.", self.shelf.path(snapshot.step))
        if self.config.keep_latest_k is not None and self._ranks.is_first:
            self.shelf.keep(self.config.keep_latest_k)

    def _step_to_load(self) -> int | None:
        step = self.config.load_step
        if step is None:
            step, self.passed_over = find_newest_whole(self.shelf, self._ranks)
            return step
        damage = damage_of(self.shelf.path(step), self._ranks)
        if damage:
            raise BrokenCheckpoint(
                f"Got load_step {step}, and {self.shelf.path(step)} is not whole: {damage}. A checkpoint is loaded only when "
                f"all its files are. Choose another of {self.shelf.steps()}, or leave load_step out for the newest whole one."
            )
        return step

    def _set_aside_after(self, step: int) -> None:
        for path in self.shelf.set_aside_after(step):
            logger.warning("Renamed a checkpoint newer than step %s to %s.", step, path)
