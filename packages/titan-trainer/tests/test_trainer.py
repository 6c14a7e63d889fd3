"""The training loop through its public API, with toy classes. Ranks are forked once per test and train whole runs."""

import gzip
import json
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from titan_config import ConfigError, Configurable
from titan_parallel import ParallelDims, RoleTable
from titan_trainer import (
    CrossEntropy,
    Metrics,
    NonFiniteError,
    Profiler,
    SingleReplica,
    TensorBoard,
    Trainer,
    Training,
    Validator,
    WarmupStableDecay,
)
from torch import nn
from torch.distributed.tensor import DTensor


def losses(folder) -> list[float]:
    return [record["loss"] for record in records(folder)]


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reference_losses(toy, steps: int, dtype=torch.float32, shift: int = 0) -> list[float]:
    """Return the losses of the same run in plain PyTorch: the global batch at once, torch's optimizer and clipping.

    The first `shift` samples of a batch are moved to its end, so that sums over samples add in another order.
    """
    model = toy.Model.Config().build()
    model.init_weights(0)
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in range(steps):
        samples = torch.arange(step * 8, step * 8 + 8)
        text = (samples[:, None] + torch.arange(13)) % 16
        labels = text[:, 1:].clone()
        for i, sample in enumerate(samples):
            labels[i, : sample % 3] = -100
        text, labels = text.roll(-shift, 0), labels.roll(-shift, 0)
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = (step + 1) / 2 if step < 2 else 1 - (step - 2) / 18
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def relative_error(actual: list[float], toy) -> float:
    """Return the largest error of ten losses, relative to ten times the fp32 rounding error of the reference."""
    exact = reference_losses(toy, 10, torch.float64)

    def error(losses: list[float]) -> float:
        return max(abs(loss - expected) for loss, expected in zip(losses, exact, strict=True))

    rounding = max(error(reference_losses(toy, 10, shift=shift)) for shift in (0, 1, 4))
    return error(actual) / (10 * max(rounding, max(exact) * torch.finfo(torch.float32).eps))


def train(config: Trainer.Config) -> None:
    config.build().train()


def test_one_rank_with_gradient_accumulation_matches_plain_pytorch(run_ranks, toy_config, toy):
    config = toy_config()
    run_ranks(1, train, config)
    assert relative_error(losses(config.dump_folder), toy) <= 1


@pytest.mark.parametrize(
    "parallelism",
    [{}, {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}],
    ids=["fsdp", "ddp"],
)
def test_two_ranks_match_plain_pytorch(run_ranks, toy_config, parallelism, toy):
    config = toy_config(parallelism=ParallelDims.Config(**parallelism))
    run_ranks(2, train, config)
    assert relative_error(losses(config.dump_folder), toy) <= 1


def test_a_local_target_count_in_place_of_the_global_one_is_detected(run_ranks, toy_config, monkeypatch, toy):
    """Break the global count on purpose: each rank normalizes by the number of its own targets."""
    sum_over_data_ranks = Trainer.sum_over_data_ranks

    def with_local_count(self, batches):
        count = int(sum(self.loss.count(batch.targets) for batch in batches))
        return count, *sum_over_data_ranks(self, batches)[1:]

    monkeypatch.setattr(Trainer, "sum_over_data_ranks", with_local_count)
    config = toy_config()
    run_ranks(2, train, config)
    assert relative_error(losses(config.dump_folder), toy) > 10


def test_metrics_have_one_record_per_step(run_ranks, toy_config, capfd):
    config = toy_config()
    run_ranks(1, train, config)
    metrics = records(config.dump_folder)
    assert [record["step"] for record in metrics] == list(range(1, 11))
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds", "memory_gib"}
    assert all(set(record) == keys for record in metrics)  # no mfu: the peak of a CPU is unknown
    assert all(record["tokens"] == 8 * 12 for record in metrics)
    assert all(record["tokens_per_second"] == pytest.approx(96 / record["seconds"]) for record in metrics)
    assert [record["lr"] for record in metrics[:3]] == pytest.approx([1.5e-2, 3e-2, 3e-2])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 3  # the first step, then every fifth
    assert all(word in lines[-1] for word in ("loss", "grad norm", "lr", "tokens/s", "GiB", "left"))


def test_a_run_resumed_twice_is_bitwise_equal_to_one_without_interruption(run_ranks, toy_config, tmp_path, toy):
    def train_both():
        for folder, stops in (("uninterrupted", [20]), ("resumed", [7, 13, 20])):
            for steps in stops:
                config = toy_config(dump_folder=tmp_path / folder, checkpoint=toy.Checkpointer.Config())
                config.training.steps = steps
                train(config)

    run_ranks(1, train_both)
    uninterrupted, resumed = losses(tmp_path / "uninterrupted"), losses(tmp_path / "resumed")
    assert uninterrupted == resumed
    assert len(uninterrupted) == 20


def test_records_after_the_loaded_checkpoint_are_replaced_on_resume(run_ranks, toy_config, toy):
    def interrupted():
        config = toy_config(checkpoint=toy.Checkpointer.Config(interval=5))
        trainer = config.build()
        trainer.after_step = stop_after(trainer, 8)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        train(config)

    run_ranks(1, interrupted)
    config = toy_config()
    assert [record["step"] for record in records(config.dump_folder)] == list(range(1, 11))


def stop_after(trainer: Trainer, step: int):
    original = trainer.after_step

    def after_step(result):
        original(result)
        if trainer.step == step:
            raise KeyboardInterrupt

    return after_step


def test_sigterm_finishes_the_step_saves_and_returns(run_ranks, toy_config, toy):
    def terminated():
        config = toy_config(checkpoint=toy.Checkpointer.Config(interval=100))
        trainer = config.build()
        original = trainer.after_step

        def after_step(result):
            original(result)
            if trainer.step == 3 and os.environ["RANK"] == "1":  # only one rank receives the signal
                os.kill(os.getpid(), signal.SIGTERM)

        trainer.after_step = after_step
        trainer.train()
        return trainer.step, toy.Checkpointer.saved[str(config.dump_folder)][0], trainer.loader.cursor

    assert run_ranks(2, terminated) == [(3, 3, 24), (3, 3, 24)]


class NanOnLastRankLoss(CrossEntropy):
    """Cross-entropy that is nan on the last rank."""

    def __call__(self, head, hidden, targets):
        total, count = super().__call__(head, hidden, targets)
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        return total * (math.nan if is_last else 1.0), count


def test_a_non_finite_loss_stops_all_ranks_before_the_weights_are_updated(run_ranks, toy_config):
    def train_with_nan():
        trainer = toy_config(loss=NanOnLastRankLoss.Config()).build()
        before = [p.detach().to_local().clone() for p in trainer.model.parameters()]
        with pytest.raises(NonFiniteError) as report:
            trainer.train()
        after = [p.detach().to_local() for p in trainer.model.parameters()]
        return str(report.value), all(map(torch.equal, before, after)), trainer.step

    for message, weights_are_equal, step in run_ranks(2, train_with_nan):
        assert "must be finite, got loss nan" in message
        assert "in step 1" in message
        assert (weights_are_equal, step) == (True, 0)


class FailsOnce(SingleReplica):
    """A replica group whose third step does not commit."""

    def __init__(self, config: SingleReplica.Config) -> None:
        super().__init__(config)
        self.calls = 0

    def commit(self) -> bool:
        self.calls += 1
        return self.calls != 3


def test_a_step_that_is_not_committed_is_repeated_with_the_same_samples(run_ranks, toy_config, toy):
    def train_with_a_failure():
        trainer = toy_config(replica_group=FailsOnce.Config()).build()
        trainer.train()
        return trainer.loader.samples_read

    (samples,) = run_ranks(1, train_with_a_failure)
    assert samples[16:24] == samples[24:32]
    assert relative_error(losses(toy_config().dump_folder), toy) <= 1


def test_validation_loss_is_the_mean_over_the_same_samples_each_time(run_ranks, toy_config, toy):
    def validate():
        config = toy_config(validator=Validator.Config(dataloader=toy.Loader.Config(num_samples=20), interval=4))
        trainer = config.build()
        trainer.train()
        model = toy.Model.Config().build()
        model.load_state_dict({name: p.full_tensor() for name, p in trainer.model.named_parameters()})
        total, count = 0.0, 0
        for sample in range(16):  # two whole global batches; the last four samples do not fill a third
            text = (sample + torch.arange(13)) % 16
            labels = text[1:].clone()
            labels[: sample % 3] = -100
            total += float(F.cross_entropy(model(text[None, :-1])[0], labels, reduction="sum"))
            count += int((labels != -100).sum())
        return total / count

    expected = run_ranks(2, validate)[0]
    actual = [
        (record["step"], record["validation_loss"])
        for record in records(toy_config().dump_folder)
        if "validation_loss" in record
    ]
    assert [step for step, _ in actual] == [4, 8, 10]
    assert [record["step"] for record in records(toy_config().dump_folder)] == list(range(1, 11))
    # after ten steps in fp32; one step more or less changes the loss by 1e-2
    assert actual[-1][1] == pytest.approx(expected, rel=1e-4)


def test_the_run_ends_when_the_data_ends(run_ranks, toy_config, toy):
    config = toy_config(dataloader=toy.Loader.Config(num_samples=30))
    run_ranks(2, train, config)
    assert len(losses(config.dump_folder)) == 3


class ScaledEmbedding(Configurable):
    """A converter that changes the embedding before the model is parallelized, and counts the steps."""

    class Config(Configurable.Config): ...

    def __init__(self, config: Config) -> None:
        self.steps = 0

    def convert(self, model: nn.Module, roles: RoleTable) -> RoleTable:
        assert model.embedding.weight.is_meta
        model.embedding.scale_grad_by_freq = True
        return roles

    def after_step(self, model: nn.Module) -> None:
        self.steps += 1


def test_converters_run_before_parallelize_and_after_each_step(run_ranks, toy_config):
    def train_converted():
        trainer = toy_config(model_converters=[ScaledEmbedding.Config()]).build()
        trainer.train()
        return trainer.model.embedding.scale_grad_by_freq, trainer.converters[0].steps

    assert run_ranks(1, train_converted) == [(True, 10)]


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class FreezingTrainer(Trainer):
    """A trainer with an additional field and an overridden method."""

    class Config(Trainer.Config):
        freeze_embedding: bool = False

    def build_optimizer(self) -> None:
        self.model.embedding.requires_grad_(not self.config.freeze_embedding)
        super().build_optimizer()


def test_a_subclass_adds_a_field_and_overrides_a_method_on_any_mesh(run_ranks, toy_config, toy):
    def train_frozen(folder: str):
        values = {name: value for name, value in vars(toy_config()).items() if not name.startswith("_")}
        values["dump_folder"] = toy_config().dump_folder / folder
        trainer = FreezingTrainer.Config(**values, freeze_embedding=True).build()
        trainer.train()
        return {name: full_tensor(p.detach()) for name, p in trainer.model.named_parameters()}

    initial = toy.Model.Config().build()
    initial.init_weights(0)
    (one_rank,) = run_ranks(1, train_frozen, "one_rank")
    for weights in run_ranks(2, train_frozen, "two_ranks"):
        assert torch.equal(weights["embedding.weight"], initial.embedding.weight)
        assert not torch.equal(weights["head.weight"], initial.head.weight)
        # AdamW scales rounding errors of gradients up to a fraction of its learning rate, 3e-2
        torch.testing.assert_close(weights, one_rank, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "training.steps must be at least 1, got -1"),
        ({"global_batch_size": 0}, "training.global_batch_size must be at least 1, got 0"),
        ({"global_batch_size": 7}, r"must be a multiple of training\.local_batch_size \(2\), got 7"),
        ({"max_norm": 0.0}, r"training.max_norm must be > 0, .*got 0\.0"),
        ({"max_norm": math.nan}, "training.max_norm must be > 0, .*got nan"),
    ],
)
def test_invalid_training_settings_are_rejected(toy_config, changes, message):
    config = toy_config()
    with pytest.raises(ConfigError, match=message):
        for name, value in changes.items():
            setattr(config.training, name, value)
        config.build()


def test_a_dump_folder_that_is_a_file_is_rejected(run_ranks, toy_config, tmp_path):
    (tmp_path / "file").write_text("mine")

    def build():
        with pytest.raises(ConfigError, match=r"dump_folder must be a writable folder, got .*file \("):
            toy_config(dump_folder=tmp_path / "file").build().train()

    run_ranks(1, build)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_tokenizer_with_more_ids_than_the_model_is_rejected(run_ranks, toy_config):
    class WideTokenizer(Configurable):
        class Config(Configurable.Config):
            vocab_size: int = 17

        def __init__(self, config: Config) -> None:
            self.vocab_size = config.vocab_size

    def build():
        with pytest.raises(ConfigError, match=r"at least that of the tokenizer \(17\), got 16\."):
            toy_config(tokenizer=WideTokenizer.Config()).build()

    run_ranks(1, build)


def test_a_seq_len_above_max_seq_len_of_the_model_is_rejected(run_ranks, toy_config):
    class Short(type(toy_config().model)._owner):
        class Config(type(toy_config().model)):
            max_seq_len: int

    def build():
        config = toy_config()
        config.model = Short.Config(max_seq_len=config.training.seq_len - 1)
        with pytest.raises(ConfigError, match=r"seq_len must be at most model\.max_seq_len \(11\), got 12\."):
            config.build()

    run_ranks(1, build)


def test_an_indivisible_global_batch_is_rejected_with_a_local_batch_size_that_fits():
    training = Training(global_batch_size=16, local_batch_size=8, seq_len=32, steps=1)
    message = r"must be a multiple of 32 \(.*\), got 16\. .* or set --training\.local_batch_size to 4\."
    with pytest.raises(ConfigError, match=message):
        training.num_batches(dp_size=4)
    with pytest.raises(ConfigError, match=r"must be a multiple of 24 \(.*\), got 16\.$"):
        training.num_batches(dp_size=3)


def test_the_error_for_a_missing_tokenizer_file_names_the_flag(run_ranks, toy_config):
    class MissingTokenizer(Configurable):
        class Config(Configurable.Config):
            pass

        def __init__(self, config: Config) -> None:
            raise FileNotFoundError("tokenizer.model does not exist.")

    def build():
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.model does not exist\. Set --tokenizer\.path"):
            toy_config(tokenizer=MissingTokenizer.Config()).build()

    run_ranks(1, build)


def test_the_schedule_keeps_its_total_steps_with_other_training_steps(toy_config):
    assert toy_config().lr_scheduler == WarmupStableDecay.Config(warmup_steps=2, total_steps=20)
    assert math.isclose(toy_config().lr_scheduler.build(training_steps=7).factor(11), 0.5)


def test_the_profiler_writes_traces_of_the_configured_steps(run_ranks, toy_config):
    profiling = Profiler.Config(profile_freq=4, profiler_warmup=1, profiler_active=2)
    config = toy_config(profiling=profiling)
    run_ranks(2, train, config)
    traces = sorted(path.relative_to(config.dump_folder) for path in config.dump_folder.rglob("*.json.gz"))
    assert [str(path) for path in traces] == [
        f"profile_traces/step-{step}/rank{rank}.json.gz" for step in (4, 8) for rank in (0, 1)
    ]
    events = json.loads(gzip.decompress((config.dump_folder / traces[0]).read_bytes()))["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events) == 2


def test_tensorboard_has_the_loss_of_every_step(run_ranks, toy_config):
    config = toy_config(metrics=Metrics.Config(sinks=[TensorBoard.Config()]))
    run_ranks(1, train, config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.dump_folder / "tb")).Reload()
    written = [event.value for event in events.Scalars("loss")]
    assert written == pytest.approx(losses(config.dump_folder), rel=1e-6)


def test_training_dtype_applies_to_parameters_only_and_keeps_tied_weights_tied(run_ranks, toy, toy_config):
    class Tied(toy.Model):
        def __init__(self, config):
            super().__init__(config)
            self.head.weight = self.embedding.weight
            self.register_buffer("inv_freq", torch.linspace(0, 1, 4), persistent=False)
            self.register_buffer("scale", torch.ones(2))

    def build():
        config = toy_config(model=Tied.Config())
        config.training.dtype = "bfloat16"
        model = Trainer(config).model
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: tensor.dtype for name, tensor in tensors.items()}, model.head.weight is model.embedding.weight

    parameters = dict.fromkeys(("embedding.weight", "layers.0.weight", "layers.0.bias"), torch.bfloat16)
    for num_ranks in (1, 2):
        for dtypes, is_tied in run_ranks(num_ranks, build):
            assert dtypes == parameters | {"inv_freq": torch.float32, "scale": torch.float32}
            assert is_tied
