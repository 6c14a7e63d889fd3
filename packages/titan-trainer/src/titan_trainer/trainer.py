"""The training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from titan_config import ConfigError, Configurable, save, to_dict
from titan_parallel import (
    ActivationCheckpoint,
    Compile,
    ParallelDims,
    ParallelModel,
    RoleTable,
    init_distributed,
    parallelize,
    set_collective_timeout,
    set_determinism,
)
from torch import Tensor, nn

from titan_trainer.callbacks import Callback, CallbackStates
from titan_trainer.device import peak_flops, peak_memory_gib
from titan_trainer.errors import NonFiniteError
from titan_trainer.garbage import GarbageCollection
from titan_trainer.loss import CrossEntropy
from titan_trainer.metrics import Metrics
from titan_trainer.model_state import ModelState
from titan_trainer.notices import describe_changes, find_16_bit_parameters, rounding_warning, zero_lr_warning
from titan_trainer.optimizer import AdamW, Optimizer
from titan_trainer.profiling import Profiler
from titan_trainer.protocols import Batch, Checkpointer, Converter, Loader, Loss, ModelConfig, State, Stateful
from titan_trainer.replica_group import SingleReplica
from titan_trainer.schedule import Schedule, WarmupStableDecay
from titan_trainer.scheduled import ScheduledNumber
from titan_trainer.settings import Comm, Debug, Training
from titan_trainer.stop import StopRequest
from titan_trainer.validation import Validator

log = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """Results of a committed step: mean loss, gradient norm before clipping, learning rate, tokens of all replicas.

    `measured` has the metrics of model layers, such as `expert_load`.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    num_replicas: int
    measured: dict[str, float]


class Trainer(Configurable):
    """The training loop. A subclass may override each stage (method) and add fields to the Config.

    Two flags do not train: --plan --world-size N (dry run: memory, FLOPs, communication on N ranks) and --generate TEXT
    (continue TEXT with the model of the newest checkpoint in dump_folder).
    """

    class Config(Configurable.Config):
        model: Configurable.Config
        dataloader: Configurable.Config
        training: Training
        tokenizer: Configurable.Config | None = None
        loss: Configurable.Config = CrossEntropy.Config()
        optimizer: Optimizer.Config = AdamW.Config()
        lr_scheduler: Schedule.Config = WarmupStableDecay.Config()
        scheduled: list[ScheduledNumber.Config] = []
        """Other numbers that change during the run, such as loss weights."""
        parallelism: ParallelDims.Config = ParallelDims.Config()
        activation_checkpoint: ActivationCheckpoint.Config | None = None
        compile: Compile.Config | None = None
        model_converters: list[Configurable.Config] = []
        transforms: list[Configurable.Config] = []
        """Third-party transforms of the model, applied before data parallelism: see titan_parallel.Transform."""
        checkpoint: Configurable.Config | None = None
        validator: Validator.Config | None = None
        metrics: Metrics.Config = Metrics.Config()
        callbacks: list[Callback.Config] = []
        """Custom callbacks, such as metric loggers or an average of the weights; called in this order."""
        profiling: Profiler.Config | None = None
        comm: Comm = Comm()
        debug: Debug = Debug()
        replica_group: Configurable.Config = SingleReplica.Config()
        dump_folder: Path = Path("outputs")
        """Folder for all files of a run. A run with the folder of an earlier one resumes from its newest checkpoint."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model_config: ModelConfig = config.model  # type: ignore[assignment]  # a recipe sets one
        self.step = 0
        self.stop_request = StopRequest()
        self.data_ended = False
        self.build_mesh()
        self.build_data()
        self.build_model()
        self.build_optimizer()
        self.build_checkpointer()

    # Build: mesh, data, model, optimizer, checkpointer

    def build_mesh(self) -> None:
        """Initialize torch.distributed, the device mesh, the replica group and the random number generators."""
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
        np.random.seed(config.debug.seed % 2**32)  # for custom data and losses; NumPy takes 32-bit seeds

    def build_data(self) -> None:
        """Build the tokenizer and the data loader."""
        config = self.config
        self.tokenizer = build_tokenizer(config)
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.model_config.vocab_size:
            raise ConfigError(
                f"model.vocab_size must be at least that of the tokenizer ({self.tokenizer.vocab_size}), got "
                f"{self.model_config.vocab_size}. Raise --model.vocab_size, or use the tokenizer of the model."
            )
        config.training.num_batches(self.dims.dp_size)
        self.loader = self.build_loader(config.dataloader)

    def build_loader(self, config: Configurable.Config) -> Loader:
        """Build a loader with the batch sizes, sequence length and seed of the run, for training or validation."""
        training = self.config.training
        return config.build(
            tokenizer=self.tokenizer,
            seq_len=training.seq_len,
            global_batch_size=training.global_batch_size,
            local_batch_size=training.local_batch_size,
            seed=self.config.debug.seed,
        )

    def build_model(self) -> None:
        """Build the model on the meta device, convert and parallelize it, then initialize each rank's shards."""
        config = self.config
        model, roles, self.converters = model_on_meta(config)
        self.loss: Loss = config.loss.build()
        self.parallel: ParallelModel = parallelize(
            model,
            roles,
            self.dims,
            activation_checkpoint=config.activation_checkpoint,
            compile=config.compile,
            mixed_precision=config.training.mixed_precision(),
            extra_transforms=[transform.build() for transform in config.transforms],
        )
        self.parallel.to_empty(self.device)
        model.init_weights(seed=config.debug.seed)
        self.model: nn.Module = model
        self.parallel.set_gradient_hook(self.replica_group.reduce_)

    def build_optimizer(self) -> None:
        """Build the optimizer, the learning rate schedule and the other scheduled numbers."""
        config = self.config
        self.optimizer: Optimizer = config.optimizer.build(
            parameters=self.model.named_parameters(), nonlocal_parameters=self.parallel.nonlocal_parameters
        )
        self.schedule: Schedule = config.lr_scheduler.build(training_steps=config.training.steps)
        numbers: list[ScheduledNumber] = [each.build() for each in config.scheduled]
        self.scheduled = [(number, number.owners(self)) for number in numbers]
        dtypes = find_16_bit_parameters(self.optimizer.parameters)
        if self.agree(bool(dtypes)) and self.is_first_rank:
            log.warning(rounding_warning(dtypes))

    def build_checkpointer(self) -> None:
        """Name the parts of the run's state, and build the checkpointer that saves and loads them."""
        config = self.config
        self.parts: dict[str, Stateful] = {
            "model": ModelState(self.model),
            "optimizer": self.optimizer,
            "dataloader": self.loader,
            "trainer": self,
        }
        self.build_callbacks()
        self.checkpointer: Checkpointer | None = None
        if config.checkpoint is not None:
            self.checkpointer = config.checkpoint.build(dump_folder=config.dump_folder, config=config)

    def build_callbacks(self) -> None:
        """Build the custom callbacks; the state of those that have some is a part of checkpoints."""
        self.callbacks: list[Callback] = [callback.build() for callback in self.config.callbacks]
        for callback in self.callbacks:
            callback.setup(self)
        if states := CallbackStates(self.callbacks):
            self.parts["callbacks"] = states

    # Train

    def train(self) -> None:
        """Train from the newest checkpoint to `training.steps`, or until SIGTERM or SIGINT; save the last step."""
        self.validator = self.build_validator()
        with self.stop_request, ExitStack() as stack:
            stack.callback(self.replica_group.close)
            self.resume()
            warning = zero_lr_warning(self.schedule, self.step, self.config.training.steps)
            if warning and self.config.optimizer.lr and self.is_first_rank:
                log.warning(warning)
            identity = self.replica_identity()
            self.replica_group.register_state(self.healing_state, self.heal, step=self.step, identity=identity)
            self.metrics = stack.enter_context(closing(self.build_metrics()))
            observers = self.build_observers()
            for callback in (*observers, *self.callbacks):
                stack.enter_context(callback)
            for callback in self.callbacks:
                callback.on_train_begin(self)
            while self.has_next_step() and not self.is_stopped():
                result = self.train_step()
                if result is not None:
                    self.after_step(result)
                    for observer in observers:
                        observer.on_step_end(self, {"step": self.step})
            self.finish()

    def has_next_step(self) -> bool:
        """Return whether there are more steps to train and data for them."""
        return self.step < self.config.training.steps and not self.data_ended

    def train_step(self) -> StepResult | None:
        """Run one optimizer step of all replicas: load batches, forward and backward, clip, commit, update.

        Return None, with weights and data position unchanged, if the data has ended or the step was not committed.
        """
        replica, num_replicas = self.replica_group.begin_step()
        for callback in self.callbacks:
            callback.on_step_begin(self)
        for number, owners in self.scheduled:
            number.apply(owners, self.step)
        dp_size = self.dims.dp_size
        batches = self.loader.next_batches(replica * dp_size + self.dims.dp_rank, num_replicas * dp_size)
        if not batches:
            log.warning("The data ended after step %d.", self.step)
            self.data_ended = True
            return None
        count, tokens, cursor_delta = self.sum_over_data_ranks(batches)

        loss_sum = self.parallel.forward_backward(batches, self.loss, denominator=count)
        self.replica_group.reduce_(loss_sum)
        loss = float(loss_sum) / count
        for callback in self.callbacks:
            callback.on_gradients_ready(self)
        grad_norm = float(self.parallel.clip_grad_norm_(self.config.training.max_norm))

        if not self.replica_group.commit():
            self.loader.rollback()
            self.optimizer.zero_grad()
            log.warning("Step %d was not committed; it is repeated with the same samples.", self.step + 1)
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
        """Return the valid targets (at least 1), tokens and cursor delta of a step, summed over ranks and replicas."""
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
        """Raise NonFiniteError, on every rank, unless loss and gradient norm are finite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        names = [name for name, p in self.model.named_parameters() if p.grad is not None and not is_finite(p.grad)]
        samples = list(dict.fromkeys(sample for batch in batches for row in batch.sample_ids for sample in row))
        error = NonFiniteError(
            f"Loss and gradient norm must be finite, got loss {loss} and gradient norm {grad_norm} in step "
            f"{self.step + 1}, and non-finite gradients in {len(names)} parameters"
            f"{f' (first {names[0]})' if names else ''}. The weights were not updated. Inspect the samples in each "
            f"rank's report ({len(samples)} samples here, first {', '.join(map(str, samples[:8]))}), or resume from "
            "the last checkpoint with a lower --optimizer.lr."
        )
        error.add_note(f"This rank's samples: {samples}")
        raise error

    def after_step(self, result: StepResult) -> None:
        """Validate if due, record the metrics, and save a checkpoint if due."""
        config, last = self.config, self.step == self.config.training.steps
        self.metrics.stop_clock()
        validation_loss = None
        if self.step == self.first_step + 1:
            set_collective_timeout(self.dims, config.comm.train_timeout_seconds)
        if self.validator is not None and self.validator.is_due(self.step, last):
            set_collective_timeout(self.dims, config.comm.init_timeout_seconds)  # validation may compile, or open data
            validation_loss = self.validator.validate()
            set_collective_timeout(self.dims, config.comm.train_timeout_seconds)
        record = self.metrics.record_step(
            self.step,
            memory_gib=peak_memory_gib(self.device),
            validation_loss=validation_loss,
            **result._asdict(),
        )
        for callback in self.callbacks:
            if validation_loss is not None:
                callback.on_validation_end(self, validation_loss)
            callback.on_step_end(self, record)
        if self.checkpointer is not None:
            self.save(last=False)

    def save(self, last: bool | Literal["stopped"]) -> None:
        """Save a checkpoint if the step is due or the `last` of the run, and tell callbacks."""
        assert self.checkpointer is not None
        if self.checkpointer.save(self.step, self.parts, last=last):
            for callback in self.callbacks:
                callback.on_save(self, self.step)

    def agree(self, condition: bool) -> bool:
        """Return whether `condition` holds on any rank of this replica."""
        if dist.get_world_size() == 1:
            return condition
        flag = torch.tensor(int(condition), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def is_stopped(self) -> bool:
        """Return whether any rank of this replica has received a signal to stop."""
        return self.agree(self.stop_request.received)

    def finish(self) -> None:
        """Save the last step, wait for pending writes, and print a line if a signal stopped the run."""
        if self.checkpointer is not None:
            self.save(last="stopped" if self.has_next_step() else True)
            self.checkpointer.close()
        if self.stop_request.received and self.has_next_step() and self.is_first_rank:
            saved = "No checkpoint was saved" if self.checkpointer is None else "Run the same command again to resume"
            print(f"Stopped by a signal after step {self.step} of {self.config.training.steps}. {saved}.", flush=True)

    # State: resume, and heal replicas

    def resume(self) -> None:
        """Load the newest complete checkpoint, if there is one, and print which settings have changed since."""
        config_file = self.config.dump_folder / "config.json"
        loaded_step = self.checkpointer.load(self.parts) if self.checkpointer is not None else None
        self.first_step = self.step
        if self.is_first_rank:
            if loaded_step is not None:
                print(f"resuming after step {self.step} of {self.config.dump_folder}", flush=True)
                if not self.has_next_step():
                    print(f"no steps left: training.steps is {self.config.training.steps}", flush=True)
                if config_file.exists():
                    changes = describe_changes(config_file, self.config, self.schedule)
                    print(changes, end="", flush=True)
            try:
                self.config.dump_folder.mkdir(parents=True, exist_ok=True)
                save(self.config, config_file)
            except OSError as error:
                raise ConfigError(
                    f"dump_folder must be a writable folder, got {self.config.dump_folder} ({error})."
                ) from error

    def state_dict(self) -> State:
        """Return the part "trainer" of a checkpoint: the number of steps done."""
        return {"step": self.step}

    def load_state_dict(self, state: State) -> None:
        """Restore the number of steps done."""
        self.step = state["step"]

    def healing_state(self) -> State:
        """Return the state that heals a joining replica."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def replica_identity(self) -> State:
        """Return the settings, and the identity of the data, that must be equal on all replicas of a group."""
        config = to_dict(self.config)
        names = (
            "model",
            "training",
            "loss",
            "optimizer",
            "lr_scheduler",
            "parallelism",
            "model_converters",
            "transforms",
        )
        data = self.loader.state_dict().get("identity")
        return {name: config[name] for name in names if name in config} | {"data": data, "parts": sorted(self.parts)}

    def heal(self, state: State) -> None:
        """Load the `healing_state` of a live replica."""
        for name, part_state in state.items():
            self.parts[name].load_state_dict(part_state)
        self.first_step = self.step
        log.warning("Healed from a live replica; continuing with step %d.", self.step + 1)

    # Observe: metrics, profiling, validation

    def build_metrics(self) -> Metrics:
        """Build the metrics of the run, which the first rank writes."""
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

    def build_observers(self) -> list[Callback]:
        """Build the callbacks of the Trainer itself: garbage collection and the profiler."""
        observers: list[Callback] = [GarbageCollection.Config(freq=self.config.training.gc_freq).build()]
        if self.config.profiling is not None:
            build = self.config.profiling.build
            observers.append(build(dump_folder=self.config.dump_folder, device=self.device, first_step=self.step))
        return observers

    def build_validator(self) -> Validator | None:
        """Build the validation loop and its data loader, if the config has a validator."""
        config = self.config.validator
        if config is None:
            return None
        loader = self.build_loader(config.dataloader)
        validator: Validator = config.build(
            loader=loader, parallel=self.parallel, loss=self.loss, is_stopped=self.is_stopped
        )
        return validator


def model_on_meta(config: Trainer.Config) -> tuple[Any, RoleTable, list[Converter]]:
    """Return the model of a run on the meta device, after the converters, its roles, and the converters.

    Raises ConfigError if sequences are longer than the `max_seq_len` of the model's config, if there is one.
    """
    longest = getattr(config.model, "max_seq_len", None)
    if longest is not None and config.training.seq_len > longest:
        raise ConfigError(
            f"training.seq_len must be at most model.max_seq_len ({longest}), got {config.training.seq_len}. Lower "
            "--training.seq_len, or raise --model.max_seq_len if the model supports longer sequences."
        )
    converters: list[Converter] = [converter.build() for converter in config.model_converters]
    with torch.device("meta"):
        model = config.model.build()
        for parameter in model.parameters():
            if parameter.is_floating_point():  # buffers, such as RoPE frequencies, keep their dtype
                parameter.data = parameter.data.to(getattr(torch, config.training.dtype))
        roles = model.roles()
        for converter in converters:
            roles = converter.convert(model, roles)
    return model, roles, converters


def build_tokenizer(config: Trainer.Config) -> Any:
    """Return the tokenizer of a run, or None. Raises FileNotFoundError, naming the flag, if its file is missing."""
    if config.tokenizer is None:
        return None
    try:
        return config.tokenizer.build()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} Set --tokenizer.path; `titan-models download` downloads the tokenizers of public models."
        ) from error


def num_tokens(batch: Batch) -> int:
    """Return the number of tokens of a batch; for targets without a sequence dim, the number of samples."""
    name, target = next(iter(batch.targets.items()))
    return len(target) * (target.size(batch.sequence_dims[name]) if name in batch.sequence_dims else 1)


def is_finite(gradient: Tensor) -> bool:
    """Return whether this rank's shard of a gradient is finite."""
    from torch.distributed.tensor import DTensor  # takes a second to import, and only this error needs it

    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(local.isfinite().all())
