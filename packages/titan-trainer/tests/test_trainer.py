"""The loop through its public face, on toy parts. Ranks are forked once per test and run whole trainings."""

import gzip
import json
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from titan_config import ConfigError, Configurable
from titan_parallel import ParallelDims
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


def flat_loop(toy, steps: int, dtype=torch.float32, turned: int = 0) -> list[float]:
    """The same run with nothing of Titan's: whole batch at once, torch's own optimizer and clipping.

    `turned` rows stand last instead of first, so that sums over rows add in another order.
    """
    model = toy.Model.Config().build()
    model.init_weights(0)
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, betas=(0.9, 0.95), weight_decay=0.1)
    found = []
    for step in range(steps):
        rows = torch.arange(step * 8, step * 8 + 8)
        text = (rows[:, None] + torch.arange(13)) % 16
        labels = text[:, 1:].clone()
        for i, row in enumerate(rows):
            labels[i, : row % 3] = -100
        text, labels = text.roll(-turned, 0), labels.roll(-turned, 0)
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = (step + 1) / 2 if step < 2 else 1 - (step - 2) / 18
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * factor
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def misses(found: list[float], toy) -> float:
    """The largest error of the losses of ten steps, in units of ten times the rounding of the flat loop in fp32."""
    exact = flat_loop(toy, 10, torch.float64)

    def error(losses: list[float]) -> float:
        return max(abs(loss - expected) for loss, expected in zip(losses, exact, strict=True))

    rounding = max(error(flat_loop(toy, 10, turned=turned)) for turned in (0, 1, 4))
    return error(found) / (10 * max(rounding, max(exact) * torch.finfo(torch.float32).eps))


def train(config: Trainer.Config) -> None:
    config.build().train()


def test_one_rank_with_accumulation_is_the_flat_loop(run_ranks, toy_config, toy):
    config = toy_config()
    run_ranks(1, train, config)
    assert misses(losses(config.dump_folder), toy) <= 1


@pytest.mark.parametrize(
    "parallelism",
    [{}, {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}],
    ids=["fsdp", "ddp"],
)
def test_two_ranks_are_the_flat_loop(run_ranks, toy_config, parallelism, toy):
    config = toy_config(parallelism=ParallelDims.Config(**parallelism))
    run_ranks(2, train, config)
    assert misses(losses(config.dump_folder), toy) <= 1


def test_a_rank_that_counts_only_its_own_targets_is_seen(run_ranks, toy_config, monkeypatch, toy):
    """Breaks the global count on purpose: each rank normalizes by what it has."""
    summed = Trainer.sum_over_data_ranks

    def own(self, batches):
        return int(sum(self.loss.count(batch.targets) for batch in batches)), *summed(self, batches)[1:]

    monkeypatch.setattr(Trainer, "sum_over_data_ranks", own)
    config = toy_config()
    run_ranks(2, train, config)
    assert misses(losses(config.dump_folder), toy) > 10


def test_metrics_hold_one_object_a_step(run_ranks, toy_config, capfd):
    config = toy_config()
    run_ranks(1, train, config)
    found = records(config.dump_folder)
    assert [record["step"] for record in found] == list(range(1, 11))
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds", "memory_gib"}
    assert all(set(record) == keys for record in found)  # no mfu: a CPU has no known peak
    assert all(record["tokens"] == 8 * 12 for record in found)
    assert all(record["tokens_per_second"] == pytest.approx(96 / record["seconds"]) for record in found)
    assert [record["lr"] for record in found[:3]] == pytest.approx([1.5e-2, 3e-2, 3e-2])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 3  # the first step, then every fifth
    assert all(word in lines[-1] for word in ("loss", "grad norm", "lr", "tokens/s", "GiB", "left"))


def test_seven_and_six_and_seven_steps_are_twenty_bit_for_bit(run_ranks, toy_config, tmp_path, toy):
    def at_once_and_in_parts():
        for folder, stops in (("whole", [20]), ("parts", [7, 13, 20])):
            for steps in stops:
                config = toy_config(dump_folder=tmp_path / folder, checkpoint=toy.Checkpointer.Config())
                config.training.steps = steps
                train(config)

    run_ranks(1, at_once_and_in_parts)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert whole == parts
    assert len(whole) == 20


def test_records_of_lost_steps_are_dropped_on_resume(run_ranks, toy_config, toy):
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
    whole = trainer.after_step

    def after_step(result):
        whole(result)
        if trainer.step == step:
            raise KeyboardInterrupt

    return after_step


def test_sigterm_finishes_the_step_saves_and_returns(run_ranks, toy_config, toy):
    def terminated():
        config = toy_config(checkpoint=toy.Checkpointer.Config(interval=100))
        trainer = config.build()
        whole = trainer.after_step

        def after_step(result):
            whole(result)
            if trainer.step == 3 and os.environ["RANK"] == "1":  # one rank alone receives it
                os.kill(os.getpid(), signal.SIGTERM)

        trainer.after_step = after_step
        trainer.train()
        return trainer.step, toy.Checkpointer.saved[str(config.dump_folder)][0], trainer.loader.next_row

    assert run_ranks(2, terminated) == [(3, 3, 24), (3, 3, 24)]


class PoisonedLoss(CrossEntropy):
    """Cross-entropy that is not a number on the last rank."""

    def __call__(self, head, hidden, targets):
        total, count = super().__call__(head, hidden, targets)
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        return total * (math.nan if is_last else 1.0), count


def test_a_non_finite_loss_stops_all_ranks_before_the_weights_are_touched(run_ranks, toy_config):
    def poisoned():
        trainer = toy_config(loss=PoisonedLoss.Config()).build()
        before = [p.detach().to_local().clone() for p in trainer.model.parameters()]
        with pytest.raises(NonFiniteError) as report:
            trainer.train()
        after = [p.detach().to_local() for p in trainer.model.parameters()]
        return str(report.value), all(map(torch.equal, before, after)), trainer.step

    for message, untouched, step in run_ranks(2, poisoned):
        assert "loss nan" in message
        assert "in step 1" in message
        assert (untouched, step) == (True, 0)


class FailsOnce(SingleReplica):
    """A replica group whose third step does not commit."""

    def __init__(self, config: SingleReplica.Config) -> None:
        super().__init__(config)
        self.calls = 0

    def commit(self) -> bool:
        self.calls += 1
        return self.calls != 3


def test_a_step_that_is_not_committed_is_done_again_with_the_same_samples(run_ranks, toy_config, toy):
    def train_with_a_failure():
        trainer = toy_config(replica_group=FailsOnce.Config()).build()
        trainer.train()
        return trainer.loader.rows_drawn

    (rows,) = run_ranks(1, train_with_a_failure)
    assert rows[16:24] == rows[24:32]
    assert misses(losses(toy_config().dump_folder), toy) <= 1


def test_validation_gives_the_mean_over_the_same_rows_each_time(run_ranks, toy_config, toy):
    def validate():
        config = toy_config(validator=Validator.Config(dataloader=toy.Loader.Config(num_rows=20), interval=4))
        trainer = config.build()
        trainer.train()
        model = toy.Model.Config().build()
        model.load_state_dict({name: p.full_tensor() for name, p in trainer.model.named_parameters()})
        total, count = 0.0, 0
        for row in range(16):  # two whole global batches; the last four rows fill none
            text = (row + torch.arange(13)) % 16
            labels = text[1:].clone()
            labels[: row % 3] = -100
            total += float(F.cross_entropy(model(text[None, :-1])[0], labels, reduction="sum"))
            count += int((labels != -100).sum())
        return total / count

    expected = run_ranks(2, validate)[0]
    found = [
        (record["step"], record["validation_loss"])
        for record in records(toy_config().dump_folder)
        if "validation_loss" in record
    ]
    assert [step for step, _ in found] == [4, 8, 10]
    assert [record["step"] for record in records(toy_config().dump_folder)] == list(range(1, 11))
    # after ten steps in fp32; a step more or less changes it by 1e-2
    assert found[-1][1] == pytest.approx(expected, rel=1e-4)


def test_data_that_ends_ends_the_run(run_ranks, toy_config, toy):
    config = toy_config(dataloader=toy.Loader.Config(num_rows=30))
    run_ranks(2, train, config)
    assert len(losses(config.dump_folder)) == 3


class ScaledEmbedding(Configurable):
    """A converter that changes the embedding before training and counts the steps."""

    class Config(Configurable.Config): ...

    def __init__(self, config: Config) -> None:
        self.steps = 0

    def convert(self, model: nn.Module) -> None:
        assert model.embedding.weight.is_meta
        model.embedding.scale_grad_by_freq = True

    def after_step(self, model: nn.Module) -> None:
        self.steps += 1


def test_converters_act_before_parallelizing_and_after_each_step(run_ranks, toy_config):
    def train_converted():
        trainer = toy_config(model_converters=[ScaledEmbedding.Config()]).build()
        trainer.train()
        return trainer.model.embedding.scale_grad_by_freq, trainer.converters[0].steps

    assert run_ranks(1, train_converted) == [(True, 10)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class FreezingTrainer(Trainer):
    """An experiment: one more field, one changed chapter."""

    class Config(Trainer.Config):
        freeze_embedding: bool = False

    def build_optimizer(self) -> None:
        self.model.embedding.requires_grad_(not self.config.freeze_embedding)
        super().build_optimizer()


def test_an_experiment_adds_a_field_and_rewrites_a_chapter_on_any_mesh(run_ranks, toy_config, toy):
    def train_frozen(folder: str):
        values = {name: value for name, value in vars(toy_config()).items() if not name.startswith("_")}
        values["dump_folder"] = toy_config().dump_folder / folder
        trainer = FreezingTrainer.Config(**values, freeze_embedding=True).build()
        trainer.train()
        return {name: whole(p.detach()) for name, p in trainer.model.named_parameters()}

    plain = toy.Model.Config().build()
    plain.init_weights(0)
    (alone,) = run_ranks(1, train_frozen, "alone")
    for weights in run_ranks(2, train_frozen, "together"):
        assert torch.equal(weights["embedding.weight"], plain.embedding.weight)
        assert not torch.equal(weights["head.weight"], plain.head.weight)
        # AdamW makes of rounding a part of its rate, 3e-2
        torch.testing.assert_close(weights, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": -1}, "training.steps -1"),
        ({"global_batch_size": 0}, "training.global_batch_size 0"),
        ({"global_batch_size": 7}, "7 rows in micro-batches of 2"),
        ({"max_norm": 0.0}, "max_norm 0.0"),
        ({"max_norm": math.nan}, "max_norm nan"),
    ],
)
def test_training_settings_without_meaning_are_refused(toy_config, changes, words):
    config = toy_config()
    with pytest.raises(ConfigError, match=words):
        for name, value in changes.items():
            setattr(config.training, name, value)
        config.build()


def test_a_dump_folder_that_cannot_be_written_is_refused(run_ranks, toy_config, tmp_path):
    (tmp_path / "file").write_text("mine")

    def build():
        with pytest.raises(ConfigError, match=r"dump_folder .*file, where nothing can be written"):
            toy_config(dump_folder=tmp_path / "file").build().train()

    run_ranks(1, build)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_tokenizer_beyond_the_vocabulary_is_refused(run_ranks, toy_config):
    class WideTokenizer(Configurable):
        class Config(Configurable.Config):
            vocab_size: int = 17

        def __init__(self, config: Config) -> None:
            self.vocab_size = config.vocab_size

    def build():
        with pytest.raises(ConfigError, match="17 tokens for a model of 16"):
            toy_config(tokenizer=WideTokenizer.Config()).build()

    run_ranks(1, build)


def test_rows_longer_than_a_model_is_meant_for_are_refused(run_ranks, toy_config):
    class Short(type(toy_config().model)._owner):
        class Config(type(toy_config().model)):
            max_seq_len: int

    def build():
        config = toy_config()
        config.model = Short.Config(max_seq_len=config.training.seq_len - 1)
        with pytest.raises(ConfigError, match=r"is meant for .*--model\.max_seq_len to what it should be"):
            config.build()

    run_ranks(1, build)


def test_a_batch_that_ranks_cannot_share_offers_both_ways_out():
    training = Training(global_batch_size=16, local_batch_size=8, seq_len=32, steps=1)
    message = r"--training\.global_batch_size to a multiple of 32, or --training\.local_batch_size to 4\."
    with pytest.raises(ConfigError, match=message):
        training.num_batches(dp_size=4)
    with pytest.raises(ConfigError, match=r"a multiple of 24\.$"):
        training.num_batches(dp_size=3)


def test_a_tokenizer_whose_file_is_not_there_names_the_flag(run_ranks, toy_config):
    class Lost(Configurable):
        class Config(Configurable.Config):
            pass

        def __init__(self, config: Config) -> None:
            raise FileNotFoundError("Got tokenizer.model, which is not there.")

    def build():
        with pytest.raises(FileNotFoundError, match=r"which is not there\. Set --tokenizer\.path"):
            toy_config(tokenizer=Lost.Config()).build()

    run_ranks(1, build)


def test_the_schedule_does_not_stretch_when_a_run_goes_on(toy_config):
    assert toy_config().lr_scheduler == WarmupStableDecay.Config(warmup_steps=2, total_steps=20)
    assert math.isclose(toy_config().lr_scheduler.build(training_steps=7).factor(11), 0.5)


def test_the_profiler_writes_a_trace_of_the_steps_asked_for(run_ranks, toy_config):
    profiling = Profiler.Config(profile_freq=4, profiler_warmup=1, profiler_active=2)
    config = toy_config(profiling=profiling)
    run_ranks(2, train, config)
    traces = sorted(path.relative_to(config.dump_folder) for path in config.dump_folder.rglob("*.json.gz"))
    assert [str(path) for path in traces] == [
        f"profile_traces/step-{step}/rank{rank}.json.gz" for step in (4, 8) for rank in (0, 1)
    ]
    events = json.loads(gzip.decompress((config.dump_folder / traces[0]).read_bytes()))["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events) == 2


def test_tensorboard_gets_every_number(run_ranks, toy_config):
    config = toy_config(metrics=Metrics.Config(sinks=[TensorBoard.Config()]))
    run_ranks(1, train, config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.dump_folder / "tb")).Reload()
    written = [event.value for event in events.Scalars("loss")]
    assert written == pytest.approx(losses(config.dump_folder), rel=1e-6)


def test_stored_dtype_is_that_of_parameters_alone_and_tied_weights_stay_tied(run_ranks, toy, toy_config):
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
    for number in (1, 2):
        for dtypes, is_tied in run_ranks(number, build):
            assert dtypes == parameters | {"inv_freq": torch.float32, "scale": torch.float32}
            assert is_tied
