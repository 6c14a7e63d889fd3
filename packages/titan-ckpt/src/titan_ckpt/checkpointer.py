"""The checkpointer of a run: saves named parts, resumes from the newest valid checkpoint, keeps the latest k."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from titan_config import Configurable, to_dict

from titan_ckpt.checkpoint_folder import CheckpointFolder
from titan_ckpt.collective_guard import CollectiveGuard
from titan_ckpt.format.chunks import Chunk, is_dtensor, is_writer, local_chunks
from titan_ckpt.format.safetensors_writer import write_tensors
from titan_ckpt.format.state_tree import Part, split_parts
from titan_ckpt.format.step_names import require_step, to_step
from titan_ckpt.format.verify import check_whole
from titan_ckpt.hugging_face.adapter import adapter_of
from titan_ckpt.hugging_face.base_folder import BASE_MODEL
from titan_ckpt.hugging_face.export import export_checkpoint
from titan_ckpt.hugging_face.metadata import export_metadata, token_ids_of_run
from titan_ckpt.load.initial_model import load_initial_model
from titan_ckpt.load.load import Skipped, find_newest_valid, find_requested, load_parts, load_step_was_applied
from titan_ckpt.paths import local_path
from titan_ckpt.rng_state import RandomState
from titan_ckpt.save.background_writer import BackgroundWriter
from titan_ckpt.save.save import Snapshot, save
from titan_ckpt.save.staging import Staging
from titan_ckpt.save.write_plan import Planner
from titan_ckpt.torch_parts import to_parts

logger = logging.getLogger(__name__)


class Checkpointer(Configurable):
    """Saves and loads the named parts of a run; every method is a collective of all ranks.

    Args:
        settings: the checkpointer's config.
        dump_folder: output folder of the run; checkpoints go to `dump_folder / settings.folder`.
        config: the config of the whole run. It is saved with each checkpoint, and its `model.hf_adapter()` translates
            weights for Hugging Face. None saves no config.

    `skipped` lists the broken checkpoints that the last `load` found newer than the one it loaded.
    """

    class Config(Configurable.Config):
        folder: str = "checkpoint"
        """Checkpoint folder, relative to the dump folder."""
        interval: int = 500
        """Number of steps between saves."""
        keep_latest_k: int | None = 10
        """Number of checkpoints to keep; older ones are deleted after a newer one is published. None keeps all."""
        async_mode: Literal["disabled", "async"] = "async"
        """"async": a thread writes a copy while training continues. "disabled": training waits for the disk."""
        load_step: int | None = None
        """Step to go back to, once; newer checkpoints are set aside. None loads the newest valid checkpoint.

        A run that is restarted with the same command resumes from the newest checkpoint that it has saved since. To go
        back to `load_step` again, move the newer checkpoints away."""
        max_failed_saves: int = 3
        """Number of consecutive saves that may fail before an asynchronous run ends; the last save must succeed."""
        initial_load_path: Path | None = None
        """Checkpoint that initializes the model of a run without checkpoints of its own."""
        initial_load_in_hf: bool = False
        """Read `initial_load_path` as a folder of Hugging Face weights."""
        last_save_in_hf: bool = False
        """Export the weights in Hugging Face format at the last save, to `step-N-hf` beside the checkpoint.

        The tokenizer and the generation settings come from the Hugging Face folder that initialized the run."""
        export_when_stopped: bool = False
        """Make the export of `last_save_in_hf` also when the run is stopped before its last step."""
        export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
        """Dtype of the weights in a Hugging Face export."""

        def validate(self) -> None:
            if self.interval < 1:
                raise ValueError(
                    f"interval must be at least 1, got {self.interval}. To save nothing, configure no checkpointer."
                )
            if self.keep_latest_k is not None and self.keep_latest_k < 1:
                raise ValueError(
                    f"keep_latest_k must be at least 1, got {self.keep_latest_k}. Set it to None to keep all "
                    "checkpoints."
                )
            if self.max_failed_saves < 1:
                raise ValueError(f"max_failed_saves must be at least 1, got {self.max_failed_saves}.")
            if self.load_step is not None and self.load_step < 0:
                raise ValueError(f"load_step must be at least 0, got {self.load_step}.")
            local_path(self.folder, "folder")
            if self.initial_load_path is not None:
                local_path(self.initial_load_path, "initial_load_path")
            if self.initial_load_in_hf and self.initial_load_path is None:
                raise ValueError(
                    "initial_load_in_hf must be set together with initial_load_path, got only initial_load_in_hf."
                )

        def read(self, dump_folder: Path, parts: Mapping[str, Part]) -> int | None:
            """Load `parts` from the newest valid checkpoint, or from that of `load_step`; return its step.

            Returns None if there is no checkpoint. For inspecting a run, even one that is still training: nothing in
            its folder changes, only this process takes part, and the checkpoint may contain more parts. Raises
            CheckpointError as `Checkpointer.load` does.
            """
            checkpoint_folder = CheckpointFolder(local_path(dump_folder, "dump_folder") / self.folder)
            guard = CollectiveGuard(alone=True)
            find = find_newest_valid if self.load_step is None else partial(find_requested, load_step=self.load_step)
            step, _ = find(checkpoint_folder, guard)
            if step is not None:
                load_parts(checkpoint_folder.step_path(step), parts, guard, run_config=None, exactly=False)
            return step

    def __init__(self, settings: Config, /, dump_folder: Path, config: Any = None) -> None:
        self.config = settings
        self._guard = CollectiveGuard()
        dump_folder = self._guard.run_on_all(lambda: local_path(dump_folder, "dump_folder"))
        self.checkpoint_folder = self._guard.run_on_all(lambda: CheckpointFolder(dump_folder / settings.folder))
        self.skipped: list[Skipped] = []
        self._run_config = config
        self._run_data = None if config is None else to_dict(config)
        self._planner = Planner(self._guard)
        self._staging = Staging()
        self._writer = BackgroundWriter(self._guard, settings.async_mode == "async", settings.max_failed_saves)
        self._newest: int | None = None
        self._load_step: int | None = None
        self._has_checked_folder = False
        self._guard.run_on_first(self.checkpoint_folder.open)
        self._guard.run_on_all(self.checkpoint_folder.check_writable)

    def save(self, step: int, parts: Mapping[str, Part], *, last: bool | Literal["stopped"] = False) -> bool:
        """Save `parts` as the checkpoint of `step` if the interval is due or `last` is set; return whether it was.

        `last` is "stopped" if the run ends before its last step: the Hugging Face export is then skipped unless
        `export_when_stopped` is set. The random number generators of all ranks are saved too, as the part "random".

        In mode "async" this returns as soon as the parts are copied. A step that this object has already saved or
        loaded is not saved again. If the disk fails, the background thread logs the error and tries once more; the run
        continues to the next save, up to `max_failed_saves` consecutive failures.

        Raises:
            CheckpointError: if the parts cannot be saved; if the folder has a newer checkpoint (checked at the first
                call); if the disk failed in this save (in the last save, or in mode "disabled") or failed too often.
        """
        number = to_step(step)
        is_due = last or number is None or number % self.config.interval == 0
        if is_due:
            self._writer.finish_previous(is_last=bool(last))  # its thread uses the same process group
            self._guard.run_on_all(lambda: require_step(step))
        step = require_step(step)
        if not self._has_checked_folder:
            self._guard.run_on_first(lambda: self.checkpoint_folder.check_newest(step))
            self._has_checked_folder = True
        elif is_due and self._newest is not None:  # without listing the folder: the disk may fail for a while
            self.checkpoint_folder.check_newest(step, self._newest)
        if not is_due:
            return False
        is_new = step != self._newest
        if is_new:
            snapshot = self._snapshot(step, parts)
            self._writer.submit(self._write, self._after_write, snapshot)
        if last or self.config.async_mode == "disabled":
            self.wait()
        if self.config.last_save_in_hf and (last is True or (last and self.config.export_when_stopped)):
            self._guard.run_on_first(lambda: self._export(step))
        return is_new

    def load(self, parts: Mapping[str, Part]) -> int | None:
        """Load the newest valid checkpoint, or that of `load_step`; return its step, or None if there is no checkpoint.

        Every file is verified before any weight changes. Broken checkpoints are skipped (see `skipped`). Checkpoints
        newer than the loaded one are renamed to `step-N.set-aside-*`, so that the run can continue from it. `load_step`
        acts once: a run that is restarted with it resumes from what it has saved since. If there is no checkpoint, the
        part "model" is loaded from `initial_load_path`, if set.

        Raises:
            CheckpointError: if the checkpoint of `load_step` is broken or absent, if all checkpoints are broken, if the
                checkpoint does not fit `parts` or has an unknown format, or if the disk fails.
        """
        self._writer.finish_previous()
        step, self.skipped = _find_step(self.config, self.checkpoint_folder, self._guard)
        self._load_step = self.config.load_step
        if step is None:
            path, in_hf = self.config.initial_load_path, self.config.initial_load_in_hf
            find_adapter = partial(adapter_of, self._run_config)
            load_initial_model(path, in_hf, parts, self.checkpoint_folder, self._guard, find_adapter, self._run_data)
            return None
        load_parts(self.checkpoint_folder.step_path(step), _with_random_state(parts), self._guard, self._run_data)
        self._guard.run_on_first(lambda: self._set_aside_after(step))
        logger.info("Loaded %s.", self.checkpoint_folder.step_path(step))
        self._newest = step
        return step

    def wait(self) -> None:
        """Block until the save in progress is published.

        Raises:
            CheckpointError: if that save failed; raised once.
        """
        self._writer.wait()

    def close(self) -> None:
        """Wait for the save in progress, stop the background thread and release the lock on the folder.

        Raises:
            CheckpointError: if that save failed.
        """
        try:
            self.wait()
        finally:
            self._writer.close()
            self.checkpoint_folder.close()

    def _snapshot(self, step: int, parts: Mapping[str, Part]) -> Snapshot:
        chunks, replicated, values = self._guard.run_on_all(lambda: _collect_state(parts))
        plan = self._planner.plan(chunks, replicated)
        mine = {chunk.key: chunk.data for chunk in chunks if chunk.name in plan.mine}
        if self.config.async_mode == "disabled":
            return Snapshot(step, plan, partial(write_tensors, tensors=mine), values)
        self._guard.run_on_all(lambda: self._staging.copy(mine))
        return Snapshot(step, plan, self._staging.write, values)

    def _write(self, snapshot: Snapshot) -> None:
        save(snapshot, self.checkpoint_folder, self._guard, self._run_data, self._load_step)

    def _after_write(self, snapshot: Snapshot) -> None:
        self._newest = snapshot.step
        logger.info("Saved %s.", self.checkpoint_folder.step_path(snapshot.step))
        count = self.config.keep_latest_k
        if count is not None:
            self._guard.run_on_first(lambda: self.checkpoint_folder.delete_old(count, snapshot.step))

    def _export(self, step: int) -> None:
        folder = self.checkpoint_folder.hf_path(step)
        if not folder.exists():
            dtype = getattr(torch, self.config.export_dtype)
            copied = self.checkpoint_folder.path / BASE_MODEL
            original = self.config.initial_load_path if self.config.initial_load_in_hf else None
            base = copied if copied.is_dir() else original
            check_whole(self.checkpoint_folder.step_path(step))
            build_metadata = partial(
                export_metadata, base=base, tokenizer=None, run_ids=partial(token_ids_of_run, self._run_config)
            )
            export_checkpoint(
                self.checkpoint_folder.step_path(step), folder, dtype, adapter_of(self._run_config), build_metadata
            )
            logger.info("Exported %s.", folder)

    def _set_aside_after(self, step: int) -> None:
        for path in self.checkpoint_folder.set_aside_after(step):
            logger.warning("Set aside a checkpoint newer than step %s as %s.", step, path)


def _collect_state(parts: Mapping[str, Part]) -> tuple[list[Chunk], frozenset[str], Mapping[str, Any]]:
    """Return the chunks that this rank may write, the names of those that other ranks hold too, and its JSON values."""
    tensors, values, _ = split_parts(to_parts(_with_random_state(parts)))
    chunks = [chunk for name, chunk in local_chunks(tensors).items() if is_writer(name, tensors[name])]
    return chunks, frozenset(name for name, tensor in tensors.items() if not is_dtensor(tensor)), values


def _with_random_state(parts: Mapping[str, Part]) -> dict[str, Part]:
    return {**parts, "random": RandomState()}


def _find_step(
    config: Checkpointer.Config, checkpoint_folder: CheckpointFolder, guard: CollectiveGuard
) -> tuple[int | None, list[Skipped]]:
    """Return the step to load (None: no checkpoint), with verified files, and the broken checkpoints newer than it."""
    step = config.load_step
    if step is None:
        return find_newest_valid(checkpoint_folder, guard)
    if not guard.run_on_first(lambda: load_step_was_applied(checkpoint_folder, step)):
        return find_requested(checkpoint_folder, guard, step)
    if guard.is_first:
        logger.warning(
            "A run with load_step %d has already gone back to that step; resuming from the newest checkpoint saved "
            "since. To go back again, move the checkpoints newer than step %d out of %s.",
            *(step, step, checkpoint_folder.path),
        )
    return find_newest_valid(checkpoint_folder, guard, min_step=step)
