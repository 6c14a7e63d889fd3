"""The folder that holds a run's checkpoints: their names, and what happens to old, dead and replaced ones."""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.durable_files import flush_folder, rename_flushed
from titan_ckpt.format.manifest import MANIFEST, STEP_NAME
from titan_ckpt.format.regular_file import retried
from titan_ckpt.lock import ProcessLock
from titan_ckpt.paths import local_path

logger = logging.getLogger(__name__)

LOCK = ".lock"
_EXPORT = re.compile(STEP_NAME.pattern + "-hf")
_LEFTOVER = re.compile(r"step-[0-9]+(-hf)?\.(saving|deleting)-[0-9a-f]+|\.probe-[0-9a-f]+")
_saving: set[Path] = set()  # by this process, which may have the folder open more than once


class CheckpointFolder:
    """A folder of checkpoints named `step-N`; only rank 0 changes it.

    A name ending in `.saving-*` or `.deleting-*` belongs to a save or a deletion that has not finished; when its
    process is dead it is a leftover. A name ending in `.set-aside-*` was a checkpoint, or something else in the place
    of one, and is kept for a person to look at. Any other name is left alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _resolved(local_path(folder, "the folder of checkpoints"))
        self._lock: ProcessLock | None = None
        self._unflushed: int | None = None  # the step whose folder has its name, which may not survive a loss of power

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, once published."""
        return self.folder / f"step-{step}"

    def hf_path(self, step: int) -> Path:
        """Where the weights of a step are in Hugging Face's format, once exported."""
        return self.folder / f"step-{step}-hf"

    def steps(self) -> list[int]:
        """The steps that have a published name, oldest first.

        Raises:
            CheckpointError: when the disk fails.
        """
        return retried(lambda: self._numbers(STEP_NAME), self.folder)

    def check_newest(self, step: int, newest: int | None = None) -> None:
        """Check that no checkpoint here is newer than `step`; `newest` is the newest one where that is known.

        Raises:
            CheckpointError: when one is: it would outlive those that are saved now. When the disk fails.
        """
        newest = max(self.steps(), default=step) if newest is None else newest
        if newest > step:
            raise CheckpointError(
                f"The step to save must be at least {newest}, the newest checkpoint in {self.folder}, got {step}. Call "
                f"load before the first save to go on from there (load_step goes back and sets newer ones aside), or "
                f"save into another folder."
            )

    def begin(self, step: int) -> Path:
        """Make and return the folder that a save of `step` writes to; what is no folder at its name is set aside.

        Raises:
            CheckpointError: when there already is a checkpoint of that step.
            OSError: when the disk fails.
        """
        final = self.path(step)
        if final.is_dir():
            raise CheckpointError(
                f"A step to save must not be in the folder yet, got step {step}, which is in {final}. Move it away, or "
                f"save into another folder."
            )
        if os.path.lexists(final):
            aside = _set_aside(final)
            logger.warning("Renamed %s, which is no folder, to %s.", final, aside)
        temporary = self.folder / f"step-{step}.saving-{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True)
        _saving.add(temporary)
        return temporary

    def publish(self, temporary: Path, step: int) -> None:
        """Give a folder that `begin` made the name of its step, once this process is known to have the lock still.

        Raises:
            CheckpointError: when another process has it now.
            OSError: when the disk fails.
        """
        if self._lock is not None:
            self._lock.check()
        rename_flushed(temporary, self.path(step))
        self._unflushed = step
        self.flush_published(step)

    def flush_published(self, step: int) -> bool:
        """Flush the name that `publish` gave the folder of a step, where that failed; return whether it is there.

        Raises:
            OSError: when the disk fails.
        """
        if self._unflushed != step or not self.path(step).is_dir():
            return False
        flush_folder(self.folder)
        self._unflushed = None
        return True

    def end(self, temporary: Path) -> None:
        """Forget a folder that `begin` made; what is left of it, after a save that failed, is deleted."""
        _remove(temporary)
        _saving.discard(temporary)

    def keep(self, count: int, saved: int) -> None:
        """Delete all but the newest `count` of the checkpoints up to the one just saved; what fails is logged.

        Folders without a manifest do not count and are left alone.
        """
        try:
            published = [step for step in self.steps() if step <= saved and (self.path(step) / MANIFEST).is_file()]
            for step in published[:-count]:
                doomed = self.folder / f"step-{step}.deleting-{uuid.uuid4().hex[:8]}"
                os.rename(self.path(step), doomed)  # so that a deletion that is interrupted leaves no half checkpoint
                _remove(doomed)
        except (OSError, CheckpointError) as error:
            logger.warning("Old checkpoints stay in %s: %s.", self.folder, error)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename all checkpoints newer than `step`, and their exports: a run going on from there needs their names.

        Raises:
            CheckpointError: when one cannot be renamed.
        """
        newer = [self.path(made) for made in self.steps() if made > step]
        try:
            newer += [self.hf_path(made) for made in self._numbers(_EXPORT) if made > step]
            return [_set_aside(path) for path in newer]
        except OSError as error:
            raise CheckpointError(
                f"Checkpoints newer than step {step} must be renamed to go on from there, got {error}. Restore the "
                f"permissions of {self.folder}, or move them away."
            ) from error

    def open(self) -> None:
        """Make the folder and keep other processes out of it; delete what dead saves and deletions left.

        Raises:
            CheckpointError: when there can be no such folder, another process has it open, or the disk fails.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"Got the folder {self.folder} for checkpoints, which cannot be made ({error}). A run saves there. "
                f"Choose a folder that you may write to, or move away the file of that name."
            ) from error
        self._lock = ProcessLock(self.folder / LOCK)
        if self._lock.is_held:
            for path in retried(lambda: list(self.folder.iterdir()), self.folder):
                if _LEFTOVER.fullmatch(path.name) and path not in _saving:
                    logger.info("Deleting %s, which an interrupted save left.", path)
                    _remove(path)

    def probe(self) -> None:
        """Write a file and delete it.

        Raises:
            CheckpointError: when that fails.
        """
        path = self.folder / f".probe-{uuid.uuid4().hex}"
        try:
            path.write_bytes(b"\0")
            path.unlink()
        except OSError as error:
            raise CheckpointError(
                f"The folder of checkpoints must be writable on every rank, got {error}. Choose a folder that all "
                f"ranks share and may write to, or restore the permissions of {self.folder}."
            ) from error

    def close(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.release()

    def _numbers(self, name: re.Pattern[str]) -> list[int]:
        return sorted(int(match[1]) for match in _folders(self.folder, name))


def _folders(folder: Path, name: re.Pattern[str]) -> Iterator[re.Match[str]]:
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in paths:
        match = name.fullmatch(path.name)
        if match and path.is_dir():
            yield match


def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, up to Python 3.12
        raise CheckpointError(
            f"The folder of checkpoints must be one that can be reached, got {folder} ({error}). Choose another."
        ) from error


def _set_aside(path: Path) -> Path:
    target = path.with_name(f"{path.name}.set-aside-{uuid.uuid4().hex[:8]}")
    os.rename(path, target)
    return target


def _remove(path: Path) -> None:
    """Delete a folder or a file, and what a link leads to not; what fails is logged."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s could not be deleted: %s.", path, error)
