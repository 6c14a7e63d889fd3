"""The checkpointer of a run: saves named parts, finds the newest whole checkpoint, keeps the latest k."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from titan_config import Configurable, to_dict

from titan_ckpt.adapter import adapter_of
from titan_ckpt.chunks import Chunk, is_dtensor, is_writer, local_chunks
from titan_ckpt.errors import BrokenCheckpoint, CheckpointError
from titan_ckpt.hf_export import export_hf
from titan_ckpt.hf_files import tokenizer_in
from titan_ckpt.hf_import import load_hf
from titan_ckpt.loading import PassedOver, damage_of, find_newest_whole, load_parts
from titan_ckpt.plan import Planner
from titan_ckpt.random_state import RandomState
from titan_ckpt.ranks import Ranks
from titan_ckpt.saving import Snapshot, save
from titan_ckpt.shelf import Shelf
from titan_ckpt.staging import Staging
from titan_ckpt.state import Part, split_parts
from titan_ckpt.tensor_file import write_tensors

logger = logging.getLogger(__name__)


class Checkpointer(Configurable):
    """Saves and loads the parts of a run; every method is a collective of all ranks.

    Args:
        own: what to do.
        dump_folder: where the run writes; the checkpoints are in `dump_folder / own.folder`.
        config: the run's whole config: it is saved with each checkpoint, and its `model.hf_adapter()` translates
            weights. None saves none.

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
        initial_load_path: Path | None = None
        """Checkpoint whose model a run begins with that has no checkpoint of its own."""
        initial_load_in_hf: bool = False
        """Whether `initial_load_path` is a folder of Hugging Face weights."""
        last_save_in_hf: bool = False
        """Whether the last save also writes the weights for Hugging Face, as `step-N-hf` beside it, with the tokenizer
        of the Hugging Face folder that the run began with."""
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
            shelf, ranks = Shelf(Path(dump_folder) / self.folder), Ranks(alone=True)
            step, _ = _find_step(self, shelf, ranks)
            if step is not None:
                load_parts(shelf.path(step), parts, ranks, run_config=None, exactly=False)
            return step

    def __init__(self, own: Config, /, dump_folder: Path, config: Any = None) -> None:
        self.config = own
        self.shelf = Shelf(Path(dump_folder) / own.folder)
        self.passed_over: list[PassedOver] = []
        self._run_config = config
        self._run_data = None if config is None else to_dict(config)
        self._ranks = Ranks()
        self._planner = Planner(self._ranks)
        self._staging = Staging()
        initializer = _yield_to_training if own.async_mode == "async" else None
        self._writer = ThreadPoolExecutor(1, "titan-ckpt", initializer)
        self._pending: Future[None] | None = None
        self._newest: int | None = None
        self._ranks.together(lambda: self.shelf.open() if self._ranks.is_first else None)

    def save(self, step: int, parts: Mapping[str, Part], *, last: bool = False) -> bool:
        """Save the parts as the checkpoint of `step` if the interval asks for it, or it is the `last`; return whether.

        Every rank's random generators are saved with them, as the part "random".
        In the mode "async" this returns once the parts are copied. A step that this object saved or loaded is there
        already, and is not saved again.

        Raises:
            CheckpointError: when this save fails, or (in the mode "async") the one before it did.
        """
        if not last and step % self.config.interval:
            return False
        self.wait()
        is_new = step != self._newest
        if is_new:
            snapshot = self._take(step, parts)
            self._pending = self._writer.submit(self._write, snapshot)
        if last or self.config.async_mode == "disabled":
            self.wait()
        if last and self.config.last_save_in_hf:
            self._ranks.together(lambda: self._export(step) if self._ranks.is_first else None)
        return is_new

    def load(self, parts: Mapping[str, Part]) -> int | None:
        """Load the newest whole checkpoint, or that of `load_step`; return its step (None: there is none).

        Every file is checked before a weight is touched. Broken checkpoints are passed over (see `passed_over`), and
        what is newer than the loaded one is renamed to `step-N.set-aside-*`, so that the run can go on from there.
        Where there is none, the part "model" is filled from `initial_load_path`, if that is set.

        Raises:
            CheckpointError: when the one asked for is broken or absent, when all are broken, or when it does not fit
                the parts.
        """
        self.wait()
        step, self.passed_over = _find_step(self.config, self.shelf, self._ranks)
        if step is None:
            self._load_initial(parts)
            return None
        load_parts(self.shelf.path(step), _with_random_state(parts), self._ranks, self._run_data)
        self._ranks.together(lambda: self._set_aside_after(step) if self._ranks.is_first else None)
        logger.info("Loaded %s.", self.shelf.path(step))
        self._newest = step
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
        """Wait for the save that is under way, end the thread, and let other processes save to the folder."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self.shelf.close()

    def _take(self, step: int, parts: Mapping[str, Part]) -> Snapshot:
        chunks, replicated, values = self._ranks.together(lambda: _hold(parts))
        plan = self._planner.plan(chunks, replicated)
        mine = {chunk.key: chunk.data for chunk in chunks if chunk.name in plan.mine}
        if self.config.async_mode == "disabled":
            return Snapshot(step, plan, partial(write_tensors, tensors=mine), values)
        self._ranks.together(lambda: self._staging.copy(mine))
        return Snapshot(step, plan, self._staging.write, values)

    def _write(self, snapshot: Snapshot) -> None:
        save(snapshot, self.shelf, self._ranks, self._run_data)
        self._newest = snapshot.step
        logger.info("Saved %s.", self.shelf.path(snapshot.step))
        count = self.config.keep_latest_k
        if count is not None:
            self._ranks.together(lambda: self.shelf.keep(count) if self._ranks.is_first else None)

    def _load_initial(self, parts: Mapping[str, Part]) -> None:
        path = self.config.initial_load_path
        if path is None:
            return
        if "model" not in parts:
            raise CheckpointError(
                f'Got initial_load_path {path} and the parts {list(parts)}. It fills the part "model". Name it so.'
            )
        model = {"model": parts["model"]}
        if self.config.initial_load_in_hf:
            tensors, _, states = self._ranks.together(lambda: split_parts(model))
            weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
            elsewhere = set().union(*self._ranks.gather(set(weights))) - weights.keys()
            self._ranks.together(lambda: load_hf(path, weights, adapter_of(self._run_config), elsewhere))
            self._ranks.together(lambda: parts["model"].load_state_dict(dict(states["model"])))
        else:
            damage = damage_of(path, self._ranks)
            if damage:
                raise BrokenCheckpoint(
                    f"Got initial_load_path {path}, which is not a whole checkpoint: {damage}. It must be a folder "
                    f"step-N (of Hugging Face weights with initial_load_in_hf). Give another."
                )
            load_parts(path, model, self._ranks, self._run_data, exactly=False)
        logger.info("Began with the model of %s.", path)

    def _export(self, step: int) -> None:
        folder = self.shelf.hf_path(step)
        if not folder.exists():
            dtype = getattr(torch, self.config.export_dtype)
            begun_with = self.config.initial_load_path if self.config.initial_load_in_hf else None
            tokenizer = begun_with if begun_with is not None and tokenizer_in(begun_with) else None
            export_hf(self.shelf.path(step), folder, dtype, adapter_of(self._run_config), tokenizer=tokenizer)
            logger.info("Exported %s.", folder)

    def _set_aside_after(self, step: int) -> None:
        for path in self.shelf.set_aside_after(step):
            logger.warning("Renamed a checkpoint newer than step %s to %s.", step, path)


def _yield_to_training() -> None:
    """Let this thread have what the threads that compute leave; Linux alone has priorities for threads."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + 10)


def _hold(parts: Mapping[str, Part]) -> tuple[list[Chunk], frozenset[str], Mapping[str, Any]]:
    """What this rank may have to write: its chunks, which of them other ranks have too, and its values."""
    tensors, values, _ = split_parts(_with_random_state(parts))
    chunks = [chunk for name, chunk in local_chunks(tensors).items() if is_writer(name, tensors[name])]
    return chunks, frozenset(name for name, tensor in tensors.items() if not is_dtensor(tensor)), values


def _with_random_state(parts: Mapping[str, Part]) -> dict[str, Part]:
    return {**parts, "random": RandomState()}


def _find_step(config: Checkpointer.Config, shelf: Shelf, ranks: Ranks) -> tuple[int | None, list[PassedOver]]:
    """The step to load (None: there is none), whose files are whole, and the broken ones that are newer."""
    step = config.load_step
    if step is None:
        return find_newest_whole(shelf, ranks)
    damage = damage_of(shelf.path(step), ranks)
    if damage:
        raise BrokenCheckpoint(
            f"Got load_step {step}, and {shelf.path(step)} is not whole: {damage}. A checkpoint is loaded only when "
            f"all its files are. Choose another of {shelf.steps()}, or leave load_step out for the newest whole one."
        )
    return step, []
