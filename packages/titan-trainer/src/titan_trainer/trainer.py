"""The story of a training run, from top to bottom."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from titan_config import ConfigError, Configurable, save, to_dict
from titan_parallel import (
    ActivationCheckpoint,
    Compile,
    ParallelDims,
    ParallelModel,
    init_distributed,
    parallelize,
    set_collective_timeout,
    set_determinism,
)
from torch import Tensor, nn

from titan_trainer.device import peak_flops, peak_memory_gib
from titan_trainer.errors import NonFiniteError
from titan_trainer.garbage import CollectedGarbage
from titan_trainer.loss import CrossEntropy
from titan_trainer.metrics import Metrics
from titan_trainer.model_state import ModelState
from titan_trainer.notices import changes_since, rounded_parameters, steps_without_rate, warning_of_rounding
from titan_trainer.optimizer import AdamW, Optimizer
from titan_trainer.profiling import Profiler
from titan_trainer.protocols import Batch, Checkpointer, Converter, Loader, Loss, ModelConfig, State, Stateful
from titan_trainer.replica_group import SingleReplica
from titan_trainer.schedule import WarmupStableDecay
from titan_trainer.scheduled import ScheduledNumber
from titan_trainer.settings import Comm, Debug, Training
from titan_trainer.stop import StopRequest
from titan_trainer.validation import Validator

log = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """What a committed step gave: mean loss, gradient norm before clipping, learning rate, tokens of all replicas.

    `measured` is what parts of the model tell, such as the load of experts.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    num_replicas: int
    measured: dict[str, float]


class Trainer(Configurable):
    """Trains a model. Each method is a chapter that a subclass may rewrite; a subclass's Config may add fields.

    With --plan --world-size N it says what N ranks would hold, compute and send, and with --generate TEXT what the run
    in the dump folder continues a text with; neither trains.
    """

    class Config(Configurable.Config):
        model: Configurable.Config
        dataloader: Configurable.Config
        training: Training
        tokenizer: Configurable.Config | None = None
        loss: Configurable.Config = CrossEntropy.Config()
        optimizer: Optimizer.Config = AdamW.Config()
        lr_scheduler: WarmupStableDecay.Config = WarmupStableDecay.Config()
        scheduled: list[ScheduledNumber.Config] = []
        """Other numbers that change in the course of the run."""
        parallelism: ParallelDims.Config = ParallelDims.Config()
        activation_checkpoint: ActivationCheckpoint.Config | None = None
        compile: Compile.Config | None = None
        model_converters: list[Configurable.Config] = []
        checkpoint: Configurable.Config | None = None
        validator: Validator.Config | None = None
        metrics: Metrics.Config = Metrics.Config()
        profiling: Profiler.Config | None = None
        comm: Comm = Comm()
        debug: Debug = Debug()
        replica_group: Configurable.Config = SingleReplica.Config()
        dump_folder: Path = Path("outputs")
        """All that a run writes lies below it. Running again with the same folder goes on."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model_config: ModelConfig = config.model  # type: ignore[assignment]  # the recipe's promise
        self.step = 0
        self.stop_request = StopRequest()
        self.data_ended = False
        self.build_mesh()
        self.build_data()
        self.build_model()
        self.build_optimizer()
        self.build_checkpointer()

    # Building: mesh, data, model, optimizer, checkpointer

    def build_mesh(self) -> None:
        """Join the other ranks, arrange them in a mesh, and seed the random generators."""
        config = self.config
        self.device = init_distributed(timeout_s=config.comm.init_timeout_seconds)
        self.is_first_rank = dist.get_rank() == 0
        self.dims = config.parallelism.build(world_size=dist.get_world_size(), device_type=self.device.type)
        self.replica_group = config.replica_group.build()
        set_determinism(
            config.debug.seed,
            deterministic=config.debug.deterministic,
            warn_only=config.debug.deterministic_warn_only,
        )
        np.random.seed(config.debug.seed % 2**32)  # for data and losses that use numpy, which takes 32 bits

    def build_data(self) -> None:
        """Build the tokenizer and the loader."""
        config = self.config
        self.tokenizer = build_tokenizer(config)
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.model_config.vocab_size:
            raise ConfigError(
                f"Got a tokenizer of {self.tokenizer.vocab_size} tokens for a model of {self.model_config.vocab_size}. "
                "Every token id needs a row of the embedding. "
                f"Set --model.vocab_size to {self.tokenizer.vocab_size} or more, or take the model's own tokenizer."
            )
        config.training.num_batches(self.dims.dp_size)
        self.loader = self.build_loader(config.dataloader)

    def build_loader(self, config: Configurable.Config) -> Loader:
        """A loader of this run's batches: for training, and another for validation."""
        training = self.config.training
        return config.build(
            tokenizer=self.tokenizer,
            seq_len=training.seq_len,
            global_batch_size=training.global_batch_size,
            local_batch_size=training.local_batch_size,
            seed=self.config.debug.seed,
        )

    def build_model(self) -> None:
        """Build the model without memory, convert and parallelize it, then draw each rank's part of the weights."""
        config = self.config
        model, self.converters = model_on_meta(config)
        self.loss: Loss = config.loss.build()
        self.parallel: ParallelModel = parallelize(
            model,
            model.roles(),
            self.dims,
            activation_checkpoint=config.activation_checkpoint,
            compile=config.compile,
            mixed_precision=config.training.mixed_precision(),
        )
        self.parallel.to_empty(self.device)
        model.init_weights(seed=config.debug.seed)
        self.model: nn.Module = model
        self.parallel.set_gradient_hook(self.replica_group.reduce_)

    def build_optimizer(self) -> None:
        """Build the optimizer over the model's parameters, the schedule of its learning rate, and of other numbers."""
        config = self.config
        self.optimizer: Optimizer = config.optimizer.build(
            parameters=self.model.named_parameters(), nonlocal_parameters=self.parallel.nonlocal_parameters
        )
        self.schedule: WarmupStableDecay = config.lr_scheduler.build(training_steps=config.training.steps)
        numbers: list[ScheduledNumber] = [each.build() for each in config.scheduled]
        self.scheduled = [(number, number.owners(self)) for number in numbers]
        rounded = rounded_parameters(self.optimizer.parameters)
        if self.agree(bool(rounded)) and self.is_first_rank:
            log.warning(warning_of_rounding(rounded))

    def build_checkpointer(self) -> None:
        """Name the parts of a run's state, and build what saves them."""
        config = self.config
        self.parts: dict[str, Stateful] = {
            "model": ModelState(self.model),
            "optimizer": self.optimizer,
            "dataloader": self.loader,
            "trainer": self,
        }
        self.checkpointer: Checkpointer | None = None
        if config.checkpoint is not None:
            self.checkpointer = config.checkpoint.build(dump_folder=config.dump_folder, config=config)

    # The run

    def train(self) -> None:
        """Go on from the newest checkpoint to `training.steps`, or until asked to stop; save the last step."""
        self.validator = self.build_validator()
        with self.stop_request, ExitStack() as stack:
            stack.callback(self.replica_group.close)
            self.resume()
            idle = steps_without_rate(self.schedule, self.step, self.config.training.steps)
            if idle and self.config.optimizer.lr and self.is_first_rank:
                log.warning(idle)
            identity = self.replica_identity()
            self.replica_group.register_state(self.healing_state, self.heal, step=self.step, identity=identity)
            self.metrics = stack.enter_context(closing(self.build_metrics()))
            observers = self.build_observers()
            for observer in observers:
                stack.enter_context(observer)
            while self.has_next_step() and not self.is_stopped():
                result = self.train_step()
                if result is not None:
                    self.after_step(result)
                    for observer in observers:
                        observer.step_ended(self.step)
            self.finish()

    def has_next_step(self) -> bool:
        """Return whether steps and data are left."""
        return self.step < self.config.training.steps and not self.data_ended

    def train_step(self) -> StepResult | None:
        """One step of the whole group: draw, forward and backward, clip, commit, update.

        Returns None, with weights and data as before, if the data has ended or the replica group did not get through.
        """
        replica, num_replicas = self.replica_group.begin_step()
        for number, owners in self.scheduled:
            number.apply(owners, self.step)
        ranks_each = self.dims.dp_size
        batches = self.loader.next_batches(replica * ranks_each + self.dims.dp_rank, num_replicas * ranks_each)
        if not batches:
            log.warning("The data ended after step %d.", self.step)
            self.data_ended = True
            return None
        count, tokens, cursor_delta = self.sum_over_data_ranks(batches)

        loss_sum = self.parallel.forward_backward(batches, self.loss, denominator=count)
        self.replica_group.reduce_(loss_sum)
        loss = float(loss_sum) / count
        grad_norm = float(self.parallel.clip_grad_norm_(self.config.training.max_norm))

        if not self.replica_group.commit():
            self.loader.rollback()
            self.optimizer.zero_grad()
            log.warning("Step %d was not committed; its samples are drawn again.", self.step + 1)
            return None
        self.require_finite(loss, grad_norm, batches)
        lr_factor = self.schedule.factor(self.step)
        self.optimizer.step(lr_factor)
        measured = self.parallel.after_step()
        for converter in self.converters:
            converter.after_step(self.model)
        self.loader.commit(cursor_delta)
        self.step += 1
        return StepResult(loss, grad_norm, self.config.optimizer.lr * lr_factor, tokens, num_replicas, measured)

    def sum_over_data_ranks(self, batches: Sequence[Batch]) -> tuple[int, int, Tensor]:
        """What the group is about to compute on: valid targets (at least 1), tokens, how far each stream moves."""
        count = int(sum(self.loss.count(batch.targets) for batch in batches))
        cursor_delta = self.loader.cursor_delta()
        totals = torch.cat([torch.tensor([count, sum(map(num_tokens, batches))]), cursor_delta.flatten()]).to(
            self.device
        )
        if self.dims.dp_size > 1:
            dist.all_reduce(totals, group=self.dims.data_group)
        self.replica_group.reduce_(totals)
        totals = totals.cpu()
        return max(int(totals[0]), 1), int(totals[1]), totals[2:].view_as(cursor_delta)

    def require_finite(self, loss: float, grad_norm: float, batches: Sequence[Batch]) -> None:
        """Raise NonFiniteError, on every rank alike, unless loss and gradient norm are finite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        names = [name for name, p in self.model.named_parameters() if p.grad is not None and not is_finite(p.grad)]
        samples = list(dict.fromkeys(sample for batch in batches for row in batch.sample_ids for sample in row))
        error = NonFiniteError(
            f"Got loss {loss} and gradient norm {grad_norm} in step {self.step + 1}, non-finite gradients in "
            f"{len(names)} parameters{f' ({names[0]} first)' if names else ''}. Both must be finite; no weight was "
            f"touched. Look at the samples in each rank's report ({len(samples)} samples here, "
            f"{', '.join(map(str, samples[:8]))} first), or go on from the last checkpoint with a lower --optimizer.lr."
        )
        error.add_note(f"This rank's samples: {samples}")
        raise error

    def after_step(self, result: StepResult) -> None:
        """Tell, validate and save what is due."""
        config, last = self.config, self.step == self.config.training.steps
        self.metrics.stop_clock()
        validation_loss = None
        if self.step == self.first_step + 1:
            set_collective_timeout(self.dims, config.comm.train_timeout_seconds)
        if self.validator is not None and self.validator.is_due(self.step, last):
            set_collective_timeout(self.dims, config.comm.init_timeout_seconds)  # it may compile, and open its data
            validation_loss = self.validator.validate()
            set_collective_timeout(self.dims, config.comm.train_timeout_seconds)
        self.metrics.record_step(
            self.step,
            memory_gib=peak_memory_gib(self.device),
            validation_loss=validation_loss,
            **result._asdict(),
        )
        if self.checkpointer is not None:
            self.checkpointer.save(self.step, self.parts)

    def agree(self, condition: bool) -> bool:
        """Return whether `condition` holds on any rank of this replica."""
        if dist.get_world_size() == 1:
            return condition
        flag = torch.tensor(int(condition), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def is_stopped(self) -> bool:
        """Return whether any rank of this replica was asked to stop."""
        return self.agree(self.stop_request.received)

    def finish(self) -> None:
        """Save the last step, wait for what is being written, and say so if the run was asked to stop."""
        if self.checkpointer is not None:
            self.checkpointer.save(self.step, self.parts, last="stopped" if self.has_next_step() else True)
            self.checkpointer.close()
        if self.stop_request.received and self.has_next_step() and self.is_first_rank:
            saved = "saved nothing" if self.checkpointer is None else "saved it; the same command goes on from there"
            print(f"Stopped after step {self.step} of {self.config.training.steps}, as asked: {saved}.", flush=True)

    # State: what is resumed, and what heals a replica

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one, and say what changed in the config since."""
        config_file = self.config.dump_folder / "config.json"
        loaded_step = self.checkpointer.load(self.parts) if self.checkpointer is not None else None
        self.first_step = self.step
        if self.is_first_rank:
            if loaded_step is not None:
                print(f"going on after step {self.step} of {self.config.dump_folder}", flush=True)
                if not self.has_next_step():
                    print(f"no step is left: training.steps is {self.config.training.steps}", flush=True)
                if config_file.exists():
                    print(
                        changes_since(config_file, self.config, self.config.lr_scheduler.total_steps),
                        end="",
                        flush=True,
                    )
            try:
                self.config.dump_folder.mkdir(parents=True, exist_ok=True)
                save(self.config, config_file)
            except OSError as error:
                raise ConfigError(
                    f"Got dump_folder {self.config.dump_folder}, where nothing can be written ({error}). It is the "
                    "folder for all that the run leaves. Set --dump_folder to a folder that you may write to."
                ) from error

    def state_dict(self) -> State:
        """The trainer's own part of a checkpoint."""
        return {"step": self.step}

    def load_state_dict(self, state: State) -> None:
        """Take up the step of a checkpoint."""
        self.step = state["step"]

    def healing_state(self) -> State:
        """What a replica that joins needs."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def replica_identity(self) -> State:
        """Return the settings and the data that all replicas of a group share."""
        config = to_dict(self.config)
        names = ("model", "training", "loss", "optimizer", "lr_scheduler", "parallelism", "model_converters")
        data = self.loader.state_dict().get("identity")
        return {name: config[name] for name in names if name in config} | {"data": data}

    def heal(self, state: State) -> None:
        """Become a copy of the replica whose `healing_state` this is."""
        for name, part_state in state.items():
            self.parts[name].load_state_dict(part_state)
        self.first_step = self.step
        log.warning("Healed from a live replica: step %d is next.", self.step + 1)

    # Watching

    def build_metrics(self) -> Metrics:
        """What tells of the run; the first rank writes."""
        peak = peak_flops(self.device)
        seconds_per_token = None
        if peak is not None:
            flops_per_token = self.model_config.flops_per_token(self.config.training.seq_len).full
            seconds_per_token = flops_per_token / (peak * dist.get_world_size())
        return self.config.metrics.build(
            dump_folder=self.config.dump_folder,
            first_step=self.first_step,
            steps=self.config.training.steps,
            seconds_per_token_at_peak=seconds_per_token,
            is_first_rank=self.is_first_rank,
        )

    def build_observers(self) -> list[CollectedGarbage | Profiler]:
        """What is told of the end of each step: the garbage collector and the profiler."""
        observers: list[CollectedGarbage | Profiler] = [CollectedGarbage(self.config.training.gc_freq)]
        if self.config.profiling is not None:
            build = self.config.profiling.build
            observers.append(build(dump_folder=self.config.dump_folder, device=self.device, first_step=self.step))
        return observers

    def build_validator(self) -> Validator | None:
        """The validation loop, with a loader of its own."""
        config = self.config.validator
        if config is None:
            return None
        loader = self.build_loader(config.dataloader)
        validator: Validator = config.build(
            loader=loader, parallel=self.parallel, loss=self.loss, is_stopped=self.is_stopped
        )
        return validator


def model_on_meta(config: Trainer.Config) -> tuple[Any, list[Converter]]:
    """The model of a run without memory, converted, and its converters.

    Raises ConfigError where rows are longer than what a model that has a `max_seq_len` is meant for.
    """
    longest = getattr(config.model, "max_seq_len", None)
    if longest is not None and config.training.seq_len > longest:
        raise ConfigError(
            f"Got rows of {config.training.seq_len} tokens for a model that is meant for {longest}. Its positions end "
            f"there. Set --training.seq_len to {longest} or less, or --model.max_seq_len to what it should be."
        )
    with torch.device("meta"):
        model = config.model.build()
    for parameter in model.parameters():
        if parameter.is_floating_point():  # buffers, such as rotary frequencies, keep the dtype that the model chose
            parameter.data = parameter.data.to(getattr(torch, config.training.dtype))
    converters: list[Converter] = [converter.build() for converter in config.model_converters]
    for converter in converters:
        converter.convert(model)
    return model, converters


def build_tokenizer(config: Trainer.Config) -> Any:
    """The tokenizer of a run, if it has one. Raises FileNotFoundError, naming the flag, where its file is not there."""
    if config.tokenizer is None:
        return None
    try:
        return config.tokenizer.build()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} Set --tokenizer.path; `titan-models download` brings the tokenizers of public models."
        ) from error


def num_tokens(batch: Batch) -> int:
    """Rows times sequence length (or rows, for targets without a sequence)."""
    name, target = next(iter(batch.targets.items()))
    return len(target) * (target.size(batch.sequence_dims[name]) if name in batch.sequence_dims else 1)


def is_finite(gradient: Tensor) -> bool:
    """Return whether this rank's part of a gradient is finite."""
    from torch.distributed.tensor import DTensor  # a second of imports, for an error

    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(local.isfinite().all())
