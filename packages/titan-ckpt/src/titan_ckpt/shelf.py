"""The folder that holds a run's checkpoints: their names, and what happens to old, dead and replaced ones."""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from pathlib import Path

from titan_ckpt.errors import CheckpointError
from titan_ckpt.lock import ProcessLock
from titan_ckpt.manifest import MANIFEST

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"step-\d+(-hf)?\.(saving|deleting)-[0-9a-f]+")


class Shelf:
    """A folder of checkpoints named `step-N`; only rank 0 changes it.

    A name ending in `.saving-*` or `.deleting-*` belongs to a save or a deletion that has not finished; when its
    process is dead it is a leftover. A name ending in `.set-aside-*` was a checkpoint, and is kept for a person to look
    at.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: ProcessLock | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, once published."""
        return self.folder / f"step-{step}"

    def hf_path(self, step: int) -> Path:
        """Where the weights of a step are in Hugging Face's format, once exported."""
        return self.folder / f"step-{step}-hf"

    def steps(self) -> list[int]:
        """The steps that have a published name, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = [_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def begin(self, step: int) -> Path:
        """Make and return the folder that a save of `step` writes to.

        Raises:
            CheckpointError: when there already is a checkpoint of that step.
        """
        if self.path(step).exists():
            raise CheckpointError(
                f"Got step {step} to save, and {self.path(step)} is there already. A checkpoint is never written over. "
                f"Move it away, or save into another folder."
            )
        temporary = self.folder / f"step-{step}.saving-{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True)
        return temporary

    def keep(self, count: int) -> None:
        """Delete all but the newest `count` checkpoints; folders without a manifest do not count and are left alone."""
        published = [step for step in self.steps() if (self.path(step) / MANIFEST).is_file()]
        for step in published[:-count]:
            doomed = self.folder / f"step-{step}.deleting-{uuid.uuid4().hex[:8]}"
            os.rename(self.path(step), doomed)  # so that a deletion that is interrupted leaves no half checkpoint
            shutil.rmtree(doomed)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename all checkpoints newer than `step`, and their exports: a run going on from there needs their names."""
        moved = []
        newer = [made for made in self.steps() if made > step]
        for path in [*map(self.path, newer), *filter(Path.exists, map(self.hf_path, newer))]:
            target = path.with_name(f"{path.name}.set-aside-{uuid.uuid4().hex[:8]}")
            os.rename(path, target)
            moved.append(target)
        return moved

    def open(self) -> None:
        """Make the folder and keep other processes out of it; delete what dead saves and deletions left.

        Raises:
            CheckpointError: when there can be no such folder, or another process has it open.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"Got the folder {self.folder} for checkpoints, which cannot be made ({error}). A run saves there. "
                f"Choose a folder that you may write to, or move away the file of that name."
            ) from error
        self._lock = ProcessLock(self.folder.with_name(f".{self.folder.name}.lock"))
        for path in self.folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                logger.info("Deleting %s, which an interrupted save left.", path)
                shutil.rmtree(path)

    def close(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.release()
