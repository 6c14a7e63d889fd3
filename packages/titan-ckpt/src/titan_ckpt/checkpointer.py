"""The checkpointer of a run: saves named parts, finds the newest whole checkpoint, keeps the latest k."""

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
from titan_ckpt.hugging_face.metadata import companions, ids_of_run
from titan_ckpt.load.initial_model import begin_with
from titan_ckpt.load.load import Skipped, find_asked, find_newest_whole, load_parts, was_followed
from titan_ckpt.paths import local_path
from titan_ckpt.rng_state import RandomState
from titan_ckpt.save.background_writer import Writer
from titan_ckpt.save.save import Snapshot, save
from titan_ckpt.save.staging import Staging
from titan_ckpt.save.write_plan import Planner
from titan_ckpt.torch_parts import to_parts

logger = logging.getLogger(__name__)


class Checkpointer(Configurable):
    """Saves and loads the parts of a run; every method is a collective of all ranks.

    Args:
        own: what to do.
        dump_folder: where the run writes; the checkpoints are in `dump_folder / own.folder`.
        config: the run's whole config: it is saved with each checkpoint, and its `model.hf_adapter()` translates
            weights. None saves none.

    `skipped` holds the broken checkpoints that the last `load` found newer than the one it took.
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
        """The step to go back to, once; newer checkpoints are set aside. None takes the newest whole one.

        A run that is started again by the same command goes on from the newest checkpoint that it saved since. To go
        back to that step again, move the newer ones away."""
        max_failed_saves: int = 3
        """How many saves in a row the disk may fail before an asynchronous run ends; the last save must succeed."""
        initial_load_path: Path | None = None
        """Checkpoint whose model a run begins with that has no checkpoint of its own."""
        initial_load_in_hf: bool = False
        """Whether `initial_load_path` is a folder of Hugging Face weights."""
        last_save_in_hf: bool = False
        """Whether the last save also writes the weights for Hugging Face, as `step-N-hf` beside it, with the tokenizer
        and the generation settings of the Hugging Face folder that the run began with."""
        export_when_stopped: bool = False
        """Whether last_save_in_hf also exports where the run is asked to stop before its last step."""
        export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
        """Type of the weights written for Hugging Face."""

        def validate(self) -> None:
            if self.interval < 1:
                raise ValueError(
                    f"Got interval {self.interval}. The steps between two saves must be 1 or more. To save nothing, "
                    f"leave the checkpointer out."
                )
            if self.keep_latest_k is not None and self.keep_latest_k < 1:
                raise ValueError(
                    f"Got keep_latest_k {self.keep_latest_k}. At least 1 checkpoint must stay. Set it to None to keep "
                    f"all."
                )
            if self.max_failed_saves < 1:
                raise ValueError(f"max_failed_saves must be 1 or more, got {self.max_failed_saves}.")
            if self.load_step is not None and self.load_step < 0:
                raise ValueError(f"load_step must be 0 or more, got {self.load_step}.")
            local_path(self.folder, "folder")
            if self.initial_load_path is not None:
                local_path(self.initial_load_path, "initial_load_path")
            if self.initial_load_in_hf and self.initial_load_path is None:
                raise ValueError(
                    "Got initial_load_in_hf without initial_load_path. It says what kind of folder that is. Set both "
                    "or none."
                )

        def read(self, dump_folder: Path, parts: Mapping[str, Part]) -> int | None:
            """Fill parts from the newest whole checkpoint, or that of `load_step`; its step (None: there is none).

            For looking at a run, even one that goes on: nothing in its folder changes, this process is alone, and the
            checkpoint may have more parts. Raises CheckpointError as `Checkpointer.load` does.
            """
            checkpoint_folder, ranks = (
                CheckpointFolder(local_path(dump_folder, "dump_folder") / self.folder),
                CollectiveGuard(alone=True),
            )
            find = find_newest_whole if self.load_step is None else partial(find_asked, load_step=self.load_step)
            step, _ = find(checkpoint_folder, ranks)
            if step is not None:
                load_parts(checkpoint_folder.path(step), parts, ranks, run_config=None, exactly=False)
            return step

    def __init__(self, own: Config, /, dump_folder: Path, config: Any = None) -> None:
        self.config = own
        self._ranks = CollectiveGuard()
        dump_folder = self._ranks.together(lambda: local_path(dump_folder, "dump_folder"))
        self.checkpoint_folder = self._ranks.together(lambda: CheckpointFolder(dump_folder / own.folder))
        self.skipped: list[Skipped] = []
        self._run_config = config
        self._run_data = None if config is None else to_dict(config)
        self._planner = Planner(self._ranks)
        self._staging = Staging()
        self._writer = Writer(self._ranks, own.async_mode == "async", own.max_failed_saves)
        self._newest: int | None = None
        self._load_step: int | None = None
        self._has_begun = False
        self._ranks.first(self.checkpoint_folder.open)
        self._ranks.together(self.checkpoint_folder.probe)

    def save(self, step: int, parts: Mapping[str, Part], *, last: bool | Literal["stopped"] = False) -> bool:
        """Save the parts as the checkpoint of `step` if the interval asks for it, or it is the `last`; return whether.

        `last` is "stopped" where a run ends before its last step: the weights are then not exported for Hugging Face,
        unless `export_when_stopped`.

        Every rank's random generators are saved with them, as the part "random".
        In the mode "async" this returns once the parts are copied. A step that this object saved or loaded is there
        already, and is not saved again. A disk that fails is logged by the thread that writes, which tries once more;
        the run goes on to the next save, up to `max_failed_saves` in a row.

        Raises:
            CheckpointError: when the parts cannot be saved; when a checkpoint in the folder is newer, which is told at
                the first call; when the disk failed in this save (the last, or in the mode "disabled") or too often.
        """
        number = to_step(step)
        is_due = last or number is None or number % self.config.interval == 0
        if is_due:
            self._writer.settle(is_last=bool(last))  # its thread talks over the same group
            self._ranks.together(lambda: require_step(step))
        step = require_step(step)
        if not self._has_begun:
            self._ranks.first(lambda: self.checkpoint_folder.check_newest(step))
            self._has_begun = True
        elif is_due and self._newest is not None:  # the folder is not listed again: a disk may fail for a while
            self.checkpoint_folder.check_newest(step, self._newest)
        if not is_due:
            return False
        is_new = step != self._newest
        if is_new:
            snapshot = self._take(step, parts)
            self._writer.submit(self._write, self._after_write, snapshot)
        if last or self.config.async_mode == "disabled":
            self.wait()
        if self.config.last_save_in_hf and (last is True or (last and self.config.export_when_stopped)):
            self._ranks.first(lambda: self._export(step))
        return is_new

    def load(self, parts: Mapping[str, Part]) -> int | None:
        """Load the newest whole checkpoint, or that of `load_step`; return its step (None: there is none).

        Every file is checked before a weight is touched. Broken checkpoints are passed over (see `skipped`), and
        what is newer than the loaded one is renamed to `step-N.set-aside-*`, so that the run can go on from there.
        `load_step` acts once: a run that is started again with it goes on from what it saved since.
        Where there is none, the part "model" is filled from `initial_load_path`, if that is set.

        Raises:
            CheckpointError: when the one asked for is broken or absent, when all are broken, when it does not fit
                the parts, is of a format that this version does not read, or the disk fails.
        """
        self._writer.settle()
        step, self.skipped = _find_step(self.config, self.checkpoint_folder, self._ranks)
        self._load_step = self.config.load_step
        if step is None:
            path, in_hf = self.config.initial_load_path, self.config.initial_load_in_hf
            find_adapter = partial(adapter_of, self._run_config)
            begin_with(path, in_hf, parts, self.checkpoint_folder, self._ranks, find_adapter, self._run_data)
            return None
        load_parts(self.checkpoint_folder.path(step), _with_random_state(parts), self._ranks, self._run_data)
        self._ranks.first(lambda: self._set_aside_after(step))
        logger.info("Loaded %s.", self.checkpoint_folder.path(step))
        self._newest = step
        return step

    def wait(self) -> None:
        """Block until the save that is under way is published.

        Raises:
            CheckpointError: when it failed; it is said once.
        """
        self._writer.wait()

    def close(self) -> None:
        """Wait for the save that is under way, end the thread, and let other processes save to the folder.

        Raises:
            CheckpointError: when that save failed.
        """
        try:
            self.wait()
        finally:
            self._writer.close()
            self.checkpoint_folder.close()

    def _take(self, step: int, parts: Mapping[str, Part]) -> Snapshot:
        chunks, replicated, values = self._ranks.together(lambda: _hold(parts))
        plan = self._planner.plan(chunks, replicated)
        mine = {chunk.key: chunk.data for chunk in chunks if chunk.name in plan.mine}
        if self.config.async_mode == "disabled":
            return Snapshot(step, plan, partial(write_tensors, tensors=mine), values)
        self._ranks.together(lambda: self._staging.copy(mine))
        return Snapshot(step, plan, self._staging.write, values)

    def _write(self, snapshot: Snapshot) -> None:
        save(snapshot, self.checkpoint_folder, self._ranks, self._run_data, self._load_step)

    def _after_write(self, snapshot: Snapshot) -> None:
        self._newest = snapshot.step
        logger.info("Saved %s.", self.checkpoint_folder.path(snapshot.step))
        count = self.config.keep_latest_k
        if count is not None:
            self._ranks.first(lambda: self.checkpoint_folder.keep(count, snapshot.step))

    def _export(self, step: int) -> None:
        folder = self.checkpoint_folder.hf_path(step)
        if not folder.exists():
            dtype = getattr(torch, self.config.export_dtype)
            kept = self.checkpoint_folder.folder / BASE_MODEL
            begun_with = self.config.initial_load_path if self.config.initial_load_in_hf else None
            base = kept if kept.is_dir() else begun_with
            check_whole(self.checkpoint_folder.path(step))
            beside = partial(companions, base=base, tokenizer=None, run_ids=partial(ids_of_run, self._run_config))
            export_checkpoint(self.checkpoint_folder.path(step), folder, dtype, adapter_of(self._run_config), beside)
            logger.info("Exported %s.", folder)

    def _set_aside_after(self, step: int) -> None:
        for path in self.checkpoint_folder.set_aside_after(step):
            logger.warning("Renamed a checkpoint newer than step %s to %s.", step, path)


def _hold(parts: Mapping[str, Part]) -> tuple[list[Chunk], frozenset[str], Mapping[str, Any]]:
    """What this rank may have to write: its chunks, which of them other ranks have too, and its values."""
    tensors, values, _ = split_parts(to_parts(_with_random_state(parts)))
    chunks = [chunk for name, chunk in local_chunks(tensors).items() if is_writer(name, tensors[name])]
    return chunks, frozenset(name for name, tensor in tensors.items() if not is_dtensor(tensor)), values


def _with_random_state(parts: Mapping[str, Part]) -> dict[str, Part]:
    return {**parts, "random": RandomState()}


def _find_step(
    config: Checkpointer.Config, checkpoint_folder: CheckpointFolder, ranks: CollectiveGuard
) -> tuple[int | None, list[Skipped]]:
    """The step to load (None: there is none), whose files are whole, and the broken ones that are newer."""
    step = config.load_step
    if step is None:
        return find_newest_whole(checkpoint_folder, ranks)
    if not ranks.first(lambda: was_followed(checkpoint_folder, step)):
        return find_asked(checkpoint_folder, ranks, step)
    if ranks.is_first:
        logger.warning(
            "A run with load_step %d has gone back to that step: this one goes on from what it saved since. To go back "
            "again, move the checkpoints newer than step %d out of %s.",
            *(step, step, checkpoint_folder.folder),
        )
    return find_newest_whole(checkpoint_folder, ranks, least=step)
