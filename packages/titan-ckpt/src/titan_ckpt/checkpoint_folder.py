"""The folder with the checkpoints of a run: naming, publishing, retention, leftovers of interrupted saves."""

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
from titan_ckpt.format.regular_file import retry_io
from titan_ckpt.lock import ProcessLock
from titan_ckpt.paths import local_path

logger = logging.getLogger(__name__)

LOCK = ".lock"
_EXPORT = re.compile(STEP_NAME.pattern + "-hf")
_LEFTOVER = re.compile(r"step-[0-9]+(-hf)?\.(saving|deleting)-[0-9a-f]+|\.probe-[0-9a-f]+")
_saving: set[Path] = set()  # saves in progress in this process, which may have the folder open more than once


class CheckpointFolder:
    """A folder of checkpoints named `step-N`; only rank 0 changes it.

    A name ending in `.saving-*` or `.deleting-*` belongs to a save or a deletion in progress; once its process has
    died, it is a leftover. A name ending in `.set-aside-*` was a checkpoint, or something else with the name of a
    checkpoint, and is kept for manual inspection. Files and folders with other names are never touched.
    """

    def __init__(self, folder: Path) -> None:
        self.path = _resolved(local_path(folder, "the checkpoint folder"))
        self._lock: ProcessLock | None = None
        self._unflushed: int | None = None  # step that was renamed, but whose new name may not survive a power loss

    def step_path(self, step: int) -> Path:
        """Return the path of the published checkpoint of `step`."""
        return self.path / f"step-{step}"

    def hf_path(self, step: int) -> Path:
        """Return the path of the Hugging Face export of `step`."""
        return self.path / f"step-{step}-hf"

    def steps(self) -> list[int]:
        """Return the published steps, oldest first.

        Raises:
            CheckpointError: if the folder cannot be listed.
        """
        return retry_io(lambda: self._numbers(STEP_NAME), self.path)

    def check_newest(self, step: int, newest: int | None = None) -> None:
        """Check that no checkpoint in the folder is newer than `step`.

        `newest` is the newest published step if the caller knows it; None lists the folder.

        Raises:
            CheckpointError: if one is newer, since it would outlive the checkpoints saved now and be loaded instead of
                them. Also if the folder cannot be listed.
        """
        newest = max(self.steps(), default=step) if newest is None else newest
        if newest > step:
            raise CheckpointError(
                f"The step to save must be at least {newest}, the newest checkpoint in {self.path}, got {step}. Call "
                "load() before the first save to resume from that checkpoint, set load_step to go back to an earlier "
                "one (newer ones are set aside), or save to another folder."
            )

    def begin_save(self, step: int) -> Path:
        """Create and return the temporary folder of a save of `step`; set aside anything but a folder named `step-N`.

        Raises:
            CheckpointError: if the folder already has a checkpoint of that step.
            OSError: if the disk fails.
        """
        final = self.step_path(step)
        if final.is_dir():
            raise CheckpointError(
                f"The step to save must be new, got step {step}, which exists at {final}. Move it away, or save to "
                "another folder."
            )
        if os.path.lexists(final):
            aside = _set_aside(final)
            logger.warning("Renamed %s, which is not a folder, to %s.", final, aside)
        temporary = self.path / f"step-{step}.saving-{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True)
        _saving.add(temporary)
        return temporary

    def publish(self, temporary: Path, step: int) -> None:
        """Rename a folder from `begin_save` to `step-N`, after checking that this process still holds the lock.

        Raises:
            CheckpointError: if another process holds the lock now.
            OSError: if the disk fails.
        """
        if self._lock is not None:
            self._lock.check()
        rename_flushed(temporary, self.step_path(step))
        self._unflushed = step
        self.flush_published(step)

    def flush_published(self, step: int) -> bool:
        """Flush the new name of `step` if `publish` failed to; return whether the checkpoint is published.

        Raises:
            OSError: if the disk fails.
        """
        if self._unflushed != step or not self.step_path(step).is_dir():
            return False
        flush_folder(self.path)
        self._unflushed = None
        return True

    def end_save(self, temporary: Path) -> None:
        """Finish a save: after a failure, delete what remains of the temporary folder."""
        _remove(temporary)
        _saving.discard(temporary)

    def delete_old(self, keep: int, saved: int) -> None:
        """Delete all but the newest `keep` checkpoints up to step `saved`; log failures.

        Folders without a manifest are neither counted nor deleted.
        """
        try:
            published = [step for step in self.steps() if step <= saved and (self.step_path(step) / MANIFEST).is_file()]
            for step in published[:-keep]:
                renamed = self.path / f"step-{step}.deleting-{uuid.uuid4().hex[:8]}"
                os.rename(self.step_path(step), renamed)  # an interrupted deletion leaves no incomplete step-N
                _remove(renamed)
        except (OSError, CheckpointError) as error:
            logger.warning("Could not delete old checkpoints in %s: %s.", self.path, error)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename all checkpoints and exports newer than `step`, which frees their names; return the new paths.

        Raises:
            CheckpointError: if one cannot be renamed.
        """
        newer = [self.step_path(later) for later in self.steps() if later > step]
        try:
            newer += [self.hf_path(later) for later in self._numbers(_EXPORT) if later > step]
            return [_set_aside(path) for path in newer]
        except OSError as error:
            raise CheckpointError(
                f"Checkpoints newer than step {step} must be renamed to resume from that step, got {error}. Restore "
                f"the permissions of {self.path}, or move the newer checkpoints away."
            ) from error

    def open(self) -> None:
        """Create the folder, lock it against other processes and delete leftovers of interrupted saves and deletions.

        Raises:
            CheckpointError: if the folder cannot be created, another process has it open, or the disk fails.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"Cannot create the checkpoint folder {self.path}: {error}. Choose a writable location, or move away "
                "the file of that name."
            ) from error
        self._lock = ProcessLock(self.path / LOCK)
        if self._lock.is_held:
            for path in retry_io(lambda: list(self.path.iterdir()), self.path):
                if _LEFTOVER.fullmatch(path.name) and path not in _saving:
                    logger.info("Deleting %s, a leftover of an interrupted save.", path)
                    _remove(path)

    def check_writable(self) -> None:
        """Check that this rank can create and delete a file in the folder.

        Raises:
            CheckpointError: if it cannot.
        """
        path = self.path / f".probe-{uuid.uuid4().hex}"
        try:
            path.write_bytes(b"\0")
            path.unlink()
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint folder must be writable on every rank, got {error}. Choose a folder on storage that "
                f"all ranks share, or restore the permissions of {self.path}."
            ) from error

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()

    def _numbers(self, name: re.Pattern[str]) -> list[int]:
        return sorted(int(match[1]) for match in _folders(self.path, name))


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
    except (OSError, RuntimeError) as error:  # RuntimeError: a symlink loop, up to Python 3.12
        raise CheckpointError(
            f"Cannot resolve the path of the checkpoint folder {folder}: {error}. Choose another folder."
        ) from error


def _set_aside(path: Path) -> Path:
    target = path.with_name(f"{path.name}.set-aside-{uuid.uuid4().hex[:8]}")
    os.rename(path, target)
    return target


def _remove(path: Path) -> None:
    """Delete a folder, a file or a symlink (never its target); log failures."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("Could not delete %s: %s.", path, error)
